"""What a run is told of its tokens: which belong to which sequence, where their keys and values go, whose results are
wanted.

Plain arrays of int32, so that they can be sent to another process as they are.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import GraphError
from ..kernels.table import SLAB
from .pages import pages_of


class Span(NamedTuple):
    """The tokens of one sequence in a run.

    Attributes
    ----------
    ids : sequence of int
    n_past : int
        Positions of the sequence before them.
    pages : sequence of int
        The sequence's pages (`Pages`), with room for its new tokens.
    n_outputs : int
        How many of its last tokens' results are wanted.
    slot : int
        The sequence's slot (`States`), in models that have states.
    """

    ids: Sequence[int]
    n_past: int
    pages: Sequence[int]
    n_outputs: int = 0
    slot: int = 0


class Batch(NamedTuple):
    """The tokens of a run, span after span; spans of one token come first. All arrays are int32 and contiguous.

    Attributes
    ----------
    ids, positions, places : array (n_tokens,)
        Token id; position in its sequence; page * SLAB + position in the page, where its keys and values go.
    spans : array (n_spans, 5)
        First token, tokens, positions before them, first of their entries in `pages`, slot.
    pages : array
        The pages of each span, from its sequence's first to that of its last token.
    outputs : array (n_outputs,)
        The tokens whose results are wanted, rising.
    """

    ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    spans: np.ndarray
    pages: np.ndarray
    outputs: np.ndarray

    def each(self) -> Iterator[tuple[slice, int, np.ndarray]]:
        """For each span its tokens, the positions before them, and its pages."""
        ends = [*self.spans[1:, 3], len(self.pages)]
        for (first, n, n_past, page, _), end in zip(self.spans.tolist(), ends, strict=True):
            yield slice(first, first + n), n_past, self.pages[page:end]


def _order(spans: Sequence[Span]) -> Sequence[int]:
    """The spans of one token first."""
    n = len(spans)
    return range(n) if n == 1 else sorted(range(n), key=lambda i: len(spans[i].ids) > 1)


def tokens_of(spans: Sequence[Span]) -> list[slice]:
    """Which tokens of the run that `pack` makes of spans are each one's."""
    places, first = [slice(0)] * len(spans), 0
    for i in _order(spans):
        places[i] = slice(first, first + len(spans[i].ids))
        first = places[i].stop
    return places


def pack(spans: Sequence[Span]) -> tuple[Batch, list[slice]]:
    """Puts spans together.

    Returns
    -------
    batch : Batch
    rows : list of slice
        For each span, in the order given, which of the run's outputs are its own.

    Raises
    ------
    GraphError
        A span without tokens, after less than none, or with fewer pages than its tokens take.
    """
    n_spans = len(spans)
    rows = [slice(0)] * n_spans
    table, ids, positions, places, pages, outputs = [], [], [], [], [], []
    n_tokens = n_pages = n_outputs = 0
    for i in _order(spans):
        span = spans[i]
        n, n_past = len(span.ids), span.n_past
        used = pages_of(n_past + n)
        if not 0 <= span.n_outputs <= n or not n or n_past < 0 or used > len(span.pages):
            raise GraphError(f"a span of {n} tokens after {n_past}, {span.n_outputs} outputs, in {len(span.pages)} pages")
        table.append((n_tokens, n, n_past, n_pages, span.slot))
        ids.append(np.asarray(span.ids, np.int32))
        own = np.asarray(span.pages[:used], np.int32)
        pages.append(own)
        if n == 1:
            positions.append(np.array((n_past,), np.int32))
            places.append(np.array((span.pages[used - 1] * SLAB + n_past % SLAB,), np.int32))
        else:
            at = np.arange(n_past, n_past + n, dtype=np.int32)
            positions.append(at)
            places.append(own[at // SLAB] * np.int32(SLAB) + at % SLAB)
        n_tokens, n_pages = n_tokens + n, n_pages + used
        rows[i] = slice(n_outputs, n_outputs + span.n_outputs)
        outputs.append(np.arange(n_tokens - span.n_outputs, n_tokens, dtype=np.int32))
        n_outputs += span.n_outputs
    joined = [parts[0] if n_spans == 1 else np.concatenate(parts) for parts in (ids, positions, places, pages, outputs)]
    return Batch(joined[0], joined[1], joined[2], np.array(table, np.int32), joined[3], joined[4]), rows
