"""Runs that end where a weight is read beyond its ends: each one stands alone between pages that can't be read.

    python -m tests.graph.walls front|back|short MODEL…

A process of its own, since what is found is a signal. `front` has the weights begin behind a page that can't be read,
`back` has them end before one; `short` takes the last 64 bytes of each away, which every run must find.
"""

import ctypes
import mmap
import sys
from pathlib import Path
from unittest import mock

import numpy as np

import ggpy
from ggpy.file.tensors import GGUFTensor
from ggpy.models.weights import DerivedWeight

from .guards import guarded

READ_WRITE, NOTHING, PRIVATE_ANONYMOUS = 3, 0, 0x22


class Walls:
    """Copies of arrays between pages that can't be read; each is kept, as its address is what runs know."""

    def __init__(self, where):
        self._where, self._kept = where, {}
        self._libc = ctypes.CDLL(None)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def of(self, owner, data):
        """The copy of an owner's data."""
        if id(owner) not in self._kept:
            self._kept[id(owner)] = owner, self._copied(np.ascontiguousarray(data))
        return self._kept[id(owner)][1]

    def _copied(self, data):
        page = mmap.PAGESIZE
        n = -(-data.nbytes // page) * page
        start = self._libc.mmap(None, n + 2 * page, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        at = start + page + (0 if self._where == "front" else n - data.nbytes)
        copy = np.frombuffer((ctypes.c_char * data.nbytes).from_address(at), data.dtype).reshape(data.shape)
        copy[...] = data
        if self._where == "short":
            copy = np.frombuffer((ctypes.c_char * data.nbytes).from_address(at + 64), data.dtype).reshape(data.shape)
        for wall in (start, start + page + n):
            assert self._libc.mprotect(wall, page, NOTHING) == 0
        return copy


def run(path):
    """One token and many, with two types of cache and both ways of latent attention."""
    found = []
    for kv_type, mla in (("f16", "absorbed"), ("q8_0", "naive")):
        with ggpy.load(path, n_ctx=64, n_batch=16, n_threads=1, kv_type=kv_type, mla=mla) as model:
            texts = [list(range(5, 25)), [5]]
            if model._runner.is_encoder:
                found.append(model.embed(texts, pooling="cls"))
            else:
                found += [model.logits(text) for text in texts]
    return found


def main():
    where, *paths = sys.argv[1:]
    walls, stored, derived = Walls(where), GGUFTensor.data.fget, {}

    def of_derived(weight, *given):
        """Takes a weight's data, or gives them."""
        return derived.update({id(weight): given[0]}) if given else walls.of(weight, derived[id(weight)])

    for path in paths:
        plain = run(Path(path))
        with (
            guarded(),
            mock.patch.object(GGUFTensor, "data", property(lambda tensor: walls.of(tensor, stored(tensor)))),
            mock.patch.object(DerivedWeight, "data", property(of_derived, of_derived), create=True),
        ):
            between = run(Path(path))
        assert all(np.array_equal(a, b) for a, b in zip(plain, between, strict=True))


if __name__ == "__main__":
    main()
