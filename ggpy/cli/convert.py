"""`ggpy convert`: a Hugging Face checkpoint to a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import conversion_progress, kernel_progress

if TYPE_CHECKING:
    from converters.conversion import Plan


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.", metavar="SRC")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to write; default: SRC-TYPE.gguf here.")] = None,
    type: Annotated[str, typer.Option("--type", help="Such as f16, bf16, q8_0, q4_k_m.")] = "q8_0",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", help="A LoRA adapter's folder to merge, or FOLDER:SCALE; may be repeated.", metavar="FOLDER"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: tensors, types, sizes.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run a few tokens through transformers, too, and compare.")
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint (safetensors, or PyTorch's .bin) to a GGUF file."""
    from converters import convert as convert_checkpoint
    from converters import verify as verify_file

    target = out or Path(f"{Path(source).name or 'model'}-{type}.gguf")
    if dry_run:
        plan = convert_checkpoint(source, target, type, dry_run=True, lora=lora or ())
        _print_plan(plan)
        _print_notes(plan)
        return
    with kernel_progress() as compiling, conversion_progress() as progress:
        plan = convert_checkpoint(source, target, type, lora=lora or (), progress=progress, kernel_progress=compiling)
    _print_notes(plan)
    from ..file import GGUFFile

    with GGUFFile(target) as file:
        print(f"{target}: {len(file.tensors)} tensors, {target.stat().st_size / 1e6:,.1f} MB")
    if verify:
        with kernel_progress() as compiling:
            found = verify_file(source, target, kernel_progress=compiling)
        print(
            f"like transformers: the same best token {found.n_same} of {found.n_tokens} times, "
            f"mean KL divergence {found.kl:.6f}"
        )


def _print_notes(plan: "Plan") -> None:
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)


def _print_plan(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "type", "shape", "bytes", box=None)
    for t in plan.tensors:
        table.add_row(t.name, t.type, "×".join(map(str, t.shape)), f"{t.n_bytes:,}")
    Console().print(table)
    print(f"{len(plan.tensors)} tensors, {plan.n_bytes:,} bytes")
