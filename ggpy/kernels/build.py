"""Compiling kernels on this machine, once, and loading them.

numba compiles each kernel in a worker process, which hands back an object file. The running process keeps those in a
cache directory and loads them with llvmlite: a second start imports no numba (0.6 s) and has its kernels in
milliseconds. The cache's key covers a kernel's module and what that imports, the versions of numba and llvmlite, and the
processor.
"""

import ctypes
import hashlib
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..cpus import usable_cpus
from ..errors import Error
from ..installed import missing_packages
from ..simd.target import cpu_is_arm, target
from . import faults
from .table import KERNELS

_PACKAGE = Path(__file__).parent

Progress = Callable[[int, int, str], None]


def cache_dir() -> Path:
    """Where ggpy keeps what it can make again: $GGPY_CACHE, else the platform's cache directory; where that can't be
    written, a folder for temporary files of this user's own.

    Raises
    ------
    Error
        None of them can be used.
    """
    return _cache_dir(*map(os.environ.get, ("GGPY_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME")))


@lru_cache(4)
def _cache_dir(given: str | None, xdg: str | None, local: str | None, home: str | None) -> Path:
    if given:
        return Path(given)
    try:
        if sys.platform == "win32":
            folder = Path(local or Path.home() / "AppData" / "Local") / "ggpy"
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Caches" / "ggpy"
        else:
            folder = Path(xdg or Path.home() / ".cache") / "ggpy"
        _make_private(folder)
        return folder
    except (OSError, RuntimeError) as error:  # no home, or one that can't be written, as in containers
        reason = error
    folder = Path(tempfile.gettempdir()) / (f"ggpy-{os.getuid()}" if hasattr(os, "getuid") else "ggpy")
    words = f"there is no folder for compiled kernels ({reason})"
    try:
        _make_private(folder)
    except OSError as error:
        raise Error(f"{words}, and {folder} isn't one either: {error}; GGPY_CACHE names another") from None
    kept = f"they are kept in {folder} as long as the system keeps that; GGPY_CACHE names another"
    logging.getLogger("ggpy").warning(f"{words}: {kept}")
    return folder


def _make_private(folder: Path) -> None:
    """Makes a folder that only this user may write, or sees to it that one is so: what lies there is run.

    Raises
    ------
    OSError
        It can't be made or written.
    Error
        It belongs to, or may be written by, others.
    """
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        with suppress(FileExistsError):
            missing.mkdir(mode=0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} can't be written")
    _check_private(folder.stat(), folder)


def _check_private(status: os.stat_result, path: Path) -> None:
    """Raises Error if others than this user, and the one who may do everything, could have written a file or folder."""
    if not hasattr(os, "getuid"):
        return
    if status.st_uid not in (os.getuid(), 0):
        raise Error(f"{path}: belongs to user {status.st_uid}, whose code won't be run; GGPY_CACHE names another folder")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Error(f"{path}: others may write it, whose code won't be run; 'chmod go-w' or GGPY_CACHE help")


#: an import of this package's own modules at a module's top, its dots, its module and the first of its names
_IMPORT = re.compile(rb"^from (\.+)([\w.]*) import (\w*)", re.MULTILINE)


@lru_cache(None)
def _source(path: Path) -> tuple[bytes, tuple[Path, ...]]:
    """The digest of a module of this package and the modules of the package that it imports."""
    text = path.read_bytes()
    imports = [
        path.parents[len(dots) - 1].joinpath(*(module or name).decode().split(".")).with_suffix(".py")
        for dots, module, name in _IMPORT.findall(text)
    ]
    return hashlib.sha256(text).digest(), tuple(filter(Path.exists, imports))


@lru_cache
def _key(module: str) -> str:
    """A digest of everything that the object code of a module's kernels depends on."""
    sources: dict[Path, bytes] = {}
    left = [_PACKAGE / f"{module}.py"]
    while left:
        path = left.pop()
        if path not in sources:
            sources[path], imports = _source(path)
            left += imports
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(sources[path])
    machine = target()
    for part in (machine.form, machine.cpu, machine.features, *_versions()):
        digest.update(part.encode() + b"\0")
    return f"{machine.form}-{digest.hexdigest()[:24]}"


@lru_cache
def _versions() -> tuple[str, str]:
    """The versions of the two compilers."""
    return metadata.version("numba"), metadata.version("llvmlite")


def _object_path(name: str) -> Path:
    """Where the object file of a kernel, or of a module that is no kernel's, is kept."""
    return cache_dir() / "kernels" / _key(KERNELS[name].module if name in KERNELS else name) / f"{name}.o"


def _read_object(name: str) -> tuple[str, bytes] | None:
    """Symbol and code of a kernel from the cache; None if it isn't there or is damaged (LLVM would crash on it)."""
    path = _object_path(name)
    try:
        with path.open("rb") as file:
            _check_private(os.fstat(file.fileno()), path)
            digest, symbol, code = file.read().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    return (symbol.decode(), code) if hashlib.sha256(code).hexdigest().encode() == digest else None


def _write_object(name: str, symbol: str, code: bytes) -> None:
    path = _object_path(name)
    _make_private(path.parent)
    # Never through a link: mkstemp makes a new file, of a name that nobody knows before, for this user alone.
    descriptor, aside = tempfile.mkstemp(".tmp", f"{name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(b"\n".join([hashlib.sha256(code).hexdigest().encode(), symbol.encode(), code]))
        os.replace(aside, path)
    except BaseException:  # a full disk, Ctrl-C
        Path(aside).unlink(missing_ok=True)
        raise


def work() -> None:
    """The worker: compiles each kernel named on a line of standard input and answers with ANSWER and its name."""
    from .source import compile_kernel

    for line in sys.stdin:
        _write_object(line.strip(), *compile_kernel(line.strip()))
        print(f"\n{_ANSWER}{line.strip()}", flush=True)  # a line of its own, whatever was printed before


#: What the worker's answers begin with. Other lines may be there: whatever Python or numba are set to print.
_ANSWER = "ggpy has compiled "

#: What the worker runs: this very package, whatever folder it is started in; there may be a file of settings for numba.
_WORKER = f"""import os, sys
sys.path[0] = {str(_PACKAGE.parent.parent)!r}
os.chdir({str(_PACKAGE)!r})
from {__name__} import work
work()"""


class _Worker:
    """A process that compiles kernels."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_worker_environment(),
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise Error(f"kernels can't be compiled: {sys.executable or 'no Python'} doesn't start: {error}") from None
        self._stderr: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self._process.stderr
        self._stderr.extend(line.strip() for line in self._process.stderr if line.strip())

    def compile(self, name: str) -> None:
        """Compiles a kernel into the cache.

        Raises
        ------
        Error
            It didn't, and the worker is of no more use; says why.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
            answered = any(line.rstrip("\n") == _ANSWER + name for line in self._process.stdout)
        except OSError:  # it has ended
            answered = False
        if not answered:
            self.close()
            reason = self._stderr[-1] if self._stderr else f"its process ended with code {self._process.returncode}"
            if missing := missing_packages():
                reason = f"{reason}; ggpy needs {', '.join(missing)}"
            raise Error(f"kernel {name} did not compile: {reason}")

    def close(self) -> None:
        """Lets it end, and waits for that."""
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        with suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.wait()
        self._reader.join()
        process.stderr.close()


def _worker_environment() -> dict[str, str]:
    machine = target()
    return {
        # Not what numba is told to do here: code compiled without optimization would stay in the cache.
        **{key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")},
        "GGPY_SIMD": machine.form,
        "GGPY_CACHE": str(cache_dir().absolute()),
        "NUMBA_CPU_NAME": machine.cpu,
        "NUMBA_CPU_FEATURES": machine.features,
        "NUMBA_DISABLE_JIT": "0",
    }


def compile_missing(names: Iterable[str], progress: Progress | None = None) -> int:
    """Compiles those of `names` that the cache lacks, in as many processes as this one may use processors.

    Parameters
    ----------
    names : iterable of str
        Kernels of the table.
    progress : callable, optional
        Called as progress(done, total, name) before the first and after each kernel.

    Returns
    -------
    int
        How many were compiled.

    Raises
    ------
    Error
        A kernel didn't compile, or the cache directory can't be written.
    """
    todo = [n for n in dict.fromkeys(names) if _read_object(n) is None]
    if not todo:
        return 0
    # The long ones first, so that no worker is left alone with one at the end.
    todo.sort(key=lambda n: not n.startswith(("mul_mat", "attention")))
    total = len(todo)
    lock = threading.Lock()
    if progress:
        progress(0, total, "")

    def drive() -> None:
        worker: _Worker | None = None
        try:
            while True:
                with lock:
                    if not queue or failures:
                        break
                    name = queue.pop(0)
                worker = worker or _Worker()
                worker.compile(name)
                with lock:
                    done.append(name)
                    if progress:
                        progress(len(done), total, name)
        except BaseException as error:
            failures.append(error)
        finally:
            if worker is not None:
                worker.close()

    queue, done, failures = list(todo), list[str](), list[BaseException]()
    threads = [threading.Thread(target=drive) for _ in range(min(total, usable_cpus()))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]
    return total


#: LLVM makes calls of these out of loops and large copies. Kernels need nothing else from outside.
_C_FUNCTIONS = {
    "memcpy": ctypes._memmove_addr,  # type: ignore[attr-defined]
    "memmove": ctypes._memmove_addr,  # type: ignore[attr-defined]
    "memset": ctypes._memset_addr,  # type: ignore[attr-defined]
}


class _Loaded:
    """The kernels loaded in this process. LLVM's execution engine holds their code."""

    def __init__(self) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._llvm = llvm
        # LLVM's older linker, which would be used, puts parts of an ARM object further apart than its code can reach.
        self._jit = llvm.create_lljit_compiler(use_jit_link=cpu_is_arm() and sys.platform != "win32")
        self._libraries: dict[str, Any] = {}
        self._lock = threading.Lock()
        if faults.IS_SUPPORTED:
            if (found := _read_object("faults")) is None:
                found = faults.compile_handler(llvm)
                with suppress(OSError):
                    _write_object("faults", *found)
            faults.install(self._link("faults", *found, faults.symbols()))

    def address(self, name: str) -> int:
        """Of a kernel."""
        with self._lock:
            if name in self._libraries:
                tracker, symbol = self._libraries[name]
                return tracker[symbol]
            found = _read_object(name)
            if found is None:
                raise Error(f"kernel {name} is not compiled")
            return self._link(name, *found, _C_FUNCTIONS)

    def _link(self, name: str, symbol: str, code: bytes, imports: dict[str, int]) -> int:
        library = self._llvm.JITLibraryBuilder().add_object_img(code).export_symbol(symbol)
        for c_name, place in imports.items():
            library.import_symbol(c_name, place)
        tracker = library.link(self._jit, name)
        self._libraries[name] = (tracker, symbol)
        return tracker[symbol]


_loaded = lru_cache(_Loaded)
if hasattr(os, "register_at_fork"):  # a fork loads kernels anew: another thread may have been at it, with the lock
    os.register_at_fork(after_in_child=_loaded.cache_clear)


#: the C type of a kernel: int32 f(void **result, void **exception, int64 ith, int64 nth, int64 params)
KERNEL_TYPE = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)


def load(names: Iterable[str], progress: Progress | None = None) -> dict[str, int]:
    """The addresses of the named kernels, compiled first if need be."""
    names = list(dict.fromkeys(names))
    compile_missing(names, progress)
    return {name: _loaded().address(name) for name in names}
