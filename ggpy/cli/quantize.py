"""`ggpy quantize`: a GGUF model with other block types."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Error
from ..printable import counted
from .common import MODEL_HELP, byte_count, conversion_progress, find_model, kernel_progress

if TYPE_CHECKING:
    from ..quantization import Plan


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="IN")],
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT")],
    type: Annotated[
        str | None, typer.Argument(help="Such as q4_k_m, q8_0, iq4_xs, f16; copy.", metavar="[TYPE]", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="An importance matrix (GGUF or .dat).", metavar="F")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option("--tensor-type", help="A type for the tensors whose names match.", metavar="PATTERN=TYPE"),
    ] = None,
    target_size: Annotated[
        str | None, typer.Option("--target-size", help="Choose types: the best file of this size.", metavar="SIZE")
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option("--target-kl", help="Choose types: the smallest file that diverges by this.", metavar="KL"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="For a target: the text to measure divergence on.", metavar="F")
    ] = None,
    keep_split: Annotated[bool, typer.Option("--keep-split", help="Split the new model as the old one is.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan: tensors, types, sizes.")] = False,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Default: the physical cores.", min=1)] = None,
) -> None:
    """Quantize a GGUF model: each tensor gets the type that llama.cpp's mix of this name gives it, or, with a target, the
    type that its measured sensitivity calls for."""
    from ..quantization import Override, quantize_model

    if sum(given is not None for given in (type, target_size, target_kl)) != 1:
        raise Error("name a type, or --target-size, or --target-kl")
    if (text is None) == (type is None):
        raise Error("targets need --text, and nothing else does")
    source = find_model(model, "f16")
    overrides = [Override.parse(text) for text in tensor_type or ()]
    if type is None:
        assert text is not None
        size = None if target_size is None else byte_count(target_size)
        _choose(
            source, out, text, size, target_kl, imatrix=imatrix, overrides=overrides, dry_run=dry_run, n_threads=threads
        )
        return
    run = partial(
        quantize_model, source, out, type, imatrix=imatrix, overrides=overrides, keep_split=keep_split, n_threads=threads
    )
    if dry_run:
        plan = run(dry_run=True)
        _print_plan(plan)
    else:
        with kernel_progress() as compiling, conversion_progress() as progress:
            plan = run(progress=progress, kernel_progress=compiling)
    _print_notes(plan)
    _print_size(plan)


def _choose(
    source: Path, out: Path, text: Path, size: int | None, kl: float | None, *, dry_run: bool, **options: Any
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from ..measure.choose import quantize_to_target

    with kernel_progress() as compiling, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        choice = quantize_to_target(
            source,
            out,
            text,
            size=size,
            kl=kl,
            dry_run=dry_run,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            kernel_progress=compiling,
            **options,
        )
    if dry_run:
        _print_plan(choice.plan)
    _print_notes(choice.plan)
    _print_size(choice.plan)
    print(f"the file has {choice.n_bytes:,} bytes")
    print(f"KL divergence on {text}: {choice.kl:.6f} ± {choice.kl_error:.6f}; {choice.expected_kl:.6f} was expected")


def _print_size(plan: "Plan") -> None:
    print(
        f"{plan.path}: {len(plan.steps)} tensors, {plan.n_bytes / 1e6:,.1f} MB, {plan.bits_per_weight:.2f} bits per weight"
    )


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
        n = counted(len(plan.decoded_again), "tensor")
        typer.echo(f"note: quantized already: {n}; what they lost stays lost", err=True)
    if plan.without_importance:
        names = ", ".join(plan.without_importance[:3]) + (", …" if len(plan.without_importance) > 3 else "")
        typer.echo(
            f"note: the importance matrix has nothing for {counted(len(plan.without_importance), 'tensor')}: {names}",
            err=True,
        )
