"""The threads that run tapes, and how many there should be."""

import atexit
import ctypes
import os
import sys
import threading
import weakref
from pathlib import Path

import numpy as np

from ..errors import Error
from ..kernels.build import KERNEL_TYPE, Progress, load

_LINE = 8  # int64s in a cache line; the layout of the shared memory: see kernels/tape.py
_SPINS = 30_000  # about a millisecond without work before a worker leaves the processor to others


def default_threads() -> int:
    """As many threads as this process may use physical cores: by the processor's topology, affinity, and cgroup quotas."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in allowed})
    if sys.platform == "darwin":
        cores = _mac_cores() or cores
    quota = cgroup_quota()
    if quota is not None:
        cores = min(cores, max(1, int(quota + 0.5)))
    return max(1, cores)


def _siblings(cpu: int) -> str:
    """What names the physical core of a logical one."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _mac_cores() -> int | None:
    """Performance cores on Apple's processors: the slow ones would hold the fast ones up at each barrier."""
    import subprocess

    try:
        return int(subprocess.run(["sysctl", "-n", "hw.perflevel0.physicalcpu"], capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def cgroup_quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the cgroup's quota allows (v2, then v1), the least of it and its parents; None without a quota."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
        elif "cpu" in controllers.split(","):
            base = root / "cpu"
        else:
            continue
        folder = base / path.lstrip("/")
        for place in [folder, *folder.parents]:
            quota = _quota_of(place)
            if quota is not None:
                found.append(quota)
            if place == base:
                break
    return min(found, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        micro = int((folder / "cpu.cfs_quota_us").read_text())
        return None if micro <= 0 else micro / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None


def _yield_address() -> int:
    """A C function without parameters that lets other threads run."""
    if sys.platform == "win32":
        return ctypes.cast(ctypes.windll.kernel32.SwitchToThread, ctypes.c_void_p).value or 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def aligned(n_bytes: int) -> np.ndarray:
    """Zeroed memory that starts at a cache line."""
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


class Team:
    """`n_threads` threads, the caller's among them, that run a tape together. One run at a time.

    Workers wait for the next run in compiled code for about a millisecond, then sleep.
    """

    def __init__(self, n_threads: int, progress: Progress | None = None):
        if n_threads < 1:
            raise Error(f"{n_threads} threads: at least 1 is needed")
        self.n_threads = n_threads
        kernels = load(["run_tape", "wait_for_work", "publish"], progress)
        self._run_address = kernels["run_tape"]
        self._run, self._publish = KERNEL_TYPE(kernels["run_tape"]), KERNEL_TYPE(kernels["publish"])
        self._memory = aligned(64 * (3 + n_threads)).view(np.int64)
        self._sync = self._memory.ctypes.data
        self._memory[20] = _yield_address()
        self._spare = aligned(64 * n_threads)  # numba's calling convention wants room for a result and an exception
        self._publish_params = np.array([self._sync], np.int64)
        self._run_lock = threading.Lock()
        self._arrivals = 0
        state = _Workers(self._memory, self._spare, kernels["wait_for_work"], self._run_address, n_threads)
        self._workers = state
        self._finalizer = weakref.finalize(self, state.stop)
        atexit.register(self._finalizer)

    def run(self, tape: np.ndarray, n_barriers: int, profile: np.ndarray | None = None) -> None:
        """Runs a tape of (kernel, parameters, barrier) int64s once.

        Parameters
        ----------
        tape : int64 array (n_steps, 3)
        n_barriers : int
            How many of its steps have a barrier before them.
        profile : int64 array (n_steps + 1,), optional
            Gets the processor's clock before each step and at the end.
        """
        with self._run_lock:
            clock = 0 if profile is None else profile.ctypes.data
            self._memory[16:20] = (tape.ctypes.data, len(tape), self._sync, clock)
            self._memory[21] = self._arrivals
            if self.n_threads > 1:
                self._arrivals += self.n_threads * (n_barriers + 1)
            spare = self._spare.ctypes.data
            if self.n_threads > 1:
                self._publish(spare, spare + 8, 0, 1, self._publish_params.ctypes.data)
                self._workers.wake()
            self._run(spare, spare + 8, 0, self.n_threads, self._sync + 128)

    def close(self) -> None:
        """Ends the workers."""
        self._finalizer()
        atexit.unregister(self._finalizer)


class _Workers:
    """The worker threads; apart from `Team`, so that a forgotten team can be collected."""

    def __init__(self, memory: np.ndarray, spare: np.ndarray, wait_address: int, run_address: int, n_threads: int):
        self._memory, self._spare = memory, spare
        self._wait = KERNEL_TYPE(wait_address)
        self._params = np.array([memory.ctypes.data, run_address, _SPINS], np.int64)
        self._n_threads = n_threads
        self._stopping = False
        self._sleeping = [threading.Semaphore(0) for _ in range(n_threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(i,), daemon=True, name=f"ggpy-{i}") for i in range(1, n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, ith: int) -> None:
        asleep = _LINE * (2 + ith)
        slot = self._spare.ctypes.data + 64 * ith
        while not self._stopping:
            self._wait(slot, slot + 8, ith, self._n_threads, self._params.ctypes.data)
            if self._memory[asleep]:
                self._sleeping[ith].acquire()
                self._memory[asleep] = 0

    def wake(self) -> None:
        """Wakes the workers that have gone to sleep."""
        for ith in range(1, self._n_threads):
            if self._memory[_LINE * (2 + ith)]:
                self._sleeping[ith].release()

    def stop(self) -> None:
        self._stopping = True
        for semaphore in self._sleeping:
            semaphore.release()
        for thread in self._threads:
            thread.join(timeout=2)
