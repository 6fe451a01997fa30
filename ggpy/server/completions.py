"""OpenAI's completions: texts that go on, with the log-probabilities of the prompt if they are asked for."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import Error
from ..generate.generation import Generation
from ..generate.model import Model
from ..generate.piece import Piece
from ..generate.tokenizer import Tokenizer
from .answers import Answer, Delta, Usage, new_id
from .conversation import seeded, text_of
from .errors import invalid, too_long
from .writer import FINGERPRINT, Event, Writer

#: a text, or tokens with texts among them
Prompt: TypeAlias = str | list[int | str]

#: keys of the tokens that stand around the parts of a text with a gap: before it, behind it, in it
_GAP_KEYS = ("fim_pre", "fim_suf", "fim_mid")
_GAP_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


def prompts_of(prompt: Any) -> list[Prompt]:
    """The prompts of a request: one or many, each a text, tokens, tokens with texts among them, or an object with text.

    Raises
    ------
    APIError
        An object has no text, or something else than text.
    """
    is_one = not isinstance(prompt, list) or (prompt and isinstance(prompt[0], (int, float)))
    return [_prompt_of(one) if isinstance(one, dict) else one for one in ([prompt] if is_one else prompt)]


def _prompt_of(given: Mapping[str, Any]) -> str:
    """The text of an object, as llama.cpp's server knows them: a `prompt_string`, or a `content` in parts."""
    if given.get("multimodal_data"):
        raise invalid("prompt: multimodal_data is not supported, only text", "prompt")
    if isinstance(given.get("content"), list):
        return text_of(given["content"], "content", "")
    if not isinstance(given.get("prompt_string"), str):
        raise invalid("prompt: an object needs a prompt_string, or a content of parts", "prompt")
    return str(given["prompt_string"])


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The tokens of a prompt; texts among tokens are parts of a text, not beginnings."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return [i for part in prompt for i in (tokenizer.encode_inside(part) if isinstance(part, str) else [part])]


def gap_ids(model: Model, before: str, behind: str, more: str = "") -> list[int | str]:
    """The tokens of a prompt for what fills a gap in a text.

    Raises
    ------
    APIError
        The model hasn't learned that.
    """
    tokenizer = model.tokenizer
    ids = [model.file.get(f"tokenizer.ggml.{key}_token_id", int, default=None) for key in _GAP_KEYS]
    if None in ids:
        for names in _GAP_NAMES:
            encoded = [tokenizer.encode(name, bos=False) for name in names]
            if all(len(e) == 1 and tokenizer.is_hidden(e[0]) for e in encoded):
                ids = [e[0] for e in encoded]
                break
    if None in ids:
        raise invalid(f"{model.file.path.name} has no tokens for filling a gap in a text", "suffix")
    inside = tokenizer.encode_inside
    start = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    first, second, last = (i for i in ids if i is not None)
    return [*start, *inside(more), first, *inside(before), second, *inside(behind), last]


def continuations(
    model: Model,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    n: int = 1,
    echo: bool = False,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> list[Generation]:
    """Begins n continuations of each prompt; of all, none is begun if one can't be. `change` makes each one's options.

    Raises
    ------
    APIError
        A prompt is empty or doesn't fit into the context.
    Error
        An option isn't understood.
    """
    encoded = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    room = 0 if echo and options.get("max_tokens") == 0 else 1
    for ids in encoded:
        if not ids:
            raise invalid("the prompt is empty", "prompt")
        if len(ids) + room > model.n_ctx:
            raise too_long(len(ids), model.n_ctx)
        if wrong := [i for i in ids if not 0 <= i < model.architecture.n_vocab]:
            raise invalid(f"token {wrong[0]} is not one of the vocabulary's {model.architecture.n_vocab}", "prompt")
    begun: list[Generation] = []
    try:
        for ids in encoded:
            for _ in range(n):
                begun.append(model.generate(ids, echo=echo, **change(seeded(options, len(begun)))))
    except Error:
        for generation in begun:
            generation.cancel()
        raise
    return begun


class CompletionWriter(Writer):
    """Writes answers as completions; of each prompt, the best `n` of those made, if more were made."""

    def __init__(
        self, model: str, answers: Sequence[Answer], tokenizer: Tokenizer, logprobs: bool, with_usage: bool, n_best: int = 0
    ):
        self._answers, self._tokenizer = answers, tokenizer
        self._logprobs, self._with_usage, self._n_best = logprobs, with_usage, n_best
        head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._head = {**head, "system_fingerprint": FINGERPRINT}
        self._said = [0] * len(answers)
        self._offset = [0] * len(answers)

    def waiting(self, index: int) -> list[Event]:
        """A chunk without text."""
        return [self._chunk(index, "")]

    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """A chunk with the text that is certain now."""
        text = "".join(delta.text for delta in deltas)
        return [self._chunk(index, text)] if text else []

    def end(self, index: int) -> list[Event]:
        """The last chunk of a text: why it ended."""
        return [self._chunk(index, "", _reason(self._answers[index]))]

    def finish(self, usage: Usage) -> list[Event]:
        """What follows all: the tokens, if they are asked for."""
        return [(None, {**self._head, "choices": [], "usage": usage.openai()})] if self._with_usage else []

    def _chunk(self, index: int, text: str, reason: str | None = None) -> Event:
        choice = {"index": index, "text": text, "logprobs": self._new_logprobs(index), "finish_reason": reason}
        return None, {**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})}

    def _new_logprobs(self, index: int) -> dict[str, Any] | None:
        pieces = self._answers[index].pieces
        new, self._said[index] = pieces[self._said[index] :], len(pieces)
        if not self._logprobs or not new:
            return None
        offsets = []
        for piece in new:
            offsets.append(self._offset[index])
            self._offset[index] += len(piece)
        return {
            "tokens": [_token_text(self._tokenizer, piece.token) for piece in new],
            "token_logprobs": [piece.logprob for piece in new],
            "top_logprobs": [_top(self._tokenizer, piece) for piece in new],
            "text_offset": offsets,
        }

    def whole(self, usage: Usage) -> dict[str, Any]:
        """All texts at once."""
        order = list(range(len(self._answers)))
        if self._n_best:
            n_prompts = max(a.generation.index for a in self._answers) + 1
            each = len(order) // n_prompts
            order = [
                i
                for first in range(0, len(order), each)
                for i in sorted(order[first : first + each], key=lambda i: -_mean(self._answers[i]))[: self._n_best]
            ]
        choices = [
            {
                "index": place,
                "text": self._answers[i].text("content"),
                "logprobs": self._new_logprobs(i),
                "finish_reason": _reason(self._answers[i]),
            }
            for place, i in enumerate(order)
        ]
        return {**self._head, "choices": choices, "usage": usage.openai()}


def _reason(answer: Answer) -> str:
    return "stop" if answer.generation.finish_reason == "stop" else "length"


def _mean(answer: Answer) -> float:
    known = [p.logprob for p in answer.pieces[len(answer.pieces) - len(answer.generation.ids) :] if p.logprob is not None]
    return sum(known) / len(known) if known else 0.0


def _top(tokenizer: Tokenizer, piece: Piece) -> dict[str, float] | None:
    """The likeliest tokens, and the one that stands there; none where nothing is known, at a prompt's beginning."""
    if piece.logprob is None:
        return None
    known = {**piece.top_logprobs, piece.token: piece.logprob}
    return {_token_text(tokenizer, token): value for token, value in known.items()}


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; where it isn't whole characters, its bytes, so that different tokens have different texts."""
    data = tokenizer.token_bytes(token) if token < tokenizer.n_vocab else b""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
