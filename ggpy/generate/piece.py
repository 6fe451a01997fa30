"""What a generation gives for each token."""

from collections.abc import Mapping


class Piece(str):
    """The text that became certain with a token, as a `str`, and what else is known of the token.

    The text is whole characters only and nothing of a stop text, so that a piece may be empty, or longer than its token.

    Attributes
    ----------
    token : int
    logprob : float or None
        The natural logarithm of the probability that the model gave the token, before processors and sampling options
        changed it. None if `logprobs` wasn't asked for, and for a prompt's first token.
    top_logprobs : mapping of int to float
        The likeliest tokens and theirs, the likeliest first: as many as were asked for.
    finish_reason : str or None
        Why the generation ended, in its last piece; see `Generation.finish_reason`.
    """

    token: int
    logprob: float | None
    top_logprobs: Mapping[int, float]
    finish_reason: str | None

    def __new__(
        cls,
        text: str,
        token: int,
        logprob: float | None = None,
        top_logprobs: Mapping[int, float] | None = None,
        finish_reason: str | None = None,
    ) -> "Piece":
        piece = super().__new__(cls, text)
        piece.token, piece.logprob, piece.finish_reason = token, logprob, finish_reason
        piece.top_logprobs = {} if top_logprobs is None else top_logprobs
        return piece

    def __reduce__(self) -> tuple:
        return Piece, (str(self), self.token, self.logprob, dict(self.top_logprobs), self.finish_reason)

    @property
    def text(self) -> str:
        """The text, as a plain `str`."""
        return str(self)
