"""Files of strangers by the thousand: sound ones, changed by structure, are opened, loaded and run.

    python -m tests.fuzz --runs 2000 gguf checkpoint imatrix logits sequence

Processes with a limit of time do the work, file after file; which changes a file has follows from its number alone, so that
`--first 1234 --runs 1` repeats one. A file may be refused by an `Error`, or it runs; anything else is a failure: another
exception, a signal, more than SECONDS, more memory than twice the file and a constant.
"""

import argparse
import json
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

SECONDS = 60
MOST_MEMORY = 150 << 20  # beside twice the file: what a model's arena, pages and tokenizer take

INTEGERS = [0, 1, 2, 3, 7, 31, 33, 255, 1 << 16, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, -1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-300, 1e38, 3.4e38, 1e300, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "\0", "a" * 70000, "\x1b[31m", "llama", "{{ 1 // 0 }}", "\ud800"]
TEMPLATES = [
    "{{ messages }}",
    "{{ 'a' * 10 ** 10 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(a=[1]) %}" + "{% set n.a = [n.a, n.a] %}" * 60 + "{{ n.a }}",
]
#: float32 NaN, infinities and others, which the scales of blocks may meet, too
PIECES = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, bytes(4), b"\xff\xff\x7f\x7f"]


# Changes


def odd_number(rng, kind):
    """A number that fits a GGUF type, and often no model."""
    if kind.startswith("float"):
        value = rng.choice(FLOATS)
        return value if kind == "float64" or not 3.5e38 < abs(value) < float("inf") else 3e38
    if kind == "bool":
        return rng.choice([0, 1, 2, 255])
    bits = int(kind.lstrip("uint"))
    low, high = (0, (1 << bits) - 1) if kind.startswith("u") else (-(1 << bits - 1), (1 << bits - 1) - 1)
    return min(max(rng.choice(INTEGERS), low), high)


def change_key(rng, model):
    from tests.file.make import NUMBERS, string, u32, u64

    key = rng.choice(list(model.keys))
    what = rng.randrange(7)
    if what == 0:
        del model.keys[key]
    elif what <= 2:
        kind = rng.choice(list(NUMBERS))
        model.set(key, kind, odd_number(rng, kind))
    elif what == 3:
        text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        model.keys[key] = string(key) + u32(8) + string(text)
    elif what == 4:
        kind = rng.choice(list(NUMBERS))
        model.set(key, kind, [odd_number(rng, kind) for _ in range(rng.choice([0, 1, 2, 3, 512]))])
    elif what == 5:
        n = rng.choice([0, 1, 511, 512, 513])
        texts = [rng.choice(["", "a", "b", "<0x0A>", "é"]).encode() + bytes([rng.randrange(256)]) for _ in range(n)]
        model.keys[key] = string(key) + u32(9) + u32(8) + u64(n) + b"".join(map(string, texts))
    else:
        model.set("tokenizer.chat_template", "string", rng.choice(TEMPLATES))


def change_value(rng, model):
    """Overwrites the value of a number, or items of an array, where they are."""
    key = rng.choice([k for k, raw in model.keys.items() if len(raw) > len(k) + 12])
    raw = bytearray(model.keys[key])
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(8 + len(key.encode()) + 4, len(raw))
        if rng.random() < 0.5:
            raw[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        else:
            raw[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 6, 0x7FC00000, 0x7F800000, 0xFFFFFFFF]))[: len(raw) - at]
    model.keys[key] = bytes(raw)


def change_tensor(rng, model):
    from tests.file.edit import Stored

    name = rng.choice(list(model.tensors))
    tensor, what = model.tensors[name], rng.randrange(8)
    if what == 0:
        del model.tensors[name]
    elif what == 1:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([abs(i) for i in INTEGERS])
    elif what == 2:
        tensor.dims = rng.choice([tensor.dims[::-1], tensor.dims[:1], [*tensor.dims, 1], [1, *tensor.dims], []])
    elif what == 3:
        tensor.type_id = rng.randrange(42)
    elif what == 4:
        tensor.data = tensor.data[: rng.choice([0, 1, len(tensor.data) // 2, len(tensor.data) - 1])]
    elif what == 5:
        other = rng.choice(list(model.tensors))
        model.tensors[name], model.tensors[other] = model.tensors[other], tensor
    elif what == 6:
        model.tensors[name + rng.choice(["", ".x", "\n", "\x1b[0m"])] = Stored(
            list(tensor.dims), tensor.type_id, tensor.data
        )
    else:
        tensor.offset = rng.choice([0, 32, 64, 1 << 20, 1 << 62])


def change_data(rng, model):
    """Damages weights: all, a row, some bytes."""
    tensor = model.tensors[rng.choice(list(model.tensors))]
    data = bytearray(tensor.data)
    if not data:
        return
    start = rng.choice([0, rng.randrange(len(data)) // 4 * 4])
    n = rng.choice([4, 64, 256, len(data)])
    piece = rng.choice([*PIECES, rng.randbytes(64)])
    data[start : start + n] = (piece * (n // len(piece) + 1))[: len(data[start : start + n])]
    tensor.data = bytes(data)


def change_bytes(rng, content):
    """Cuts a file off, or overwrites bytes, mostly of its head."""
    content = bytearray(content)
    if rng.random() < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice([1, 4, 16])):
        at = rng.randrange(min(len(content), rng.choice([64, 4096, len(content)])))
        content[at] = rng.choice([0, 1, 255, rng.randrange(256)])
    return bytes(content)


def change_json(rng, value, most=2):
    """Replaces, removes or doubles parts of a JSON document."""
    for _ in range(rng.randint(1, most)):
        holder, key, inner = None, None, value
        while isinstance(inner, (dict, list)) and inner and (holder is None or rng.random() < 0.8):
            holder, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = holder[key]
        if holder is None:
            return value
        shapes = [None, True, [], {}, [inner] * 3, {"a": inner}, str(inner)]
        new = rng.choice([*shapes, *TEXTS[:5], *INTEGERS, *FLOATS])
        if rng.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = new
    return value


def changed_gguf(rng, content):
    from tests.file.edit import Edited

    model = Edited.read(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if model.tensors and model.keys:
            rng.choice([change_key, change_value, change_tensor, *[change_data] * 3])(rng, model)
    content = model.bytes()
    return change_bytes(rng, content) if rng.random() < 0.1 else content


def changed_safetensors(rng, content):
    n = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return change_bytes(rng, content)
    head = json.dumps(change_json(rng, json.loads(content[8 : 8 + n]))).encode()
    return rng.choice([len(head), len(head), n, 1 << 40]).to_bytes(8, "little") + head + content[8 + n :]


# What is done with a file; `seeds` are sound files, `folder` is emptied after each


def try_gguf(rng, seeds, folder):
    import ggpy

    path = folder / "model.gguf"
    source = rng.choice(sorted(seeds.glob("*.gguf"))).read_bytes()
    path.write_bytes(changed_gguf(rng, source))
    how = {"kv_type": rng.choice(["f16", "q8_0", "f32"]), "mla": rng.choice(["absorbed", "naive"])}
    with ggpy.load(path, n_ctx=64, n_threads=2, n_batch=16, **how) as model:
        ids = [rng.randrange(model.architecture.n_vocab) for _ in range(rng.choice([1, 15, 18]))]
        model.generate(ids, max_tokens=2, seed=1).run()
        model.tokenizer.decode(model.tokenizer.encode("Größe <|im_end|> 12"))
        if model.chat_template is not None:
            model.chat_template.render([{"role": "user", "content": "hello"}])
    if rng.random() < 0.1:
        ggpy.quantize(path, folder / "out.gguf", "q8_0")
    return path


def try_checkpoint(rng, seeds, folder):
    import shutil

    import ggpy

    source = folder / "checkpoint"
    shutil.copytree(rng.choice(sorted(p for p in seeds.iterdir() if p.is_dir())), source)
    path = source / rng.choice(
        ["model.safetensors", "config.json", "config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    if path.suffix == ".json":
        path.write_text(json.dumps(change_json(rng, json.loads(path.read_text()))))
        if rng.random() < 0.05:
            path.write_bytes(change_bytes(rng, path.read_bytes()))
    else:
        path.write_bytes(changed_safetensors(rng, path.read_bytes()))
    ggpy.convert(source, folder / "out.gguf", "f32")
    with ggpy.load(folder / "out.gguf", n_ctx=64, n_threads=1, n_batch=16) as model:
        model.logits([1, 2, 3])
    return source / "model.safetensors"


def try_imatrix(rng, seeds, folder):
    from ggpy.quantization.imatrix import read_imatrix

    path = folder / "imatrix.gguf"
    path.write_bytes(changed_gguf(rng, (seeds / "imatrix").read_bytes()))
    matrix = read_imatrix(path)
    for name in matrix.sums:
        assert np.isfinite(matrix.weights(name)).all()
    return path


def try_logits(rng, seeds, folder):
    from ggpy.measure.logits_file import LogitsFile, counted

    path = folder / "logits"
    content = bytearray((seeds / "logits").read_bytes())
    if rng.random() < 0.5:
        at = rng.choice([8, 12, 16, rng.randrange(len(content) // 4) * 4])
        content[at : at + 4] = rng.choice([*PIECES, *(struct.pack("<i", n) for n in (0, 1, -1, 3, 2**31 - 1))])
    path.write_bytes(change_bytes(rng, content) if rng.random() < 0.5 else content)
    with LogitsFile(path) as file:
        rows, top = file.read(counted(file.tokens.shape[1]))
        assert np.isfinite(rows).all() and (rows <= 1e-2).all() and (top >= 0).all()
    return path


def try_sequence(rng, seeds, folder):
    import ggpy

    path = folder / "sequence"
    path.write_bytes(changed_safetensors(rng, (seeds / "sequence").read_bytes()))
    with ggpy.load(seeds / "V3.gguf", n_ctx=64, n_threads=1, n_batch=16) as model, model.load_sequence(path) as sequence:
        sequence.extend([1])
    return path


KINDS = {name.removeprefix("try_"): function for name, function in list(globals().items()) if name.startswith("try_")}


# Processes


def make_seeds(folder):
    """Sound files of every kind."""
    import ggpy
    from tests.models.checkpoints import converted
    from tests.models.test_architectures import made as decoder
    from tests.models.test_moe import made

    models = dict.fromkeys(("V3", "V2", "V2-Lite, yarn", "mixtral", "qwen2moe", "qwen2"), made)
    models |= dict.fromkeys(("gemma2", "gemma4, experts", "gpt-oss", "phi3, long", "glm4moe", "cohere2", "gpt2"), decoder)
    for name, make in models.items():
        place = folder / name.split(",")[0]
        place.mkdir()
        converted(place, make(name)).rename(folder / f"{place.name}.gguf")
        (place / "checkpoint").rename(folder / f"{place.name}.checkpoint")
        place.rmdir()
    ggpy.quantize(folder / "mixtral.gguf", folder / "mixtral-q8_0.gguf", "q8_0")
    for path in folder.glob("*.gguf"):  # compiles their kernels: that takes longer than a file may
        for kv_type, mla in (("f16", "absorbed"), ("q8_0", "absorbed"), ("f32", "absorbed"), ("f16", "naive")):
            with ggpy.load(path, n_ctx=64, n_threads=2, n_batch=16, kv_type=kv_type, mla=mla) as model:
                model.logits([1, 2])
    with ggpy.load(folder / "V3.gguf", n_ctx=64, n_threads=1, n_batch=16) as model, model.new_sequence() as sequence:
        sequence.extend(range(5))
        sequence.save(folder / "sequence")
        from ggpy.measure.perplexity import measure_perplexity

        measure_perplexity(model, np.arange(64, dtype=np.int32).reshape(2, 32), save=folder / "logits")
    import gguf

    writer = gguf.GGUFWriter(folder / "imatrix", "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight"):
        writer.add_tensor(f"{name}.in_sum2", np.ones((4, 64), np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((4, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def work(seeds):
    """A process: takes kinds and numbers, and answers each with what came of it."""
    from ggpy.errors import Error
    from ggpy.generate import templates
    from ggpy.kernels import build

    def not_now(names, progress=None):
        if any(build._read_object(name) is None for name in names):
            raise UncompiledError

    build.compile_missing = not_now
    templates.MOST_SECONDS = 0
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            before, what = _memory(reset=True), "ran"
            try:
                KINDS[kind](random.Random(int(number)), Path(seeds), Path(folder))
            except UncompiledError:
                what = "uncompiled"
            except Error as error:
                what = "refused"
                if len(str(error)) > 1000 or "\n" in str(error):
                    what = "message"
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                inner = [f for f in frames if "ggpy" in f.filename or "converters" in f.filename] or frames
                where = f"{Path(inner[-1].filename).name}:{inner[-1].lineno}"
                what = " ".join(f"exception {type(error).__name__} in {where}: {error}"[:200].split())
            size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            used = _memory() - before
            if used > 2 * size + MOST_MEMORY:
                what = f"memory {used >> 20} MB for {size >> 10} KB, {what}"
        print(f"{number} {what}", flush=True)


def _memory(reset=False):
    """The most memory of this process since it was reset, or what it holds now, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmRSS" if reset else "VmHWM"
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class UncompiledError(Exception):
    """A changed type needs a kernel that would take longer to compile than a file may take."""


class Worker:
    """A process that does `work`."""

    def __init__(self, seeds):
        command = [sys.executable, "-m", "tests.fuzz", "--work", str(seeds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, kind, number):
        """What came of a file; a process that has ended or hangs is over."""
        try:
            self._process.stdin.write(f"{kind} {number}\n")
            if not select.select([self._process.stdout], [], [], SECONDS)[0]:
                self._process.kill()
                return "hung"
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return answer.split(" ", 1)[1].strip() if answer.endswith("\n") else f"signal {-self._process.wait()}"

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def campaign(kind, numbers, seeds, say=print):
    """Tries files; how many came to what, and the failures by number."""
    worker, counts, failures = Worker(seeds), Counter(), {}
    for number in numbers:
        what = worker.ask(kind, number)
        counts[what.split()[0]] += 1
        if what not in ("ran", "refused", "uncompiled"):
            failures[number] = what
            say(f"{kind} {number}: {what}")
        if what.startswith(("hung", "signal")):
            worker = Worker(seeds)
    worker.close()
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=Path, help="sound files that were made before, or where to make them")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        seeds = options.seeds or Path(folder)
        seeds.mkdir(exist_ok=True)
        if not any(seeds.iterdir()):
            make_seeds(seeds)
        failed = 0
        for kind in options.kinds:
            started = time.time()
            counts, failures = campaign(kind, range(options.first, options.first + options.runs), seeds)
            failed += len(failures)
            print(
                f"{kind}: {sum(counts.values())} tried in {time.time() - started:.0f} s: {dict(counts.most_common())}",
                flush=True,
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
