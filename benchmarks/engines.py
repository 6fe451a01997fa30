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

    def __init__(self, path: str, n_ctx: int, n_threads: int, n_sequences: int = 1, shared: bool = False):
        import ggpy

        self._model = ggpy.load(path, n_ctx=n_ctx * n_sequences, n_threads=n_threads)
        self._sequence = self._model.new_sequence()

    @property
    def n_vocab(self) -> int:
        return self._model.architecture.n_vocab

    def clear(self) -> None:
        self._sequence.keep(0)

    def extend(self, ids: list[int]) -> np.ndarray:
        """Logits after the last id."""
        return self._sequence.extend(ids)

    def start(self, prompts: list[list[int]]) -> None:
        """Begins sequences, each with its prompt."""
        self._many = [self._model.new_sequence() for _ in prompts]
        for sequence, prompt in zip(self._many, prompts, strict=True):
            sequence.extend(prompt)

    def step(self, tokens: list[int]) -> np.ndarray:
        """The next token of each sequence in one run; the logits of the last one."""
        return self._many[0].extend_together(self._many, [[t] for t in tokens])[-1]

    def converse(self, system: list[int], questions: list[list[int]], n: int) -> list[list[int]]:
        """Answers of n tokens to questions that follow a common beginning, the likeliest token each time."""
        self._sequence.close()
        prompts = [system + q for q in questions]
        options = {"max_tokens": n, "temperature": 0}
        return [g.ids for g in sorted(self._model.generate_batch(prompts, **options), key=lambda g: g.index)]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits after each id, (n, n_vocab)."""
        return self._model.logits(ids)

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokenize(text)


class LlamaCpp:
    """llama.cpp through llama-cpp-python: built for this processor when pip installs it."""

    needs = "llama_cpp"

    def __init__(self, path: str, n_ctx: int, n_threads: int, n_sequences: int = 1, shared: bool = False):
        api = self._api = self._load()
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise SystemExit(f"{self.needs} can't load {path}")
        context = api.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx * n_sequences, 512, 512
        if n_sequences > 1:
            context.n_seq_max, context.kv_unified = n_sequences, shared
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

    def _decode_all(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted)."""
        api = self._api
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = wanted
        code = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")

    def _row(self, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, i), (self.n_vocab,))

    def start(self, prompts: list[list[int]]) -> None:
        self.clear()
        self._lengths = [len(p) for p in prompts]
        for s, prompt in enumerate(prompts):
            for first in range(0, len(prompt), 512):
                piece = prompt[first : first + 512]
                self._decode_all([(t, first + i, s, i == len(piece) - 1) for i, t in enumerate(piece)])

    def step(self, tokens: list[int]) -> np.ndarray:
        self._decode_all([(t, self._lengths[s], s, True) for s, t in enumerate(tokens)])
        self._lengths = [n + 1 for n in self._lengths]
        return self._row(len(tokens) - 1)

    def converse(self, system: list[int], questions: list[list[int]], n: int) -> list[list[int]]:
        self.start([system])
        memory, n_system = self._api.llama_get_memory(self._context), len(system)
        for s in range(1, len(questions)):
            self._api.llama_memory_seq_cp(memory, 0, s, -1, -1)
        work = [(t, n_system + i, s, i == len(q) - 1) for s, q in enumerate(questions) for i, t in enumerate(q)]
        answers: list[list[int]] = [[] for _ in questions]
        for first in range(0, len(work), 512):
            piece = work[first : first + 512]
            self._decode_all(piece)
            for i, (_, _, s, wanted) in enumerate(piece):
                if wanted:
                    answers[s].append(int(self._row(i).argmax()))
        for _ in range(n - 1):
            self._decode_all(
                [
                    (a[-1], n_system + len(q) + len(a) - 1, s, True)
                    for s, (q, a) in enumerate(zip(questions, answers, strict=True))
                ]
            )
            for s, answer in enumerate(answers):
                answer.append(int(self._row(s).argmax()))
        return answers

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


def read_once(path: str) -> None:
    """Brings a file into the page cache, which an engine that copies its weights may have driven it out of."""
    room = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(room):
            pass


def available() -> list[str]:
    """The engines that are installed, but for those that are slow or noisy and must be asked for."""
    return [name for name in ("ggpy", "llama-cpp-python") if importlib.util.find_spec(ENGINES[name].needs)]
