"""Numbered pieces of memory that are shared until somebody writes to them."""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from ..errors import ContextFullError


class Pool:
    """Piece p of a pool is piece p of each of its arrays. Whoever uses one holds it, and several may.

    Parameters
    ----------
    n : int
        How many pieces there are.
    what : str
        What they are called in messages.
    """

    def __init__(self, n: int, what: str):
        self._n, self._what = n, what
        self._arrays: dict[str, tuple[np.ndarray, ...]] = {}
        self._holders = [0] * n
        self._free = list(range(n))  # a heap: the lowest first, so that no more memory is touched than need be

    # Who holds what

    @property
    def n_free(self) -> int:
        """Pieces that nobody holds."""
        return len(self._free)

    def holders(self, i: int) -> int:
        """How many hold a piece."""
        return self._holders[i]

    def take(self) -> int:
        """A piece that nobody held.

        Raises
        ------
        ContextFullError
            There is none.
        """
        if not self._free:
            raise ContextFullError(f"all {self._n} {self._what} are taken")
        i = heapq.heappop(self._free)
        self._holders[i] = 1
        return i

    def share(self, i: int) -> None:
        """Adds a holder."""
        self._holders[i] += 1

    def give(self, i: int) -> None:
        """Takes a holder away; a piece without any is free."""
        self._holders[i] -= 1
        if not self._holders[i]:
            heapq.heappush(self._free, i)

    def own(self, i: int) -> int:
        """The piece itself, or a copy if others hold it too: what may be written.

        Raises
        ------
        ContextFullError
            There is none for the copy.
        """
        if self._holders[i] == 1:
            return i
        copy = self.take()
        self.copy(i, copy)
        self._holders[i] -= 1
        return copy

    def copy(self, i: int, to: int) -> None:
        """Copies what a piece holds."""
        for arrays in self._arrays.values():
            for a in arrays:
                a[to] = a[i]

    # What they hold

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays when full."""
        return sum(a.nbytes for arrays in self._arrays.values() for a in arrays)

    def read(self, pieces: Sequence[int]) -> dict[str, np.ndarray]:
        """The bytes of some pieces: for each array, "name.0" and so on, uint8 (len(pieces), bytes of a piece)."""
        return {
            f"{name}.{i}": a[np.array(pieces, np.intp)].reshape(len(pieces), math.prod(a.shape[1:])).view(np.uint8)
            for name, arrays in self._arrays.items()
            for i, a in enumerate(arrays)
        }

    def write(self, pieces: Sequence[int], saved: dict[str, np.ndarray]) -> None:
        """The inverse of `read`."""
        for name, arrays in self._arrays.items():
            for i, a in enumerate(arrays):
                a[np.array(pieces, np.intp)] = saved[f"{name}.{i}"].view(a.dtype).reshape(len(pieces), *a.shape[1:])
