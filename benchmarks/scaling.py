"""Prompt and decode speed against context length and threads, ggpy and llama.cpp in turn.

    python benchmarks/scaling.py MODEL.gguf... [-t 1,2] [-d 0,512,2048,8192] [-r 3] [--json OUT] [--png OUT]

For each model, number of threads and depth (tokens in the cache before), both engines run in fresh processes, interleaved;
medians count. The time for a prompt of 512 tokens is measured once a thread count, without depth.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))

from compare_llamacpp import child
from engines import available


def measure(model: str, threads: int, depth: int, prompt: int, rounds: int, engines: list[str]) -> dict[str, dict]:
    """Medians of each engine: tok/s of decode after `depth`, of the prompt, and the peak memory in MB."""
    a = SimpleNamespace(model=model, threads=threads, prompt=prompt, decode=32, depth=depth)
    results: dict[str, list[dict]] = {e: [] for e in engines}
    for i in range(rounds):
        for engine in engines if i % 2 else reversed(engines):
            results[engine].append(child("full", engine, a)[0])
    return {e: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for e, rows in results.items()}


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = {r["model"]: Path(r["model"]).stem for r in rows}
    engines = list(rows[0]["medians"])
    runs = list(dict.fromkeys((r["model"], r["threads"]) for r in rows))
    for color, (model, threads) in enumerate(runs):
        line = [r for r in rows if (r["model"], r["threads"]) == (model, threads)]
        for engine in engines:
            style = "o-" if engine == "ggpy" else "s--"
            rates = [r["medians"][engine]["decode"] for r in line]
            label = f"{engine}, {names[model]}, {threads} threads"
            left.plot([max(r["depth"], 1) for r in line], rates, style, color=f"C{color}", label=label)
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens in the cache")
    left.set_ylabel("decode, tok/s")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend(fontsize=7)
    for i, engine in enumerate(engines):
        places = [k + 0.8 * i / len(engines) for k in range(len(runs))]
        rates = [next(r for r in rows if (r["model"], r["threads"]) == run)["medians"][engine]["prompt"] for run in runs]
        hatch = None if engine == "ggpy" else "//"
        colors = [f"C{k}" for k in range(len(runs))]
        right.bar(places, rates, 0.8 / len(engines), align="edge", color=colors, hatch=hatch, edgecolor="white")
    ticks = [k + 0.4 for k in range(len(runs))]
    right.set_xticks(ticks, [f"{names[m]}\n{t} threads" for m, t in runs], fontsize=7, rotation=30, ha="right")
    right.set_ylabel("prompt of 512, tok/s")
    right.set_title(f"{engines[0]}; hatched: {', '.join(engines[1:])}" if len(engines) > 1 else engines[0], fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("-t", "--threads", default=str(os.cpu_count()))
    parser.add_argument("-d", "--depths", default="0,512,2048,8000")
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    a = parser.parse_args()
    engines, rows = available(), []
    print(
        f"{'model':<28}{'threads':>8}{'depth':>8}{'':>4}"
        + "".join(f"{e + ', tok/s':>26}" for e in engines)
        + f"{'ratio':>8}"
    )
    for model in a.models:
        for threads in map(int, a.threads.split(",")):
            for i, depth in enumerate(map(int, a.depths.split(","))):
                medians = measure(model, threads, depth, 512 if i == 0 else 0, a.rounds, engines)
                rows.append({"model": model, "threads": threads, "depth": depth, "medians": medians})
                for key in ("prompt", "decode"):
                    if key not in medians[engines[0]]:
                        continue
                    rates = [medians[e][key] for e in engines]
                    ratio = f"{rates[0] / rates[1]:.2f}×" if len(rates) > 1 else ""
                    name = f"{Path(model).stem:<28}{threads:>8}{depth:>8}{'p' if key == 'prompt' else 'd':>4}"
                    print(name + "".join(f"{r:>26.1f}" for r in rates) + f"{ratio:>8}", flush=True)
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1))
    if a.png:
        plot(rows, a.png)


if __name__ == "__main__":
    main()
