"""A model's layers in several processes beside one: the memory of each, and tokens per second.

    python benchmarks/stages.py MODEL.gguf [-t 2] [--stages 1,2,3] [--sequences 1,8] [-n 16] [-r 3]

By turns, `-r` times: the model is opened with so many stages, which have `-t` threads together (one each at least), reads
256 tokens, and then writes `-n` tokens for so many sequences at once. Memory is the proportional set size of each process
(Linux): pages of the file that others map too are shared out among them, so nothing else should have it open.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

import ggpy
from ggpy.generate.sequence import TokenSequence

PROMPT = 256


def megabytes(pid: int | str) -> float:
    """The proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1e3


def measured(path: str, stages: int, n_threads: int, sequences: list[int], n: int) -> tuple[list[float], list[float]]:
    """Megabytes of each stage and, of several, of the process that calls them; tokens per second of a prompt, and for each
    number of sequences."""
    rng = np.random.default_rng(0)
    with ggpy.load(path, n_ctx=512, n_threads=max(1, n_threads // stages), stages=stages) as model:
        tokens = rng.integers(0, model.architecture.n_vocab, PROMPT).tolist()
        model.new_sequence().extend(tokens)  # touches the weights
        started = time.perf_counter()
        model.new_sequence().extend(tokens[::-1])
        rates = [PROMPT / (time.perf_counter() - started)]
        for together in sequences:
            opened = [model.new_sequence() for _ in range(together)]
            logits = TokenSequence.extend_together(opened, [tokens[i : i + 16] for i in range(together)])
            started = time.perf_counter()
            for _ in range(n):
                logits = TokenSequence.extend_together(opened, [[int(row.argmax())] for row in logits])
            rates.append(together * n / (time.perf_counter() - started))
        pids: list[int | str] = ["self"]
        if stages > 1:
            pids[:0] = [process.pid for process in model._runner._stages._links._processes]  # type: ignore[union-attr]
        return [megabytes(pid) for pid in pids], rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--sequences", default="1,8")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    a = parser.parse_args()
    stages, sequences = ([int(n) for n in text.split(",")] for text in (a.stages, a.sequences))
    rates: dict[int, list[list[float]]] = {n: [] for n in stages}
    for _ in range(a.rounds):
        for n in stages:
            memory, found = measured(a.model, n, a.threads, sequences, a.n)
            rates[n].append(found)
            print(f"{n} stages: MB {[round(m) for m in memory]}, tokens/s {[round(r, 1) for r in found]}", flush=True)
    print("\nmedians, tokens/s:", "prompt", *(f"{n} at once" for n in sequences))
    for n, rounds in rates.items():
        print(f"{n} stages:", *(f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True)))


if __name__ == "__main__":
    main()
