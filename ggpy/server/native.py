"""llama.cpp's own completions, and filling gaps in a text."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ..generate.piece import Piece
from ..generate.tokenizer import Tokenizer
from .answers import Answer, Delta, Usage, usage_of
from .chat import token_facts
from .writer import Event, Writer, timings_of


class NativeWriter(Writer):
    """Writes answers as llama.cpp's server does."""

    after = ""

    def __init__(
        self,
        model: str,
        answers: Sequence[Answer],
        tokenizer: Tokenizer,
        options: Mapping[str, Any],
        values: Mapping[str, Any],
    ):
        self._model, self._answers, self._tokenizer, self._options = model, answers, tokenizer, options
        self._with_probs, self._with_tokens = bool(values.get("n_probs")), values.get("return_tokens", False)
        self._said = [0] * len(answers)

    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """The text that is certain now."""
        pieces = self._answers[index].pieces
        new, self._said[index] = pieces[self._said[index] :], len(pieces)
        if not new:
            return []
        text = "".join(delta.text for delta in deltas)
        facts = {"index": index, "content": text, "tokens": [piece.token for piece in new], "stop": False}
        return [(None, {**facts, **self._probs_of(new)})]

    def end(self, index: int) -> list[Event]:
        """Why it ended, and how long it took."""
        return [(None, {**self._facts(index), "content": "", "tokens": []})]

    def whole(self, usage: Usage) -> Any:
        """The text, why it ended, and how long it took; a list of these for several prompts."""
        made = []
        for index, answer in enumerate(self._answers):
            tokens = [piece.token for piece in answer.pieces] if self._with_tokens else []
            facts = {"content": answer.text("content"), "tokens": tokens, **self._probs_of(answer.pieces)}
            made.append({**self._facts(index), **facts})
        return made if len(made) > 1 else made[0]

    def _probs_of(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if not self._with_probs:
            return {}
        return {"completion_probabilities": [self._probs(piece) for piece in pieces]}

    def _probs(self, piece: Piece) -> dict[str, Any]:
        top = [{"id": token, **token_facts(self._tokenizer, token, value)} for token, value in piece.top_logprobs.items()]
        return {"id": piece.token, **token_facts(self._tokenizer, piece.token, piece.logprob), "top_logprobs": top}

    def _facts(self, index: int) -> dict[str, Any]:
        answer = self._answers[index]
        generation, usage = answer.generation, usage_of([answer])
        kinds = {"stop": "word" if generation.stop_text is not None else "eos"}
        bias = self._options.get("logit_bias", {})
        # JSON has no infinity.
        biases = [{"token": token, "bias": value if isfinite(value) else None} for token, value in bias.items()]
        settings = {**self._options, "n_predict": self._options.get("max_tokens", -1), "logit_bias": biases}
        return {
            "index": index,
            "stop": True,
            "model": self._model,
            "prompt": self._tokenizer.decode(generation.prompt_ids),
            "tokens_predicted": usage.completion,
            "tokens_evaluated": usage.prompt,
            "tokens_cached": usage.cached,
            "truncated": generation.finish_reason == "context",
            "has_new_line": "\n" in answer.text("content"),
            "stop_type": kinds.get(generation.finish_reason or "", "limit"),
            "stopping_word": generation.stop_text or "",
            "generation_settings": settings,
            "timings": timings_of(answer),
        }
