"""`ggpy imatrix`: which columns of the weights matter for a text."""

from pathlib import Path
from typing import Annotated

import typer

from ..printable import counted
from .common import MODEL_HELP, open_model


def imatrix(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    text: Annotated[Path, typer.Argument(help="The text to run.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    n: Annotated[int | None, typer.Option("-n", "--tokens", min=1, help="Tokens of it at most; default: all.")] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=2, help="Tokens of a chunk.")] = 512,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
) -> None:
    """Measure an importance matrix for `ggpy quantize --imatrix`, in llama.cpp's form."""
    from rich.console import Console
    from rich.progress import Progress

    from ..file import folder_of, read_text
    from ..measure.importance import measure_importance
    from ..measure.perplexity import chunks_of
    from ..quantization.imatrix import write_imatrix

    folder_of(out)
    with open_model(model, ctx, threads) as opened:
        chunks = chunks_of(opened.tokenize(read_text(text), special=False)[:n], ctx)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("running the text")
            matrix = measure_importance(
                opened, chunks, str(text), lambda done, total: bar.update(task, completed=done, total=total)
            )
    write_imatrix(out, matrix)
    print(f"{out}: {len(matrix.sums)} tensors, {chunks.size} tokens in {counted(len(chunks), 'chunk')}")
    unseen = {name: int((counts == 0).sum()) for name, counts in matrix.counts.items() if (counts == 0).any()}
    if unseen:
        n_experts = sum(unseen.values())
        typer.echo(f"note: no token chose {n_experts} experts' matrices, in {counted(len(unseen), 'tensor')}", err=True)
