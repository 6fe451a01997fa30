"""`ggpy pull`: fetch a model, or a newer version of it."""

from typing import Annotated

import typer

from .common import find_model


def pull(
    model: Annotated[str, typer.Argument(help="Such as owner/name, owner/name:Q4_K_M.", metavar="MODEL")],
) -> None:
    """Fetch a model of the Hugging Face hub, or what is new of it; convert it if it is a checkpoint."""
    path = find_model(model, fresh=True)
    print(path)
