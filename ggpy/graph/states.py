"""The memory of sequences in layers where it has a fixed size: recurrences and short convolutions.

A *slot* is what all such layers of a model know of one sequence after some of its tokens, float32. Unlike a page, it can't
be cut: a sequence that is to go back needs a copy from then. At a sequence's first token a slot counts as zeros, whatever
it holds.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .pool import Pool
from .threads import aligned

if TYPE_CHECKING:
    from .tensor import Tensor


class States(Pool):
    """The slots of all sequences of a model.

    Parameters
    ----------
    n_slots : int
        How many there are.
    """

    def __init__(self, n_slots: int):
        super().__init__(n_slots, "slots of states")
        self.n_slots = n_slots

    def array(self, state: "Tensor") -> np.ndarray:
        """The values of a STATE node, float32 (n_slots, *shape). Made as graphs ask for them, and shared by all graphs
        that name them alike."""
        if state.name not in self._arrays:
            n = 4 * self.n_slots * math.prod(state.shape)
            self._arrays[state.name] = (aligned(n).view(np.float32).reshape(self.n_slots, *state.shape),)
        return self._arrays[state.name][0]


def slot_bytes(graph: "Iterable[Tensor]") -> int:
    """Bytes of a slot in all states of a graph; 0 where it has none."""
    return sum(4 * math.prod(t.shape) for t in graph if t.op == "STATE")
