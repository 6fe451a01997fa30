"""`ggpy quantize`: a GGUF model with other block types."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import conversion_progress, kernel_progress

if TYPE_CHECKING:
    from ..quantize import Plan


def quantize(
    source: Annotated[Path, typer.Argument(help="A .gguf model; of a split one any file.", metavar="IN")],
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT")],
    type: Annotated[str, typer.Argument(help="Such as q4_k_m, q8_0, iq4_xs, f16; copy.", metavar="TYPE")],
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="An importance matrix (GGUF).", metavar="F")] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option("--tensor-type", help="A type for the tensors whose names match.", metavar="PATTERN=TYPE"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: tensors, types, sizes.")] = False,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Default: the physical cores.", min=1)] = None,
) -> None:
    """Quantize a GGUF model: each tensor gets the type that llama.cpp's mix of this name gives it."""
    from ..quantize import Override, quantize_model

    overrides = [Override.parse(text) for text in tensor_type or ()]
    run = partial(quantize_model, source, out, type, imatrix=imatrix, overrides=overrides, n_threads=threads)
    if dry_run:
        plan = run(dry_run=True)
        _print_plan(plan)
    else:
        with kernel_progress() as compiling, conversion_progress() as progress:
            plan = run(progress=progress, kernel_progress=compiling)
    _print_notes(plan)
    print(f"{out}: {len(plan.steps)} tensors, {plan.n_bytes / 1e6:,.1f} MB, {plan.bits_per_weight:.2f} bits per weight")


def _print_plan(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("tensor", "shape", "from", "to", box=None)
    table.add_column("bytes", justify="right")
    for step in plan.steps:
        shape = "×".join(map(str, step.shape))
        table.add_row(Text(step.name), shape, step.old_type, step.new_type, f"{step.new_bytes:,}")
    Console().print(table)


def _print_notes(plan: "Plan") -> None:
    """What a user should know of the result."""
    if plan.decoded_again:
        n = len(plan.decoded_again)
        typer.echo(f"note: {n} tensors were quantized already: what they lost stays lost", err=True)
    if plan.without_importance:
        names = ", ".join(plan.without_importance[:3]) + (", …" if len(plan.without_importance) > 3 else "")
        typer.echo(f"note: the importance matrix has nothing for {len(plan.without_importance)} tensors: {names}", err=True)
