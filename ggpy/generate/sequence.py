"""A sequence of tokens run through a model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..errors import ContextFullError, Error
from ..graph import Span, pages_of
from ..kernels.table import SLAB
from .snapshots import SNAPSHOT_TOKENS, Snapshot

if TYPE_CHECKING:
    from ..graph.plan import Step
    from .runner import Runner


_MOST_SNAPSHOTS = 4  # of a sequence


class TokenSequence:
    """The tokens evaluated so far, and the pages of their keys and values. Made by `Model.new_sequence`.

    Sequences of a model are independent of each other, also in different threads; one sequence is for one thread at a time.

    Attributes
    ----------
    ids : list of int
        The tokens evaluated so far.
    pages : list of int
        The numbers of its pages.
    slot : int
        Its slot, in models with states; -1 before its first token.
    """

    def __init__(self, runner: "Runner"):
        self._runner = runner
        self.ids: list[int] = []
        self.pages: list[int] = []
        self.slot = -1
        self._n_in_slot = 0  # tokens; -1 while a run writes there
        self._snapshots: list[Snapshot] = []  # by their tokens
        self._mark: Snapshot | None = None
        self._mark_is_own = False
        runner.check()
        runner.note(self)

    @property
    def n_ctx(self) -> int:
        """The most tokens."""
        return self._runner.n_ctx

    def __len__(self) -> int:
        return len(self.ids)

    def __del__(self) -> None:
        self._runner.drop(self.pages, self.slot)

    def __reduce__(self) -> NoReturn:
        raise Error("a sequence can't be pickled; save() writes it to a file")

    def __enter__(self) -> "TokenSequence":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives its pages back."""
        self.keep(0)

    def keep(self, n: int) -> None:
        """Forgets all but the first n tokens. Models with states go back to a snapshot, SNAPSHOT_TOKENS tokens or fewer
        before, and evaluate the rest again; where others have needed its room, to an earlier one."""
        if self._runner.is_elsewhere:  # where the lock may be held for ever
            return
        with self._runner.lock:
            ids = self.ids[:n]
            if len(ids) == len(self.ids) and self.is_current:
                self._trim()
                return
            if self._runner.has_states:
                usable = [s for s in self._snapshots if s.slot >= 0 and s.n_tokens <= len(ids)]
                self.go_back(*((usable[-1].n_tokens, usable[-1].slot) if usable else (0, -1)))
                try:
                    for chunk, _ in self.chunks(ids[len(self.ids) :], self._runner.n_batch):
                        self._run(chunk, 0)
                except BaseException:  # the tokens stay; the next run is preceded by another try
                    self.ids, self._n_in_slot = ids, -1
                    raise
            else:
                self.go_back(len(ids))

    def go_back(self, n: int, slot: int = -1) -> None:
        """Forgets all but the first n tokens; in models with states, `slot` is how it was then, unless n is 0."""
        del self.ids[n:]
        self._snapshots = [s for s in self._snapshots if s.n_tokens <= n]  # other tokens may come
        if self._mark is not None and self._mark.n_tokens > n:
            self.unmark()
        if slot >= 0:
            self._runner.pages.states.share(slot)
        self._set_slot(slot)
        self._trim()

    def mark(self) -> None:
        """Keeps its state as it is now, in place of what it kept before, so that tokens that come can be taken back: the
        next run goes on in a copy. Nothing is kept for longer than others leave room for it."""
        self.unmark()
        if self._runner.has_states and self.slot >= 0 and self.is_current:
            self._mark_is_own = self.slot not in self._runner.snapshots
            self._mark = self._runner.snapshots.add(self.slot, len(self.ids))

    def unmark(self) -> None:
        """Lets go of what `mark` has kept."""
        if self._mark is not None and self._mark_is_own:
            self._runner.snapshots.drop(self._mark.slot)
        self._mark = None

    @property
    def is_marked(self) -> bool:
        """Whether `back_to_mark` can take tokens back."""
        return self._mark is not None and self._mark.slot >= 0

    def back_to_mark(self) -> None:
        """Forgets what came after `mark`. Where others have needed the room, its state isn't current."""
        if self._mark is not None and self._mark.slot >= 0:
            self.go_back(self._mark.n_tokens, self._mark.slot)
        else:
            self._n_in_slot = -1
        self.unmark()

    def _set_slot(self, slot: int) -> None:
        """Takes a slot, which it holds, for its own tokens."""
        if self.slot >= 0:
            self._runner.pages.states.give(self.slot)
        self.slot, self._n_in_slot = slot, len(self.ids)

    @property
    def is_current(self) -> bool:
        """Whether its state is that after its tokens: not where a run failed, or an interrupt came before it ended."""
        return not self._runner.has_states or self._n_in_slot == len(self.ids)

    def settle(self) -> None:
        """Makes its state that after its tokens; see `is_current`."""
        if not self.is_current:
            self.keep(len(self.ids))

    def _trim(self) -> None:
        """Gives back pages beyond its tokens: runs that failed leave some."""
        used = pages_of(len(self.ids))
        while len(self.pages) > used:
            self._runner.pages.give(self.pages.pop())
        if not self.ids:
            self._set_slot(-1)

    def known(self) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Its ids and pages; and after how many ids its state is in which slots."""
        kept = [s for s in (*self._snapshots, self._mark) if s is not None]
        slots = [(len(self.ids), self.slot), *((s.n_tokens, s.slot) for s in kept)]
        return self.ids, self.pages, [(n, slot) for n, slot in slots if slot >= 0]

    def fork(self) -> "TokenSequence":
        """Another sequence of the same tokens. Pages are shared until one of the two writes."""
        other = TokenSequence(self._runner)
        with self._runner.lock:
            self.settle()
            self._trim()
            other.adopt(self.pages, self.ids, self.slot)
            other._snapshots = list(self._snapshots)
        return other

    def adopt(self, pages: Sequence[int], ids: Sequence[int], slot: int = -1) -> None:
        """Goes on with `ids`, whose keys and values others have computed in `pages`, and what came of them in `slot`."""
        self._trim()
        for page in pages:
            self._runner.pages.share(page)
            self.pages.append(page)
        self.ids.extend(ids)
        if slot >= 0:
            self._runner.pages.states.share(slot)
            self._set_slot(slot)

    def make_room(self, n: int) -> None:
        """Takes pages for n more tokens, and a slot.

        Raises
        ------
        ContextFullError
            They don't fit into the context, or all pages or slots are in use.
        """
        past = len(self.ids)
        if past + n > self.n_ctx:
            raise ContextFullError(f"{past} + {n} tokens don't fit into a context of {self.n_ctx}")
        try:
            if past % SLAB:
                self.pages[past // SLAB] = self._runner.own_page(self.pages[past // SLAB])
            while len(self.pages) * SLAB < past + n:
                self.pages.append(self._runner.take_page())
            if self._runner.has_states and n:
                self.slot = self._runner.own_slot(self.slot)
        except ContextFullError:
            self._trim()
            raise

    def span(self, ids: Sequence[int], n_outputs: int) -> Span:
        """These tokens as the sequence's next, for a run; `advance` follows it."""
        self._n_in_slot = -1
        return Span(ids, len(self.ids), self.pages, n_outputs, max(self.slot, 0))

    def advance(self, ids: Sequence[int]) -> None:
        """Notes that a run has evaluated these tokens."""
        self.ids.extend(ids)
        self._n_in_slot = len(self.ids)

    # Evaluating

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Evaluates more tokens; the logits after the last, float32 (n_vocab,).

        Raises
        ------
        ContextFullError
            They don't fit.
        """
        logits = None
        for chunk, last in self.chunks(ids, self._runner.n_batch):
            logits = self._run(chunk, int(last))
        if logits is None:
            raise Error("no tokens to evaluate")
        return logits[0]

    def extend_all(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Evaluates more tokens; yields the logits of all, in pieces (n, n_vocab), each good until the next.

        Raises
        ------
        ContextFullError
            They don't fit.
        """
        n = self._runner.n_outputs
        room = np.empty((min(n, len(ids)), self._runner.arch.n_vocab), np.float32)
        for chunk, _ in self.chunks(ids, n):
            yield self._run(chunk, len(chunk), room)

    def profile(self, ids: Sequence[int]) -> "tuple[list[Step], np.ndarray]":
        """Evaluates more tokens in one run; its steps, and the processor's clock before each and at the end, in ticks.

        Raises
        ------
        ContextFullError
            They don't fit.
        """
        if len(ids) > self._runner.n_batch:
            raise Error(f"{len(ids)} tokens in one run; at most {self._runner.n_batch} are possible")
        with self._runner.lock:
            steps = self._runner.program_of(len(ids)).plan.steps
            clock = np.zeros(len(steps) + 1, np.int64)
            for chunk, _ in self.chunks(ids, self._runner.n_batch):
                self._run(chunk, 1, profile=clock)
        return steps, clock

    @staticmethod
    def extend_together(sequences: "Sequence[TokenSequence]", ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Evaluates more tokens of several sequences of a model in one run.

        Returns
        -------
        list of float32 array (n_vocab,)
            The logits after the last token of each. Views, good until the model's next run.

        Raises
        ------
        ContextFullError
            They don't fit.
        Error
            A sequence that stands twice among them or is another model's; one without more tokens; more tokens than a run
            takes.
        """
        if not sequences or len(sequences) != len(ids):
            raise Error(f"{len(sequences)} sequences and {len(ids)} lists of tokens")
        runner = sequences[0]._runner
        if len({id(s) for s in sequences}) < len(sequences) or any(s._runner is not runner for s in sequences):
            raise Error("sequences that are extended together are different ones, of one model")
        runner.check()
        with runner.lock:
            for more in ids:
                runner.check_ids(more)
            for sequence, more in zip(sequences, ids, strict=True):
                sequence.settle()
                sequence.make_room(len(more))
            logits = runner.run([s.span(more, 1) for s, more in zip(sequences, ids, strict=True)])
            for sequence, more in zip(sequences, ids, strict=True):
                sequence.advance(more)
        for rows in logits:
            runner.check_finite(rows)
        return [rows[0] for rows in logits]

    def chunks(self, ids: Sequence[int], n: int) -> Iterator[tuple[Sequence[int], bool]]:
        """Pieces of at most n tokens, checked, and whether each is the last. Raises as `extend`."""
        if len(self.ids) + len(ids) > self.n_ctx:
            raise ContextFullError(f"{len(self.ids)} + {len(ids)} tokens don't fit into a context of {self.n_ctx}")
        self._runner.check_ids(ids)
        for first in range(0, len(ids), n):
            yield ids[first : first + n], first + n >= len(ids)

    def _run(
        self, ids: Sequence[int], n_outputs: int, to: np.ndarray | None = None, profile: np.ndarray | None = None
    ) -> np.ndarray:
        runner = self._runner
        runner.check()
        with runner.lock:
            self.settle()
            self.make_room(len(ids))
            (logits,) = runner.run([self.span(ids, n_outputs)], profile)
            self.advance(ids)
            runner.check_finite(logits)
            self._remember()
            if to is None:
                return logits.copy()
            to[: len(logits)] = logits
        return to[: len(logits)]

    def _remember(self) -> None:
        """Leaves a snapshot, if the last one is long ago."""
        if not self._runner.has_states:
            return
        self._snapshots = [s for s in self._snapshots if s.slot >= 0][-_MOST_SNAPSHOTS:]
        if len(self.ids) >= SNAPSHOT_TOKENS + (self._snapshots[-1].n_tokens if self._snapshots else 0):
            self._snapshots.append(self._runner.snapshots.add(self.slot, len(self.ids)))

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens with their keys and values to a file, which `Model.load_sequence` reads.

        Raises
        ------
        Error
            The model has hooks: the values may be theirs. The file can't be written.
        """
        from .saved import save_sequence

        save_sequence(self, self._runner, Path(path))
