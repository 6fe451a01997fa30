"""`ggpy inspect`: what is in a GGUF file."""

import json as json_format
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Error
from ..printable import counted, printable
from .common import MODEL_HELP, find_model
from .memory import memory_line, size_text

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..generate.memory import MemoryUse

_SHOWN = 6  # items of an array


def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    lint: Annotated[
        bool, typer.Option("--lint", help="Print what looks wrong or dangerous instead; exit code 1 if there are errors.")
    ] = False,
) -> None:
    """Print the metadata and tensors of a GGUF file, and what it takes to run it."""
    if lint:
        raise typer.Exit(_lint(find_model(model), json))
    from ..file import GGUFFile

    with GGUFFile(find_model(model)) as file:
        use = _memory(file)
        if json:
            print(
                json_format.dumps(_as_json(file) | ({"memory": {**vars(use), "total": use.total}} if use else {}), indent=1)
            )
        else:
            _print(file)
            if use is not None:
                more = use.with_context(use.n_ctx + 1024).cache - use.cache
                print(f"{memory_line(use)}; each 1,024 tokens more {size_text(more)}")


def _lint(path: Path, json: bool) -> int:
    """Prints what is found; the exit code."""
    from ..generate.lint import lint

    found = lint(path)
    if json:
        print(json_format.dumps([vars(finding) for finding in found], indent=1))
    else:
        for finding in found:
            print(finding)
        counts = ", ".join(counted(sum(f.level == level for f in found), level) for level in ("error", "warning"))
        print(f"{path}: {counts}")
    return int(any(finding.level == "error" for finding in found))


def _memory(file: "GGUFFile") -> "MemoryUse | None":
    """What the model takes with the context that it gets by default; None of what can't be run."""
    from ..cpus import default_threads
    from ..generate.memory import memory_use
    from ..generate.model import DEFAULT_CONTEXT
    from ..models import read_architecture

    with suppress(Error):
        architecture = read_architecture(file, n_ctx=DEFAULT_CONTEXT)
        return memory_use(file, architecture, min(architecture.n_ctx_train, DEFAULT_CONTEXT), default_threads())
    return None


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
