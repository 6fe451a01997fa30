"""A sequence of tokens run through a model: its caches, and the programs that extend it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ContextFullError, Error
from ..graph import Caches, Hook, Program
from ..kernels.build import Progress, load
from ..models import Architecture, Logits, build_graph, run_inputs
from .expert_memory import ExpertMemory

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Team
    from ..graph.plan import Step

_LOGITS_BYTES = 64 << 20  # that a run which computes the logits of all its tokens may take for them


class TokenSequence:
    """The tokens evaluated so far, with their keys and values.

    Parameters
    ----------
    file, arch
        The model.
    n_ctx : int
        The most tokens.
    n_batch : int
        The most tokens in one run.
    team : Team
        The threads.
    kv_type : {"F16", "Q8_0", "F32"}
        Of the cached keys and values.
    ram_budget : int, optional
        Bytes that the process may take; see `expert_memory`.
    progress : callable, optional
        Told of kernels that must be compiled first.
    """

    def __init__(
        self,
        file: "GGUFFile",
        arch: Architecture,
        n_ctx: int,
        n_batch: int,
        team: "Team",
        kv_type: str = "F16",
        ram_budget: int | None = None,
        progress: Progress | None = None,
    ):
        self._file, self._arch, self._team = file, arch, team
        self.n_ctx, self._n_batch = n_ctx, min(n_batch, n_ctx)
        self.caches = Caches(n_ctx, kv_type)
        self.ids: list[int] = []
        #: see `Program`; may be changed between runs
        self.hooks: dict[str, Hook] = {}
        self._evaluated_with: dict[str, Hook] = {}
        self._programs: dict[tuple, Program] = {}
        self.expert_memory: ExpertMemory | None = None
        if ram_budget is not None:
            graph = build_graph(file, arch, 1)
            cache_bytes = sum(self.caches.size(t) for t in graph if t.op == "CACHE")
            self.expert_memory = ExpertMemory(file, graph, ram_budget, cache_bytes)
        # One token, and a prompt: both are sure to be needed, so their kernels are compiled together.
        programs = [self.program(1, "last"), self.program(self._n_batch, "last")]
        load([name for p in programs for name in p.plan.names], progress)

    def program(self, n_tokens: int, logits: Logits) -> Program:
        """The program for up to n_tokens tokens."""
        key = (n_tokens, logits, *self.hooks.items())
        if key not in self._programs:
            graph = build_graph(self._file, self._arch, n_tokens, logits)
            hooks = self.hooks if self.expert_memory is None else self.expert_memory.beside(dict(self.hooks))
            self._programs[key] = Program(graph, self.caches, self._team, hooks)
        return self._programs[key]

    def keep(self, n: int) -> None:
        """Forgets all but the first n tokens."""
        del self.ids[n:]

    def reuse(self, ids: Sequence[int]) -> int:
        """Keeps what this sequence shares with `ids`, but for their last token, which must be evaluated for its logits.

        Nothing is kept when the hooks have changed, which may have changed the cached values.

        Returns
        -------
        int
            How many tokens of `ids` are kept.
        """
        n = 0
        for a, b in zip(self.ids, ids[:-1], strict=False):
            if a != b:
                break
            n += 1
        n = n if self.hooks == self._evaluated_with else 0
        self.keep(n)
        return n

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Evaluates more tokens; the logits after the last, float32 (n_vocab,), good until the next call.

        Raises
        ------
        ContextFullError
            They don't fit.
        """
        logits = None
        for chunk in self._chunks(ids, self._n_batch):
            logits = self._run(chunk, self.program(1 if len(chunk) == 1 else self._n_batch, "last"))
        if logits is None:
            raise Error("no tokens to evaluate")
        return logits[-1]

    def extend_all(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Evaluates more tokens; yields the logits of all, in pieces (n, n_vocab), each good until the next.

        Raises
        ------
        ContextFullError
            They don't fit.
        """
        n = max(2, min(self._n_batch, _LOGITS_BYTES // (4 * self._arch.n_vocab)))
        for chunk in self._chunks(ids, n):
            yield self._run(chunk, self.program(n, "all"))

    def profile(self, ids: Sequence[int]) -> tuple[list["Step"], np.ndarray]:
        """Evaluates more tokens in one run; its steps, and the processor's clock before each and at the end, in ticks.

        Raises
        ------
        ContextFullError
            They don't fit.
        """
        if len(ids) > self._n_batch:
            raise Error(f"{len(ids)} tokens in one run; at most {self._n_batch} are possible")
        program = self.program(1 if len(ids) == 1 else self._n_batch, "last")
        clock = np.zeros(len(program.plan.steps) + 1, np.int64)
        for chunk in self._chunks(ids, self._n_batch):
            self._run(chunk, program, clock)
        return program.plan.steps, clock

    def _chunks(self, ids: Sequence[int], n: int) -> Iterator[Sequence[int]]:
        if len(self.ids) + len(ids) > self.n_ctx:
            raise ContextFullError(f"{len(self.ids)} + {len(ids)} tokens don't fit into a context of {self.n_ctx}")
        for i in ids:
            if not 0 <= i < self._arch.n_vocab:
                raise Error(f"token {i} is not one of the vocabulary's {self._arch.n_vocab}")
        for first in range(0, len(ids), n):
            yield ids[first : first + n]

    def _run(self, ids: Sequence[int], program: Program, profile: np.ndarray | None = None) -> np.ndarray:
        n_past = len(self.ids)
        inputs = {"ids": np.array(ids, np.int32), **run_inputs(self._arch, n_past, len(ids))}
        logits = program.run(inputs, n_past, profile)["logits"]
        self.ids.extend(ids)
        self._evaluated_with = dict(self.hooks)
        return logits
