"""Each matrix kernel against the limits of this machine, measured on the spot.

    python benchmarks/kernels.py [--types Q4_0,Q4_K] [-t 1,2] [--tokens 8,48,512] [--forms avx512,avx2] [--json F] [--png F]

Matrix × vector: GB/s of weights, out of memory (256 MB) and out of the second-level cache, beside the bandwidth of plain
reading. Matrix × matrix: GOP/s (2 per weight and token) for several numbers of tokens, beside the rate of int8 dot products
out of the first-level cache. Kernels run as they do in a model: from a tape, with all threads.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")
N_COLS = 2048
MEMORY, CACHE = 256 << 20, 192 << 10


class RandomWeight:
    """Blocks of random bytes: what they mean doesn't matter for speed, but for scales that aren't tiny or infinite."""

    def __init__(self, name: str, kind: str, n_rows: int):
        from ggpy.quant import block_type

        row_bytes = block_type(kind).row_bytes(N_COLS)
        pattern = np.random.default_rng(0).integers(0, 64, row_bytes * 64, dtype=np.uint8)
        # In small pages, as those of a mapped file are; numpy asks for huge ones.
        self.data = np.frombuffer(mmap.mmap(-1, n_rows * row_bytes), np.uint8).reshape(n_rows, row_bytes)
        self.data[:] = np.resize(pattern, (n_rows, row_bytes))
        self.name, self.type, self.shape, self.n_bytes = name, kind, (n_rows, N_COLS), self.data.nbytes


def seconds(kind: str, n_bytes: int, n_tokens: int, team, repeat: int = 7) -> tuple[float, int]:
    """The median time of one product with a matrix of about n_bytes, and its exact bytes."""
    from ggpy.graph import Graph, Pages, Program, Span, pack, pages_of
    from ggpy.quant import block_type

    n_rows = max(64, n_bytes // block_type(kind).row_bytes(N_COLS) // 16 * 16)
    weight = RandomWeight("w", kind, n_rows)
    graph = Graph(n_tokens)
    x, w = graph.input("x", (N_COLS,)), graph.weight(weight)
    n_products = max(1, (32 << 20) // (weight.n_bytes * n_tokens))  # enough that a run isn't over at once
    for i in range(n_products):
        graph.output(graph.op("MUL_MAT", w, x), f"out{i}")
    n_pages = pages_of(n_tokens)
    program = Program(graph, Pages(n_pages), team)
    batch, _ = pack([Span([0] * n_tokens, 0, range(n_pages))])
    values = {"x": np.random.default_rng(1).standard_normal((n_tokens, N_COLS)).astype(np.float32)}
    clock = np.zeros(len(program.plan.steps) + 1, np.int64)
    shares = []
    for i in range(repeat + 1):
        started = time.perf_counter()
        program.run(values, batch, clock)
        whole = time.perf_counter() - started
        ticks = np.diff(clock)
        products = sum(t for t, s in zip(ticks, program.plan.steps, strict=True) if s.kernel.startswith("mul_mat"))
        if i:
            shares.append(whole * products / ticks.sum() / n_products)
    return statistics.median(shares), weight.n_bytes


def measure(types: list[str], threads: list[int], tokens: list[int]) -> dict:
    """All figures of one SIMD form."""
    from ggpy.graph import Team
    from ggpy.measure.limits import measure_limits
    from ggpy.simd.target import target

    result: dict = {"form": target().form, "threads": {}}
    for n_threads in threads:
        team = Team(n_threads)
        rows: dict = {}
        for kind in types:
            row: dict = {}
            for name, size in (("memory", MEMORY), ("cache", CACHE)):
                t, n_bytes = seconds(kind, size, 1, team)
                row[f"GB/s {name}"] = n_bytes / t / 1e9
            for n in tokens:
                t, _ = seconds(kind, 4 << 20, n, team, 5)
                n_weights = seconds_weights(kind, 4 << 20)
                row[f"GOP/s {n}"] = 2 * n_weights * n / t / 1e9
            rows[kind] = row
        team.close()
        limits = measure_limits(n_threads)
        facts = {"bandwidth": limits.bytes_per_second / 1e9, "peak": limits.operations_per_second / 1e9}
        result["threads"][n_threads] = {**facts, "types": rows}
    return result


def seconds_weights(kind: str, n_bytes: int) -> int:
    """Weights of the matrix that `seconds` makes."""
    from ggpy.quant import block_type

    return max(64, n_bytes // block_type(kind).row_bytes(N_COLS) // 16 * 16) * N_COLS


def show(result: dict) -> None:
    for n_threads, facts in result["threads"].items():
        limits = f"reading alone: {facts['bandwidth']:.1f} GB/s, dot products alone: {facts['peak']:.0f} GOP/s"
        print(f"\n{result['form']}, {n_threads} threads; {limits}")
        columns = list(next(iter(facts["types"].values())))
        print(f"{'':<6}" + "".join(f"{c:>14}" for c in columns))
        for kind, row in facts["types"].items():
            print(f"{kind:<6}" + "".join(f"{row[c]:>14.1f}" for c in columns))


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        n_threads, facts = max(result["threads"].items())
        kinds = list(facts["types"])
        label = f"{result['form']}, {n_threads} threads"
        left.plot(kinds, [facts["types"][k]["GB/s memory"] for k in kinds], "o-", label=label)
        many = [c for c in facts["types"][kinds[0]] if c.startswith("GOP")][-1]
        right.plot(kinds, [facts["types"][k][many] for k in kinds], "o-", label=label)
        right.axhline(facts["peak"], color="gray", linestyle="--", linewidth=0.8)
    left.axhline(facts["bandwidth"], color="gray", linestyle="--", label="reading alone")
    left.set_ylabel("matrix × vector, GB/s from memory")
    right.set_ylabel(f"matrix × matrix, {many}")
    for axes in (left, right):
        axes.set_ylim(0)
        axes.tick_params(axis="x", rotation=60)
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("-t", "--threads", default=str(os.cpu_count()))
    parser.add_argument("--tokens", default="8,48,512")
    parser.add_argument("--forms", default="", help="SIMD forms, each in a process of its own; default: the widest")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    threads, tokens = ([int(n) for n in text.split(",")] for text in (a.threads, a.tokens))
    if a.work:
        print(json.dumps(measure(a.types.split(","), threads, tokens)))
        return
    results = []
    for form in a.forms.split(","):
        environment = {**os.environ, **({"GGPY_SIMD": form} if form else {})}
        command = [sys.executable, __file__, "--work", "--types", a.types, "-t", a.threads, "--tokens", a.tokens]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        results[-1]["threads"] = {int(n): facts for n, facts in results[-1]["threads"].items()}
        show(results[-1])
    if a.json:
        a.json.write_text(json.dumps(results, indent=1))
    if a.png:
        plot(results, a.png)


if __name__ == "__main__":
    main()
