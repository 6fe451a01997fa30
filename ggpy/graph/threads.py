"""The threads that run tapes."""

import ctypes
import os
import sys
import threading
import time
import weakref
from typing import NoReturn

import numpy as np

from ..cpus import usable_cpus
from ..errors import Error
from ..kernels.build import KERNEL_TYPE, Progress, load
from ..kernels.table import (
    SYNC_LINE,
    SYNC_LOCK,
    SYNC_MOST_SPINS,
    SYNC_RELEASE,
    SYNC_SYSCALL,
    SYNC_TAKE,
    SYNC_WORKERS,
    SYNC_YIELD,
)
from ..kernels.waiting import FUTEX, LEAST_SPINS, MOST_SPINS

_SPINS = 30_000  # about a millisecond without work before a worker leaves the processor to others
_SECONDS_TO_END = 2.0  # that closing waits for the workers


def aligned(n_bytes: int) -> np.ndarray:
    """Zeroed memory that starts at a cache line."""
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


class Team:
    """`n_threads` threads, the caller's among them, that run a tape together.

    One run at a time: threads that ask for one at once wait for each other. Workers wait for the next run for about a
    millisecond, then sleep. Ctrl-C falls before a run or after it, never within; see `kernels.tape`. A team belongs to the
    process that made it.

    Parameters
    ----------
    n_threads : int
    progress : callable, optional
        Told of kernels that must be compiled first.
    """

    def __init__(self, n_threads: int, progress: Progress | None = None):
        if n_threads < 1:
            raise Error(f"{n_threads} threads: at least 1 is needed")
        self.n_threads = n_threads
        kernels = load(["run_team", "run_tape", "wait_for_work", "end_team"], progress)
        self._run_team, self._run_tape = KERNEL_TYPE(kernels["run_team"]), kernels["run_tape"]
        self._workers = _Workers(n_threads, kernels)
        self._pid = os.getpid()
        # The handler of a signal may use the team that it interrupts.
        self._lock = threading.RLock()
        self._closed = False
        self._finalizer = weakref.finalize(self, self._workers.end)
        self._workers.start()

    def run(self, tape: np.ndarray, profile: np.ndarray | None = None) -> None:
        """Runs a tape of (kernel, parameters, barrier) int64s once.

        Parameters
        ----------
        tape : int64 array (n_steps, 3)
        profile : int64 array (n_steps + 1,), optional
            Gets the processor's clock before each step and at the end.

        Raises
        ------
        Error
            The team is closed, or was made in another process, of which this one is a fork.
        """
        if os.getpid() != self._pid:  # first of all: another thread may have held the lock at the fork
            raise Error("the model was opened in another process, whose threads a fork lacks; open the model again here")
        done = ctypes.c_int64(0)
        clock = 0 if profile is None else profile.ctypes.data
        request = (tape.ctypes.data, len(tape), self._workers.sync, clock, self._run_tape, ctypes.addressof(done))
        params = (ctypes.c_int64 * len(request))(*request)
        with self._lock:
            if not self._closed:
                self._run_team(*_room(), 0, self.n_threads, ctypes.addressof(params))
        if not done.value:
            raise Error("the model is closed")

    def close(self) -> None:
        """Ends the workers, after the run that is under way; in a fork, which has none, it does nothing."""
        self._closed = True  # for threads that wait for the lock
        if os.getpid() == self._pid:
            with self._lock:
                self._workers.end()
        self._finalizer.detach()

    def __reduce__(self) -> NoReturn:
        raise Error("the threads of an open model can't be copied or pickled; open the model where it is needed")


class _Workers:
    """The worker threads and what all threads share; apart from `Team`, so that a forgotten team can be collected."""

    def __init__(self, n_threads: int, kernels: dict[str, int]):
        self._n_threads = n_threads
        self._memory = aligned(8 * (SYNC_WORKERS + SYNC_LINE * (n_threads - 1))).view(np.int64)
        #: address of the memory described in `kernels.tape`
        self.sync = self._memory.ctypes.data
        crowded = n_threads > usable_cpus()
        self._memory[SYNC_MOST_SPINS] = LEAST_SPINS if crowded else MOST_SPINS
        self._memory[SYNC_YIELD] = _yield_address()
        if FUTEX:
            self._memory[SYNC_SYSCALL] = _address(ctypes.CDLL(None).syscall)
        self._memory[SYNC_TAKE] = _address(ctypes.pythonapi.PyThread_acquire_lock)
        self._memory[SYNC_RELEASE] = _address(ctypes.pythonapi.PyThread_release_lock)
        self._locks = [_Lock() for _ in range(1, n_threads)]
        self._memory[SYNC_WORKERS + SYNC_LOCK :: SYNC_LINE] = [lock.address for lock in self._locks]
        self._wait, self._end = KERNEL_TYPE(kernels["wait_for_work"]), KERNEL_TYPE(kernels["end_team"])
        self._params = np.array([self.sync, kernels["run_tape"], LEAST_SPINS if crowded else _SPINS], np.int64)
        self._pid = os.getpid()
        self._threads = [
            threading.Thread(target=self._work, args=(i,), daemon=True, name=f"ggpy-{i}") for i in range(1, n_threads)
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def _work(self, ith: int) -> None:
        self._wait(*_room(), ith, self._n_threads, self._params.ctypes.data)

    def end(self) -> None:
        """Ends the threads. In a fork there are none."""
        if os.getpid() != self._pid:
            return
        self._end(*_room(), 0, self._n_threads, self._params.ctypes.data)
        until = time.monotonic() + _SECONDS_TO_END
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():  # garbage is collected in any thread
                thread.join(max(0, until - time.monotonic()))


class _Lock:
    """A lock as Python's C code has it, taken: all systems have it, and compiled code can use it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        new = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", ctypes.pythonapi))
        take = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(("PyThread_acquire_lock", ctypes.pythonapi))
        self._free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyThread_free_lock", ctypes.pythonapi))
        self.address = new()
        take(self.address, 1)

    def __del__(self) -> None:
        if os.getpid() == self._pid:  # in a fork it may look as if somebody slept on it
            self._free(self.address)


_result = (ctypes.c_int64 * 2)()


def _room() -> tuple[int, int]:
    """Addresses for a result and an exception, which numba's calling convention wants and our kernels don't write."""
    return ctypes.addressof(_result), ctypes.addressof(_result) + 8


def _address(function: object) -> int:
    """Of a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _yield_address() -> int:
    """A C function without parameters that lets other threads run."""
    if sys.platform == "win32":
        return _address(ctypes.windll.kernel32.SwitchToThread)
    return _address(ctypes.CDLL(None).sched_yield)
