"""Vectors of texts, and of tokens: what a model's last layer gives, pooled, and what each layer gives."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ContextFullError, Error, GGUFError
from ..graph import pages_of
from .sequence import TokenSequence

if TYPE_CHECKING:
    from ..file import GGUFFile
    from .runner import Runner
    from .scheduler import Scheduler

Pooling = Literal["none", "mean", "cls", "last"]
POOLINGS = ("none", "mean", "cls", "last")
_STORED = (None, "mean", "cls", "last", "rank")  # by `{arch}.pooling_type`


def pooling_of(file: "GGUFFile", is_encoder: bool) -> str:
    """How a file says that the vectors of a text's tokens become one: "mean", "cls", "last" or "rank". Where it doesn't
    say: of encoders the mean, of others the last, which alone knows of all tokens.

    Raises
    ------
    GGUFError
        A number that stands for nothing.
    """
    key = f"{file.get('general.architecture', str)}.pooling_type"
    kind = file.get(key, int, default=0)
    if not 0 <= kind < len(_STORED):
        raise GGUFError(f"{file.path}: key {key}: {kind} is no kind of pooling")
    return _STORED[kind] or ("mean" if is_encoder else "last")


def projections_of(file: "GGUFFile", n_embd: int) -> list[np.ndarray]:
    """The matrices, float64, that a file has for pooled vectors of n_embd values, such as EmbeddingGemma's.

    Raises
    ------
    GGUFError
        They don't fit.
    """
    found = []
    for name in ("dense_2.weight", "dense_3.weight"):
        tensor = file.tensors.get(name)
        if tensor is not None:
            if len(tensor.shape) != 2 or tensor.shape[1] != n_embd:
                raise GGUFError(f"{file.path}: tensor {name} has shape {tensor.shape}, expected (…, {n_embd})")
            n_embd = tensor.shape[0]
            found.append(tensor.dequantize().astype(np.float64))
    return found


class _Text:
    """A text under way.

    Attributes
    ----------
    index : int
        Its place among the texts.
    ids : list of int
    sequence : TokenSequence
        What has been evaluated of it.
    """

    def __init__(
        self,
        index: int,
        ids: list[int],
        sequence: TokenSequence,
        pooling: str,
        normalize: bool,
        projections: Sequence[np.ndarray],
    ):
        self.index, self.ids, self.sequence = index, ids, sequence
        self._pooling, self._normalize, self._projections = pooling, normalize, projections
        self._total: np.ndarray | None = None
        self._rows: list[np.ndarray] = []

    @property
    def rest(self) -> list[int]:
        """Tokens to be evaluated."""
        return self.ids[len(self.sequence) :]

    def n_outputs(self, n: int) -> int:
        """How many of the next n tokens' vectors are needed, counted from the last."""
        if self._pooling == "last":
            return int(n == len(self.rest))
        if self._pooling == "cls":
            return 0 if len(self.sequence) else n
        return n

    def take(self, rows: np.ndarray) -> None:
        """The vectors asked for, (n_outputs, n_embd)."""
        if self._pooling == "mean":
            # Row by row, also across pieces, so that these don't change the sum.
            before = [] if self._total is None else [self._total]
            self._total = np.add.reduce(np.concatenate([*before, rows]), 0, keepdims=True)
        else:
            self._rows.append(rows[:1].copy() if self._pooling == "cls" else rows.copy())

    def vectors(self) -> np.ndarray:
        """What becomes of them: (1, n_embd), or (n_tokens, n_embd) if they aren't pooled."""
        x = np.concatenate(self._rows) if self._total is None else self._total / np.float32(len(self.ids))
        if self._projections and self._pooling != "none":
            y = x[0].astype(np.float64)
            for matrix in self._projections:
                y = matrix @ y
            x = y[None].astype(np.float32)
        if self._normalize:
            norms = np.sqrt(np.square(x, dtype=np.float64).sum(-1, keepdims=True))
            x = (x / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
        return x


def embed(
    runner: "Runner",
    scheduler: "Scheduler",
    texts: Sequence[list[int]],
    pooling: str,
    normalize: bool,
    projections: Sequence[np.ndarray] = (),
    what: str = "texts",
) -> Iterator[tuple[int, np.ndarray]]:
    """The vectors of texts, as they are done, with their places; see `Model.embed`.

    Parameters
    ----------
    runner : Runner
    scheduler : Scheduler
        Of the generations that may be at work.
    texts : sequence of list of int
        Token ids of each, checked.
    pooling, normalize
    projections : sequence of array
        What pooled vectors are multiplied by.
    what : str
        What errors call them.

    Raises
    ------
    ContextFullError
        A text is longer than the context, or all pages are in use.
    Error
        A text without tokens.
    """
    for i, ids in enumerate(texts):
        if not ids:
            raise Error(f"{what}[{i}] has no tokens")
        if len(ids) > runner.n_ctx:
            raise ContextFullError(f"{what}[{i}] is too large: {len(ids)} tokens, the context holds {runner.n_ctx}")
    todo = enumerate(texts)
    begun: list[_Text] = []  # one at most: it, or the rest of it, comes with the next run
    n_done = 0
    while n_done < len(texts):
        room = min(scheduler.give_way(), runner.n_batch)
        with runner.lock:
            work: list[tuple[_Text, int]] = []
            while room > 0 and (not work or runner.has_room):
                if begun:
                    text = begun.pop()
                elif (following := next(todo, None)) is not None:
                    text = _Text(*following, TokenSequence(runner), pooling, normalize, projections)
                else:
                    break
                n = len(text.rest) if runner.is_encoder else min(len(text.rest), room)
                if work and (n > room or runner.pages.n_free < pages_of(n)):
                    begun.append(text)
                    break
                text.sequence.make_room(n)
                work.append((text, n))
                room -= n
            spans = [t.sequence.span(t.rest[:n], t.n_outputs(n)) for t, n in work]
            for (text, n), rows in zip(work, runner.run(spans, output="embeddings"), strict=True):
                text.sequence.advance(text.rest[:n])
                runner.check_finite(rows)
                if len(rows):
                    text.take(rows)
        for text, _ in work:
            if text.rest:
                begun.append(text)
            else:
                text.sequence.close()
                n_done += 1
                yield text.index, text.vectors()


def hidden_states(runner: "Runner", ids: list[int], layers: Sequence[int]) -> np.ndarray:
    """See `Model.hidden_states`; `layers` from 0 to n_layer."""
    sequence = TokenSequence(runner)
    out = np.empty((len(layers), len(ids), runner.arch.n_embd), np.float32)
    for chunk, _ in sequence.chunks(ids, runner.n_run):
        first = len(sequence)
        with runner.lock:
            sequence.make_room(len(chunk))
            states = runner.run_states(sequence.span(chunk, len(chunk)))
            sequence.advance(chunk)
            for place, layer in zip(out, layers, strict=True):
                place[first : len(sequence)] = states[layer]
    sequence.close()
    return out
