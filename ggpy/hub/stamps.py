"""Notes beside the cache: that a model's file was found sound, and when it was used."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path


def _place(path: Path) -> Path:
    from ..kernels.build import cache_dir

    path = Path(os.path.realpath(path))
    status = path.stat()
    key = repr((str(path), status.st_size, status.st_mtime_ns))
    return cache_dir() / "used" / hashlib.sha256(key.encode()).hexdigest()[:32]


def stamp(path: Path) -> None:
    """Notes that a file, as it is now, is sound and used; where nothing can be written, nothing is noted."""
    with suppress(OSError):
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


def is_stamped(path: Path) -> bool:
    """Whether that was noted of a file as it is now."""
    return _place(path).exists()


def last_use(path: Path) -> float:
    """When a file was used, in seconds since 1970; when it was written, if that was never noted."""
    with suppress(OSError):
        return _place(path).stat().st_mtime
    return path.stat().st_mtime


def forget(path: Path) -> None:
    """Removes the note."""
    with suppress(OSError):
        _place(path).unlink()
