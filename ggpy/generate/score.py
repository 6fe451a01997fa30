"""How probable a continuation is."""

from collections.abc import Sequence
from typing import NamedTuple

from .piece import Piece


class Score(NamedTuple):
    """What a model thinks of a continuation.

    Attributes
    ----------
    logprob : float
        The natural logarithm of its probability: the sum of its tokens'.
    is_greedy : bool
        Whether each token is the likeliest at its place.
    ids : list of int
        Its tokens.
    logprobs : list of float
        Theirs.
    """

    logprob: float
    is_greedy: bool
    ids: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Score":
        """The score of pieces that have log-probabilities and the likeliest token."""
        logprobs = [piece.logprob for piece in pieces if piece.logprob is not None]
        is_greedy = all(piece.token in piece.top_logprobs for piece in pieces)
        return cls(sum(logprobs), is_greedy, [piece.token for piece in pieces], logprobs)
