"""The tape: a list of kernels that a team of threads runs one after the other, without Python between them.

`tape` holds three int64 a step: the kernel's address, its parameters' address, and whether the threads must meet before it.
`sync` is the team's shared memory, in cache lines of 64 bytes; `table` has the slots' numbers:

    arrivals     how often a thread has come to a barrier, which only grows; how many sleep there, for how many rounds one
                 waits awake, now and at most (`waiting`), and C's `syscall`
    calls        how many runs have been asked for; whether the workers shall end
    request      `run_tape`'s parameters, arrivals before the run, C functions: to yield the processor, to take a lock, to
                 release it
    workers      a line each: whether it sleeps, and the lock that it sleeps on

Runs happen in compiled code alone. The main thread asks for a run, wakes those who sleep and takes part, all in one call of
`run_team`, and nothing about a run is remembered in Python: an exception there (Ctrl-C) falls before the whole or after it.

No worker misses a run. It says that it sleeps (ASLEEP), then looks once more at `calls`, then takes its lock; `run_team`
counts `calls` up, then looks who sleeps. Of two threads that each write first and read then, at least one sees the other's
word. Whoever takes ASLEEP back, in one step, decides: the worker itself, and doesn't take the lock; or `run_team`, which
then releases it, once.
"""

from ..simd.futex import sleep_while, wake_all
from ..simd.vector import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_kernel,
    call_lock,
    call_plain,
    clock,
    ld_i64,
    spin_hint,
    st_i64,
)
from .source import function, kernel
from .table import (
    SYNC_ARRIVALS,
    SYNC_ASLEEP,
    SYNC_BASE,
    SYNC_CALLS,
    SYNC_ENDING,
    SYNC_LINE,
    SYNC_LOCK,
    SYNC_MOST_SPINS,
    SYNC_RELEASE,
    SYNC_REQUEST,
    SYNC_SLEEPERS,
    SYNC_SPINS,
    SYNC_SYSCALL,
    SYNC_TAKE,
    SYNC_WORKERS,
    SYNC_YIELD,
)
from .waiting import FUTEX, LEAST_SPINS


@function
def barrier(sync, target):
    """Waits until there are `target` arrivals: at the processor, then asleep (or, where that can't be, letting others on).

    Where waits are long others want the processor, too: each sleep halves the time at the processor of the next waits in
    this run. Who sleeps is counted before it looks at the arrivals for the last time, within the system call; who arrives
    last counts itself before it looks who sleeps. So one of the two sees the other.
    """
    arrivals = sync + 8 * SYNC_ARRIVALS
    sleepers = sync + 8 * SYNC_SLEEPERS
    if atomic_add(arrivals, 1) + 1 == target:
        if FUTEX and atomic_load(sleepers):
            wake_all(ld_i64(sync + 8 * SYNC_SYSCALL), FUTEX, arrivals)
        return
    spins = ld_i64(sync + 8 * SYNC_SPINS)  # several threads write it: any of their numbers will do
    waited = 0
    seen = atomic_load(arrivals)
    while seen < target:
        if waited < spins:
            waited += 1
            spin_hint()
        elif FUTEX:
            atomic_add(sleepers, 1)
            sleep_while(ld_i64(sync + 8 * SYNC_SYSCALL), FUTEX, arrivals, seen)
            atomic_add(sleepers, -1)
            st_i64(sync + 8 * SYNC_SPINS, max(spins >> 1, LEAST_SPINS))
        else:
            call_plain(ld_i64(sync + 8 * SYNC_YIELD))
        seen = atomic_load(arrivals)


@kernel("run_tape")
def run_tape(ith, nth, tape, n_ops, sync, profile):
    """Runs the tape once. `profile`, if not 0, gets the clock before each step and after the last (thread 0)."""
    target = ld_i64(sync + 8 * SYNC_BASE)
    for i in range(n_ops):
        step = tape + 24 * i
        if nth > 1 and ld_i64(step + 16):
            target += nth
            barrier(sync, target)
        if profile and ith == 0:
            st_i64(profile + 8 * i, clock())
        call_kernel(ld_i64(step), ith, nth, ld_i64(step + 8))
    if nth > 1:
        target += nth
        barrier(sync, target)
    if profile and ith == 0:
        st_i64(profile + 8 * n_ops, clock())


@function
def worker_line(sync, ith):
    """The address of a worker's line; the first worker is thread 1."""
    return sync + 8 * (SYNC_WORKERS + SYNC_LINE * (ith - 1))


@function
def wake(sync, nth):
    """Wakes the workers that sleep."""
    for i in range(1, nth):
        worker = worker_line(sync, i)
        if atomic_swap(worker + 8 * SYNC_ASLEEP, 0):
            call_lock(ld_i64(sync + 8 * SYNC_RELEASE), ld_i64(worker + 8 * SYNC_LOCK), 0)


@kernel("run_team")
def run_team(ith, nth, tape, n_ops, sync, profile, run_tape, done):
    """Runs the tape once with all workers, as thread 0, and writes 1 to `done`; nothing if the workers have ended."""
    if atomic_load(sync + 8 * SYNC_ENDING):
        return
    request = sync + 8 * SYNC_REQUEST
    st_i64(request, tape)
    st_i64(request + 8, n_ops)
    st_i64(request + 16, sync)
    st_i64(request + 24, profile)
    # All have come to the last barrier of the run before, so that nobody counts arrivals now.
    st_i64(sync + 8 * SYNC_BASE, atomic_load(sync + 8 * SYNC_ARRIVALS))
    st_i64(sync + 8 * SYNC_SPINS, ld_i64(sync + 8 * SYNC_MOST_SPINS))
    if nth > 1:
        atomic_add(sync + 8 * SYNC_CALLS, 1)
        wake(sync, nth)
    call_kernel(run_tape, 0, nth, request)
    st_i64(done, 1)


@kernel("end_team")
def end_team(ith, nth, sync):
    """Lets the workers end; those at work do so after it."""
    atomic_store(sync + 8 * SYNC_ENDING, 1)
    wake(sync, nth)


@kernel("wait_for_work")
def wait_for_work(ith, nth, sync, run_tape, spins):
    """A worker's life: runs what is asked for, sleeps after `spins` rounds without work, returns when all shall end."""
    mine = worker_line(sync, ith)
    seen = 0
    waited = 0
    while True:
        if atomic_load(sync + 8 * SYNC_CALLS) != seen:
            seen += 1
            call_kernel(run_tape, ith, nth, sync + 8 * SYNC_REQUEST)
            waited = 0
        elif atomic_load(sync + 8 * SYNC_ENDING):
            return
        spin_hint()
        waited += 1
        if waited > spins:
            waited = 0
            atomic_store(mine + 8 * SYNC_ASLEEP, 1)
            stirred = atomic_load(sync + 8 * SYNC_CALLS) != seen or atomic_load(sync + 8 * SYNC_ENDING)
            if not stirred or not atomic_swap(mine + 8 * SYNC_ASLEEP, 0):
                call_lock(ld_i64(sync + 8 * SYNC_TAKE), ld_i64(mine + 8 * SYNC_LOCK), 1)
