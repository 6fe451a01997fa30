"""How much memory a model takes, in words, and what takes less."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Error

if TYPE_CHECKING:
    from ..generate.memory import MemoryUse
    from ..generate.model import Model

_STEP = 512  # tokens of a context that is proposed


def size_text(n_bytes: int) -> str:
    """A size in megabytes or gigabytes."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def memory_line(use: "MemoryUse") -> str:
    """What a model takes, part by part."""
    parts = (
        ("weights", use.weights),
        ("weights made anew", use.made),
        ("keys and values", use.cache),
        ("states", use.states),
        ("computing", use.computing),
        ("Python and the like", use.process),
    )
    words = ", ".join(f"{name} {size_text(n)}" for name, n in parts if n)
    return f"memory: about {size_text(use.total)} with a context of {use.n_ctx:,} tokens ({words})"


def memory_warning(name: str, model: "Model", free: int | None) -> str | None:
    """What to say of a model that takes more memory than there is, with what takes less; None if it fits.

    Parameters
    ----------
    name : str
        As the user named it.
    model : Model
    free : int or None
        Bytes that there are; None if unknown.
    """
    use = model.memory_use()
    needed = use.total - use.process  # that is there already
    if free is None or needed <= free:
        return None
    choices = ", ".join(_smaller(name, model, use, free))
    return (
        f"{name}: takes about {size_text(needed)}, and {size_text(free)} of memory are free: "
        f"it will be slow, or fail; {choices or 'no smaller context or type of cache'} would fit"
    )


def _smaller(name: str, model: "Model", use: "MemoryUse", free: int) -> Iterator[str]:
    """What would fit."""
    room = free - (use.total - use.process)
    by_token = use.cache / use.n_ctx
    n_ctx = int(use.n_ctx + room / by_token) // _STEP * _STEP if by_token else 0
    if n_ctx > 0:
        yield f"-c {n_ctx}"
    small = model.memory_use(kv_type="q8_0")
    if small.cache < use.cache and use.cache - small.cache + room >= 0:
        yield "--kv-type q8_0"
    if any(node.op == "MUL_MAT_ID" for node in model.graph(1)) and free > use.cache:
        yield f"--ram-budget {free // 10 * 9 >> 20}M"
    with suppress(Error):
        yield from _smaller_file(name, replace(use, weights=0), free)


def _smaller_file(name: str, rest: "MemoryUse", free: int) -> Iterator[str]:
    """The largest GGUF file of the same repository that leaves room for the rest."""
    from ..hub.download import list_remote
    from ..hub.names import models_among, parse

    reference = None if Path(name).exists() else parse(name)
    if reference is None:
        return
    files = list_remote(reference).files
    sized = [(sum(files[file].size for file in m.files), m) for m in models_among(files)]
    fitting = [(size, m) for size, m in sized if size + rest.total - rest.process <= free]
    if fitting:
        size, best = max(fitting, key=lambda pair: pair[0])
        again = replace(reference, type="" if best.type == "" else best.type, file="" if best.type else best.files[0])
        yield f"{again} ({size_text(size)})"
