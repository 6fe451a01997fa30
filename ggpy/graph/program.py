"""A graph made ready to run: planned, its kernels loaded, its tape written."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GraphError
from ..kernels.build import Progress, load
from ..simd.target import target
from .ops import OPS
from .plan import Plan
from .threads import aligned

if TYPE_CHECKING:
    from .cache import Caches
    from .tensor import Graph
    from .threads import Team


Hook = Callable[[str, np.ndarray], Any]


class Program:
    """Runs a graph with the kernels.

    Parameters
    ----------
    graph : Graph
    caches : Caches
        Read and extended by each run.
    team : Team
        The threads.
    hooks : mapping of str to callable
        For names of computed nodes: called as hook(name, value) when the node's value, float32 (n_tokens, …), has just
        been computed. What it returns, if not None, replaces the value.

    Raises
    ------
    GraphError
        A hook's node doesn't exist, or isn't computed.
    """

    def __init__(self, graph: "Graph", caches: "Caches", team: "Team", hooks: Mapping[str, Hook] = MappingProxyType({})):
        self.graph, self._team, self._n_ctx = graph, team, caches.n_ctx
        for name in hooks:
            if name not in graph or graph[name].op not in OPS:
                raise GraphError(f"hook on {name!r}, which is no computed node of the graph")
        self._hooks = dict(hooks)
        self.plan = Plan(graph, caches, team.n_threads, target().lanes, self._hooks)
        self._tape: np.ndarray | None = None

    def prepare(self, progress: Progress | None = None) -> None:
        """Loads the kernels, compiled first if need be, and takes the memory of the run. `run` does so by itself."""
        kernels = load(self.plan.names, progress)
        n_steps = len(self.plan.steps)
        self._arena = aligned(self.plan.arena_bytes)
        self._state = aligned(128).view(np.int64)
        self._counters = aligned(8 * n_steps)
        state = self._state.ctypes.data
        self._params, starts = self.plan.encode(self._arena.ctypes.data, (state, state + 64), self._counters.ctypes.data)
        base = self._params.ctypes.data
        steps = zip(self.plan.steps, starts, strict=True)
        self._tape = np.array([(kernels[s.kernel], base + 8 * first, b) for s, (first, b) in steps], np.int64)
        self._barriers = np.array([b for _, b in starts])
        stops = sorted((self.plan.step_after(self.graph[name]), name) for name in self._hooks)
        self._stops = [(stop, name, self._view(self.graph[name])) for stop, name in stops]
        self._inputs = {n.name: self._view(n) for n in self.graph if n.op == "INPUT" and self._is_used(n)}
        self._outputs = {name: self._view(t) for name, t in self.graph.outputs.items()}

    def _run(self, first: int, stop: int, profile: np.ndarray | None) -> None:
        assert self._tape is not None
        self._team.run(self._tape[first:stop], int(self._barriers[first:stop].sum()), profile)

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
        first = 0
        for stop, name, place in self._stops:
            if stop > first:
                self._run(first, stop, None)
            first = stop
            value = place[:n_tokens]
            new = self._hooks[name](name, value)
            if new is not None:
                value[...] = new
        self._run(first, len(self._tape), profile)
        return {name: value[:n_tokens] for name, value in self._outputs.items()}
