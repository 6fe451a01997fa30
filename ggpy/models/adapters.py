"""LoRA adapters (Hu et al. 2021): thin matrices that are added to a model's own."""

import os
from pathlib import Path

from ..errors import Error


def path_and_scale(text: str | os.PathLike[str]) -> tuple[Path, float]:
    """An adapter's path and its scale, from PATH or PATH:SCALE.

    Raises
    ------
    Error
        The scale isn't a finite number.
    """
    path, colon, scale = os.fspath(text).rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not abs(value) < 1e30:
        raise Error(f"{path}: a scale of {scale}")
    return Path(path), value
