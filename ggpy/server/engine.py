"""Where threads and tasks meet: one thread steps a model's generations, tasks take what is ready."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence

from ..generate.generation import Generation
from ..generate.piece import Piece

_log = logging.getLogger(__name__)


class Engine:
    """Moves a model's generations on, in a thread of its own, as long as there are any.

    Parameters
    ----------
    loop : event loop
        Of the tasks that take the text.
    name : str
        The thread's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str):
        self._loop = loop
        self._streams: list[Stream] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, stream: "Stream") -> None:
        """Moves a stream's generations on from now on."""
        with self._changed:
            self._streams.append(stream)
            self._changed.notify()

    def remove(self, stream: "Stream") -> None:
        """Forgets a stream."""
        with self._changed:
            if stream in self._streams:
                self._streams.remove(stream)

    def go_on(self) -> None:
        """Says that text was taken: a generation that had too much of it may go on."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (wanted := self._wanted()) is None:
                    self._changed.wait()
                if self._closed:
                    return
                streams = list(self._streams)
            assert wanted is not None
            try:
                wanted.step()
            except Exception as error:  # not of one generation, whose own is kept with it
                _log.exception("a run failed")
                for stream in streams:
                    stream.error = error
            ready = [s for s in streams if s.error is not None or any(map(s.has_news, s.generations))]
            if ready:
                self._loop.call_soon_threadsafe(_wake, ready)

    def _wanted(self) -> Generation | None:
        """A generation that has nothing for its reader; each run moves the others on, too."""
        for stream in self._streams:
            for generation in stream.generations:
                if stream.error is None and not generation.ready:
                    return generation
        return None


def _wake(streams: "list[Stream]") -> None:
    for stream in streams:
        stream.event.set()


class Stream:
    """The generations of one request: iterate for what each has given since it was last asked.

    Yields (place, pieces, whether that was its last). Leave with `close`, which cancels what hasn't ended.

    Parameters
    ----------
    engine : Engine
    generations : sequence of Generation
    seconds : float, optional
        Those that haven't ended by then are cancelled.
    with_progress : bool
        Whether there is something to yield, too, when more of a prompt is evaluated.
    """

    def __init__(
        self,
        engine: Engine,
        generations: Sequence[Generation],
        seconds: float | None = None,
        with_progress: bool = False,
    ):
        self.generations, self.with_progress = list(generations), with_progress
        self._evaluated = dict.fromkeys(self.generations, 0) if with_progress else {}  # how much of prompts was told
        self.event = asyncio.Event()
        self.error: Exception | None = None
        self._engine = engine
        self._timer = asyncio.get_running_loop().call_later(seconds, self._cancel) if seconds is not None else None
        engine.add(self)

    def has_news(self, generation: Generation) -> bool:
        """Whether there is something to take of a generation."""
        return generation.ready or generation.n_evaluated > self._evaluated.get(generation, generation.n_evaluated)

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[Piece], bool]]:
        left = dict(enumerate(self.generations))
        while left:
            self.event.clear()
            if self.error is not None:
                raise self.error
            ready = [(i, g) for i, g in left.items() if self.has_news(g)]
            if not ready:
                await self.event.wait()
                continue
            for i, generation in ready:
                if generation in self._evaluated:
                    self._evaluated[generation] = generation.n_evaluated
                pieces: list[Piece] = []
                ended = False
                while generation.ready and not ended:
                    piece = next(generation, None)
                    ended = piece is None
                    if piece is not None:
                        pieces.append(piece)
                if ended:
                    del left[i]
                yield i, pieces, ended
            self._engine.go_on()

    def _cancel(self) -> None:
        for generation in self.generations:
            if generation.finish_reason is None:
                generation.cancel()
        self.event.set()

    def close(self) -> None:
        """Ends all generations."""
        if self._timer is not None:
            self._timer.cancel()
        self._engine.remove(self)
        self._cancel()
