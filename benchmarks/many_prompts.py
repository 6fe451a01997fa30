"""Many prompts on one machine: `ggpy batch` beside one by one, and llama.cpp's server with parallel sequences.

    python benchmarks/many_prompts.py MODEL.gguf [-t 2] [-n 2000] [-g 24] [--sample 100] [--parallel 1,16,64]

Each prompt differs from its first words on. One by one, and llama.cpp (xllamacpp: its server in this process), do the first
`--sample` of them. Greedy, no end token before `-g` tokens.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ggpy

WORDS = [
    "river",
    "stone",
    "winter",
    "garden",
    "iron",
    "market",
    "letter",
    "morning",
    "engine",
    "silver",
    "window",
    "forest",
    "teacher",
    "harbour",
    "music",
    "bridge",
]


def prompts(n: int) -> list[str]:
    """Texts of some twenty tokens."""
    return [f"{i}. Write about the {WORDS[i % 16]} and the {WORDS[i // 16 % 16]} in a few words, please:" for i in range(n)]


def one_by_one(model: ggpy.Model, texts: list[str], options: dict) -> float:
    """Seconds."""
    started = time.perf_counter()
    for text in texts:
        assert len(model.generate(text, **options).run().ids) == options["max_tokens"]
    return time.perf_counter() - started


def in_a_batch(model: ggpy.Model, texts: list[str], options: dict) -> float:
    """Seconds, the files' reading and writing included."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "in.jsonl"
        rows.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(texts)))
        started = time.perf_counter()
        summary = ggpy.batch(model, rows, Path(folder) / "out.jsonl", **options)
        seconds = time.perf_counter() - started
    assert summary.completion_tokens == len(texts) * options["max_tokens"]
    return seconds


def llama_cpp(path: str, n_threads: int, n_parallel: int, texts: list[str], n: int) -> float:
    """Seconds of its server, which gets so many requests at once."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = path, n_parallel, n_parallel * 128
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(params)

    def ask(text: str) -> None:
        body = {"prompt": text, "max_tokens": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(body)
        assert answer["usage"]["completion_tokens"] == n, answer

    with ThreadPoolExecutor(n_parallel) as pool:
        list(pool.map(ask, texts[:n_parallel]))  # warms up
        started = time.perf_counter()
        list(pool.map(ask, texts))
        return time.perf_counter() - started


def show(name: str, n: int, generate: int, seconds: float) -> None:
    """A line of the result."""
    print(f"{name:24} {n:5} prompts  {seconds:7.1f} s  {n * generate / seconds:7.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("-g", "--generate", type=int, default=24)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--parallel", default="1,16,64")
    a = parser.parse_args()
    texts, few = prompts(a.n), min(a.sample, a.n)
    with ggpy.load(a.model, n_threads=a.threads, n_ctx=1024) as model:
        ends = {token: -float("inf") for token in model.tokenizer.end_tokens}
        options = {"max_tokens": a.generate, "temperature": 0, "logit_bias": ends}
        one_by_one(model, texts[-2:], options)
        show("one by one", few, a.generate, one_by_one(model, texts[:few], options))
        show("ggpy batch", a.n, a.generate, in_a_batch(model, texts, options))
    for n in map(int, a.parallel.split(",")):
        seconds = llama_cpp(a.model, a.threads, n, texts[:few], a.generate)
        show(f"llama.cpp, {n} at once", few, a.generate, seconds)


if __name__ == "__main__":
    main()
