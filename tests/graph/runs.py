"""Batches for tests."""

from ggpy.graph import Span, pack, pages_of


def of_ids(ids, n_past=0, n_outputs=None):
    """The run of these tokens of the only sequence, whose pages are 0, 1 and so on."""
    n = len(ids)
    return pack([Span(ids, n_past, range(pages_of(n_past + n)), n if n_outputs is None else n_outputs)])[0]


def alone(n_tokens, n_past=0, n_outputs=None):
    """The same for any tokens."""
    return of_ids([0] * n_tokens, n_past, n_outputs)
