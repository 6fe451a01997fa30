"""Compiling kernels on this machine, once, and loading them.

numba compiles each kernel in a worker process, which hands back an object file. The running process keeps those in a
cache directory and loads them with llvmlite: a second start imports no numba (0.6 s) and has its kernels in
milliseconds. The cache's key covers the sources, the versions of numba and llvmlite, and the processor.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..cpus import usable_cpus
from ..errors import Error
from ..simd.target import target

_PACKAGE = Path(__file__).parent

Progress = Callable[[int, int, str], None]


def cache_dir() -> Path:
    """Where ggpy keeps what it can make again: $GGPY_CACHE, else the platform's cache directory."""
    if os.environ.get("GGPY_CACHE"):
        return Path(os.environ["GGPY_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "ggpy"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ggpy"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ggpy"


@lru_cache
def _key() -> str:
    """A digest of everything that object code depends on."""
    digest = hashlib.sha256()
    for path in sorted([*(_PACKAGE.parent / "simd").glob("*.py"), *_PACKAGE.glob("*.py")]):
        digest.update(path.read_bytes())
    machine = target()
    for part in (machine.form, machine.cpu, machine.features, metadata.version("numba"), metadata.version("llvmlite")):
        digest.update(part.encode() + b"\0")
    return f"{machine.form}-{digest.hexdigest()[:24]}"


def _object_path(name: str) -> Path:
    return cache_dir() / "kernels" / _key() / f"{name}.o"


def _read_object(name: str) -> tuple[str, bytes] | None:
    """Symbol and code of a kernel from the cache; None if it isn't there or is damaged (LLVM would crash on it)."""
    try:
        digest, symbol, code = _object_path(name).read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    return (symbol.decode(), code) if hashlib.sha256(code).hexdigest().encode() == digest else None


def _write_object(name: str, symbol: str, code: bytes) -> None:
    path = _object_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_bytes(b"\n".join([hashlib.sha256(code).hexdigest().encode(), symbol.encode(), code]))
        os.replace(aside, path)
    except BaseException:  # a full disk, Ctrl-C
        aside.unlink(missing_ok=True)
        raise


def work() -> None:
    """The worker: compiles each kernel named on a line of standard input and answers with ANSWER and its name."""
    from .source import compile_kernel

    for line in sys.stdin:
        _write_object(line.strip(), *compile_kernel(line.strip()))
        print(f"\n{_ANSWER}{line.strip()}", flush=True)  # a line of its own, whatever was printed before


#: What the worker's answers begin with. Other lines may be there: whatever Python or numba are set to print.
_ANSWER = "ggpy has compiled "

#: What the worker runs: this very package, whatever folder it is started in.
_WORKER = f"import sys; sys.path[0] = {str(_PACKAGE.parent.parent)!r}; from {__name__} import work; work()"


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
        # Not what numba is told to do in this process: code compiled without optimization would stay in the cache.
        **{key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")},
        "GGPY_SIMD": machine.form,
        "GGPY_CACHE": str(cache_dir()),
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
        self._jit = llvm.create_lljit_compiler()
        self._libraries: dict[str, Any] = {}
        self._lock = threading.Lock()

    def address(self, name: str) -> int:
        with self._lock:
            if name not in self._libraries:
                found = _read_object(name)
                if found is None:
                    raise Error(f"kernel {name} is not compiled")
                symbol, code = found
                library = self._llvm.JITLibraryBuilder().add_object_img(code).export_symbol(symbol)
                # LLVM makes calls of these out of loops and large copies. Kernels need nothing else from outside.
                for c_name, place in _C_FUNCTIONS.items():
                    library.import_symbol(c_name, place)
                self._libraries[name] = (library.link(self._jit, name), symbol)
            tracker, symbol = self._libraries[name]
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
