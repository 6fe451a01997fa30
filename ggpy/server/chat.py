"""OpenAI's chat completions."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..generate.piece import Piece
from ..generate.tokenizer import Tokenizer
from .answers import Answer, Delta, Usage, new_id
from .conversation import Conversation, choice_of, functions_of, message_of
from .errors import invalid
from .writer import FINGERPRINT, Event, Writer, timings_of


def conversation_of(values: Mapping[str, Any]) -> Conversation:
    """The conversation of a request.

    Raises
    ------
    APIError
        A message, a tool or the choice isn't understood.
    """
    if "messages" not in values:
        raise invalid("messages is required", "messages")
    messages = [message_of(message, f"messages[{i}]") for i, message in enumerate(values["messages"])]
    tools = functions_of(values.get("tools"))
    kwargs = dict(values.get("chat_template_kwargs", {}))
    if (effort := values.get("reasoning_effort")) is not None:
        kwargs.setdefault("reasoning_effort", effort)
        if effort in ("none", "minimal"):
            kwargs.setdefault("enable_thinking", False)
    continues = values.get("continue_final_message", not values.get("add_generation_prompt", False))
    if values.get("continue_final_message") and values.get("add_generation_prompt"):
        raise invalid("continue_final_message and add_generation_prompt can't both be true", "continue_final_message")
    choice = choice_of(values.get("tool_choice"), tools)
    parallel, begins = values.get("parallel_tool_calls", True), values.get("add_generation_prompt", True)
    return Conversation(one_system(messages), tools, choice, parallel, kwargs, bool(continues), begins)


def one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, those of the system at the beginning as one: most templates know only one."""
    n = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if n < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:n])
    return [{"role": "system", "content": text}, *messages[n:]]


class ChatWriter(Writer):
    """Writes answers as chat completions."""

    def __init__(self, model: str, answers: Sequence[Answer], tokenizer: Tokenizer, logprobs: bool, with_usage: bool):
        self._answers, self._tokenizer = answers, tokenizer
        self._logprobs, self._with_usage = logprobs, with_usage
        self._head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}
        self._said = [0] * len(answers)  # pieces whose log-probabilities are written

    def start(self) -> list[Event]:
        """The first chunks: whose words these are."""
        return [self._chunk(i, {"role": "assistant", "content": None}) for i in range(len(self._answers))]

    def waiting(self, index: int) -> list[Event]:
        """A chunk without anything."""
        return [self._chunk(index, {})]

    def take(self, index: int, deltas: Sequence[Delta]) -> list[Event]:
        """Chunks with what is certain now."""
        return [self._chunk(index, self._delta(index, delta), logprobs=i == 0) for i, delta in enumerate(deltas)]

    def _delta(self, index: int, delta: Delta) -> dict[str, Any]:
        segment = delta.segment
        if segment.kind != "call":
            return {"content" if segment.kind == "content" else "reasoning_content": delta.text}
        place = sum(s.kind == "call" for s in self._answers[index].segments[: delta.place])
        call: dict[str, Any] = {"index": place, "function": {"arguments": delta.text}}
        if not delta.text:
            call |= {"id": segment.id, "type": "function", "function": {"name": segment.name, "arguments": ""}}
        return {"tool_calls": [call]}

    def end(self, index: int) -> list[Event]:
        """The last chunk of an answer: why it ended."""
        return [self._chunk(index, {}, self._answers[index].finish_reason, logprobs=True)]

    def finish(self, usage: Usage) -> list[Event]:
        """What follows all answers: the tokens, if they are asked for."""
        if not self._with_usage:
            return []
        more = {"usage": usage.openai(), "timings": timings_of(self._answers[0])}
        return [(None, {**self._head, **_CHUNK, "choices": [], **more})]

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: bool = False) -> Event:
        said = None
        if self._logprobs and logprobs:
            pieces = self._answers[index].pieces
            new, self._said[index] = pieces[self._said[index] :], len(pieces)
            said = self._logprobs_of(new) if new else None
        choice = {"index": index, "delta": delta, "logprobs": said, "finish_reason": reason}
        usage = {"usage": None} if self._with_usage else {}
        return None, {**self._head, **_CHUNK, "choices": [choice], **usage}

    def _logprobs_of(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"content": [token_logprobs(self._tokenizer, piece) for piece in pieces], "refusal": None}

    def whole(self, usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": i,
                "message": _message(answer),
                "logprobs": self._logprobs_of(answer.pieces) if self._logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            for i, answer in enumerate(self._answers)
        ]
        head = {**self._head, "object": "chat.completion", "system_fingerprint": FINGERPRINT}
        return {**head, "choices": choices, "usage": usage.openai(), "timings": timings_of(self._answers[0])}


_CHUNK = {"object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT}


def _message(answer: Answer) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
        for call in answer.calls
    ]
    content = answer.text("content")
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
    message["annotations"] = []
    if thoughts := answer.text("reasoning"):
        message["reasoning_content"] = thoughts
    return {**message, "tool_calls": calls} if calls else message


def token_logprobs(tokenizer: Tokenizer, piece: Piece) -> dict[str, Any]:
    """A token with its log-probability and those of the likeliest ones, as chat completions have them."""
    top = [token_facts(tokenizer, token, value) for token, value in piece.top_logprobs.items()]
    return {**token_facts(tokenizer, piece.token, piece.logprob), "top_logprobs": top}


def token_facts(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    """A token's text and bytes, and its log-probability."""
    data = tokenizer.token_bytes(token) if token < tokenizer.n_vocab else b""
    value = -9999.0 if logprob is None else max(logprob, -9999.0)  # JSON has no infinity
    return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}
