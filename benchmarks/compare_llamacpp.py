"""ggpy against llama.cpp: the same file, the same threads, in turn.

    python benchmarks/compare_llamacpp.py MODEL.gguf [-t 2] [-p 512] [-n 64] [-d 0] [-r 5] [--json OUT]

Each round starts a fresh process of each engine, one after the other, so that drifting clocks and noisy neighbours hit all
alike, with the file in the page cache; the medians over rounds count, and the spread is printed. Engines: ggpy,
llama-cpp-python and xllamacpp, as far as they are installed (a llama-cpp-python compiled on this machine is the one to
beat; xllamacpp is a prebuilt wheel), and with --engines also ik-llama-cpp-python and transformers. `first token` is a whole
process: start, import, load, a prompt of 5 tokens, one token. `peak` is the resident memory at the end's maximum, mapped
file included.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from engines import ENGINES, available, read_once

MEASURES = {
    "load": ("s", False),
    "first_token": ("s", False),
    "prompt": ("tok/s", True),
    "decode": ("tok/s", True),
    "peak": ("MB", False),
}


def _ids(n: int, n_vocab: int) -> list[int]:
    return [(7919 * i + 13) % n_vocab for i in range(n)]


def _work_direct(engine: str, a: argparse.Namespace) -> dict[str, float]:
    """Measures one engine in this process, through its own calls."""
    started = time.perf_counter()
    model = ENGINES[engine](a.model, a.depth + max(a.prompt, a.decode) + 8, a.threads)
    load = time.perf_counter() - started
    ids = _ids(a.depth + max(a.prompt, a.decode), model.n_vocab)
    model.extend(ids[:8])  # warms up
    model.extend(ids[:1])
    model.clear()
    result = {"load": load}
    if a.depth:
        model.extend(ids[: a.depth])
    if a.decode:
        started = time.perf_counter()
        for token in ids[a.depth : a.depth + a.decode]:
            model.extend([token])
        result["decode"] = a.decode / (time.perf_counter() - started)
    if a.prompt:
        model.clear()
        started = time.perf_counter()
        model.extend(ids[: a.prompt])
        result["prompt"] = a.prompt / (time.perf_counter() - started)
    return result


def _work_xllamacpp(a: argparse.Namespace) -> dict[str, float]:
    """xllamacpp is a server in a box: its own timings are taken."""
    import xllamacpp as api

    started = time.perf_counter()
    params = api.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = a.model, a.depth + max(a.prompt, a.decode) + 8, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = a.threads
    params.n_gpu_layers = 0
    server = api.Server(params)
    result = {"load": time.perf_counter() - started}
    common = {"temperature": 0, "cache_prompt": False, "ignore_eos": True}
    ids = _ids(max(a.prompt, 1), 4096)
    server.handle_completions({"prompt": ids[:8], "n_predict": 2, **common})
    if a.prompt:
        timings = server.handle_completions({"prompt": ids, "n_predict": 1, **common})["timings"]
        result["prompt"] = timings["prompt_per_second"]
    if a.decode:
        timings = server.handle_completions({"prompt": ids[:1], "n_predict": a.decode, **common})["timings"]
        result["decode"] = timings["predicted_per_second"]
    return result


def _work_first(engine: str, a: argparse.Namespace) -> None:
    model = ENGINES[engine](a.model, 64, a.threads)
    int(model.extend(_ids(5, model.n_vocab)).argmax())


def child(mode: str, engine: str, a: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Runs this script for one measurement; its result and its seconds."""
    read_once(a.model)
    sizes = ["-t", a.threads, "-p", a.prompt, "-n", a.decode, "-d", a.depth]
    command = [sys.executable, str(Path(__file__).resolve()), a.model, "--work", f"{mode}:{engine}", *map(str, sizes)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{engine} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return (json.loads(lines[-1]) if lines else {}), seconds


def _round(engine: str, a: argparse.Namespace) -> dict[str, float]:
    result, _ = child("full", engine, a)
    if engine != "xllamacpp":
        _, result["first_token"] = child("first", engine, a)
    return result


def _print(engines: list[str], medians: dict, spreads: dict) -> None:
    print(f"{'':<12}" + "".join(f"{e:>26}" for e in engines) + "".join(f"{'ggpy / ' + e:>28}" for e in engines[1:]))
    for key, (unit, _) in MEASURES.items():
        if key not in medians[engines[0]]:
            continue
        line = f"{key.replace('_', ' '):<12}"
        for e in engines:
            value = f"{medians[e][key]:.2f} {unit} ±{spreads[e][key]:.0f} %" if key in medians[e] else "–"
            line += f"{value:>26}"
        for e in engines[1:]:
            ratio = f"{medians['ggpy'][key] / medians[e][key]:.2f}×" if key in medians[e] else "–"
            line += f"{ratio:>28}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--decode", type=int, default=64)
    parser.add_argument("-d", "--depth", type=int, default=0)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--engines", default="", help="comma-separated; default: all that are installed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.work:
        mode, engine = a.work.split(":")
        if mode == "first":
            _work_first(engine, a)
            return
        result = _work_xllamacpp(a) if engine == "xllamacpp" else _work_direct(engine, a)
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result), flush=True)
        return
    engines = [e for e in a.engines.split(",") if e] or available()
    if not a.engines and importlib.util.find_spec("xllamacpp"):
        engines.append("xllamacpp")
    if "ggpy" in engines:
        child("first", "ggpy", a)  # compiles its kernels, which happens once per machine
    results: dict[str, list[dict[str, float]]] = {e: [] for e in engines}
    for i in range(a.rounds):
        for engine in engines[i % len(engines) :] + engines[: i % len(engines)]:
            results[engine].append(_round(engine, a))
    medians, spreads = {}, {}
    for engine, rounds in results.items():
        medians[engine] = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
        half = {k: (max(r[k] for r in rounds) - min(r[k] for r in rounds)) / 2 for k in rounds[0]}
        spreads[engine] = {k: 100 * half[k] / medians[engine][k] for k in half}
    print(
        f"{a.model}: {a.threads} threads, prompt {a.prompt}, decode {a.decode} after {a.depth}, {a.rounds} rounds, medians"
    )
    _print(engines, medians, spreads)
    if a.json:
        facts = {"model": a.model, "threads": a.threads, "prompt": a.prompt, "decode": a.decode, "rounds": results}
        a.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
