"""`ggpy batch`: answer all rows of a file."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Error
from ..printable import counted
from .common import KVType, byte_count, find_model, open_model, text_of
from .sampling import sampling_values, with_sampling_flags

if TYPE_CHECKING:
    from ..batching.job import Progress, Summary
    from ..generate.model import Model

_EVERY = 30.0  # seconds between lines where there is no terminal


@with_sampling_flags
def batch(
    model: Annotated[str, typer.Argument(help="A .gguf file, a checkpoint folder or a hub id.", metavar="MODEL")],
    rows: Annotated[Path, typer.Argument(help="JSON lines or .parquet; OpenAI's requests too.", metavar="IN")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON lines or .parquet; what is there is kept.")],
    ordered: Annotated[bool, typer.Option("--ordered", help="Results in the rows' order, not as they come.")] = False,
    embed: Annotated[bool, typer.Option("--embed", help="Embed the prompts.")] = False,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="A text that may follow the prompts: which does? May be repeated.")
    ] = None,
    shard: Annotated[str, typer.Option("--shard", help="I/N: only each N-th row, from the I-th on.")] = "1/1",
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", min=-1, help="Tokens at most; -1: no limit.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends an answer; may be repeated.")] = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", min=0, help="Log-probabilities, also of this many of the likeliest tokens.")
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option("--json-schema", help="Answers are JSON that this schema allows; {}: any.", metavar="FILE_OR_TEXT"),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option("--grammar", help="Answers keep to this grammar, in Lark or GBNF.", metavar="FILE_OR_TEXT"),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="This regular expression matches each whole answer.", metavar="TEXT")
    ] = None,
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", min=1, help="Tokens of context.")] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    kv_type: KVType = "f16",
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="A Ray cluster that does the work: HOST:PORT, ray://…, auto, local.", metavar="ADDRESS"),
    ] = None,
    stages: Annotated[
        int, typer.Option("--stages", min=1, help="Processes, or nodes of --ray, that share the model's layers.")
    ] = 1,
    ram_budget: Annotated[
        str | None, typer.Option("--ram-budget", help="Memory for a bigger mixture of experts: 6G, 512M.")
    ] = None,
    **sampling: Any,
) -> None:
    """Answer all rows of a file, many at once. Ended at whatever moment, the same command goes on."""
    from ..batching import batch as run

    kept_to = {"json_schema": text_of(json_schema), "grammar": text_of(grammar), "regex": regex}
    given = {"max_tokens": max_tokens, "stop": stop, "logprobs": logprobs, **kept_to}
    options = {name: value for name, value in given.items() if value is not None} | sampling_values(sampling)
    budget = None if ram_budget is None else byte_count(ram_budget)
    how: dict[str, Any] = {"ordered": ordered, "embed": embed, "labels": label or (), "shard": _shard(shard)}
    load = {"kv_type": kv_type, "ram_budget": budget, "stages": stages}
    with ExitStack() as stack:
        opened: Model | Path
        if ray is None:
            opened = stack.enter_context(open_model(model, ctx, threads, **load))
        else:
            opened, how["ray"], how["load"] = find_model(model), ray, {"n_ctx": ctx, "n_threads": threads, **load}
        progress = stack.enter_context(_progress())
        try:
            summary = run(opened, rows, output, progress=progress, **how, **options)
        except KeyboardInterrupt:
            print(f"{output} has what was whole; the same command goes on", file=sys.stderr)
            raise
    print(_words(summary), file=sys.stderr)


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise Error(f"a shard is written as I/N, such as 1/4, not {text!r}")
    return int(part), int(parts)


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar on stderr; on no terminal a line now and then."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def line(summary: "Summary") -> None:
            nonlocal shown
            if time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                print(_words(summary), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=None, rate=0.0)

        def update(summary: "Summary") -> None:
            done = summary.n_before + summary.n_new
            bar.update(task, total=summary.n_rows, completed=done, rate=summary.rate)

        yield update


def _words(summary: "Summary") -> str:
    before = f", {summary.n_before} of them before" if summary.n_before else ""
    errors = f"; {counted(summary.n_errors, 'error')}" if summary.n_errors else ""
    done = summary.n_before + summary.n_new
    tokens = f"{summary.prompt_tokens:,} tokens read, {summary.completion_tokens:,} written ({summary.rate:,.0f}/s)"
    return f"{done} of {summary.n_rows} rows{before}{errors}; {tokens} in {summary.seconds:.1f} s"
