"""`ggpy list`: the models that are here."""

import json as json_format
import time
from typing import Annotated

import typer

from .memory import size_text


def list(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the models that were fetched from the hub, and the checkpoints that were converted."""
    from ..hub.kept import kept_models

    models = kept_models()
    if json:
        facts = [{**vars(m), "paths": [str(path) for path in m.paths]} for m in models]
        print(json_format.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "type", box=None)
    for column in ("size", "used"):
        table.add_column(column, justify="right")
    table.add_column("")
    for m in models:
        kind = "" if m.kind == "hub" else m.kind
        table.add_row(Text(m.name), m.type, size_text(m.n_bytes), _ago(time.time() - m.used), kind)
    Console().print(table)


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        n = int(seconds // length)
        if n:
            return f"{n} {unit}{'s' if n > 1 else ''} ago"
    return "now"
