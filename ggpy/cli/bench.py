"""`ggpy bench`: prompt and decode speed, as llama-bench measures them."""

import json as json_format
import statistics
import time
from typing import TYPE_CHECKING, Annotated

import typer

from .common import MODEL_HELP, KVType, byte_count, open_model

if TYPE_CHECKING:
    from ..generate.model import Model


def bench(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=0, help="Tokens of the prompt; 0: no prompt.")] = 512,
    n: Annotated[int, typer.Option("-n", "--decode", min=0, help="Tokens decoded; 0: none.")] = 64,
    depth: Annotated[int, typer.Option("-d", "--depth", min=0, help="Tokens in the cache before each run.")] = 0,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    kv_type: KVType = "f16",
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Runs; the median counts.")] = 5,
    n_expert_used: Annotated[
        int | None, typer.Option("--n-expert-used", min=1, help="Experts for each token; default: as trained.")
    ] = None,
    ram_budget: Annotated[
        str | None, typer.Option("--ram-budget", help="Memory for a bigger mixture of experts: 6G, 512M.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure tokens per second: medians and spread over several runs."""
    budget = None if ram_budget is None else byte_count(ram_budget)
    how = {"kv_type": kv_type, "n_expert_used": n_expert_used, "ram_budget": budget}
    with open_model(model, depth + max(prompt, n) + 1, threads, **how) as opened:
        tests = [(f"prompt {prompt}", prompt, 0)] * (prompt > 0) + [(f"decode {n}", 0, n)] * (n > 0)
        results = []
        for name, n_prompt, n_decode in tests:
            rates = measure_rates(opened, n_prompt, n_decode, depth, repeat)
            results.append({"test": name, "median": statistics.median(rates), "min": min(rates), "max": max(rates)})
        facts = {"model": str(opened.file.path), "threads": opened.n_threads, "depth": depth, "tokens_per_second": results}
    if json:
        print(json_format.dumps(facts, indent=1))
        return
    print(f"{facts['model']}, {facts['threads']} threads, after {depth} tokens")
    for r in results:
        print(f"{r['test']:<14} {r['median']:9.1f} tok/s   (min {r['min']:.1f}, max {r['max']:.1f}, {repeat} runs)")


def measure_rates(model: "Model", n_prompt: int, n_decode: int, depth: int, repeat: int) -> list[float]:
    """Tokens per second of `repeat` runs: a prompt of n_prompt tokens and n_decode single ones, after `depth` tokens."""
    n_vocab = model.architecture.n_vocab
    ids = [(7919 * i + 13) % n_vocab for i in range(depth + max(n_prompt, n_decode))]  # any tokens do
    sequence, rates = model.new_sequence(), []
    if depth:
        sequence.extend(ids[:depth])
    for i in range(repeat + 1):
        sequence.keep(depth)
        started = time.perf_counter()
        if n_prompt:
            sequence.extend(ids[depth : depth + n_prompt])
        for token in ids[depth : depth + n_decode]:
            sequence.extend([token])
        if i > 0:  # the first warms up
            rates.append((n_prompt + n_decode) / (time.perf_counter() - started))
    return rates
