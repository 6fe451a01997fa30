"""`ggpy rm`: remove models that are here."""

import sys
from typing import Annotated

import typer

from ..errors import Error
from .memory import size_text


def rm(
    names: Annotated[list[str], typer.Argument(help="As 'ggpy list' names them, with or without type.", metavar="NAME…")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Don't ask.")] = False,
) -> None:
    """Remove models of the hub, with their files in huggingface_hub's cache, and converted checkpoints."""
    from ..hub.kept import kept_models

    models = kept_models()
    chosen = [m for m in models if any(m.answers_to(name) for name in names)]
    for name in names:
        if not any(m.answers_to(name) for m in chosen):
            here = ", ".join(m.name for m in models[:20])
            raise Error(f"{name}: no such model here; {f'there are {here}' if here else 'there is none'}")
    for m in chosen:
        print(f"{m.name}  {size_text(m.n_bytes)}", file=sys.stderr)
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise Error("not removed: nobody can be asked; --yes removes without asking")
        if not typer.confirm("Remove?", err=True):
            raise Error("nothing was removed")
    for m in chosen:
        m.remove()
    print(f"{size_text(sum(m.n_bytes for m in chosen))} removed", file=sys.stderr)
