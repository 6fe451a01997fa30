"""Engines that run a GGUF file, behind one interface, so that benchmarks treat them alike.

Every engine evaluates token ids and gives logits; no text, no sampling: what is timed is the model. Peers are imported
only where they are used; an engine that isn't installed is left out.
"""

import importlib.util
from pathlib import Path

import numpy as np


class Ggpy:
    """ggpy itself."""

    needs = "ggpy"

    def __init__(self, path: str, n_ctx: int, n_threads: int, kv_type: str = "f16"):
        import ggpy

        self._model = ggpy.load(path, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type)
        self._sequence = self._model.new_sequence()

    @property
    def n_vocab(self) -> int:
        return self._model.architecture.n_vocab

    def clear(self) -> None:
        self._sequence.keep(0)

    def extend(self, ids: list[int]) -> np.ndarray:
        """Logits after the last id."""
        return self._sequence.extend(ids)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits after each id, (n, n_vocab)."""
        return self._model.logits(ids)

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text)


class LlamaCpp:
    """llama.cpp through llama-cpp-python: built for this processor when pip installs it."""

    needs = "llama_cpp"

    def __init__(self, path: str, n_ctx: int, n_threads: int):
        api = self._api = self._load()
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise SystemExit(f"{self.needs} can't load {path}")
        context = api.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, 512, 512
        context.n_threads = context.n_threads_batch = n_threads
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            raise SystemExit(f"{self.needs} can't run {path}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab = api.llama_vocab_n_tokens(self._vocab)
        self._n_past = 0

    def _load(self):
        import llama_cpp as api

        self._silence = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._silence, None)
        api.llama_backend_init()
        return api

    def clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._n_past = 0

    def _decode(self, ids: list[int], every: bool) -> None:
        api = self._api
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self._n_past + i, 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        code = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        self._n_past += len(ids)

    def extend(self, ids: list[int]) -> np.ndarray:
        for i in range(0, len(ids), 512):
            self._decode(ids[i : i + 512], False)
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self.n_vocab,))

    def logits(self, ids: list[int]) -> np.ndarray:
        self.clear()
        pieces = []
        for i in range(0, len(ids), 512):
            chunk = ids[i : i + 512]
            self._decode(chunk, True)
            pieces.append(
                np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (len(chunk), self.n_vocab)).copy()
            )
        return np.concatenate(pieces)

    def tokenize(self, text: str) -> list[int]:
        raw, room = text.encode(), (self._api.llama_token * (len(text.encode()) + 8))()
        n = self._api.llama_tokenize(self._vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:n])


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp, llama.cpp's fork for processors, through ik-llama-cpp-python's prebuilt wheel."""

    needs = "ik_llama_cpp"

    def _load(self):
        from ik_llama_cpp import _ctypes_api as api

        api.llama_backend_init()
        return api

    def clear(self) -> None:
        self._api.llama_kv_cache_clear(self._context)
        self._n_past = 0


class Transformers:
    """transformers with PyTorch, which dequantizes the file to float32 when it loads it."""

    needs = "transformers"

    def __init__(self, path: str, n_ctx: int, n_threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_num_threads(n_threads)
        where = Path(path)
        model = AutoModelForCausalLM.from_pretrained(where.parent, gguf_file=where.name, dtype=torch.float32)
        self._model, self.n_vocab = model.eval(), model.config.vocab_size
        self.clear()

    def clear(self) -> None:
        self._cache = None

    def extend(self, ids: list[int]) -> np.ndarray:
        with self._torch.no_grad():
            given = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": 1}
            out = self._model(self._torch.tensor([ids]), **given)
        self._cache = out.past_key_values
        return out.logits[0, -1].numpy()


ENGINES = {
    "ggpy": Ggpy,
    "llama-cpp-python": LlamaCpp,
    "ik-llama-cpp-python": IkLlamaCpp,
    "transformers": Transformers,
}


def available() -> list[str]:
    """The engines that are installed, but for those that are slow or noisy and must be asked for."""
    return [name for name in ("ggpy", "llama-cpp-python") if importlib.util.find_spec(ENGINES[name].needs)]
