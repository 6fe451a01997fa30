"""What commands share: finding the model, showing progress."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from ..errors import Error

if TYPE_CHECKING:
    from ..generate.model import Model
    from ..kernels.build import Progress

#: of the argument of all commands that take a model
MODEL_HELP = "A .gguf file, a folder, or a model of the hub: owner/name, owner/name:Q4_K_M."
#: the option of all commands that run a model
KVType = Annotated[str, typer.Option("--kv-type", help="Type of the KV cache: f16, q8_0 or f32.")]


@contextmanager
def kernel_progress() -> Iterator["Progress"]:
    """One line on stderr that counts the kernels as they are compiled; nothing if none must be."""
    shown = False

    def progress(done: int, total: int, name: str) -> None:
        nonlocal shown
        end = "\n" if done == total else ""
        line = f"compiling kernels for this processor (once): {done}/{total} {name}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)
        elif done in (0, total):
            print(line, file=sys.stderr, flush=True)
        shown = done < total

    try:
        yield progress
    finally:
        if shown:
            print(file=sys.stderr)


@contextmanager
def conversion_progress() -> Iterator:
    """A bar on stderr for a conversion: progress(done_bytes, total_bytes, tensor)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name or "converting")

        yield progress


def find_model(model: str, type: str | None = None, fresh: bool = False) -> Path:
    """The .gguf file of a MODEL argument, with progress; see `ggpy.hub.find`."""
    from ..hub import find

    found = find(model, type, fresh)
    if found.checkpoint is None:
        return found.convert()
    print(f"converting {model} to {found.type}, once", file=sys.stderr)
    with kernel_progress() as compiling, conversion_progress() as progress:
        return found.convert(progress, compiling)


def byte_count(text: str) -> int:
    """A size as people write it: 6G, 512M, 1.5GiB, 100000; units are powers of 1024.

    Raises
    ------
    Error
        No such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise Error(f"{text!r} is no size; sizes look like 6G, 512M or 100000")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def text_of(file_or_text: str | None) -> str | None:
    """The text in a file of that name; where there is none, what was given is the text.

    Raises
    ------
    Error
        The file can't be read as UTF-8 text.
    """
    from ..file import read_text

    if file_or_text is None or "\n" in file_or_text:
        return file_or_text
    try:
        return read_text(file_or_text)
    except (OSError, ValueError):
        return file_or_text


def open_model(path: str, n_ctx: int | None, n_threads: int | None, **options: Any) -> "Model":
    """Loads the model of a MODEL argument, with progress; for the options see `Model`, for `lora` see `ggpy.load`."""
    from ..generate.model import Model
    from ..hub.adapters import read_adapters

    file = find_model(path)
    options["lora"] = read_adapters(options.get("lora"), file)
    with kernel_progress() as progress:
        return Model(file, n_ctx=n_ctx, n_threads=n_threads, progress=progress, **options)


def write_output(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file aside, moved to `path` once it is whole.

    Raises
    ------
    Error
        It can't be written; an older one is kept.
    """
    from ..file import writing_aside

    with writing_aside(path) as aside, aside.open("wb") as file:
        write(file)
