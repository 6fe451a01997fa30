"""`ggpy profile`: where the time goes, from the tape itself."""

import json as json_format
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from .common import MODEL_HELP, KVType, kernel_progress, open_model

if TYPE_CHECKING:
    from ..generate.model import Model
    from ..graph.plan import Step
    from ..measure.limits import Limits


def profile(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=0, help="Tokens of a prompt; 0: decode one token.")] = 0,
    depth: Annotated[int, typer.Option("-d", "--depth", min=0, help="Tokens in the cache before.")] = 64,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    kv_type: KVType = "f16",
    repeat: Annotated[int, typer.Option("-r", "--repeat", min=1, help="Runs; the median counts.")] = 9,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Sum by layer instead of by kernel.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show the time, bytes and operations of each kernel or layer in a run, beside what this machine can do.

    The limits are measured on the spot: reading memory, and int8 dot products, with nothing else. Matrices that stay in a
    cache may exceed the first.
    """
    from ..measure.limits import measure_limits

    with open_model(model, depth + max(prompt, 1), threads, kv_type=kv_type) as opened:
        rows, seconds = _measure(opened, max(prompt, 1), depth, repeat, by_layer)
        with kernel_progress() as progress:
            limits = measure_limits(opened.n_threads, progress)
        for row in rows:
            nearer = max(row["bytes"] / limits.bytes_per_second, row["operations"] / limits.operations_per_second)
            row["share_of_limit"] = nearer / row["seconds"] if row["seconds"] else 0.0
        facts = {"model": str(opened.file.path), "threads": opened.n_threads, "tokens": max(prompt, 1), "depth": depth}
    if json:
        print(json_format.dumps({**facts, "limits": limits._asdict(), "seconds": seconds, "rows": rows}, indent=1))
        return
    _print(facts, limits, rows, seconds)


def _measure(model: "Model", n: int, depth: int, repeat: int, by_layer: bool) -> tuple[list[dict[str, Any]], float]:
    """Rows of (name, seconds, bytes of weights, operations), the longest first, and the seconds of a whole run."""
    sequence = model.new_sequence()
    ids = [(7919 * i + 13) % model.architecture.n_vocab for i in range(depth + n)]
    if depth:
        sequence.extend(ids[:depth])
    steps: list[Step] = []
    times, totals = [], []
    for i in range(repeat + 1):
        sequence.keep(depth)
        started = time.perf_counter()
        steps, clock = sequence.profile(ids[depth:])
        totals.append(time.perf_counter() - started)
        if i > 0:  # the first warms up
            times.append(np.diff(clock))
    ticks = np.median(times, axis=0)
    seconds = statistics.median(totals[1:])
    # The clock's rate follows from whole runs: all but some microseconds of them is the tape.
    tick = seconds / ticks.sum()
    rows: dict[str, dict[str, Any]] = {}
    for step, t in zip(steps, ticks, strict=True):
        layer = step.node.name.split(".")[1] if step.node.name.startswith("blk.") else "-"
        name = f"layer {layer}" if by_layer else step.kernel
        row = rows.setdefault(name, {"name": name, "steps": 0, "seconds": 0.0, "bytes": 0, "operations": 0})
        n_bytes, operations = _work(step, n)
        row["steps"] += 1
        row["seconds"] += float(t) * tick
        row["bytes"] += n_bytes
        row["operations"] += operations
    return sorted(rows.values(), key=lambda r: -r["seconds"]), seconds


def _work(step: "Step", n_tokens: int) -> tuple[int, int]:
    """Bytes of weights that a step reads, and its multiplications and additions."""
    if not step.kernel.startswith("mul_mat"):
        return 0, 0
    p, node = step.params, step.node
    product = node if node.op.startswith("MUL_MAT") else next(i for i in node.inputs if i.op.startswith("MUL_MAT"))
    weight = product.inputs[0]
    one_matrix = weight.attrs["weight"].n_bytes // (weight.shape[0] if len(weight.shape) == 3 else 1)
    n_matrices = p["n_slots"]
    n = 1 if product.shape[0] == 1 or product.per == "output" else n_tokens
    per_token = product.shape[1] if product.op == "MUL_MAT_ID" else n_matrices
    return one_matrix * n_matrices, 2 * n * per_token * weight.shape[-1] * weight.shape[-2]


def _print(facts: dict[str, Any], limits: "Limits", rows: list[dict[str, Any]], seconds: float) -> None:
    rate = facts["tokens"] / seconds
    print(
        f"{facts['model']}, {facts['threads']} threads: {facts['tokens']} tokens after {facts['depth']}, {rate:.1f} tok/s"
    )
    peaks = (limits.bytes_per_second / 1e9, limits.operations_per_second / 1e9)
    print("limits: reading alone {:.1f} GB/s, int8 dot products alone {:.0f} GOP/s".format(*peaks))
    print(f"{'':<28}{'steps':>6}{'ms':>10}{'share':>8}{'GB/s':>8}{'GOP/s':>9}{'of limit':>10}")
    for r in rows:
        gb, gop = (r[k] / r["seconds"] / 1e9 if r["seconds"] else 0.0 for k in ("bytes", "operations"))
        speeds = f"{gb:8.1f}{gop:9.1f}{r['share_of_limit']:10.0%}" if r["bytes"] else ""
        print(f"{r['name']:<28}{r['steps']:>6}{1e3 * r['seconds']:>10.3f}{r['seconds'] / seconds:>8.1%}{speeds}")
    print(f"{'all':<28}{sum(r['steps'] for r in rows):>6}{1e3 * seconds:>10.3f}")
