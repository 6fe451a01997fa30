"""llama.cpp's own completions, and filling gaps in a text."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from ..generate.model import Model
from ..generate.options import Logits, option_table
from ..generate.piece import Piece
from ..generate.sampling import StandardSampler
from ..generate.tokenizer import Tokenizer
from .answers import Answer, Delta, Usage, usage_of
from .chat import token_facts
from .writer import Event, Writer, timings_of

_MISSING = object()


class WatchedSampler(StandardSampler):
    """Keeps what it has drawn from.

    Attributes
    ----------
    drawn : dict of int to (float, dict of int to float)
        By how many tokens there were before: the probability of the one that was drawn, and those of the n likeliest.
    """

    def __init__(self, n: int, tokenizer: Tokenizer, **sampling: Any):
        super().__init__(tokenizer=tokenizer, **sampling)
        self._n = n
        self.drawn: dict[int, tuple[float, dict[int, float]]] = {}
        self._last: Any = None

    def distribution(self, logits: Logits, ids: Sequence[int] = ()) -> Any:
        """See `StandardSampler.distribution`."""
        self._last = super().distribution(logits, ids)
        return self._last

    def sample(self, logits: Logits, ids: Sequence[int] = ()) -> int:
        """See `StandardSampler.sample`."""
        token = super().sample(logits, ids)
        left, probabilities = self._last
        order = np.argsort(-probabilities, kind="stable")[: self._n]
        top = {int(left[i]): float(probabilities[i]) for i in order if probabilities[i] > 0}
        self.drawn[len(ids)] = float(probabilities[left == token][0]), top
        return token


def watched(model: Model, options: Mapping[str, Any], n: int) -> tuple[dict[str, Any], WatchedSampler]:
    """Options with such a sampler in place of those of sampling, and the sampler."""
    sampling = {name: value for name, value in options.items() if name in option_table()}
    sampler = WatchedSampler(n, model.tokenizer, **sampling)
    model._runner.check_ids(sampler.options["logit_bias"])
    return {**{k: v for k, v in options.items() if k not in sampling}, "sampler": sampler}, sampler


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
        samplers: Sequence[WatchedSampler] = (),
    ):
        self._samplers = samplers
        self._model, self._answers, self._tokenizer, self._options = model, answers, tokenizer, options
        self._with_probs, self._with_tokens = bool(values.get("n_probs")), values.get("return_tokens", False)
        self._fields = values.get("response_fields", ())
        self._said = [0] * len(answers)

    def waiting(self, index: int) -> list[Event]:
        """No text."""
        return [(None, {"index": index, "content": "", "tokens": [], "stop": False})]

    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """The text that is certain now."""
        pieces = self._answers[index].pieces
        new, self._said[index] = pieces[self._said[index] :], len(pieces)
        if not new:
            return []
        text = "".join(delta.text for delta in deltas)
        facts = {"index": index, "content": text, "tokens": [piece.token for piece in new], "stop": False}
        return [(None, {**facts, **self._probs_of(index, len(pieces) - len(new))})]

    def end(self, index: int) -> list[Event]:
        """Why it ended, and how long it took."""
        return [(None, self._picked({**self._facts(index), "content": "", "tokens": []}))]

    def whole(self, usage: Usage) -> Any:
        """The text, why it ended, and how long it took; a list of these for several prompts."""
        made = []
        for index, answer in enumerate(self._answers):
            tokens = [piece.token for piece in answer.pieces] if self._with_tokens else []
            facts = {"content": answer.text("content"), "tokens": tokens, **self._probs_of(index, 0)}
            made.append(self._picked({**self._facts(index), **facts}))
        return made if len(made) > 1 else made[0]

    def _picked(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Those that are wanted, by their names; "a/b" is b in a."""
        if not self._fields:
            return facts
        found = {}
        for field in self._fields:
            value: Any = facts
            for name in field.split("/"):
                value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
            if value is not _MISSING:
                found[field] = value
        return found

    def _probs_of(self, index: int, first: int) -> dict[str, Any]:
        """The probabilities of an answer's tokens from a place on."""
        if not self._with_probs:
            return {}
        pieces = self._answers[index].pieces[first:]
        if not self._samplers:
            return {"completion_probabilities": [self._probs(piece) for piece in pieces]}
        drawn, n_prompt = self._samplers[index].drawn, len(self._answers[index].generation.prompt_ids)
        # A grammar that leaves one token asks no sampler.
        values = [drawn.get(n_prompt + first + i, (1.0, {piece.token: 1.0})) for i, piece in enumerate(pieces)]
        return {"completion_probabilities": list(map(self._drawn, pieces, values))}

    def _drawn(self, piece: Piece, value: tuple[float, dict[int, float]]) -> dict[str, Any]:
        top = [self._fact(token, "prob", p) for token, p in value[1].items()]
        return {**self._fact(piece.token, "prob", value[0]), "top_probs": top}

    def _probs(self, piece: Piece) -> dict[str, Any]:
        top = [self._fact(token, "logprob", value) for token, value in piece.top_logprobs.items()]
        return {**self._fact(piece.token, "logprob", piece.logprob), "top_logprobs": top}

    def _fact(self, token: int, name: str, value: float | None) -> dict[str, Any]:
        facts = {"id": token, **token_facts(self._tokenizer, token, value)}
        return facts if name == "logprob" else {**{k: v for k, v in facts.items() if k != "logprob"}, name: value}

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
