"""Sequences in files: their tokens, keys and values, as safetensors with the model's digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ContextFullError, Error
from ..file.aside import writing_aside
from ..graph import pages_of
from ..kernels.table import SLAB

if TYPE_CHECKING:
    from .runner import Runner
    from .sequence import TokenSequence

_FORMAT = "ggpy sequence 1"
_DTYPES = {"uint8": "U8", "int32": "I32"}
_SAMPLE = 4096  # bytes at each end of a tensor that stand for it


def digest(runner: "Runner") -> str:
    """What tells a model from others: a hash of its metadata, of each tensor's name, shape, type, first and last bytes, of
    its adapters, and of how it is run."""
    found = hashlib.sha256(repr((runner.pages.type, SLAB, runner.arch)).encode())
    for key, value in runner.file.metadata.items():
        found.update(repr((key, value if not isinstance(value, np.ndarray) else value.tobytes())).encode())
    for name, tensor in runner.file.tensors.items():
        data = tensor.data.reshape(-1)
        found.update(repr((name, tensor.shape, tensor.type)).encode())
        found.update(data[:_SAMPLE].tobytes() + data[-_SAMPLE:].tobytes())
    for name, pair in runner.adapters.items():
        found.update(repr((name, pair.a.shape)).encode() + pair.a.tobytes() + pair.b.tobytes())
    return found.hexdigest()


def save_sequence(sequence: "TokenSequence", runner: "Runner", path: Path) -> None:
    """See `TokenSequence.save`."""
    runner.check()
    if runner.hooks:
        raise Error(f"{path}: not written; the model has hooks, which may have changed the sequence's values")
    with runner.lock:
        sequence.settle()
        arrays = runner.pages.read(sequence.pages[: pages_of(len(sequence.ids))])
        arrays |= runner.pages.states.read([sequence.slot] if sequence.slot >= 0 else [])
        arrays["ids"] = np.array(sequence.ids, np.int32)
    with writing_aside(path) as aside:
        write_arrays(aside, arrays, {"format": _FORMAT, "model": digest(runner)})


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays of bytes or int32 as safetensors. The package's own function writes to a file of another name first,
    which stays where the process is killed."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        head[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


def load_sequence(sequence: "TokenSequence", runner: "Runner", path: Path) -> None:
    """See `Model.load_sequence`; `sequence` is empty."""
    from safetensors import SafetensorError, safe_open

    runner.check()
    if path.exists() and not path.is_file():
        raise Error(f"{path}: not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise Error(f"{path}: no saved sequence")
            if metadata.get("model") != digest(runner):
                raise Error(f"{path}: a sequence of another model, or of this one with other options")
            # What the file says of itself is compared before anything is read.
            found = {}
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                found[name] = (stored.get_dtype(), tuple(stored.get_shape()))
            n = _n_ids(found.pop("ids", ("", ())))
            with runner.lock:  # other processes may have them
                pages, states = runner.pages.read([]), runner.pages.states.read([])
            expected = {name: ("U8", (pages_of(n), a.shape[1])) for name, a in pages.items()}
            expected |= {name: ("U8", (int(n > 0), a.shape[1])) for name, a in states.items()}
            if found != expected:
                raise Error(f"{path}: damaged: its arrays have other shapes than a sequence of {n} tokens")
            if n > runner.n_ctx:
                raise ContextFullError(f"{path}: {n} tokens don't fit into a context of {runner.n_ctx}")
            ids = file.get_tensor("ids").tolist() if n else []
            arrays = {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError, ValueError) as error:
        raise Error(f"{path}: {error}") from None
    with runner.lock:
        runner.check_ids(ids)
        sequence.make_room(n)
        runner.pages.write(sequence.pages, arrays)
        if sequence.slot >= 0:
            runner.pages.states.write([sequence.slot], arrays)
        sequence.advance(ids)


def _n_ids(stored: tuple[str, tuple[int, ...]]) -> int:
    """How many token ids an array of this type and shape has; none if it isn't one of token ids."""
    dtype, shape = stored
    return shape[0] if dtype == "I32" and len(shape) == 1 else 0
