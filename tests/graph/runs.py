"""Batches for tests."""

from ggpy.graph import Span, pack, pages_of


def alone(n_tokens, n_past=0, n_outputs=None):
    """A run of n_tokens of the only sequence, whose pages are 0, 1 and so on."""
    pages = range(pages_of(n_past + n_tokens))
    return pack([Span([0] * n_tokens, n_past, pages, n_tokens if n_outputs is None else n_outputs)])[0]


def of_ids(ids, n_outputs=None):
    """The run of these tokens at the beginning of the only sequence."""
    n = len(ids)
    return pack([Span(ids, 0, range(pages_of(n)), n if n_outputs is None else n_outputs)])[0]
