"""`ggpy inspect`: what is in a GGUF file."""

import json as json_format
from typing import Annotated, Any

import typer

from ..printable import printable
from .common import MODEL_HELP, find_model

_SHOWN = 6  # items of an array


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print the metadata and tensors of a GGUF file."""
    from ..file import GGUFFile

    with GGUFFile(find_model(model)) as file:
        if json:
            print(json_format.dumps(_as_json(file), indent=1))
        else:
            _print(file)


def _plain(value: Any) -> Any:
    """A metadata value as JSON has it; long arrays by their length and beginning."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return value
    first = value[:_SHOWN]
    items = first.tolist() if hasattr(first, "tolist") else list(first)
    return items if len(value) <= _SHOWN else {"length": len(value), "first": items}


def _as_json(file: Any) -> dict[str, Any]:
    tensors = [
        {"name": t.name, "type": t.type, "shape": list(t.shape), "n_bytes": t.n_bytes, "offset": t.offset}
        for t in file.tensors.values()
    ]
    metadata = {key: _plain(file.metadata[key]) for key in file.metadata}
    return {"path": str(file.path), "version": file.version, "metadata": metadata, "tensors": tensors}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        first = ", ".join(_text(v) for v in value["first"])
        return f"[{first}, …] ({value['length']:,} items)"
    if isinstance(value, list):
        return f"[{', '.join(_text(v) for v in value)}]"
    if isinstance(value, str):
        return printable(value, 80)
    return str(value)


def _print(file: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    facts = _as_json(file)
    metadata = Table("key", "value", title=f"GGUF version {file.version}", box=None, title_justify="left")
    for key, value in facts["metadata"].items():
        metadata.add_row(Text(_text(key)), Text(_text(value)))
    console.print(metadata, "")
    tensors = Table("tensor", "type", "shape", box=None)
    tensors.add_column("bytes", justify="right")
    for t in facts["tensors"]:
        tensors.add_row(Text(_text(t["name"])), t["type"], "×".join(map(str, t["shape"])), f"{t['n_bytes']:,}")
    console.print(tensors, "")
    by_type: dict[str, list[int]] = {}
    for t in facts["tensors"]:
        by_type.setdefault(t["type"], []).append(t["n_bytes"])
    kinds = ", ".join(f"{len(sizes)} {name} ({sum(sizes) / 1e6:,.1f} MB)" for name, sizes in by_type.items())
    n_values = sum(_product(t["shape"]) for t in facts["tensors"])
    console.print(Text(f"{len(facts['tensors'])} tensors, {n_values / 1e6:,.1f} M values: {kinds}"))


def _product(shape: list[int]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n
