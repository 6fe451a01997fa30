"""What the machine can do at most: how fast its threads read memory, and how fast they multiply int8."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..graph.threads import Team, aligned
from ..kernels.build import Progress, load
from ..simd.target import target

_BYTES = 256 << 20  # far more than caches hold
_ROUNDS = 1 << 19
_REPEAT = 5


class Limits(NamedTuple):
    """The limits of some threads.

    Attributes
    ----------
    bytes_per_second : float
        Of reading memory and nothing else: what decoding can't beat.
    operations_per_second : float
        Multiplications and additions of int8 dot products out of the first-level cache, in the form of SIMD that is in use
        and the tiles that the matrix kernels have: what prompts can't beat.
    """

    bytes_per_second: float
    operations_per_second: float


def measure_limits(n_threads: int, progress: Progress | None = None) -> Limits:
    """Measures them, in about a second; the best of some runs counts.

    Parameters
    ----------
    n_threads : int
    progress : callable, optional
        Told of kernels that must be compiled first.
    """
    team = Team(n_threads, progress)
    kernels = load(["read_memory", "multiply_int8"], progress)
    out = aligned(512 * n_threads)

    def best(kernel: str, *params: int) -> float:
        values = np.array([*params, out.ctypes.data], np.int64)
        tape = np.array([(kernels[kernel], values.ctypes.data, 0)], np.int64)
        return min(_seconds(lambda: team.run(tape)) for _ in range(_REPEAT))

    try:
        memory = np.ones(_BYTES, np.uint8)
        reading = best("read_memory", memory.ctypes.data, _BYTES)
        multiplying = best("multiply_int8", _ROUNDS)
    finally:
        team.close()
    operations = 2 * 32 * target().lanes * target().tokens * _ROUNDS * n_threads
    return Limits(_BYTES / reading, operations / multiplying)


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
