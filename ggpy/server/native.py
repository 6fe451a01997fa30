"""llama.cpp's own completions, and filling gaps in a text."""

from collections.abc import Mapping, Sequence
from typing import Any

from .answers import Answer, Delta, Usage
from .writer import Event, Writer


class NativeWriter(Writer):
    """Writes one answer as llama.cpp's server does."""

    after = ""

    def __init__(self, model: str, answer: Answer, options: Mapping[str, Any]):
        self._model, self._answer, self._options = model, answer, options
        self._said = 0

    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """The text that is certain now."""
        pieces = self._answer.pieces
        new, self._said = pieces[self._said :], len(pieces)
        text = "".join(delta.text for delta in deltas)
        return (
            [(None, {"index": 0, "content": text, "tokens": [piece.token for piece in new], "stop": False})] if new else []
        )

    def end(self, index: int) -> list[Event]:
        """Nothing: `finish` says all."""
        return []

    def finish(self, usage: Usage) -> list[Event]:
        """Why it ended, and how long it took."""
        return [(None, {**self.whole(usage), "content": "", "tokens": []})]

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The text, why it ended, and how long it took."""
        generation = self._answer.generation
        kinds = {"stop": "word" if generation.stop_text is not None else "eos"}
        prompt_ms, predicted_ms = 1000 * generation.prompt_seconds, 1000 * generation.decode_seconds
        return {
            "index": 0,
            "content": self._answer.text("content"),
            "tokens": [piece.token for piece in self._answer.pieces],
            "stop": True,
            "model": self._model,
            "tokens_predicted": usage.completion,
            "tokens_evaluated": usage.prompt,
            "tokens_cached": usage.cached,
            "truncated": False,
            "stop_type": kinds.get(generation.finish_reason or "", "limit"),
            "stopping_word": generation.stop_text or "",
            "generation_settings": {k: v for k, v in self._options.items() if k != "logit_bias"},
            "timings": {
                "cache_n": usage.cached,
                "prompt_n": usage.prompt - usage.cached,
                "prompt_ms": prompt_ms,
                "prompt_per_second": generation.prompt_rate,
                "predicted_n": usage.completion,
                "predicted_ms": predicted_ms,
                "predicted_per_second": generation.decode_rate,
            },
        }
