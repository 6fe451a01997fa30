"""`ggpy compare`: which quantization of a model should I run?"""

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import find_model

if TYPE_CHECKING:
    from ..measure.levels import Comparison


def compare(
    model: Annotated[str, typer.Argument(help="A .gguf file of 16 or 32 bits, or a checkpoint.", metavar="MODEL")],
    text: Annotated[Path, typer.Option("--text", help="The text to measure on.")],
    types: Annotated[
        str, typer.Option("--types", help="File types, separated by commas.")
    ] = "q8_0,q6_k,q5_k_m,q4_k_m,q4_0,q3_k_m,q2_k",
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="An importance matrix (GGUF) to quantize with.", metavar="F")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for files and results; default: NAME-levels.")] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=4, help="Tokens of a chunk.")] = 512,
    n: Annotated[
        int, typer.Option("-n", "--chunks", min=1, help="Chunks at most; the base's log-probabilities take space.")
    ] = 32,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Quantize a model in several ways and measure each: size, perplexity, divergence, speed, memory.

    Stopped, it goes on where it was when called again.
    """
    from rich.console import Console

    from ..measure.levels import compare_levels
    from ..measure.report import write_reports

    name = Path(model).name.removesuffix(".gguf")
    folder = out or Path(f"{name}-levels")
    wanted = [t.strip() for t in types.split(",") if t.strip()]
    base = find_model(model, "f16")
    with Console(stderr=True).status("", spinner="line") as status:

        def progress(level: str, state: str) -> None:
            status.update(f"{level}: {state}")

        comparison = compare_levels(
            base,
            name,
            wanted,
            text,
            folder,
            imatrix=imatrix,
            n_ctx=ctx,
            n_chunks=n,
            n_threads=threads,
            progress=progress,
        )
    paths = write_reports(comparison, folder)
    if json:
        print(json_format.dumps(comparison.as_dict(), indent=1))
        return
    print_table(comparison)
    print("\n".join(map(str, paths)), file=sys.stderr)


def print_table(comparison: "Comparison") -> None:
    """The levels as a table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    from ..measure.report import table, title

    titles, rows = table(comparison)
    grid = Table(box=None, title=title(comparison))
    for i, column in enumerate(titles):
        grid.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    Console(width=200).print(grid)  # in a narrow terminal lines run over, but no number is cut off
