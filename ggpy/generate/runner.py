"""What runs a model: its programs, the pages of all its sequences, its derived weights."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np

from ..errors import ContextFullError, Error, UnsupportedError
from ..graph import Batch, Hook, Pages, Program, Span, pack, pages_of, slot_bytes, tokens_of
from ..kernels.build import Progress, load
from ..kernels.table import SLAB
from ..models import Architecture, Output, ThinPair, build_graph, run_inputs
from ..pipeline import Known, RemotePages
from .expert_memory import ExpertMemory
from .memory import machine_memory
from .prefixes import Prefixes
from .snapshots import Snapshots

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Team
    from ..models.weights import DerivedWeight
    from ..pipeline import Stages
    from .experts import ExpertWatch
    from .sequence import TokenSequence

_LOGITS = ("logits", "both")  # outputs with logits
_LOGITS_BYTES = 64 << 20  # that a run may take for its logits
_PROGRAMS = 6  # that are kept: for one token, for many, for embeddings; without hooks and with those of now
#: contexts, and tokens, that the pages of keys and values hold, if a quarter of the machine's memory is enough for them:
#: short contexts are chosen by who has many, and 64 generations need 512 tokens each
_CONTEXTS, _TOKENS = 4, 32_768
_SHORT = 8  # tokens of a text for which encoders have pages enough
#: slots of states beside each of these contexts, and the fewest in all: two sequences, and what they were before a run
_SLOTS, _LEAST_SLOTS = 16, 4


class Runner:
    """Runs batches of tokens of any sequences, one batch at a time.

    Parameters
    ----------
    file, arch
        The model.
    team : Team
        The threads.
    n_ctx : int
        The most tokens of a sequence.
    n_batch : int
        The most tokens of a run.
    kv_type : {"F16", "Q8_0", "F32"}
        Of the cached keys and values.
    kv_memory : int, optional
        Bytes for the pages of keys and values and the slots of states, at most; by default what four contexts take, or
        32,768 tokens (one context beside a RAM budget), but no more than a quarter of the machine's memory.
    ram_budget : int, optional
        Bytes that the process may take; see `expert_memory`.
    progress : callable, optional
        Told of kernels that must be compiled first.
    stages : callable, optional
        Called as stages(runner), makes the pipeline that runs the layers in this process' place.
    adapters : mapping of str to ThinPair, optional
        What LoRA adapters add to the model's matrices.

    Attributes
    ----------
    lock : RLock
        Held during a run. Who wants to read a run's results before the next one holds it, too.
    hooks : dict
        See `Program`; may be changed between runs. A hook sees the tokens of all sequences of a run: `batch` says whose.
    batch : Batch or None
        What runs now.
    n_outputs : int
        For how many tokens of a run, at most, logits can be had.
    takes_hidden : bool
        Whether it runs a `NextN`, whose tokens come with "hidden".
    is_encoder : bool
        Whether tokens see those after them, too: then texts are run whole, and there are embeddings but no logits.
    n_run : int
        The most tokens of a run: n_batch, but of an encoder at least a context.
    has_states : bool
        Whether the model has layers with states: then a sequence can't simply forget its last tokens (`snapshots`).

    Raises
    ------
    Error
        kv_memory doesn't hold a context.
    """

    def __init__(
        self,
        file: "GGUFFile",
        arch: Architecture,
        team: "Team",
        n_ctx: int,
        n_batch: int,
        kv_type: str = "F16",
        kv_memory: int | None = None,
        ram_budget: int | None = None,
        progress: Progress | None = None,
        stages: "Callable[[Runner], Stages] | None" = None,
        adapters: Mapping[str, ThinPair] | None = None,
    ):
        self.file, self.arch, self._team = file, arch, team
        self.adapters = adapters or {}
        self.n_ctx, self.n_batch = n_ctx, n_batch
        self.n_outputs = min(n_batch, max(16, _LOGITS_BYTES // (4 * arch.n_vocab)))
        self.hooks: dict[str, Hook] = {}
        self.lock = threading.RLock()
        self.batch: Batch | None = None
        self.closed = False
        self._sequences: WeakSet[TokenSequence] = WeakSet()
        self._stages: Stages | None = None
        self._pid, self._thread = os.getpid(), 0
        self._dropped: list[int] = []
        self._dropped_slots: list[int] = []
        self._derived: dict[str, DerivedWeight] = {}
        self._programs: OrderedDict[tuple, Program] = OrderedDict()
        graph = self.graph(1, output="embeddings")
        self.takes_hidden = "hidden" in graph
        self.is_encoder = not all(t.attrs.get("causal", True) for t in graph)
        self.n_run = max(n_batch, n_ctx) if self.is_encoder else n_batch
        if "positions" in graph and n_ctx > arch.n_ctx_train:
            raise Error(f"{file.path}: a context of {n_ctx}; the model has learned {arch.n_ctx_train} positions")
        piece_bytes = (Pages(0, kv_type).page_bytes(graph), slot_bytes(graph))
        contexts, wanted = (_CONTEXTS, pages_of(_TOKENS)) if ram_budget is None else (1, 1)
        if self.is_encoder:  # many short texts go into a run
            wanted = -(-n_batch // _SHORT)
        wanted = max(wanted, contexts * pages_of(n_ctx))
        n_pages, n_slots = _counts(*piece_bytes, pages_of(n_ctx), wanted, _SLOTS * contexts, kv_memory)
        kv_bytes = n_pages * piece_bytes[0] + n_slots * piece_bytes[1]
        self.has_states = n_slots > 0
        kind = Pages if stages is None else RemotePages
        self.pages = kind(n_pages, kv_type, pages_of(n_ctx) * SLAB, n_slots)
        self.prefixes, self.snapshots = Prefixes(self.pages), Snapshots(self.pages.states)
        self.expert_memory: ExpertMemory | None = None
        self.expert_watch: ExpertWatch | None = None  # may be set between runs
        if ram_budget is not None:
            self.expert_memory = ExpertMemory(file, graph, ram_budget, kv_bytes)
        if stages is not None:
            if self.is_encoder or ram_budget is not None:
                raise UnsupportedError(f"{file.path}: no stages for encoders, or beside ram_budget")
            self._derived.clear()
            self._stages = stages(self)
            return
        # One token, and a prompt: both are sure to be needed, so their kernels are compiled together.
        try:
            programs = [(self.n_run, self._end)] if self.is_encoder else [(1, self._end), (n_batch, self._end)]
            names = [name for how in programs for name in self._program(*how).plan.names]
        except MemoryError:
            raise Error(f"no memory for {kv_bytes:,} bytes of keys and values; kv_memory takes less") from None
        load(names, progress)

    @property
    def _end(self) -> Output:
        return "embeddings" if self.is_encoder else "both" if self.takes_hidden else "logits"

    def graph(self, n_tokens: int, n_outputs: int | None = None, output: Output | None = None) -> "Graph":
        """The compute graph for up to n_tokens tokens, by default with all that the model gives; see `build_graph`."""
        output = output or self._end
        return build_graph(
            self.file, self.arch, n_tokens, n_outputs, output=output, derived=self._derived, adapters=self.adapters
        )

    def _program(self, n_tokens: int, output: Output) -> Program:
        if self._stages is not None:
            raise UnsupportedError(f"{self.file.path}: the programs are other processes'")
        hooks = dict(self.hooks)  # as they are now: another thread may change them
        key = (n_tokens, output, self.expert_watch, *hooks.items())
        program = self._programs.get(key)
        if program is None:
            n_outputs = self.n_outputs if output in _LOGITS else n_tokens
            graph = self.graph(n_tokens, min(n_tokens, n_outputs), output)
            if output not in _LOGITS and hooks:  # a hook on logits has nothing to see here
                beyond = self.graph(1)
                hooks = {name: hook for name, hook in hooks.items() if name in graph or name not in beyond}
            if self.expert_memory is not None:
                hooks = self.expert_memory.beside(hooks)
            if self.expert_watch is not None:
                hooks = self.expert_watch.beside(hooks)
            program = self._programs[key] = Program(graph, self.pages, self._team, hooks)
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return program

    # Runs

    def check(self) -> None:
        """Raises Error if the model is closed, belongs to another process, or runs a hook of this thread: to be asked
        before any lock is waited for."""
        if self.is_elsewhere:
            raise Error(f"{self.file.path}: opened in another process; open the model anew in each")
        if self.closed:
            raise Error(f"{self.file.path}: the model is closed")
        if self.batch is not None and self._thread == threading.get_ident():
            raise Error(f"{self.file.path}: a hook can't use the model that it looks into")

    @property
    def is_elsewhere(self) -> bool:
        """Whether this process is a fork of the one that opened the model."""
        return os.getpid() != self._pid

    def check_logits(self) -> None:
        """Raises UnsupportedError if the model is an encoder."""
        if self.is_encoder:
            raise UnsupportedError(f"{self.file.path}: an encoder, which gives embeddings, not logits: see Model.embed")

    def check_hidden(self) -> None:
        """Raises UnsupportedError if other processes have what goes from layer to layer."""
        if self._stages is not None:
            raise UnsupportedError(f"{self.file.path}: other processes have the hidden states")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises Error if one of them isn't a token."""
        for i in ids:
            if not 0 <= i < self.arch.n_vocab:
                raise Error(f"token {i} is not one of the vocabulary's {self.arch.n_vocab}")

    def program_of(self, n_tokens: int, output: Output = "logits") -> Program:
        """The program that runs n_tokens tokens. Memory is taken for one when it is first used."""
        return self._program(1 if n_tokens == 1 and output in _LOGITS else self.n_run, output)

    def run(self, spans: Sequence[Span], profile: np.ndarray | None = None, output: Output = "logits") -> list[np.ndarray]:
        """Evaluates tokens of some sequences; each one's logits as it wants them, float32 (n_outputs, n_vocab), or its
        embeddings, (n_outputs, n_embd).

        They are good until the next run: hold `lock` to read them where other threads may run. `profile`: see
        `Program.run`.

        Raises
        ------
        Error
            See `check`.
        """
        if self._stages is not None:
            return self._run_stages(self._stages, spans, output)
        results, rows = self._run(spans, output, profile)
        return [results[output][r] for r in rows]

    def _run_stages(self, stages: "Stages", spans: Sequence[Span], output: Output) -> list[np.ndarray]:
        if self.hooks:
            raise UnsupportedError(f"{self.file.path}: hooks see no values that other processes compute")
        with self.lock:
            self.check()
            return stages.run(spans, output)

    def note(self, sequence: "TokenSequence") -> None:
        """Is told of each new sequence, of which a stage may lose what it has."""
        if self._stages is not None:
            with self.lock:
                self._sequences.add(sequence)

    def known(self) -> Iterator[Known]:
        """What brings back all keys, values and states in use, for a stage that has lost them."""
        spare = self.pages.states.n_slots  # of the stages alone
        for ids, pages, slots in [*(s.known() for s in self._sequences), *self.prefixes.paths()]:
            first = 0
            for stop, slot in sorted([*slots, (len(ids), -1)]):
                for at in range(first, stop, self.n_batch):
                    yield Span(ids[at : min(at + self.n_batch, stop)], at, pages, 0, spare)
                if slot >= 0:
                    yield spare, slot
                first = stop

    def run_both(
        self, spans: Sequence[Span], hidden: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Evaluates tokens of some sequences; their logits as those of `run`, and for each sequence what the logits of all
        its tokens are made of, float32 (n_tokens, n_embd), good and raising likewise.

        `hidden`: of each token, span after span, where the runner `takes_hidden`.
        """
        self.check_hidden()
        places, inputs = tokens_of(spans), {}
        if hidden is not None:
            inputs["hidden"] = hidden[np.argsort(np.concatenate([np.arange(p.start, p.stop) for p in places]))]
        results, rows = self._run(spans, "both", None, inputs)
        return [results["logits"][r] for r in rows], [results["embeddings"][place] for place in places]

    def run_states(self, span: Span) -> list[np.ndarray]:
        """Evaluates tokens of a sequence; what each layer takes, and at last what logits are made of: n_layer + 1 times
        float32 (n_tokens, n_embd), good and raising as those of `run`."""
        self.check_hidden()
        results, _ = self._run([span], "states", None)
        return list(results.values())

    def _run(
        self,
        spans: Sequence[Span],
        output: Output,
        profile: np.ndarray | None,
        inputs: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> tuple[dict[str, np.ndarray], list[slice]]:
        """The outputs of a graph, and which of their rows are each span's."""
        self.check()
        if output in _LOGITS:
            self.check_logits()
        with self.lock:
            self.check()
            self.file.check()
            batch, rows = pack(spans)
            program = self.program_of(len(batch.ids), output)
            try:
                self._thread, self.batch = threading.get_ident(), batch
                results = program.run({**run_inputs(self.arch, batch), **inputs}, batch, profile)
                self.file.check()
                return results, rows
            finally:
                self.batch = None

    def check_finite(self, values: np.ndarray) -> None:
        """Raises Error if logits or embeddings aren't numbers: then text, which they would give all the same, means
        nothing. What hooks do is theirs."""
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum()) or self.hooks or np.isfinite(values).all():
                return
        cause = "the file is damaged" if self.pages.type == "F32" else "the file is damaged, or needs kv_type='f32'"
        raise Error(f"{self.file.path}: the model's values aren't finite: {cause}")

    # Pages

    def take_page(self) -> int:
        """A page; if none is free, that of a prefix which nobody uses.

        Raises
        ------
        ContextFullError
            All are in use.
        """
        self._free_one()
        return self.pages.take()

    def own_page(self, page: int) -> int:
        """The page, or a copy of it if others hold it too: what may be written. Raises as `take_page`."""
        if self.pages.holders(page) > 1:
            self._free_one()
        return self.pages.own(page)

    def _free_one(self) -> None:
        self._give_dropped()
        if not self.pages.n_free and not self.prefixes.evict():
            raise ContextFullError(f"all {self.pages.n_pages} pages of keys and values are in use; kv_memory gives more")

    def own_slot(self, slot: int) -> int:
        """The slot, or a copy of it if others hold it too: what may be written. A new one for -1.

        Raises
        ------
        ContextFullError
            All are in use.
        """
        states = self.pages.states
        if slot >= 0 and states.holders(slot) == 1:
            return slot
        self._give_dropped()
        if not states.n_free and not self.snapshots.evict():
            self.snapshots.drop(slot)
            if slot < 0 or states.holders(slot) > 1:
                raise ContextFullError(f"all {states.n_slots} slots of states are in use; kv_memory gives more")
            return slot
        return states.take() if slot < 0 else states.own(slot)

    @property
    def has_room(self) -> bool:
        """Whether one more sequence can have a page and a slot without taking a known prefix's page."""
        self._give_dropped()
        return self.pages.n_free > 0 and (not self.has_states or self.pages.states.n_free > 0 or self.snapshots.can_evict())

    def drop(self, pages: list[int], slot: int) -> None:
        """Gives pages and a slot, if it isn't -1, back from a finalizer, which may run anywhere: they are free with the
        next that is taken."""
        self._dropped.extend(pages)
        if slot >= 0:
            self._dropped_slots.append(slot)

    def _give_dropped(self) -> None:
        while self._dropped:
            self.pages.give(self._dropped.pop())
        while self._dropped_slots:
            self.pages.states.give(self._dropped_slots.pop())

    def close(self) -> None:
        """Lets go of everything. Waits for a run of another thread."""
        with self.lock:
            self.closed = True
            if self._stages is not None:
                self._stages.close()
            self._programs.clear()
            self._derived.clear()


def _counts(
    page_bytes: int, slot_bytes: int, pages_per_context: int, n_pages: int, n_slots: int, kv_memory: int | None
) -> tuple[int, int]:
    """How many pages and slots there are; as many as are wanted, or as a limit of memory holds."""
    if not slot_bytes:
        n_slots = 0
    least = pages_per_context * page_bytes + min(n_slots, _LEAST_SLOTS) * slot_bytes
    room = machine_memory() // 4 if kv_memory is None else min(int(kv_memory), machine_memory())
    if kv_memory is not None and room < least:
        raise Error(f"kv_memory of {kv_memory:,} bytes; {least:,} hold one context, less with a smaller n_ctx")
    if slot_bytes:
        n_slots = min(n_slots, _LEAST_SLOTS + max(room - least, 0) // 2 // slot_bytes)
    if not page_bytes:
        return n_pages, n_slots
    most = max(pages_per_context, (room - n_slots * slot_bytes) // page_bytes)
    return (most if kv_memory is not None else min(n_pages, most)), n_slots
