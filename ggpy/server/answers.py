"""Answers as they come, whatever the API: what is said in which order, and what belongs to it."""

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..generate.generation import Generation
from ..generate.piece import Piece
from ..generate.replies import Event
from .conversation import Parser


@dataclass
class Segment:
    """A part of an answer: thoughts, text, or a call with its arguments.

    Attributes
    ----------
    kind : str
        "content", "reasoning" or "call".
    texts : list of str
        Pieces of the text; of a call, of its arguments.
    id, name : str
        Of a call.
    """

    kind: str
    texts: list[str] = field(default_factory=list)
    id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    @property
    def arguments(self) -> dict[str, Any] | None:
        """A call's arguments; None until they are whole."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None


class Delta(NamedTuple):
    """Text that has become certain, and the segment that it belongs to, by its place."""

    place: int
    segment: Segment
    text: str


class Answer:
    """One reply.

    Attributes
    ----------
    generation : Generation
    segments : list of Segment
    pieces : list of Piece
        All so far.
    n_reasoning : int
        Tokens that were thoughts.
    """

    def __init__(self, generation: Generation, parser: Parser):
        self.generation, self._parser = generation, parser
        self.segments: list[Segment] = []
        self.pieces: list[Piece] = []
        self.n_reasoning = 0
        self._space = ""  # that comes before anything else of a part

    def take(self, pieces: Sequence[Piece], ended: bool) -> list[Delta]:
        """Takes the next pieces; what is certain now."""
        deltas: list[Delta] = []
        for piece in pieces:
            self.pieces.append(piece)
            events = self._parser.push(piece)
            self.n_reasoning += any(event.kind == "reasoning" for event in events)
            self._add(events, deltas)
        if ended:
            self._add(self._parser.flush(), deltas)
            if self._space and not self.segments:
                self._add_text("content", self._space, deltas)
        return deltas

    def _add(self, events: Sequence[Event], deltas: list[Delta]) -> None:
        for event in events:
            if event.kind == "call":
                self._space = ""
                self.segments.append(Segment("call", [], new_call_id(), event.name))
                deltas.append(Delta(len(self.segments) - 1, self.segments[-1], ""))
                self._add_text("call", event.text, deltas)
            elif event.text:
                self._add_text("call" if event.kind == "arguments" else event.kind, event.text, deltas)

    def _add_text(self, kind: str, text: str, deltas: list[Delta]) -> None:
        if not self.segments or self.segments[-1].kind != kind:
            # White space between two parts belongs to neither.
            text, self._space = self._space + text, ""
            if not text.strip() and self.segments:
                self._space = text
                return
            self.segments.append(Segment(kind))
        segment = self.segments[-1]
        segment.texts.append(text)
        if deltas and deltas[-1].segment is segment and deltas[-1].text:
            deltas[-1] = deltas[-1]._replace(text=deltas[-1].text + text)
        else:
            deltas.append(Delta(len(self.segments) - 1, segment, text))

    def text(self, kind: str) -> str:
        """All text of a kind."""
        return "".join(segment.text for segment in self.segments if segment.kind == kind)

    @property
    def calls(self) -> list[Segment]:
        """The calls that are whole."""
        return [segment for segment in self.segments if segment.kind == "call" and segment.arguments is not None]

    @property
    def finish_reason(self) -> str:
        """How it ended: "stop", "length" or "tool_calls"."""
        if self.generation.finish_reason == "stop":
            return "tool_calls" if self.calls else "stop"
        return "length"


class Usage(NamedTuple):
    """Tokens of a request: of prompts, of these those that weren't computed again, of answers, of these thoughts."""

    prompt: int
    cached: int
    completion: int
    reasoning: int

    @property
    def total(self) -> int:
        """All tokens."""
        return self.prompt + self.completion

    def openai(self) -> dict[str, object]:
        """As OpenAI's chat API has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.total,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


def usage_of(answers: Sequence[Answer], n_prompts: int = 1) -> Usage:
    """The tokens of answers to so many prompts, which have equally many answers."""
    each = len(answers) // n_prompts
    first = [answers[i].generation for i in range(0, len(answers), each)]
    return Usage(
        sum(len(g.prompt_ids) for g in first),
        sum(g.n_reused for g in first),
        sum(len(a.generation.ids) for a in answers),
        sum(a.n_reasoning for a in answers),
    )


def new_id(prefix: str) -> str:
    """An id that nothing else has."""
    return prefix + secrets.token_hex(12)


def new_call_id() -> str:
    """The id of a call: nine letters and digits, since Mistral's templates want that."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
