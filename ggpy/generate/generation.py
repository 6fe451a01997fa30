"""A running generation, as its user sees it."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, NoReturn

from ..errors import Error
from .piece import Piece
from .request import Request
from .scheduler import Scheduler

if TYPE_CHECKING:
    from typing_extensions import Self


class Generation:
    """A running generation: iterate for its pieces of text, one for each token, with `for` or `async for`.

    Generations of a model go on together: whichever is asked for its next piece moves the others on, too. Each gives what
    it would give alone. One generation is for one thread or task at a time; `cancel` may be called from any.

    Attributes
    ----------
    index : int
        Its prompt's place among the prompts of `Model.generate_batch`; 0 otherwise.
    choice : int
        Its place among the generations of its prompt, if there are several.
    prompt_ids : list of int
    """

    def __init__(self, scheduler: Scheduler, request: Request):
        self._scheduler, self._request = scheduler, request
        self._taken: list[Piece] = []
        self.index = self.choice = 0
        self.prompt_ids = request.tokens[: request.n_prompt]
        if not request.done:
            scheduler.submit(request)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = self._next()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        import asyncio  # takes 30 ms and 5 MB, which most starts need not pay

        # The thread only waits, and doesn't refer to the generation: a task that is cancelled here loses no text, and
        # cancels the generation if nothing else refers to it.
        await asyncio.to_thread(self._scheduler.advance, self._request)
        piece = self._next()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __del__(self) -> None:
        self._request.cancelled = True  # nobody will take its text

    def __reduce__(self) -> NoReturn:
        raise Error("a generation can't be pickled")

    def _next(self) -> Piece | None:
        request = self._request
        self.wait()
        if request.cancelled:
            return None
        if request.pieces:
            self._taken.append(request.pieces.popleft())
            return self._taken[-1]
        if request.error is not None:
            raise request.error
        return None

    def wait(self) -> None:
        """Goes on until there is a piece to take, or the end; for those who look after many, as `take` is."""
        self._scheduler.advance(self._request)

    @property
    def ready(self) -> bool:
        """Whether the next piece, or the end, is there already, so that asking for it takes no time."""
        return self._request.ready

    def step(self) -> None:
        """Makes one run, for all generations of the model, unless this one is `ready`."""
        self._scheduler.step(self._request)

    def take(self) -> bool:
        """Takes the pieces that are there already; True if that was the last."""
        request = self._request
        done = request.done  # first: what is there then is all
        while request.pieces or (done and request.error is not None):
            self._next()
        return done

    def run(self) -> "Self":
        """Goes on to the end; returns the generation itself, whose `text` is whole then."""
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """Ends the generation before its next token. May be called from any thread."""
        if not self._request.done:
            self._request.finish_reason = "cancelled"
        self._request.cancelled = True
        self._scheduler.reap()

    @property
    def ids(self) -> list[int]:
        """The tokens generated so far, an end token included."""
        return self._request.tokens[self._request.n_prompt :]

    @property
    def text(self) -> str:
        """The text taken so far."""
        return "".join(self._taken)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces taken so far: after `run`, all."""
        return list(self._taken)

    @property
    def finish_reason(self) -> str | None:
        """ "stop" (an end token or a stop text), "length" (max_tokens), "context" (no room left), "cancelled"; None while
        it goes on."""
        return self._request.finish_reason

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended it, if one did."""
        return self._request.stop_text

    @property
    def n_reused(self) -> int:
        """Tokens of the prompt whose keys and values were there already."""
        return self._request.n_reused

    @property
    def n_evaluated(self) -> int:
        """Tokens of the prompt that were evaluated so far, or whose keys and values were there already."""
        return self._request.n_evaluated

    @property
    def n_drafted(self) -> int:
        """Tokens that speculation proposed and the model checked."""
        return self._request.n_drafted

    @property
    def n_accepted(self) -> int:
        """Of them, those that were the model's own choice: each saved a run."""
        return self._request.n_accepted

    @property
    def prompt_seconds(self) -> float:
        """Time from its start to its first token."""
        return self._request.prompt_seconds

    @property
    def decode_seconds(self) -> float:
        """Time for the tokens after the first."""
        return self._request.decode_seconds

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second."""
        return (len(self.prompt_ids) - self.n_reused) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, without the first, which comes from the prompt's run."""
        n = len(self._request.tokens) - self._request.n_prompt
        return (n - 1) / self.decode_seconds if self.decode_seconds and n > 1 else 0.0
