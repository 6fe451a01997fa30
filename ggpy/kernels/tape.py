"""The tape: a list of kernels that a team of threads runs one after the other, without Python between them.

`tape` holds three int64 a step: the kernel's address, its parameters' address, and whether the threads must meet before it.
`sync` is the team's shared memory, one cache line (64 bytes) for each of

    0 arrivals   how often a thread has come to a barrier; only grows
    1 calls      how many runs have been asked for
    2 request    `run_tape`'s parameters, the address of a function that yields the processor, arrivals before the run
    3… workers   a line each: 1 when it has left for Python, to be woken there; the calls that it has answered
"""

from ..simd.vector import atomic_add, atomic_load, atomic_store, call_kernel, call_plain, clock, ld_i64, spin_hint, st_i64
from .source import function, kernel

_SPINS_BEFORE_YIELDING = 2_000  # some 30 microseconds: longer than balanced waits; on a busy machine others get on


@function
def barrier(sync, nth, target, yield_processor):
    atomic_add(sync, 1)
    spins = 0
    while atomic_load(sync) < target:
        spin_hint()
        spins += 1
        if spins > _SPINS_BEFORE_YIELDING:
            call_plain(yield_processor)


@kernel("run_tape")
def run_tape(ith, nth, tape, n_ops, sync, profile):
    """Runs the tape once. `profile`, if not 0, gets the clock before each step and after the last (thread 0)."""
    yield_processor = ld_i64(sync + 160)
    target = ld_i64(sync + 168)  # arrivals when the run began; kept by the main thread
    for i in range(n_ops):
        step = tape + 24 * i
        if nth > 1 and ld_i64(step + 16):
            target += nth
            barrier(sync, nth, target, yield_processor)
        if profile and ith == 0:
            st_i64(profile + 8 * i, clock())
        call_kernel(ld_i64(step), ith, nth, ld_i64(step + 8))
    if nth > 1:
        target += nth
        barrier(sync, nth, target, yield_processor)
    if profile and ith == 0:
        st_i64(profile + 8 * n_ops, clock())


@kernel("publish")
def publish(ith, nth, sync):
    """Asks for a run whose request stands in `sync`: workers see the request before the new count of calls."""
    atomic_add(sync + 64, 1)


@kernel("wait_for_work")
def wait_for_work(ith, nth, sync, run_tape, spins):
    """A worker's loop: runs what is asked for, and returns to Python after `spins` rounds without work."""
    mine = sync + 64 * (2 + ith)
    seen = ld_i64(mine + 8)
    waited = 0
    while waited < spins:
        if atomic_load(sync + 64) != seen:
            seen += 1
            call_kernel(run_tape, ith, nth, sync + 128)
            st_i64(mine + 8, seen)
            waited = 0
        spin_hint()
        waited += 1
    atomic_store(mine, 1)
    if atomic_load(sync + 64) != seen:
        atomic_store(mine, 0)
