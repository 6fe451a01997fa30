"""What conversations have computed, kept in files for the next start."""

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ContextFullError, Error
from ..generate.model import Model
from ..generate.saved import digest

_log = logging.getLogger(__name__)
_LEAST = 64  # tokens that are worth a file
_MOST = 64  # conversations that are remembered


class Cache:
    """A folder with the keys and values, and states, of a model's last conversations.

    Files of other models, or of other ways to run this one, are left alone, but count towards the budget.

    Parameters
    ----------
    folder : Path
    n_bytes : int
        That all files in it may take; the oldest go first.
    """

    def __init__(self, folder: Path, n_bytes: int):
        self._folder, self._n_bytes = folder, n_bytes
        self._ended: list[tuple[int, ...]] = []  # the last one at the end

    def remember(self, ids: Sequence[int]) -> None:
        """Notes that a conversation has come so far; it takes the place of its own beginning."""
        new = tuple(ids)
        if len(new) < _LEAST:
            return
        self._ended = [old for old in self._ended if new[: len(old)] != old][-_MOST + 1 :]
        self._ended.append(new)

    def load(self, model: Model) -> None:
        """Lets a model have what its files hold, the newest first, as long as there is room."""
        for path in reversed(self._files(f"{_key(model)}-*.kv")):
            try:
                with model.load_sequence(path) as sequence:
                    ids = list(sequence.ids)
                    if not model._runner.has_room:
                        return
                    model._scheduler.remember(sequence)
                self._ended.insert(0, tuple(ids))
            except ContextFullError:
                return
            except Error as error:
                _log.warning("%s: left aside: %s", path.name, error)

    def save(self, model: Model) -> None:
        """Writes the conversations that were remembered, the last one last, and makes room."""
        self._folder.mkdir(parents=True, exist_ok=True)
        key = _key(model)
        wanted = {f"{key}-{_name(ids)}.kv": ids for ids in self._ended}
        for path in self._files(f"{key}-*.kv"):
            if path.name in wanted:
                path.touch()  # used again, and the same bits
                del wanted[path.name]
        for name, ids in wanted.items():
            try:
                model.save_cache(self._folder / name, ids)
            except Error as error:
                _log.warning("%s: not kept: %s", name, error)
        files = self._files("*.kv")
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self._n_bytes:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[Path]:
        """Files of the folder, the oldest first."""
        found = []
        for path in self._folder.glob(pattern):
            with suppress(OSError):
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]


def _key(model: Model) -> str:
    """What a model's files begin with."""
    return digest(model._runner)[:16]


def _name(ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:24]
