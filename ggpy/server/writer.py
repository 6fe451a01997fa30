"""What all APIs' answers have in common."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from .. import __version__
from .answers import Answer, Delta, Segment, Usage
from .errors import APIError

#: OpenAI's name for the software that answers
FINGERPRINT = f"ggpy-{__version__}"

#: A server-sent event: its name, if the API has names, and its data.
Event: TypeAlias = tuple[str | None, dict[str, Any]]


def timings_of(answer: Answer) -> dict[str, Any]:
    """How long an answer took, as llama.cpp's server says it."""
    generation = answer.generation
    n_prompt, n = len(generation.prompt_ids) - generation.n_reused, len(generation.ids)
    prompt_ms, predicted_ms = 1000 * generation.prompt_seconds, 1000 * generation.decode_seconds
    return {
        "cache_n": generation.n_reused,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(n_prompt, 1),
        "prompt_per_second": generation.prompt_rate,
        "predicted_n": n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(n - 1, 1),  # the first comes of the prompt
        "predicted_per_second": generation.decode_rate,
    }


class Writer(ABC):
    """Writes the answers to one request in an API's shape, as a stream of events or whole."""

    #: what follows the last event
    after = "data: [DONE]\n\n"

    def start(self) -> list[Event]:
        """What comes first."""
        return []

    def waiting(self, index: int) -> list[Event]:
        """An answer's prompt is evaluated; the last event will say how far."""
        return []

    @abstractmethod
    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """What becomes certain of an answer."""

    @abstractmethod
    def end(self, index: int) -> list[Event]:
        """An answer has ended."""

    def finish(self, usage: Usage) -> list[Event]:
        """All have."""
        return []

    def failed(self, error: APIError) -> list[Event]:
        """Something went wrong on the way."""
        return [(None, error.openai())]

    @abstractmethod
    def whole(self, usage: Usage) -> Any:
        """All answers at once."""


class Progress:
    """Says how far the prompts of answers are evaluated, as llama.cpp's server does for `return_progress`."""

    def __init__(self, writer: Writer, answers: Sequence[Answer], with_timings: bool):
        self._writer, self._answers, self._with_timings = writer, answers, with_timings
        self._started = time.perf_counter()
        self._told: dict[int, int] = {}

    def take(self, index: int) -> list[Event]:
        """What is new: first how much of a prompt was known, then how much of it is evaluated."""
        answer = self._answers[index]
        n, cached = answer.generation.n_evaluated, answer.generation.n_reused
        if not n:
            return []
        news = [(cached, 0.0)] if index not in self._told else []
        if n > self._told.get(index, cached):
            news.append((n, 1000 * (time.perf_counter() - self._started)))
        self._told[index] = n
        events: list[Event] = []
        for processed, ms in news:
            made = self._writer.waiting(index)
            if made:
                total = len(answer.generation.prompt_ids)
                facts = {"total": total, "cache": cached, "processed": processed, "time_ms": round(ms)}
                made[-1][1]["prompt_progress"] = facts
                if self._with_timings:
                    made[-1][1]["timings"] = {**timings_of(answer), "prompt_n": processed - cached, "prompt_ms": ms}
            events += made
        return events


class SegmentWriter(Writer):
    """Writes one answer whose parts are opened and closed."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._open: int | None = None  # the segment's place

    @abstractmethod
    def opened(self, place: int, segment: Segment) -> list[Event]:
        """A part begins."""

    @abstractmethod
    def added(self, place: int, segment: Segment, text: str) -> list[Event]:
        """A part goes on."""

    @abstractmethod
    def closed(self, place: int, segment: Segment) -> list[Event]:
        """A part is whole."""

    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """What becomes certain, between the beginnings and ends of parts."""
        events: list[Event] = []
        for place, segment, text in deltas:
            if place != self._open:
                events += self.end(index)
                events += self.opened(place, segment)
                self._open = place
            if text:
                events += self.added(place, segment, text)
        return events

    def end(self, index: int) -> list[Event]:
        """The part that is open is whole."""
        if self._open is None:
            return []
        place, self._open = self._open, None
        return self.closed(place, self._answer.segments[place])
