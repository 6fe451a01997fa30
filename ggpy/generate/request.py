"""A generation, as the scheduler sees it."""

import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.table import SLAB
from .piece import Piece
from .prefixes import Prefix
from .sampling import Processor, Sampler, StandardSampler, log_probabilities, next_token
from .sequence import TokenSequence
from .snapshots import SNAPSHOT_TOKENS
from .speculation import Drafter
from .streaming import StopMatcher, StreamDecoder
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .constraints import CallsConstraint, Constraint

MOST_DRAFTED = 32  # tokens of all in a run: where many generate, a guess costs what a token does
_TEMPLATE_END = 8  # tokens at a prompt's end that the next prompt of a conversation may not have


class Request:
    """A generation as the scheduler sees it. Everything here is written by whoever steps the scheduler.

    Attributes
    ----------
    tokens : list of int
        The prompt and what has been generated.
    n_prompt : int
    pieces : deque of Piece
        What nobody has taken yet.
    n_scored : int
        The token before which all log-probabilities that are wanted are known: the prompt's length, or less while some of
        the prompt's own are to come.
    constraint : Constraint or CallsConstraint or None
        What its text must keep to, until it ends.
    finish_reason, error
        How it ended: one of the two, or None while it goes on.
    cancelled : bool
        May be set by any thread.
    n_evaluated : int
        Tokens of the prompt that were evaluated so far, or known.
    sequence : TokenSequence or None
        Its keys and values, while it is at work.
    prefix : Prefix or None
        The last of its pages that the tree of prefixes knows; None where its values aren't fit for others.
    n_known : int
        How many pages that are.
    stops : set of int
        Positions at which a snapshot is to be left, in models with states.
    drafter : Drafter or None
        Guesses its next tokens, until it has ended.
    n_drafted, n_accepted : int
        How many guesses were evaluated, and were right.

    Parameters
    ----------
    logprobs : int, optional
        Of how many of the likeliest tokens log-probabilities are wanted, beside the token's own; None: of none.
    echo_from : int, optional
        Pieces of the prompt are wanted, too, from this token on.
    shown : collection of int
        Control tokens that the text has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        sampler: Sampler,
        max_tokens: int | None,
        stop: str | Sequence[str],
        processors: Sequence[Processor] = (),
        logprobs: int | None = None,
        echo_from: int | None = None,
        constraint: "Constraint | CallsConstraint | None" = None,
        shown: Collection[int] = (),
    ):
        self.tokens = list(prompt_ids)
        self.n_prompt = len(prompt_ids)
        self.n_reused = self.n_evaluated = 0
        self.prompt_seconds = self.decode_seconds = 0.0
        self.pieces: deque[Piece] = deque()
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.sequence: TokenSequence | None = None
        self.prefix: Prefix | None = None
        self.n_known = 0
        self.stops: set[int] = set()
        self.drafter: Drafter | None = None
        self.n_drafted = self.n_accepted = 0
        self._sampler, self._processors, self._max_tokens = sampler, tuple(processors), max_tokens
        self._end_tokens, self._bos = tokenizer.end_tokens, tokenizer.bos
        self.constraint = constraint
        self._decoder = StreamDecoder(tokenizer, prompt_ids, whole=constraint is not None, shown=shown)
        self._stops = StopMatcher(stop)
        self._started = self._first = 0.0
        self._logprobs = logprobs
        self.n_scored = self.n_prompt
        if echo_from is not None:
            self._echo = StreamDecoder(tokenizer, prompt_ids[:echo_from], special=True)
            self.n_scored = echo_from
            while self.n_scored < (1 if logprobs is not None else self.n_prompt):
                self._echo_next()
        self._end_without_tokens()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None or self.error is not None

    @property
    def ready(self) -> bool:
        """Whether there is text to take, or nothing more will come."""
        return bool(self.pieces) or self.done or self.cancelled

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended it, if one did."""
        return self._stops.found

    @property
    def first_wanted(self) -> int:
        """The first position whose logits are wanted: none before the one that is to give the next token, or the next
        log-probability of the prompt."""
        return (self.n_scored if self.n_scored < self.n_prompt else len(self.tokens)) - 1

    @property
    def is_ours(self) -> bool:
        """Whether nobody else's code chooses its tokens, which may take its time."""
        return type(self._sampler) is StandardSampler and not self._processors

    @property
    def held(self) -> TokenSequence:
        """Its sequence, which it has while it is at work."""
        assert self.sequence is not None
        return self.sequence

    @property
    def n_left(self) -> int:
        """Tokens that must be evaluated before the next one can be chosen."""
        return len(self.tokens) - len(self.held.ids)

    @property
    def is_behind(self) -> bool:
        """Whether a run with a draft has left right tokens that its state lacks."""
        return len(self.tokens) > self.n_prompt and self.n_left <= MOST_DRAFTED + 1

    def n_wanted(self, n: int) -> int:
        """For how many of the next n tokens logits are wanted: the last ones."""
        past = len(self.held.ids)
        return max(0, past + n - max(past, self.first_wanted))

    def next_stop(self) -> int:
        """Where it leaves its next snapshot: where others may go on, at the last page of its prompt, and every
        SNAPSHOT_TOKENS tokens."""
        past = len(self.held.ids)
        self.stops.add((len(self.tokens) - _TEMPLATE_END) // SLAB * SLAB)
        self.stops = {stop for stop in self.stops if stop > past}
        return min(self.stops | {past // SNAPSHOT_TOKENS * SNAPSHOT_TOKENS + SNAPSHOT_TOKENS})

    def n_draftable(self, n_ctx: int) -> int:
        """How many guesses can be of use; the last token of all needs none behind it."""
        n = n_ctx - len(self.tokens)
        return n if self._max_tokens is None else min(n, self._max_tokens - (len(self.tokens) - self.n_prompt) - 1)

    def start(self) -> None:
        """Notes the time, unless it was at work before."""
        self._started = self._started or time.perf_counter()

    def take(self, logits: np.ndarray, n_ctx: int) -> None:
        """Takes logits (n, n_vocab) from position `first_wanted` on: for the prompt's log-probabilities, and to choose the
        next token and what of its text is certain."""
        try:
            for row in logits:
                if self.done:
                    return
                if self.n_scored < self.n_prompt:
                    self._echo_next(row)
                    self._end_without_tokens()
                else:
                    self._count_time()
                    self._choose(row, n_ctx)
        except Exception as error:  # the others go on
            self.error = error

    def _end_without_tokens(self) -> None:
        if self.n_scored == self.n_prompt and self._max_tokens is not None and self._max_tokens < 1:
            self.finish_reason = "length"

    def _echo_next(self, logits: np.ndarray | None = None) -> None:
        """The piece of the prompt's next token, whose log-probability the logits before it give."""
        token = self.tokens[self.n_scored]
        # A beginning-of-sequence token that the text doesn't have writes nothing.
        text = "" if self.n_scored == 0 and token == self._bos else self._echo.push(token)
        self.n_scored += 1
        if self.n_scored == self.n_prompt:
            text += self._echo.flush()
        self.pieces.append(Piece(text, token, *self._logprobs_of(token, logits)))

    def _logprobs_of(self, token: int, logits: np.ndarray | None) -> tuple[float | None, dict[int, float]]:
        if self._logprobs is None or logits is None:
            return None, {}
        return log_probabilities(logits, token, self._logprobs)

    def _count_time(self) -> None:
        now = time.perf_counter()
        if not self.prompt_seconds:
            self.prompt_seconds, self._first = now - self._started, now
        else:
            self.decode_seconds = now - self._first

    def _choose(self, logits: np.ndarray, n_ctx: int) -> None:
        token = next_token(self._sampler, self._processors, logits, self.tokens, self.constraint)
        # A constraint ends what is whole; and an end token that it wants in the middle ends nothing.
        ended = token in self._end_tokens if self.constraint is None else self.constraint.accept(token)
        self.tokens.append(token)
        n = len(self.tokens) - self.n_prompt
        text, stopped = "", False
        if token not in self._end_tokens:
            text, stopped = self._stops.push(self._decoder.push(token))
        full = len(self.tokens) > n_ctx
        reason = "stop" if ended or stopped else "length" if n == self._max_tokens else "context" if full else ""
        if reason and not stopped:
            rest, _ = self._stops.push(self._decoder.flush())
            text += rest + self._stops.flush()
        self.pieces.append(Piece(text, token, *self._logprobs_of(token, logits), reason or None))
        if reason:
            self.finish_reason = reason
            self.constraint = None  # near a megabyte, and generations are kept for their texts
