"""`ggpy convert`: a Hugging Face checkpoint to a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from .common import conversion_progress


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.", metavar="SRC")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to write; default: SRC-TYPE.gguf here.")] = None,
    type: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0 or q4_0.")] = "q8_0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: tensors, types, sizes.")] = False,
) -> None:
    """Convert a Hugging Face checkpoint (safetensors) to a GGUF file."""
    from converters import convert as convert_checkpoint

    target = out or Path(f"{Path(source).name or 'model'}-{type}.gguf")
    if dry_run:
        plan = convert_checkpoint(source, target, type, dry_run=True)
        _print_plan(plan)
        return
    with conversion_progress() as progress:
        plan = convert_checkpoint(source, target, type, progress=progress)
    print(f"{target}: {len(plan.tensors)} tensors, {target.stat().st_size / 1e6:,.1f} MB")


def _print_plan(plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "type", "shape", "bytes", box=None)
    for t in plan.tensors:
        table.add_row(t.name, t.type, "×".join(map(str, t.shape)), f"{t.n_bytes:,}")
    Console().print(table)
    print(f"{len(plan.tensors)} tensors, {plan.n_bytes:,} bytes")
