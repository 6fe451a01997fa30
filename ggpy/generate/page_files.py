"""Pages of keys and values, and states, in files: what was computed outlives the process that did."""

import hashlib
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ContextFullError, Error
from ..file import writing_aside
from ..kernels.table import SLAB
from .prefixes import Prefix
from .saved import digest, write_arrays

if TYPE_CHECKING:
    from .runner import Runner

_log = logging.getLogger(__name__)

_FORMAT = "ggpy page 1"
_PAGE, _STATE = ".page", ".state"
_MOST_WAITING = 1 << 28  # bytes that wait to be written; what comes then is left out
_ROOM_PARTS = 32  # of the budget: how much is written before files are counted again
_OLD_PART = 3600.0  # seconds after which a file that a killed process has begun is removed


class PageFiles:
    """A folder with pages that a model has computed.

    A page is a file, named by the model and all tokens up to its end; a state, where models have some, is one beside it. So
    a prompt's pages are found one after the other, whoever wrote them. They are written by a thread of its own, each
    aside, so that a process that is killed loses what it had no time to write. Those used longest ago make room.

    Parameters
    ----------
    runner : Runner
    folder : Path
    n_bytes : int
        That all files in it may take together, those of other models included.

    Raises
    ------
    Error
        The folder can't be made.
    """

    def __init__(self, runner: "Runner", folder: Path, n_bytes: int):
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)  # conversations are private
        except OSError as error:
            raise Error(f"{folder}: {error.strerror}") from None
        self._runner, self._folder, self._n_bytes = runner, folder, n_bytes
        self._model = digest(runner)
        self._queue: queue.SimpleQueue[tuple[Path, dict[str, np.ndarray]] | None] = queue.SimpleQueue()
        self._n_waiting = 0
        self._lock = threading.Lock()  # of that number
        self._thread = threading.Thread(target=self._write_all, name="ggpy page files", daemon=True)
        self._thread.start()

    # Both are called with the runner's lock held

    def keep(self, prefix: Prefix) -> None:
        """Writes a page, and its state if there is a snapshot, unless that was done."""
        pages, snapshot = self._runner.pages, prefix.snapshot
        if len(prefix.ids) != SLAB or self._runner.hooks:
            return
        if not prefix.is_kept:
            prefix.is_kept = self._put(self._path(prefix, _PAGE), pages.read([prefix.page]), prefix.ids)
        if snapshot is not None and snapshot.slot >= 0 and not snapshot.is_kept:
            snapshot.is_kept = self._put(self._path(prefix, _STATE), pages.states.read([snapshot.slot]), prefix.ids)

    def find(self, tokens: Sequence[int]) -> None:
        """Puts into the tree of prefixes what files have of the whole pages of a prompt, behind those that it knows."""
        runner = self._runner
        if runner.hooks:
            return
        known = [runner.prefixes.root]
        pieces = [tuple(tokens[at : at + SLAB]) for at in range(0, len(tokens) - SLAB + 1, SLAB)]
        for ids in pieces:
            child = known[-1].children.get(ids)
            if child is None:
                break
            known.append(child)
        # Prefixes that may come to be, to know their files' names.
        path = list(known)
        for ids in pieces[len(known) - 1 :]:
            path.append(Prefix(-1, ids, path[-1]))
            if not self._path(path[-1], _PAGE).is_file():
                path.pop()
                break
        if runner.has_states:
            while len(path) > 1 and path[-1].slot < 0 and not self._path(path[-1], _STATE).is_file():
                path.pop()
        if len(path) > len(known) or (runner.has_states and len(path) > 1 and path[-1].slot < 0):
            self._load(known[: len(path)], path)
        for prefix in reversed(known[1:]):  # a page is of no use without those before it: these go last
            self._touch(prefix)

    def _load(self, known: list[Prefix], path: list[Prefix]) -> None:
        runner, pages, prefixes = self._runner, self._runner.pages, self._runner.prefixes
        held, form = [prefix.page for prefix in known[1:]], pages.read([])
        for page in held:
            pages.share(page)
        try:
            at = known[-1]
            for prefix in path[len(known) :]:
                arrays = self._get(self._path(prefix, _PAGE), form, prefix.ids)
                if arrays is None:
                    return
                held.append(runner.take_page())
                pages.write(held[-1:], arrays)
                at = prefixes.add(at, prefix.ids, held[-1])
                at.is_kept = True
            for prefix in reversed(path[len(known) :]):
                self._touch(prefix)
            if runner.has_states and at.slot < 0:
                arrays = self._get(self._path(at, _STATE), pages.states.read([]), at.ids)
                if arrays is not None:
                    slot = runner.own_slot(-1)
                    pages.states.write([slot], arrays)
                    at.snapshot = runner.snapshots.add(slot, (len(path) - 1) * SLAB)
                    at.snapshot.is_kept = True
                    pages.states.give(slot)
        except ContextFullError:  # then the rest is computed
            pass
        finally:
            for page in held:
                pages.give(page)

    def close(self) -> None:
        """Waits until all is written."""
        self._queue.put(None)
        self._thread.join()

    # Files

    def _path(self, prefix: Prefix, suffix: str) -> Path:
        path: list[Prefix] = []
        at: Prefix | None = prefix
        while at is not None and at.parent is not None and not at.digest:
            path.append(at)
            at = at.parent
        for one in reversed(path):
            assert one.parent is not None
            before = one.parent.digest or self._model.encode()
            one.digest = hashlib.sha256(before + np.array(one.ids, np.int32).tobytes()).digest()
        return self._folder / f"{self._model[:16]}-{prefix.digest[:16].hex()}{suffix}"

    def _touch(self, prefix: Prefix) -> None:
        for suffix in (_PAGE, _STATE) if self._runner.has_states else (_PAGE,):
            with suppress(OSError):
                os.utime(self._path(prefix, suffix))

    def _put(self, path: Path, arrays: dict[str, np.ndarray], ids: Sequence[int]) -> bool:
        """Lets the thread write a file; False if too much waits there."""
        arrays["ids"] = np.array(ids, np.int32)
        n_bytes = sum(a.nbytes for a in arrays.values())
        with self._lock:
            if self._n_waiting + n_bytes > _MOST_WAITING:
                return False
            self._n_waiting += n_bytes
        self._queue.put((path, arrays))
        return True

    def _get(self, path: Path, expected: Mapping[str, np.ndarray], ids: Sequence[int]) -> dict[str, np.ndarray] | None:
        """What a file holds; None, and the file is removed, if that isn't what it should be."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            wrong = str(error)
        else:
            shapes = {name: (1, a.shape[1]) for name, a in expected.items()} | {"ids": (len(ids),)}
            facts = {"format": _FORMAT, "model": self._model, "sum": _sum(arrays)}
            is_whole = metadata == facts and {name: a.shape for name, a in arrays.items()} == shapes
            if is_whole and arrays.pop("ids").tolist() == list(ids):
                return arrays
            wrong = "it isn't what was written"
        _log.warning("%s: damaged, and removed: %s", path, wrong)
        with suppress(OSError):
            path.unlink()
        return None

    # The thread

    def _write_all(self) -> None:
        written = self._n_bytes  # so that files are counted first
        while (work := self._queue.get()) is not None:
            path, arrays = work
            n_bytes = sum(a.nbytes for a in arrays.values())
            try:
                if written + n_bytes > self._n_bytes // _ROOM_PARTS:
                    self._make_room(n_bytes)
                    written = 0
                if n_bytes <= self._n_bytes:
                    self._write(path, arrays)
                    written += n_bytes
            except Exception as error:  # a full disk among others; what is computed goes on
                _log.warning("%s: not kept: %s", path.name, error)
            with self._lock:
                self._n_waiting -= n_bytes
        with suppress(OSError):
            self._make_room(0)

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        with writing_aside(path) as aside:
            write_arrays(aside, arrays, {"format": _FORMAT, "model": self._model, "sum": _sum(arrays)})

    def _make_room(self, n_bytes: int) -> None:
        """Removes the files used longest ago, until so many bytes more may come and a part of the budget is free."""
        found = []
        for entry in os.scandir(self._folder):
            with suppress(OSError):
                facts = entry.stat()
                if entry.name.endswith(".part") and time.time() - facts.st_mtime > _OLD_PART:
                    os.unlink(entry.path)
                elif entry.name.endswith((_PAGE, _STATE)):
                    found.append((facts.st_mtime_ns, facts.st_size, entry.path))
        most = self._n_bytes - max(n_bytes, self._n_bytes // _ROOM_PARTS if n_bytes else 0)
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= most:
                break
            with suppress(OSError):
                os.unlink(name)
            total -= size


def _sum(arrays: Mapping[str, np.ndarray]) -> str:
    """A checksum of arrays."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].tobytes(), value)
    return f"{value:08x}"
