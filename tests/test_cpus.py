"""How many processors a process may use."""

import os

import pytest

from ggpy.cpus import cgroup_quota, default_threads, usable_cpus


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 1.5), ("max 100000", 4.0)])
def test_the_least_quota_of_a_cgroup_and_its_parents(tmp_path, text, expected):
    root = tmp_path / "fs"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "cpu.max").write_text(text + "\n")
    (root / "a" / "cpu.max").write_text("400000 100000\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert cgroup_quota(tmp_path / "cgroup", root) == expected


def test_the_quota_of_an_older_cgroup(tmp_path):
    """Whose path in a container is often the host's, with the container's own at the root."""
    root = tmp_path / "fs"
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cgroup").write_text("12:memory:/x\n4:cpu,cpuacct:/docker/x\n")
    for micro, expected in (("250000", 2.5), ("-1", None)):
        (root / "cpu" / "cpu.cfs_quota_us").write_text(micro + "\n")
        assert cgroup_quota(tmp_path / "cgroup", root) == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_processors_by_affinity_and_quota(monkeypatch):
    allowed = {0, 1, 2, 3}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr("ggpy.cpus._siblings", lambda cpu: str(cpu // 2))  # two on each core
    for quota, cpus, threads in ((None, 4, 2), (0.5, 1, 1), (1.5, 2, 2), (8.0, 4, 2)):
        monkeypatch.setattr("ggpy.cpus.cgroup_quota", lambda quota=quota: quota)
        assert (usable_cpus(), default_threads()) == (cpus, threads)
