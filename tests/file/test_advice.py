"""Advice on memory: what is dropped leaves memory and reads the same again."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ggpy.file.mapped import Mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
N = 64 * 4096


@pytest.fixture
def mapped(tmp_path):
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(N))
    mapped = Mapped(tmp_path / "file")
    yield mapped
    mapped.close()


def resident(mapped):
    """Bytes of the map that this process has in memory."""
    found = re.search(rf"{re.escape(str(mapped.path))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return 1024 * int(found[1])


def test_dropped_pages_leave_memory_and_read_the_same(mapped):
    before = bytes(mapped.buffer)
    assert resident(mapped) == N
    # Only whole pages among the bytes go: 9 of those from byte 100 to 10 pages and 100 bytes.
    mapped.drop(100, 10 * 4096)
    assert resident(mapped) == N - 9 * 4096
    mapped.drop(4096 * 20 + 1, 4096)
    assert resident(mapped) == N - 9 * 4096
    mapped.drop(0, N)
    assert resident(mapped) == 0
    mapped.prefetch(5000, 100_000)
    assert bytes(mapped.buffer) == before


def test_advice_works_when_the_file_is_gone_from_its_path(mapped):
    before = bytes(mapped.buffer)
    mapped.path.unlink()
    mapped.drop(0, N)
    mapped.prefetch(0, N)
    assert bytes(mapped.buffer) == before
