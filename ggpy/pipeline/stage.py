"""One stage of a pipeline: some layers of a model, and what all sequences have in them: keys, values and states."""

from typing import Any, NamedTuple

import numpy as np

from ..file import GGUFFile
from ..graph import Batch, Pages, Pool, Program, Team
from ..kernels.build import load
from ..models import Output, build_graph, read_architecture, run_inputs
from ..models.weights import DerivedWeight


class How(NamedTuple):
    """What a stage is told when it starts.

    Attributes
    ----------
    path : str
        The model's file.
    layers : range
    is_first, is_last : bool
        Whether it begins with token ids, ends with logits.
    n_expert_used, mla, n_ctx
        See `read_architecture`; n_ctx is the context.
    n_batch, n_outputs : int
        The most tokens of a run, and those of them whose logits can be had.
    kv_type : str
    n_pages, n_slots : int
    n_threads : int
    """

    path: str
    layers: range
    is_first: bool
    is_last: bool
    n_expert_used: int | None
    mla: str
    n_ctx: int
    n_batch: int
    n_outputs: int
    kv_type: str
    n_pages: int
    n_slots: int
    n_threads: int


class Stage:
    """The layers of a stage, ready to run. Of the file, only what belongs to them is read.

    Raises
    ------
    Error
        As for `Model`.
    """

    def __init__(self, how: How):
        self._how = how
        self._file = GGUFFile(how.path)
        self._arch = read_architecture(self._file, how.n_expert_used, how.mla, how.n_ctx)
        self._pages = Pages(how.n_pages, how.kv_type, how.n_ctx, how.n_slots)
        self._pools: dict[str, Pool] = {"pages": self._pages, "states": self._pages.states}
        self._derived: dict[str, DerivedWeight] = {}
        self._programs: dict[tuple[int, Output], Program] = {}
        self._team = Team(how.n_threads)
        programs = [self._program(n, "logits") for n in (1, how.n_batch)]
        load([name for program in programs for name in program.plan.names])
        #: names of its caches: no other stage may have them
        self.caches = sorted({t.name for t in programs[0].graph if t.op in ("CACHE", "STATE")})

    def _program(self, n_tokens: int, output: Output) -> Program:
        how = self._how
        end: Output = output if how.is_last else "x"
        key = (1 if n_tokens == 1 and end != "embeddings" else how.n_batch, end)
        if key not in self._programs:
            n_outputs = min(key[0], how.n_outputs) if end == "logits" else key[0]
            graph = build_graph(self._file, self._arch, key[0], n_outputs, how.layers, how.is_first, end, self._derived)
            self._programs[key] = Program(graph, self._pages, self._team)
        return self._programs[key]

    def do(self, message: tuple) -> Any:
        """What a message asks for: ("caches",) gives their names; ("run", output, batch, x), with x (n_tokens, n_embd) of
        the stage before or None, gives what the layers make of it; ("copy", pool, piece, to), ("read", pool, pieces) and
        ("write", pool, pieces, arrays) are for the pool of that name: see `Pool`."""
        kind, *rest = message
        if kind == "caches":
            return self.caches
        if kind != "run":
            return getattr(self._pools[rest[0]], kind)(*rest[1:])
        output, batch, x = rest
        batch = Batch(*batch)
        self._file.check()
        inputs = run_inputs(self._arch, batch) | ({} if x is None else {"x": x})
        (result,) = self._program(len(batch.ids), output).run(inputs, batch).values()
        self._file.check()
        return np.array(result)
