"""Many conversations at once: tokens per second of ggpy and of llama.cpp's batches, as llama-batched-bench measures them.

    python benchmarks/batched.py MODEL.gguf [-t 2] [-n 1,2,4,8,16,32] [-p 64] [-g 32] [-r 3] [--json OUT]
    python benchmarks/batched.py MODEL.gguf --system 1000 -n 64 [-p 20] [-g 32]

Each sequence has a prompt of its own of -p tokens; then -g steps are timed, each of one run with the next token of every
sequence and the logits after it. With --system all prompts begin alike, and what is timed is everything, from the common
prompt to the last token, the likeliest each time: in llama.cpp it is evaluated once and its cells copied to the sequences
by hand; ggpy is given whole prompts. Each round starts a fresh process of each engine, in turn; medians count.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from engines import ENGINES, read_once


def ids(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """Any tokens, others for each seed."""
    return [(7919 * (i + 1009 * seed) + 13) % n_vocab for i in range(n)]


def measure(engine: str, a: argparse.Namespace) -> dict[str, float]:
    """One engine in this process: tokens per second by number of sequences; or seconds and memory."""
    counts = [int(n) for n in a.n.split(",")]
    if a.system:
        (n,) = counts
        model = ENGINES[engine](a.model, a.system + a.prompt + a.generate, a.threads, n, shared=True)
        model.extend(ids(8, model.n_vocab))  # warms up
        model.clear()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.perf_counter()
        questions = [ids(a.prompt, model.n_vocab, 1 + i) for i in range(n)]
        answers = model.converse(ids(a.system, model.n_vocab), questions, a.generate)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"seconds": seconds, "tokens": sum(map(len, answers)), "peak_mb": peak, "more_mb": peak - before}
    rates = {}
    model = ENGINES[engine](a.model, a.prompt + a.generate + 8, a.threads, max(counts))
    for n in counts:
        model.start([ids(a.prompt, model.n_vocab, i) for i in range(n)])
        for i in range(2):  # warms up
            model.step(ids(n, model.n_vocab, 70 + i))
        started = time.perf_counter()
        for i in range(a.generate):
            model.step(ids(n, model.n_vocab, 100 + i))
        rates[str(n)] = n * a.generate / (time.perf_counter() - started)
    return rates


def child(engine: str, args: list[str], model: str) -> dict[str, float]:
    """This script in a process of its own, for one engine."""
    read_once(model)
    command = [sys.executable, str(Path(__file__).resolve()), *args, "--work", engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-n", default="1,2,4,8,16,32", help="numbers of sequences, comma-separated")
    parser.add_argument("-p", "--prompt", type=int, default=64)
    parser.add_argument("-g", "--generate", type=int, default=32)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--system", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--engines", default="ggpy,llama-cpp-python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.work:
        print(json.dumps(measure(a.work, a)), flush=True)
        return
    args, engines = sys.argv[1:], a.engines.split(",")
    results: dict[str, list[dict[str, float]]] = {e: [] for e in engines}
    for i in range(a.rounds):
        for engine in engines[i % len(engines) :] + engines[: i % len(engines)]:
            results[engine].append(child(engine, args, a.model))
    medians = {e: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for e, rounds in results.items()}
    print(f"{a.model}: {a.threads} threads, prompts of {a.system + a.prompt}, {a.generate} tokens each, {a.rounds} rounds")
    print(f"{'':<10}" + "".join(f"{e:>30}" for e in engines) + "".join(f"{'ggpy / ' + e:>26}" for e in engines[1:]))
    for key in medians[engines[0]]:
        line = f"{key:<10}"
        for e in engines:
            values = [r[key] for r in results[e]]
            line += f"{f'{medians[e][key]:.1f} ({min(values):.1f} to {max(values):.1f})':>30}"
        line += "".join(f"{medians[engines[0]][key] / medians[e][key]:>25.2f}×" for e in engines[1:])
        print(line)
    if a.json:
        a.json.write_text(json.dumps({**{k: str(v) for k, v in vars(a).items()}, "rounds": results}, indent=1))


if __name__ == "__main__":
    main()
