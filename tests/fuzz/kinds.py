"""What is done with files of each kind; a function's parameters are random numbers, the sound files and an empty folder."""

import json
import os
import shutil
from functools import cache

import numpy as np

import ggpy
from ggpy.quantization import read_imatrix

from . import changes
from .seeds import HOW, PROMPT

SETTINGS = ["generation_config.json", "tokenizer_config.json", "README.md"]
TEXT = "Größe <|im_end|> 12"
TYPES = ["q4_0", "q5_1", "q8_0", "q2_k", "q4_k_m", "q6_k", "iq4_nl", "iq4_xs", "tq2_0"]


def use(model, rng, path):
    """Runs a model: a text of one token or more than a run takes, and two tokens."""
    ids = [rng.randrange(model.architecture.n_vocab) for _ in range(rng.choice([1, 15, 18]))]
    if model._runner.is_encoder:
        model.embed([ids, TEXT])
    else:
        model.generate(ids, max_tokens=2, seed=1).run()
    model.tokenizer.decode(model.tokenizer.encode(TEXT))
    if path.name.startswith(("roberta", "qwen3.")) and not np.isfinite(model.rerank("what?", ["the", TEXT])).all():
        raise AssertionError("scores that aren't finite")
    if model.chat_template is not None:
        model.chat_template.render([{"role": "user", "content": "hello"}])


def sizes_for(name):
    """How a model is loaded; a reranker that is a decoder has a long prompt of its own."""
    return {"n_ctx": 1024, "n_batch": 256} if name == "qwen3.gguf" else {"n_ctx": 64, "n_batch": 16}


def gguf(rng, seeds, folder):
    source = rng.choice(sorted((seeds / "models").glob("*.gguf")))
    path = folder / source.name
    path.write_bytes(changes.gguf(rng, source.read_bytes(), all_keys(seeds)))
    how = {"kv_type": rng.choice(["f16", "q8_0", "f32"]), "mla": rng.choice(["absorbed", "naive"])}
    with ggpy.load(path, n_threads=rng.choice([1, 1, 1, 2]), **sizes_for(path.name), **how) as model:
        use(model, rng, path)
    if rng.random() < 0.05:
        ggpy.quantize(path, folder / "out.gguf", "q8_0")


@cache
def all_keys(seeds):
    """Every key that a sound file has, as it is stored: a file gets those of others."""
    from tests.file.edit import Edited

    found = {}
    for path in sorted((seeds / "models").glob("*.gguf")):
        found |= Edited.read(path.read_bytes()).keys
    return found


def adapter(rng, seeds, folder):
    """LoRA adapters, as a file and as PEFT's folder, while running and at conversion."""
    place, how = seeds / "adapters", rng.random()
    if how < 0.5:
        path = folder / "adapter.gguf"
        path.write_bytes(changes.gguf(rng, (place / path.name).read_bytes()))
    else:
        path = folder / "peft"
        shutil.copytree(place / "peft", path)
        name = rng.choice(["adapter_config.json", "adapter_model.safetensors"])
        (path / name).write_bytes(changes.OF[name.rpartition(".")[2]](rng, (path / name).read_bytes()))
    if how < 0.7:
        with ggpy.load(place / "base.gguf", n_ctx=64, n_threads=1, n_batch=16, lora=[path]) as model:
            model.logits([1, 2, 3])
    else:
        ggpy.convert(place / "base", folder / "out.gguf", "f32", lora=[path])


def converted(rng, source, folder, names):
    """Changes a file of a checkpoint's copy; converts it and runs what comes of it."""
    path = folder / source.name
    name = rng.choice([name for name in names if (source / name).exists()])
    content = changes.OF[name.rpartition(".")[2]](rng, (source / name).read_bytes())
    shutil.copytree(source, path, copy_function=os.symlink)  # as the hub's folders are
    (path / name).unlink()
    (path / name).write_bytes(content)
    out = folder / f"{source.name}.gguf"
    ggpy.convert(path, out, "f32")
    if rng.random() < 0.25:  # what was written by us is sound
        with ggpy.load(out, n_threads=1, **sizes_for(out.name)) as model:
            use(model, rng, out)


@cache
def checkpoints(seeds):
    # That one's table of characters takes most of the time; it is among the tokenizers.
    return sorted(path for path in (seeds / "checkpoints").iterdir() if path.name != "xlm-roberta")


def safetensors(rng, seeds, folder):
    converted(rng, rng.choice(checkpoints(seeds)), folder, ["model.safetensors"])


def config(rng, seeds, folder):
    converted(rng, rng.choice(checkpoints(seeds)), folder, ["config.json"] * 6 + SETTINGS)


def tokenizer(rng, seeds, folder):
    converted(rng, rng.choice(sorted((seeds / "tokenizers").iterdir())), folder, ["tokenizer.json"])


def sentencepiece(rng, seeds, folder):
    converted(rng, seeds / rng.choice(["sentencepiece", "sentencepiece-json"]), folder, ["tokenizer.model"])


def imatrix(rng, seeds, folder):
    """An importance matrix, and a model that is quantized with it."""
    name = rng.choice(["imatrix.gguf", "imatrix.dat"])
    change = changes.gguf if name.endswith("gguf") else changes.numbers
    (folder / name).write_bytes(change(rng, (seeds / name).read_bytes()))
    out, kind = folder / "out.gguf", rng.choice(TYPES)
    matrix = read_imatrix(folder / name)
    for entry in matrix.sums:
        if not np.isfinite(matrix.weights(entry)).all():
            raise AssertionError(f"{entry} has weights that aren't finite")
    ggpy.quantize(seeds / "imatrix-model.gguf", out, kind, imatrix=folder / name)
    with ggpy.GGUFFile(out) as file:
        for tensor in file.tensors.values():
            if not np.isfinite(tensor.dequantize()).all():
                raise AssertionError(f"{tensor.name} isn't finite as {tensor.type}")


def logits(rng, seeds, folder):
    from ggpy.measure.logits_file import LogitsFile, counted

    path = folder / "logits"
    path.write_bytes(changes.numbers(rng, (seeds / "logits").read_bytes()))
    with LogitsFile(path) as file:
        rows, top = file.read(counted(file.tokens.shape[1]))
        if not (np.isfinite(rows).all() and (rows <= 1e-2).all() and (top >= 0).all()):
            raise AssertionError("values that are no logarithms of probabilities")


@cache
def opened(path):
    """A model that stays, whatever files it is given."""
    return ggpy.load(path, **HOW)


def sequence(rng, seeds, folder):
    name, path = rng.choice(["V3", "lfm2moe", "qwen2"]), folder / "sequence"
    path.write_bytes(changes.safetensors(rng, (seeds / "sequences" / name).read_bytes()))
    with opened(seeds / f"models/{name}.gguf").load_sequence(path) as sequence:
        sequence.extend([1])
        sequence.keep(rng.randrange(len(sequence.ids)))
        sequence.extend([2, 3])


@cache
def expected(path):
    """What a model says without kept pages."""
    with ggpy.load(path, **HOW) as model:
        return model.generate(PROMPT, max_tokens=2, temperature=0).run().ids


def pages(rng, seeds, folder):
    """Pages that a server keeps, some of them changed: the text is what it is without them, unless their sum is right."""
    name = rng.choice(["V3", "lfm2moe", "qwen2"])
    path, model = seeds / f"models/{name}.gguf", opened(seeds / f"models/{name}.gguf")
    shutil.copytree(seeds / "pages" / name, folder, dirs_exist_ok=True)
    files, is_summed = sorted(folder.iterdir()), rng.random() < 0.3
    contents = {file: file.read_bytes() for file in files}
    for file in rng.sample(files, rng.randint(1, len(files))):
        content = changes.safetensors(rng, contents[rng.choice([file, file, file, *files])])
        file.unlink()
        if rng.random() < 0.1:
            rng.choice([os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: None])(file)
        else:
            file.write_bytes(summed(content) if is_summed else content)
    model.keep_cache(folder, rng.choice([0, 1 << 30]))
    try:
        found = model.generate(PROMPT, max_tokens=2, temperature=0).run().ids
    finally:
        model._scheduler.files.close()
        model._scheduler.files = None
        model._runner.prefixes.clear()
    if found != expected(path) and not is_summed:
        raise AssertionError(f"{found} instead of {expected(path)}")


def summed(content):
    """The same with the checksum of what it has now."""
    from safetensors.numpy import load, save

    from ggpy.generate.page_files import _sum

    try:
        arrays = load(content)
        n = int.from_bytes(content[:8], "little")
        return save(arrays, json.loads(content[8 : 8 + n])["__metadata__"] | {"sum": _sum(arrays)})
    except Exception:  # whatever it is that isn't a sound file
        return content


def batch(rng, seeds, folder):
    """Results of a run that was ended, or of whoever else wrote there; in the end each row has one."""
    rows, path = json.loads((seeds / "rows.json").read_text()), folder / "out.jsonl"
    path.write_bytes(changes.jsonl(rng, (seeds / "results.jsonl").read_bytes()))
    ggpy.batch(opened(seeds / "models/qwen2.gguf"), rows, path, ordered=rng.random() < 0.5)
    ids = [json.loads(line)["id"] for line in path.read_bytes().splitlines()]
    if sorted(map(str, ids)) != sorted(str(row["id"]) for row in rows):
        raise AssertionError(f"results of {ids}")


KINDS = {
    function.__name__: function
    for function in (
        gguf, adapter, safetensors, config, tokenizer, sentencepiece, imatrix, logits, sequence, pages, batch
    )
}  # fmt: skip
