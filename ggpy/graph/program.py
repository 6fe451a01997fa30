"""A graph made ready to run: planned, its kernels loaded, its tape written."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GraphError
from ..kernels.build import Progress, load
from ..simd.target import target
from .plan import Plan
from .threads import aligned

if TYPE_CHECKING:
    from .cache import Caches
    from .tensor import Graph
    from .threads import Team


class Program:
    """Runs a graph with the kernels.

    Parameters
    ----------
    graph : Graph
    caches : Caches
        Read and extended by each run.
    team : Team
        The threads.
    """

    def __init__(self, graph: "Graph", caches: "Caches", team: "Team"):
        self.graph, self._team, self._n_ctx = graph, team, caches.n_ctx
        self.plan = Plan(graph, caches, team.n_threads, target().lanes)
        self._tape: np.ndarray | None = None

    def prepare(self, progress: Progress | None = None) -> None:
        """Loads the kernels, compiled first if need be, and takes the memory of the run. `run` does so by itself."""
        kernels = load(self.plan.names, progress)
        n_steps = len(self.plan.steps)
        self._arena = aligned(self.plan.arena_bytes)
        self._state = aligned(128).view(np.int64)
        self._counters = aligned(64 * n_steps)
        state = self._state.ctypes.data
        self._params, starts = self.plan.encode(self._arena.ctypes.data, (state, state + 64), self._counters.ctypes.data)
        base = self._params.ctypes.data
        steps = zip(self.plan.steps, starts, strict=True)
        self._tape = np.array([(kernels[s.kernel], base + 8 * first, b) for s, (first, b) in steps], np.int64)
        self._n_barriers = sum(b for _, b in starts)
        self._inputs = {n.name: self._view(n) for n in self.graph if n.op == "INPUT" and self._is_used(n)}
        self._outputs = {name: self._view(t) for name, t in self.graph.outputs.items()}

    def _is_used(self, node) -> bool:
        return any(node in n.inputs for n in self.graph)

    def _view(self, node) -> np.ndarray:
        """A node's place in the arena, (n_tokens, …)."""
        offset, _ = self.plan.place(node)
        dtype = np.int32 if node.type == "I32" else np.float32
        return self._arena[offset : offset + 4 * node.n_values].view(dtype).reshape(node.shape)

    def run(
        self, inputs: Mapping[str, np.ndarray], n_past: int, profile: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Computes the outputs for up to `graph.n_tokens` tokens.

        Parameters
        ----------
        inputs : mapping of str to array
            For each INPUT node, (n_tokens, …).
        n_past : int
            Tokens in the caches before this run.
        profile : int64 array (n_steps + 1,), optional
            Gets the clock before each step and at the end.

        Returns
        -------
        dict of str to float32 array
            Each output, (n_tokens, …) or (1, …) after LAST_ROW. Views, good until the next run.

        Raises
        ------
        GraphError
            An input is missing or has another shape; more tokens than the graph or the caches take.
        """
        if self._tape is None:
            self.prepare()
        assert self._tape is not None
        n_tokens = 0
        for name, place in self._inputs.items():
            if name not in inputs:
                raise GraphError(f"input {name} is missing")
            given = inputs[name]
            n_tokens = n_tokens or len(given)
            if len(given) != n_tokens or given.shape[1:] != place.shape[1:] or not 0 < n_tokens <= self.graph.n_tokens:
                raise GraphError(f"input {name}: shape {given.shape}, at most {place.shape} is possible")
            place[:n_tokens] = given
        if n_past + n_tokens > self._n_ctx:
            raise GraphError(f"{n_past} + {n_tokens} tokens in a cache of {self._n_ctx}")
        self._state[0:2] = n_tokens, n_past
        self._state[8:10] = 1, n_past + n_tokens - 1
        self._counters[:] = 0
        self._team.run(self._tape, self._n_barriers, profile)
        return {name: value[:n_tokens] for name, value in self._outputs.items()}
