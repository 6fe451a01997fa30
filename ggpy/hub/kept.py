"""The models that are here: GGUF files in huggingface_hub's cache, and checkpoints that were converted.

The cache's layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .names import Reference, models_among
from .stamps import forget, last_use

_CONVERTED = re.compile(r"(?P<name>.+)-(?P<type>[a-z0-9_]+)-[0-9a-f]{16}(?:-[0-9a-f]{12})?\.gguf")


@dataclass(frozen=True)
class Kept:
    """A model that is here.

    Attributes
    ----------
    name : str
        What it can be run and removed by.
    kind : {"hub", "converted", "unfinished"}
        A GGUF file of the hub, what was made of a checkpoint, or what is left of an interrupted download.
    type : str
        Such as Q4_K_M; "" if unknown.
    n_bytes : int
    used : float
        When it was used, in seconds since 1970.
    paths : tuple of Path
        Its files; of the hub's those in snapshots, which are links to blobs where the system has links.
    """

    name: str
    kind: str
    type: str
    n_bytes: int
    used: float
    paths: tuple[Path, ...]

    def answers_to(self, name: str) -> bool:
        """Whether it is meant by a name, with or without its type."""
        return name.lower() in (self.name.lower(), self.name.rpartition(":")[0].lower())

    def remove(self) -> None:
        """Removes its files, and folders that are empty then. What runs goes on running."""
        for path in self.paths:
            forget(path)
            blob = Path(os.path.realpath(path))
            path.unlink(missing_ok=True)
            if self.kind == "hub":
                repo = _repo_folder(path)
                if not any(_same(other, blob) for other in (repo / "snapshots").rglob("*")):
                    blob.unlink(missing_ok=True)
        if self.kind != "converted":
            repo = _repo_folder(self.paths[0])
            if not any(path.is_file() for part in ("blobs", "snapshots") for path in (repo / part).rglob("*")):
                shutil.rmtree(repo, ignore_errors=True)


def _same(path: Path, blob: Path) -> bool:
    return path.is_symlink() and Path(os.path.realpath(path)) == blob


def _repo_folder(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name.startswith("models--"))


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def storage_of(repo: str) -> Path:
    """A repository's folder in the cache."""
    return _cache() / f"models--{repo.replace('/', '--')}"


def list_local(reference: Reference) -> dict[str, Path]:
    """The files of a repository that are in the cache, whole, of the commit that was fetched last."""
    storage = storage_of(reference.repo)
    commit = reference.revision
    with suppress(OSError):
        commit = (storage / "refs" / reference.revision).read_text().strip()
    return _files(storage / "snapshots" / commit)


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def kept_models() -> list[Kept]:
    """All models that are here, by name."""
    from ..kernels.build import cache_dir

    found = []
    for path in sorted((cache_dir() / "models").glob("*.gguf")):
        parts = _CONVERTED.fullmatch(path.name)
        if parts is not None:
            name = f"{parts['name'].replace('--', '/')}:{parts['type'].upper()}"
            found.append(Kept(name, "converted", parts["type"].upper(), path.stat().st_size, last_use(path), (path,)))
    for storage in sorted(_cache().glob("models--*")):
        found += _of_repo(storage)
    return sorted(found, key=lambda kept: kept.name.lower())


def _of_repo(storage: Path) -> Iterator[Kept]:
    repo = storage.name.removeprefix("models--").replace("--", "/", 1)
    refs = {}
    for path in (storage / "refs").rglob("*"):
        with suppress(OSError):
            refs[path.read_text().strip()] = path.relative_to(storage / "refs").as_posix()
    for snapshot in sorted((storage / "snapshots").glob("*")):
        files = _files(snapshot)
        models = models_among(files)
        for model in models:
            alike = sum(other.type == model.type for other in models) > 1 or not model.type
            revision = refs.get(snapshot.name, snapshot.name)
            file, type = (model.files[0], "") if alike else ("", model.type)
            paths = tuple(files[name] for name in model.files)
            n_bytes = sum(path.stat().st_size for path in paths)
            name = str(Reference(repo, revision, file, type))
            yield Kept(name, "hub", model.type, n_bytes, max(map(last_use, paths)), paths)
    left = tuple(path for path in sorted((storage / "blobs").glob("*.incomplete")) if path.stat().st_size)
    if left:
        n_bytes = sum(path.stat().st_size for path in left)
        yield Kept(f"{repo}:unfinished", "unfinished", "", n_bytes, max(p.stat().st_mtime for p in left), left)
