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
    from .batch import Batch
    from .pages import Pages
    from .tensor import Graph
    from .threads import Team


Hook = Callable[[str, np.ndarray], Any]


class Program:
    """Runs a graph with the kernels.

    Parameters
    ----------
    graph : Graph
    pages : Pages
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

    def __init__(self, graph: "Graph", pages: "Pages", team: "Team", hooks: Mapping[str, Hook] = MappingProxyType({})):
        self.graph, self._team, self._pages = graph, team, pages
        for name in hooks:
            if name not in graph or graph[name].op not in OPS:
                raise GraphError(f"hook on {name!r}, which is no computed node of the graph")
        self._hooks = dict(hooks)
        self._has_states = any(t.op == "STATE" for t in graph)
        self.plan = Plan(graph, pages, team.n_threads, target().lanes, self._hooks)
        self._tape: np.ndarray | None = None

    def prepare(self, progress: Progress | None = None) -> None:
        """Loads the kernels, compiled first if need be, and takes the memory of the run. `run` does so by itself."""
        kernels = load(self.plan.names, progress)
        n_steps = len(self.plan.steps)
        self._arena = aligned(self.plan.arena_bytes)
        self._state = aligned(128).view(np.int64)
        self._counters = aligned(8 * n_steps)
        state = self._state.ctypes.data
        self._params, starts = self.plan.encode(
            self._arena.ctypes.data, {"token": state, "output": state + 64}, self._counters.ctypes.data
        )
        base = self._params.ctypes.data
        steps = zip(self.plan.steps, starts, strict=True)
        self._tape = np.array([(kernels[s.kernel], base + 8 * first, b) for s, (first, b) in steps], np.int64)
        stops = sorted((self.plan.step_after(self.graph[name]), name) for name in self._hooks)
        self._stops = [(stop, name, self.graph[name].per, self._view(self.graph[name])) for stop, name in stops]
        given = [n for n in self.graph if n.op == "INPUT" and self._is_used(n)]
        self._inputs = [(n.name, n.per, self._view(n)) for n in given]
        self._outputs = [(name, t.per, self._view(t)) for name, t in self.graph.outputs.items()]

    def _run(self, first: int, stop: int, profile: np.ndarray | None) -> None:
        assert self._tape is not None
        self._team.run(self._tape[first:stop], profile)

    def _is_used(self, node) -> bool:
        return any(node in n.inputs for n in self.graph)

    def _view(self, node) -> np.ndarray:
        """A node's place in the arena, (n_tokens, …)."""
        offset, _ = self.plan.place(node)
        dtype = np.int32 if node.type == "I32" else np.float32
        return self._arena[offset : offset + 4 * node.n_values].view(dtype).reshape(node.shape)

    def run(
        self, inputs: Mapping[str, np.ndarray], batch: "Batch", profile: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Computes the outputs for up to `graph.n_tokens` tokens.

        Parameters
        ----------
        inputs : mapping of str to array
            For each INPUT node, (n_tokens, …) or (n_outputs, …).
        batch : Batch
            Whose tokens they are.
        profile : int64 array (n_steps + 1,), optional
            Gets the clock before each step and at the end.

        Returns
        -------
        dict of str to float32 array
            Each output, (n_tokens, …), or (n_outputs, …) after ROWS. Views, good until the next run.

        Raises
        ------
        GraphError
            An input is missing or has another shape; more tokens or outputs than the graph takes; a page or slot that
            doesn't exist, a position beyond n_ctx.
        """
        if self._tape is None:
            self.prepare()
        assert self._tape is not None
        counts = {"token": len(batch.positions), "output": len(batch.outputs)}
        if not 0 < counts["token"] <= self.graph.n_tokens or counts["output"] > self.graph.n_outputs:
            at_most = f"{self.graph.n_tokens} and {self.graph.n_outputs} are possible"
            raise GraphError(f"{counts['token']} tokens and {counts['output']} outputs in a run; {at_most}")
        if _most(batch.pages) >= self._pages.n_pages or _most(batch.positions) >= self._pages.n_ctx:
            at_most = f"{self._pages.n_pages} pages and {self._pages.n_ctx} positions of a sequence"
            raise GraphError(f"page {_most(batch.pages)}, position {_most(batch.positions)}; there are {at_most}")
        if self._has_states and _most(batch.spans[:, 4]) >= self._pages.states.n_slots:
            raise GraphError(f"slot {_most(batch.spans[:, 4])}; there are {self._pages.states.n_slots} slots of states")
        for name, per, place in self._inputs:
            if name not in inputs:
                raise GraphError(f"input {name} is missing")
            given, n = inputs[name], counts[per]
            if len(given) != n or given.shape[1:] != place.shape[1:]:
                raise GraphError(f"input {name}: shape {given.shape}, not {(n, *place.shape[1:])}")
            place[:n] = given
        n_single = int(np.count_nonzero(batch.spans[:, 1] == 1)) if len(batch.spans) > 1 else int(counts["token"] == 1)
        self._state[:6] = (
            counts["token"],
            len(batch.spans),
            n_single,
            _address(batch.spans),
            _address(batch.places),
            _address(batch.pages),
        )
        self._state[8] = counts["output"]
        self._counters[:] = 0
        first = 0
        for stop, name, per, place in self._stops:
            if stop > first:
                self._run(first, stop, None)
            first = stop
            value = place[: counts[per]]
            new = self._hooks[name](name, value)
            if new is not None:
                value[...] = new
        self._run(first, len(self._tape), profile)
        return {name: value[: counts[per]] for name, per, value in self._outputs}


def _most(array: np.ndarray) -> int:
    """The highest of int32 values, of which those below 0 count as highest."""
    return int(array.view(np.uint32).max()) if len(array) else 0


def _address(array: np.ndarray) -> int:
    if array.dtype != np.int32 or not array.flags.c_contiguous:
        raise GraphError("the arrays of a batch are int32 and contiguous")
    return array.ctypes.data
