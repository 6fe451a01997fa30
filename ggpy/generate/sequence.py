"""A sequence of tokens run through a model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..errors import ContextFullError, Error
from ..graph import Span, pages_of
from ..kernels.table import SLAB

if TYPE_CHECKING:
    from ..graph.plan import Step
    from .runner import Runner


class TokenSequence:
    """The tokens evaluated so far, and the pages of their keys and values. Made by `Model.new_sequence`.

    Sequences of a model are independent of each other, also in different threads; one sequence is for one thread at a time.

    Attributes
    ----------
    ids : list of int
        The tokens evaluated so far.
    pages : list of int
        The numbers of its pages.
    """

    def __init__(self, runner: "Runner"):
        self._runner = runner
        self.ids: list[int] = []
        self.pages: list[int] = []
        runner.check()

    @property
    def n_ctx(self) -> int:
        """The most tokens."""
        return self._runner.n_ctx

    def __len__(self) -> int:
        return len(self.ids)

    def __del__(self) -> None:
        self._runner.drop(self.pages)

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
        """Forgets all but the first n tokens."""
        if self._runner.is_elsewhere:  # where the lock may be held for ever
            return
        with self._runner.lock:
            del self.ids[n:]
            self._trim()

    def _trim(self) -> None:
        """Gives back pages beyond its tokens: runs that failed leave some."""
        used = pages_of(len(self.ids))
        while len(self.pages) > used:
            self._runner.pages.give(self.pages.pop())

    def fork(self) -> "TokenSequence":
        """Another sequence of the same tokens. Pages are shared until one of the two writes."""
        other = TokenSequence(self._runner)
        with self._runner.lock:
            self._trim()
            other.adopt(self.pages, self.ids)
        return other

    def adopt(self, pages: Sequence[int], ids: Sequence[int]) -> None:
        """Goes on with `ids`, whose keys and values others have computed in `pages`."""
        self._trim()
        for page in pages:
            self._runner.pages.share(page)
            self.pages.append(page)
        self.ids.extend(ids)

    def make_room(self, n: int) -> None:
        """Takes pages for n more tokens.

        Raises
        ------
        ContextFullError
            They don't fit into the context, or all pages are in use.
        """
        past = len(self.ids)
        if past + n > self.n_ctx:
            raise ContextFullError(f"{past} + {n} tokens don't fit into a context of {self.n_ctx}")
        try:
            if past % SLAB:
                self.pages[past // SLAB] = self._runner.own_page(self.pages[past // SLAB])
            while len(self.pages) * SLAB < past + n:
                self.pages.append(self._runner.take_page())
        except ContextFullError:
            self._trim()
            raise

    def span(self, ids: Sequence[int], n_outputs: int) -> Span:
        """These tokens as the sequence's next."""
        return Span(ids, len(self.ids), self.pages, n_outputs)

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
                sequence.make_room(len(more))
            logits = runner.run([s.span(more, 1) for s, more in zip(sequences, ids, strict=True)])
            for sequence, more in zip(sequences, ids, strict=True):
                sequence.ids.extend(more)
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
            self.make_room(len(ids))
            (logits,) = runner.run([self.span(ids, n_outputs)], profile)
            self.ids.extend(ids)
            runner.check_finite(logits)
            if to is None:
                return logits.copy()
            to[: len(logits)] = logits
        return to[: len(logits)]

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
