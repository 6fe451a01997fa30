"""Runs a mixture of experts that is bigger than the memory it may take.

The system pages weights in and out by itself, but knows neither what comes next nor what is worth keeping: a page fault
reads what stands around it, and waits. Here each router's choice is told to the system as soon as it has been made, so
that the experts are read together and nothing else is, and experts beyond the budget go least frequently used first.
"""

import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import Error, UnsupportedError

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Hook

#: bytes for what isn't weights: kernels, activations, tokenizer, Python
_OWN = 400 << 20


class _Part(NamedTuple):
    """The matrices of a layer's experts for one product: a tensor of the file."""

    name: str
    n_bytes: int  # of one expert


class ExpertMemory:
    """Keeps the experts of a model within a budget of memory.

    Parameters
    ----------
    file : GGUFFile
    graph : Graph
        A graph of the model.
    budget : int
        Bytes for all of the process: weights, caches and the rest.
    cache_bytes : int
        Bytes of the KV caches when full.

    Attributes
    ----------
    room : int
        Bytes for experts.
    held : int
        Bytes of the experts that are kept now.
    n_chosen, n_found : int
        Experts chosen so far, counted once a run, and those of them that were kept.

    Raises
    ------
    UnsupportedError
        The model has no experts, or the system takes no advice on memory maps.
    Error
        The budget doesn't hold what all tokens need and the experts of one layer.
    """

    def __init__(self, file: "GGUFFile", graph: "Graph", budget: int, cache_bytes: int):
        if not hasattr(mmap, "MADV_WILLNEED"):
            raise UnsupportedError("a RAM budget needs madvise, which this system lacks")
        self._file = file
        self._parts: dict[str, list[_Part]] = {}  # name of a router's node -> what it decides on
        for t in graph:
            if t.op == "MUL_MAT_ID":
                weight = t.inputs[0]
                part = _Part(weight.name, weight.attrs["weight"].n_bytes // weight.shape[0])
                self._parts.setdefault(t.inputs[2].name, []).append(part)
        if not self._parts:
            raise UnsupportedError(f"{file.path}: a RAM budget is for models with experts; this has none")
        all_experts = sum(file.tensors[p.name].n_bytes for parts in self._parts.values() for p in parts)
        others = sum(t.n_bytes for t in file.tensors.values()) - all_experts + cache_bytes + _OWN
        # A prompt may take all experts of a layer at once.
        least = others + max(sum(file.tensors[p.name].n_bytes for p in parts) for parts in self._parts.values())
        if budget < least:
            raise Error(f"{file.path}: a RAM budget of {budget:,} bytes; {least:,} are needed, the KV cache included")
        self.room = budget - others
        self.held = 0
        self.n_chosen = self.n_found = 0
        self._uses: dict[tuple[str, int], int] = {}
        self._worth: dict[tuple[str, int], tuple[int, int]] = {}  # of those held: uses, last use
        self._now = 0

    def _size(self, router: str) -> int:
        return sum(p.n_bytes for p in self._parts[router])

    def beside(self, hooks: "Mapping[str, Hook]") -> "dict[str, Hook]":
        """Hooks that look after the experts, and call the given ones first."""

        def on_route(name: str, route: np.ndarray) -> np.ndarray | None:
            new = hooks[name](name, route) if name in hooks else None
            self.choose(name, route if new is None else new)
            return new

        return {**hooks, **dict.fromkeys(self._parts, on_route)}

    def choose(self, router: str, route: np.ndarray) -> None:
        """Sees to it that the experts of a route (n_tokens, n_used, 2) are read, and others make room."""
        chosen = np.unique(route[..., 0].astype(np.int64)).tolist()
        size, missing = self._size(router), []
        self._now += 1
        for expert in chosen:
            key = (router, expert)
            self._uses[key] = self._uses.get(key, 0) + 1
            if key not in self._worth:
                missing.append(expert)
                self.held += size
            self._worth[key] = (self._uses[key], self._now)
        self.n_chosen += len(chosen)
        self.n_found += len(chosen) - len(missing)
        if self.held > self.room:
            self._make_room(router)
        for part in self._parts[router]:
            for expert in missing:
                self._file.tensors[part.name].prefetch(expert * part.n_bytes, part.n_bytes)

    def _make_room(self, router: str) -> None:
        # Those of this moment are needed, even if it is a whole layer's for a prompt.
        for key in sorted((k for k, worth in self._worth.items() if worth[1] < self._now), key=self._worth.__getitem__):
            if self.held <= self.room:
                return
            for part in self._parts[key[0]]:
                self._file.tensors[part.name].drop(key[1] * part.n_bytes, part.n_bytes)
            del self._worth[key]
            self.held -= self._size(key[0])
