"""The limits of the machine, as far as they can be checked without depending on its speed."""

import numpy as np

from ggpy.graph import Team
from ggpy.graph.threads import aligned
from ggpy.kernels.build import load
from ggpy.measure.limits import measure_limits
from ggpy.simd.target import target


def test_limits_are_finite_rates_in_every_form(simd_form):
    limits = measure_limits(2)
    # Between what any 64-bit processor does and what none will do soon.
    assert 1e8 < limits.bytes_per_second < 1e14
    assert 1e8 < limits.operations_per_second < 1e16


def test_reading_reads_all_of_every_part(simd_form):
    kernel = load(["read_memory"])["read_memory"]
    memory, out = np.arange(64 * 1024, dtype=np.int32), aligned(64 * 3)
    values = np.array([memory.ctypes.data, memory.nbytes, out.ctypes.data], np.int64)
    team = Team(3)
    team.run(np.array([(kernel, values.ctypes.data, 0)], np.int64))
    team.close()
    sums = out.view(np.int32).reshape(3, 16)[:, : target().lanes]
    assert sums.astype(np.uint32).sum(dtype=np.uint32) == memory.astype(np.uint32).sum(dtype=np.uint32)
