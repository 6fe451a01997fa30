"""How many processors this process may use."""

import os
import sys
from math import ceil
from pathlib import Path


def usable_cpus() -> int:
    """Logical processors that this process may use, by affinity and cgroup quota: so many processes can work at once."""
    quota = cgroup_quota()
    n = len(_allowed())
    return max(1, n if quota is None else min(n, ceil(quota)))


def default_threads() -> int:
    """As many threads as this process may use physical cores: by the processor's topology, affinity, and cgroup quotas."""
    cores = len({_siblings(cpu) for cpu in _allowed()})
    if sys.platform == "darwin":
        cores = _mac_cores() or cores
    quota = cgroup_quota()
    if quota is not None:
        cores = min(cores, max(1, int(quota + 0.5)))
    return max(1, cores)


def _allowed() -> set[int]:
    """The logical processors that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


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
