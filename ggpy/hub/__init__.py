"""Finding models: files, checkpoint folders, the Hugging Face hub, and the model that comes with ggpy."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Error
from .names import USUAL, Choice, Reference, choose, models_among, of_type, parse, some, types_of, whole_among
from .stamps import stamp

if TYPE_CHECKING:
    from ..kernels.build import Progress

#: The name of the small mixture of experts that comes with ggpy, wherever a model is named.
DEMO = "demo"
#: what checkpoints are converted to, unless something else is asked for
CONVERTED_TYPE = "q8_0"
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/[0-9a-f]{40}")
_MARKS = ("config.json", "adapter_config.json")  # of a checkpoint's folder


@dataclass(frozen=True)
class Found:
    """A model that was found.

    Attributes
    ----------
    path : Path
        Its .gguf file, which may have to be made first.
    checkpoint : Path or None
        What it has to be made of; None where it is there.
    type : str
        What it is converted to.
    """

    path: Path
    checkpoint: Path | None = None
    type: str = CONVERTED_TYPE

    def convert(self, progress: "Progress | None" = None, kernel_progress: "Progress | None" = None) -> Path:
        """The .gguf file, made if need be; see `ggpy.convert`.

        Raises
        ------
        ConversionError
            The checkpoint can't be converted.
        """
        if self.checkpoint is not None:
            from converters import convert

            self.path.parent.mkdir(parents=True, exist_ok=True)
            plan = convert(self.checkpoint, self.path, self.type, progress=progress, kernel_progress=kernel_progress)
            for note in plan.notes:
                logging.getLogger("ggpy").warning(note)
        stamp(self.path)
        return self.path


def model_file(
    model: str | os.PathLike[str],
    type: str | None = None,
    progress: "Progress | None" = None,
    kernel_progress: "Progress | None" = None,
) -> Path:
    """The .gguf file of a model, fetched from the hub or converted if need be; both are kept.

    Parameters
    ----------
    model : str or path-like
        See `find`.
    type : str, optional
        See `find`.
    progress, kernel_progress : callable, optional
        Told of a conversion as it goes on; see `ggpy.convert`.

    Raises
    ------
    Error
        See `find`.
    ConversionError
        The checkpoint can't be converted.
    """
    return find(model, type).convert(progress, kernel_progress)


def find(model: str | os.PathLike[str], type: str | None = None, fresh: bool = False) -> Found:
    """Finds a model, and fetches what isn't here.

    Parameters
    ----------
    model : str or path-like
        A .gguf file; a folder with GGUF files; a checkpoint's folder; "demo"; or a repository of the Hugging Face hub, of
        GGUF files or a checkpoint: owner/name, owner/name@revision, owner/name/file.gguf, or its page's address. A type may
        follow: owner/name:Q4_K_M.
    type : str, optional
        The type where none follows. By default Q4_K_M or the nearest of GGUF files, and Q8_0 of what is converted.
    fresh : bool
        Whether the hub is asked for a newer version of what is here.

    Raises
    ------
    Error
        There is no such file, folder, repository or type; a download failed.
    """
    name = os.fspath(model)
    path, wanted = Path(name), ""
    if not path.exists() and Path(name.rpartition(":")[0] or name).exists():
        name, _, wanted = name.rpartition(":")
        path = Path(name)
    if name == DEMO and not path.exists():
        path = Path(str(files("ggpy.demo_model")))
    if path.is_dir():
        return _in_folder(path, wanted, type)
    if path.exists():
        if wanted:
            raise Error(f"{path}: a file, which has the type that it has; {wanted!r} can't be chosen")
        return Found(path)
    reference = parse(name)
    if reference is None:
        raise Error(f"{name}: no such file or folder")
    return _of_hub(reference, type, fresh)


def _in_folder(path: Path, wanted: str, type: str | None) -> Found:
    if any((path / mark).is_file() for mark in _MARKS):
        stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.iterdir()) if p.is_file()]
        type = wanted or type or CONVERTED_TYPE
        out = _converted(path.resolve().name, repr((str(path.resolve()), stamps, type.lower())), type)
        return Found(out, None if out.exists() else path, type)
    models = models_among(p.name for p in path.iterdir() if p.is_file())
    if not models:
        raise Error(f"{path}: neither GGUF files nor config.json in it; name a .gguf file or a checkpoint")
    choice = choose(str(path), models, wanted, type.upper() if type else USUAL)
    return Found(path / choice.files[0])


def _converted(name: str, key: str, type: str) -> Path:
    """Where a checkpoint's conversion is kept, but for the commit's place in its name (`_of_commit`)."""
    from ..kernels.build import cache_dir

    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_dir() / "models" / f"{name.replace('/', '--')}-{type.lower()}-{digest}.gguf"


def _of_commit(out: Path, commit: str) -> Path:
    return out.with_name(f"{out.stem}-{commit[:12]}.gguf")


def _of_hub(reference: Reference, type: str | None, fresh: bool) -> Found:
    from .download import fetch, list_remote, verify
    from .kept import list_local

    usual = type.upper() if type else USUAL
    type = reference.type or type or CONVERTED_TYPE
    out = _converted(reference.repo, repr((reference.repo, reference.revision, type.lower())), type)
    if not fresh:
        local = list_local(reference)
        choice = _choose(reference, local, usual, exact=True)
        if choice is not None:
            for file in choice.files:
                verify(local[file])
            return Found(local[choice.files[0]])
        made = sorted(out.parent.glob(_of_commit(out, "*").name), key=lambda path: path.stat().st_mtime)
        if made:
            return Found(made[-1])
    try:
        repository = list_remote(reference)
    except Error as error:
        # Without the hub, what is here has to do, though it isn't just what would be taken otherwise.
        models = [] if fresh or reference.file else models_among(local)
        if not models:
            raise
        if reference.type:
            raise Error(f"{error}; here are {types_of(models)}") from error
        return Found(local[choose(reference.repo, models, "", usual).files[0]])
    weights = checkpoint_files(repository.files)
    choice = _choose(reference, repository.files, usual, exact=bool(weights and _is_file_type(reference.type)))
    if choice is not None:
        return Found(fetch(repository, choice.files)[0])
    if not weights:
        raise Error(f"{reference.repo}: neither GGUF files nor a checkpoint among {', '.join(list(repository.files)[:12])}")
    from ..quantization.mixes import file_type

    file_type(type, copy=False)  # before a long download
    out = _of_commit(out, repository.commit)
    return Found(out) if out.exists() else Found(out, _folder(fetch(repository, weights), weights), type)


def _is_file_type(type: str) -> bool:
    from ..quantization.mixes import FILE_TYPES

    return type.upper() in FILE_TYPES


def _choose(reference: Reference, files: Iterable[str], usual: str, exact: bool) -> Choice | None:
    """The model that is meant; None if there are no models, or, if it has to be exact, not this one."""
    if reference.file:
        found = next((c for c in whole_among(files) if reference.file in c.files), None)
        if found is None and not exact:
            names = [file for c in models_among(files) for file in c.files]
            raise Error(f"{reference.repo}: no file {reference.file}; there are {some(names) or 'no GGUF files'}")
        return found
    models = models_among(files)
    if not exact:
        return choose(reference.repo, models, reference.type, usual) if models else None
    fitting = of_type(models, reference.type or usual)
    return fitting[0] if len(fitting) == 1 else None


def fetch_checkpoint(model: str) -> Path | None:
    """The folder of a checkpoint of the hub, fetched; None where `model` is no name of the hub's.

    Raises
    ------
    Error
        The hub has no such repository, or no checkpoint in it, or a download failed.
    """
    from .download import fetch, list_remote
    from .kept import list_local

    reference = parse(model)
    if reference is None or reference.file or reference.type:
        return None
    try:
        repository = list_remote(reference)
    except Error:
        local = list_local(reference)
        if not checkpoint_files(local):
            raise
        return _folder([local[name] for name in local], list(local))
    weights = checkpoint_files(repository.files)
    if not weights:
        what = "GGUF files already; 'ggpy pull' fetches one" if models_among(repository.files) else "no checkpoint"
        raise Error(f"{reference.repo}: not a checkpoint's repository, but {what}")
    return _folder(fetch(repository, weights), weights)


def name_of_snapshot(folder: Path) -> str | None:
    """owner/name of a folder in huggingface_hub's cache; None of another."""
    found = _SNAPSHOT.fullmatch("/".join(folder.resolve().parts[-3:]))
    return f"{found[1]}/{found[2]}" if found else None


def checkpoint_files(names: Iterable[str]) -> list[str]:
    """The files of a checkpoint that a conversion takes; none if there is no configuration or there are no weights."""
    from converters.checkpoint import FILE_PATTERNS, PICKLED_PATTERNS

    names = list(names)
    taken = [n for n in names if any(fnmatch(n, pattern) for pattern in FILE_PATTERNS)]
    if not any(n.endswith(".safetensors") for n in taken):
        pickled = [n for n in names if any(fnmatch(n, pattern) for pattern in PICKLED_PATTERNS)]
        taken = taken + pickled if pickled else []
    return taken if any(mark in taken for mark in _MARKS) else []


def _folder(paths: list[Path], names: list[str]) -> Path:
    """The folder that holds files of these names at these paths."""
    return paths[0].parents[names[0].count("/")]
