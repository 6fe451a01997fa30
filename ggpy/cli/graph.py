"""`ggpy graph`: the compute graph of a model, to look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import MODEL_HELP, find_model

if TYPE_CHECKING:
    from ..graph import Graph


def graph(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="One layer only.")] = None,
    format: Annotated[str, typer.Option("--format", help="text, mermaid or dot.")] = "text",
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens of a run.")] = 1,
    compare: Annotated[str | None, typer.Option("--compare", help="A second model, set beside the first.")] = None,
) -> None:
    """Print the compute graph: operations, shapes, types, bytes."""
    from ..errors import UnsupportedError
    from ..graph import pictures

    if format not in pictures.FORMATS:
        raise UnsupportedError(f"format {format!r}; there are {', '.join(pictures.FORMATS)}")
    first = _build(model, tokens)
    if compare is not None:
        _compare(first, _build(compare, tokens), layer if layer is not None else _last_layer(first), model, compare)
        return
    nodes = list(first) if layer is None else pictures.of_layer(first, layer)
    if not nodes:
        raise UnsupportedError(f"{model} has no layer {layer}; the last is {_last_layer(first)}")
    print(pictures.FORMATS[format](nodes))


def _build(model: str, n_tokens: int) -> "Graph":
    from ..file import GGUFFile
    from ..models import build_graph, read_architecture

    file = GGUFFile(find_model(model))
    return build_graph(file, read_architecture(file), n_tokens)


def _last_layer(graph: "Graph") -> int:
    return max((int(t.name.split(".")[1]) for t in graph if t.name.startswith("blk.")), default=0)


def _compare(a: "Graph", b: "Graph", layer: int, name_a: str, name_b: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from ..graph import pictures

    layers = [pictures.of_layer(g, min(layer, _last_layer(g))) for g in (a, b)]
    table = Table("node", *(escape(Path(n).name) for n in (name_a, name_b)), title=f"layer {layer}", title_justify="left")
    for row in pictures.side_by_side(*layers):
        table.add_row(*map(Text, row), style="" if all(row) else "bold")
    console = Console()
    console.print(table)
    for name, nodes in zip((name_a, name_b), layers, strict=True):
        stored = sum(t.attrs["weight"].n_bytes for t in nodes if t.op == "WEIGHT")
        read = sum(pictures.weight_bytes(t) for t in nodes)
        line = f"{name}: {pictures.bytes_text(stored)} of weights, {pictures.bytes_text(read)} read for one token"
        console.print(line, markup=False, highlight=False)
