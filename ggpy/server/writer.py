"""What all APIs' answers have in common."""

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
