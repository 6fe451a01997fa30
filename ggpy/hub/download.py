"""Files of the Hugging Face hub: in huggingface_hub's cache, continued where a download ended, checked by their digests."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import Error
from .kept import storage_of
from .names import Reference
from .stamps import is_stamped, stamp

_log = logging.getLogger("ggpy")
# SHA-256 of large files, SHA-1 of those that are in the repository itself.
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_CHUNK = 1 << 22


class HubFile(NamedTuple):
    """A file of a repository, with what the hub says of it.

    Attributes
    ----------
    name : str
        Its path in the repository.
    size : int
    digest : str
        SHA-256; of small files git's SHA-1.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """What is in a repository.

    Attributes
    ----------
    reference : Reference
    commit : str
    files : dict of str to HubFile
    """

    reference: Reference
    commit: str
    files: dict[str, HubFile]


def list_remote(reference: Reference) -> Repository:
    """What is in a repository, asked of the hub.

    Raises
    ------
    Error
        The hub can't be reached, or has no such repository or revision, or doesn't show it.
    """
    from huggingface_hub import HfApi

    with _told(reference):
        info = HfApi().model_info(reference.repo, revision=reference.revision, files_metadata=True)
        files = {}
        for file in info.siblings or ():
            digest, size = (file.lfs.sha256, file.lfs.size) if file.lfs else (file.blob_id or "", file.size)
            if not _DIGEST.fullmatch(digest):  # what comes from a server becomes a file's name here
                raise Error(f"{reference}: the hub gives no digest of {file.rfilename}")
            files[file.rfilename] = HubFile(file.rfilename, size or 0, digest)
        return Repository(reference, str(info.sha), files)


def fetch(repository: Repository, names: Sequence[str]) -> list[Path]:
    """Fetches files of a repository, as far as they aren't in the cache, and checks them.

    What an interrupted download has left is continued. Two processes that want the same file share one download.

    Raises
    ------
    Error
        The hub can't be reached or doesn't give the file; there is no room for it; its digest is wrong.
    """
    return [_fetch(repository, repository.files[name]) for name in names]


def _fetch(repository: Repository, file: HubFile) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    reference = repository.reference
    with _told(reference, file.name):
        here = try_to_load_from_cache(reference.repo, file.name, revision=repository.commit)
        if not isinstance(here, str):
            _fetch_blob(reference, repository.commit, file)
        # Finds the blob in the cache; makes the snapshot, and notes the commit of a branch.
        path = Path(hf_hub_download(reference.repo, file.name, revision=reference.revision))
    verify(path, file.digest)
    return path


def _fetch_blob(reference: Reference, commit: str, file: HubFile) -> None:
    """Puts a file's content in its place in the cache. huggingface_hub's own way throws away what it has when it is
    interrupted, and doesn't compare digests."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    storage = storage_of(reference.repo)
    blob = storage / "blobs" / file.digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(HF_HUB_CACHE) / ".locks" / storage.name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        part = blob.with_name(f"{blob.name}.incomplete")
        part.touch()
        with part.open("r+b") as out:
            done = out.seek(0, os.SEEK_END)
            if done > file.size:
                done = out.seek(0)
                out.truncate()
            url = hf_hub_url(reference.repo, file.name, revision=commit)
            headers = {**build_hf_headers(library_name="ggpy"), "Accept-Encoding": "identity"}
            name = file.name.rpartition("/")[2]
            while done < file.size:
                before = done
                try:
                    http_get(url, out, resume_size=done, headers=headers, expected_size=file.size, displayed_filename=name)
                except Exception:  # what HTTP libraries raise has no common base
                    done = out.seek(0, os.SEEK_END)
                    if done <= before:
                        raise
                else:
                    break
        try:
            _compare(part, file.digest, f"{reference.repo}: {file.name}", "nothing of it was kept; fetch it again")
        except Error:
            part.unlink()
            raise
        os.replace(part, blob)
        stamp(blob)


def verify(path: Path, digest: str | None = None) -> None:
    """Compares a file of the cache with its digest, once: other programs may have fetched it, and don't check all.

    Parameters
    ----------
    path : Path
    digest : str, optional
        By default what the cache calls the file, where it has links.

    Raises
    ------
    Error
        It is another.
    """
    blob = Path(os.path.realpath(path))
    digest = digest or blob.name
    if is_stamped(blob) or not _DIGEST.fullmatch(digest):
        return
    _compare(blob, digest, str(path), "remove it ('ggpy rm') and fetch it again")
    stamp(blob)


def _compare(path: Path, digest: str, what: str, remedy: str) -> None:
    """Raises Error if a file's content hasn't the digest, with what to do then."""
    size = path.stat().st_size
    if size > 1 << 30:
        _log.info("%s: comparing %.1f GB with their digest", what, size / 1e9)
    found = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    if found.hexdigest() != digest:
        raise Error(f"{what}: damaged: its digest is {found.hexdigest()[:12]}…, the hub says {digest[:12]}…; {remedy}")


@contextmanager
def _told(reference: Reference, file: str = "") -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP libraries raise into one line of what to do."""
    from huggingface_hub import errors

    where = f"{reference.repo}{f': {file}' if file else ''}"
    try:
        yield
    except Error:
        raise
    except errors.GatedRepoError as error:
        raise Error(
            f"{where}: gated: ask for access at https://huggingface.co/{reference.repo}, "
            "then set HF_TOKEN or call 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise Error(f"{where}: no revision {reference.revision!r}{_revisions(reference)}") from error
    except errors.RepositoryNotFoundError as error:
        raise Error(
            f"{where}: the hub has no such repository; if it is private, set HF_TOKEN or call 'hf auth login'"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise Error(f"{where}: not here, and HF_HUB_OFFLINE is set") from error
    except Exception as error:  # HTTP, network, cache and validation errors, which have no common base
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise Error(f"{where}: the hub gives no access ({status}); set HF_TOKEN or call 'hf auth login'") from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise Error(f"{where}: the hub doesn't give it: {reason}") from error


def _revisions(reference: Reference) -> str:
    """Which revisions there are, for a message; "" where that can't be known."""
    from huggingface_hub import HfApi

    with suppress(Exception):
        refs = HfApi().list_repo_refs(reference.repo)
        return f"; there are {', '.join(ref.name for ref in (*refs.branches, *refs.tags)[:20])}"
    return ""
