"""Sound files of every kind."""

import json
import shutil

import numpy as np

from tests.file.edit import Edited

#: architectures that differ in what reads their numbers; names are those of the modules' own tables
MIXTURES = {"V3": {}, "V2": {}, "V2-Lite, yarn": {}, "mixtral": {}, "qwen2moe": {}, "qwen2": {}}
DECODERS = {
    "gemma2": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4, experts": {},
    "gpt-oss": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3, long": {"num_hidden_layers": 2},
    "glm4moe": {"num_hidden_layers": 2},
    "cohere2": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"num_hidden_layers": 2},
    "dbrx": {"n_layers": 2},
}
STATES = {
    "mamba2": {},
    "falcon-h1": {"num_hidden_layers": 2},
    "lfm2moe": {},
    "qwen35": {},
    "qwen3next": {},
    "nemotron_h_moe, groups, latent": {},
    "granitehybrid, experts": {},
}
ENCODERS = ("bert", "xlm-roberta", "modern", "nomic")
WIDE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
PROMPT = list(range(5, 205))  # fills three pages
HOW = {"n_ctx": 256, "n_threads": 1, "n_batch": 64}


def make_seeds(folder, every=False):
    """Makes all of them, and compiles the kernels that they need, which takes longer than a changed file may.

    Checkpoints are of some architectures, or of `every` one.
    """
    import ggpy

    for name in ("models", "checkpoints", "tokenizers", "sequences", "pages"):
        (folder / name).mkdir()
    _models(folder)
    if every:
        _checkpoints(folder)
    _typed(folder)
    _adapters(folder)
    _tokenizers(folder)
    for path in (folder / "models").glob("*.gguf"):
        for kv_type, mla in (("f16", "absorbed"), ("q8_0", "absorbed"), ("f32", "absorbed"), ("f16", "naive")):
            with ggpy.load(path, n_ctx=64, n_threads=2, n_batch=16, kv_type=kv_type, mla=mla) as model:
                if not model._runner.is_encoder:
                    model.logits([1, 2])
    _importance(folder)
    _logits_and_sequences(folder)
    _batch(folder)


def _models(folder):
    from converters import convert
    from tests.models import test_encoder, test_ranking
    from tests.models.checkpoints import converted
    from tests.models.test_architectures import made as decoder
    from tests.models.test_moe import made as mixture
    from tests.models.test_states import made as with_states

    def keep(name, path, checkpoint):
        name = name.split(",")[0]
        path.rename(folder / "models" / f"{name}.gguf")
        checkpoint.rename(folder / "checkpoints" / name)

    place = folder / "new"
    for names, make in ((MIXTURES, mixture), (DECODERS, decoder), (STATES, with_states)):
        for name, changes in names.items():
            place.mkdir()
            keep(name, converted(place, make(name, **changes)), place / "checkpoint")
            place.rmdir()
    for make, names in ((test_encoder.checkpoint, ENCODERS), (test_ranking.checkpoint, ("roberta",))):
        for name in names:
            make(place, name)
            convert(place, folder / "new.gguf", "f32")
            keep(name, folder / "new.gguf", place)
    place.mkdir()
    test_ranking.qwen3_reranker(place)
    (place / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# Qwen3-Reranker-0.6B\n")
    convert(place, folder / "new.gguf", "f32")
    keep("qwen3", folder / "new.gguf", place)


def _checkpoints(folder):
    """Of all the other architectures that transformers has."""
    from tests.models import test_architectures, test_moe, test_states
    from tests.models.checkpoints import save_tokenizer

    for module in (test_architectures, test_moe, test_states):
        for name in module.MODELS:
            place = folder / "checkpoints" / name.replace(", ", "-").replace(" ", "-")
            if not place.exists():
                module.made(name).save_pretrained(place)
                save_tokenizer(place)


def _typed(folder):
    import ggpy

    ggpy.quantize(folder / "models/mixtral.gguf", folder / "models/mixtral-q8_0.gguf", "q8_0")
    place = folder / "new"
    place.mkdir()
    for i, content in enumerate(of_all_types(place)):
        (folder / "models" / f"typed-{i}.gguf").write_bytes(content)
    shutil.rmtree(place)


def of_all_types(folder):
    """Files of models whose matrices have all types of blocks that there are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ggpy.quant import BLOCK_TYPES
    from tests.models.checkpoints import converted, random_model

    content = converted(folder, random_model(LlamaForCausalLM, LlamaConfig(**WIDE))).read_bytes()
    kinds = [kind for kind in BLOCK_TYPES.values() if kind.decode and kind.block_size > 1]
    matrices = [name for name, tensor in Edited.read(content).tensors.items() if len(tensor.dims) == 2]
    for i in range(0, len(kinds), len(matrices)):
        model = Edited.read(content)
        for name, kind in zip(matrices, kinds[i:] + kinds[:i], strict=False):
            tensor = model.tensors[name]
            tensor.type_id, tensor.data = kind.id, blocks(kind, int(np.prod(tensor.dims)) // kind.block_size)
        yield model.bytes()


def blocks(kind, n):
    """Random blocks of a type whose values are those of a model."""
    random, found, got = np.random.default_rng(0), [], 0
    while got < n:
        made = random.integers(0, 256, (4096, kind.n_bytes), np.uint8)
        with np.errstate(all="ignore"):
            values = np.abs(kind.dequantize(made))
        made = made[(values.max(1) < 0.3) & (values.max(1) > 1e-3)]
        found.append(made)
        got += len(made)
    return np.concatenate(found)[:n].tobytes()


def _adapters(folder):
    from tests.converters.test_lora import LINEAR, adapted
    from tests.models.test_adapters import random_pairs, saved, write_adapter

    place = folder / "adapters"
    place.mkdir()
    saved(place, "Llama").rename(place / "base.gguf")
    adapted(place / "base", place / "peft", target_modules=[*LINEAR, "lm_head"], r=5, rank_pattern={"q_proj": 3})
    write_adapter(place / "adapter.gguf", random_pairs())


def _tokenizers(folder):
    """Checkpoints of one layer that differ in their tokenizers."""
    from converters import convert
    from tests.converters.conftest import save_llama, save_tokenizer
    from tests.converters.test_vocabulary import train_sentencepiece

    place = folder / "tokenizers"
    sizes = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    save_llama(place / "bytes", **sizes)
    save_llama(place / "llama3", pre="llama-bpe", **sizes)
    save_llama(place / "deepseek", pre="deepseek-v3", **sizes)
    for name in ("bert", "xlm-roberta"):
        shutil.copytree(folder / "checkpoints" / name, place / name)
    for with_json in (False, True):
        source = folder / f"sentencepiece{'-json' * with_json}"
        save_llama(source, **sizes)
        save_tokenizer(source)
        # A symbol with spaces is refused where a tokenizer.json has it.
        train_sentencepiece(source, user_defined_symbols=["<tool>", "▁two▁words"][: 1 if with_json else 2])
        if not with_json:
            (source / "tokenizer.json").unlink()
        else:
            _as_json(source)
    for source in (*place.iterdir(), *folder.glob("sentencepiece*")):  # what is refused when sound tests nothing
        convert(source, folder / "new.gguf", "f32")
        (folder / "new.gguf").unlink()


def _as_json(source):
    """The tokenizer.model once more as a tokenizer.json, as transformers writes it."""
    from transformers import LlamaTokenizer

    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    LlamaTokenizer.from_pretrained(source).save_pretrained(source)


def _importance(folder):
    from ggpy.quantization import ImportanceMatrix, write_imatrix
    from tests.quantization.shapes import write_gguf
    from tests.quantization.test_imatrix import old_form

    random = np.random.default_rng(0)
    shapes = {"blk.0.attn_q.weight": (8, 256), "blk.0.ffn_up_exps.weight": (3, 4, 256)}
    values = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    keys = {"llama.block_count": 1, "llama.expert_count": 3, "general.architecture": "llama"}
    write_gguf(folder / "imatrix-model.gguf", keys, shapes, values, "llama")
    sums = {name: random.gamma(1, 5, (shape[0] if len(shape) > 2 else 1, 256)) for name, shape in shapes.items()}
    sums = {name: value.astype(np.float32) for name, value in sums.items()}
    counts = {name: np.full(len(value), 4, np.float32) for name, value in sums.items()}
    write_imatrix(folder / "imatrix.gguf", ImportanceMatrix(sums, counts, ["text"], 3, 512))
    (folder / "imatrix.dat").write_bytes(old_form(sums))


def _logits_and_sequences(folder):
    import ggpy
    from ggpy.measure.perplexity import measure_perplexity

    for name in ("V3", "lfm2moe", "qwen2"):
        with ggpy.load(folder / f"models/{name}.gguf", **HOW) as model:
            model.save_cache(folder / "sequences" / name, PROMPT[:70])
            model.keep_cache(folder / "pages" / name)
            model.generate(PROMPT, max_tokens=2).run()
            if name == "V3":
                measure_perplexity(model, np.arange(64, dtype=np.int32).reshape(2, 32), save=folder / "logits")


def _batch(folder):
    import ggpy
    from ggpy.batching import batch

    rows = [{"id": i if i % 2 else f"row {i}", "prompt": [5 + i, 6], "options": {"max_tokens": 2}} for i in range(6)]
    (folder / "rows.json").write_text(json.dumps(rows))
    with ggpy.load(folder / "models/qwen2.gguf", **HOW) as model:
        batch(model, rows, folder / "results.jsonl", ordered=True)
