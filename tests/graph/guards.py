"""Runs that watch their memory: a guard behind every buffer, and after each step a look at what it has written."""

from contextlib import contextmanager
from unittest import mock

import numpy as np

from ggpy.graph import Program
from ggpy.graph.plan import Memory, Plan, _buffer

GUARD = 512  # bytes; more than the widest vectors and a padded row of activations


class OutOfBoundsError(AssertionError):
    """A step has written what isn't its own."""


@contextmanager
def guarded():
    """Programs that are made within have guards and raise OutOfBoundsError. What they read beyond a buffer is NaN."""
    buffer, scratch, prepare = Plan.buffer, Plan.scratch, Program.prepare

    def prepare_guarded(self, *args):
        prepare(self, *args)
        self._arena[:] = 0xFF

    with (
        mock.patch.object(Plan, "buffer", lambda self, n: buffer(self, n + GUARD)),
        mock.patch.object(Plan, "scratch", lambda self, n: scratch(self, n + GUARD)),
        mock.patch.object(Program, "prepare", prepare_guarded),
        mock.patch.object(Program, "_run", _run),
    ):
        yield


def _run(self, first, stop, profile):
    for i in range(first, stop):
        step = self.plan.steps[i]
        caches = [a for arrays in self._pages._arrays.values() for a in arrays]
        before, kept = self._arena.copy(), [a.tobytes() for a in caches]
        self._team.run(self._tape[i : i + 1], None)
        own = np.zeros(len(self._arena), bool)
        written = [_buffer(step.params[name]) for name in step.writes]
        for place in written:
            if not isinstance(place, Memory):
                own[place.offset : place.offset + place.n_bytes - GUARD] = True
        stride = self.plan._scratch_stride
        for thread in range(self.plan.n_threads):
            start = self.plan._scratch.offset + thread * stride
            own[start : start + max(0, stride - GUARD)] = True
        strange = np.flatnonzero((before != self._arena) & ~own)
        if len(strange):
            raise OutOfBoundsError(f"{step.kernel} for {step.node.name} has written to byte {strange[0]} of the arena")
        for cache, old in zip(caches, kept, strict=True):
            mine = any(isinstance(place, Memory) and place.address == cache.ctypes.data for place in written)
            if not mine and cache.tobytes() != old:
                raise OutOfBoundsError(f"{step.kernel} for {step.node.name} has written to keys or values")
