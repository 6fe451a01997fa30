"""Finding models: files, checkpoint folders, the Hugging Face hub, and the model that comes with ggpy."""

import hashlib
import logging
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Error

if TYPE_CHECKING:
    from .kernels.build import Progress

#: The name of the small mixture of experts that comes with ggpy, wherever a model is named.
DEMO = "demo"


def model_file(
    model: str | os.PathLike[str],
    type: str = "q8_0",
    progress: "Progress | None" = None,
    kernel_progress: "Progress | None" = None,
) -> Path:
    """The .gguf file of a model. A checkpoint is converted once and kept in the cache.

    Parameters
    ----------
    model : str or path-like
        A .gguf file, a checkpoint's folder, a hub id of the form owner/name, or "demo".
    type : str
        What a checkpoint is converted to; see `ggpy.convert`.
    progress, kernel_progress : callable, optional
        Told of the conversion as it goes on; see `ggpy.convert`.

    Raises
    ------
    Error
        There is no such file or folder.
    ConversionError
        The checkpoint can't be converted.
    """
    source, out = _place(model, type)
    if out is None:
        return Path(source)
    if not out.exists():
        from converters import convert

        out.parent.mkdir(parents=True, exist_ok=True)
        for note in convert(source, out, type, progress=progress, kernel_progress=kernel_progress).notes:
            logging.getLogger("ggpy").warning(note)
    return out


def is_converted(model: str | os.PathLike[str], type: str = "q8_0") -> bool:
    """Whether `model_file` has nothing to convert.

    Raises
    ------
    Error
        There is no such file or folder.
    """
    _, out = _place(model, type)
    return out is None or out.exists()


def _place(model: str | os.PathLike[str], type: str) -> tuple[str, Path | None]:
    """The file or checkpoint that is meant, and where a checkpoint's conversion is kept."""
    from .kernels.build import cache_dir

    path, name = Path(model), os.fspath(model)
    if name == DEMO and not path.exists():
        path = Path(str(files("ggpy.demo_model")))
    if path.exists() and not path.is_dir():
        return str(path), None
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise Error(f"{path}: a folder without config.json is no checkpoint; name a .gguf file or a checkpoint")
        stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.iterdir()) if p.is_file()]
        key = repr((str(path.resolve()), stamp, type))
        name, source = path.resolve().name, str(path)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf"):
        key, source = repr((name, type)), name
    else:
        raise Error(f"{name}: no such file or folder")
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return source, cache_dir() / "models" / f"{name.replace('/', '--')}-{type}-{digest}.gguf"
