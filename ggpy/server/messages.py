"""Anthropic's messages."""

from collections.abc import Mapping
from typing import Any

from .answers import Answer, Segment, Usage, new_id, usage_of
from .conversation import Conversation, choice_of, functions_of, text_of
from .errors import APIError, invalid
from .writer import Event, SegmentWriter

#: what begins blocks of system prompts that change with every request and say nothing to the model
_NOISE = "x-anthropic-"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def conversation_of(values: Mapping[str, Any]) -> Conversation:
    """The conversation of a request.

    Raises
    ------
    APIError
        A message, a tool or the choice isn't understood.
    """
    if "messages" not in values:
        raise invalid("messages is required", "messages")
    messages: list[dict[str, Any]] = []
    if system := _system(values.get("system", "")):
        messages.append({"role": "system", "content": system})
    for i, message in enumerate(values["messages"]):
        messages += _messages_of(message, f"messages[{i}]")
    tools = functions_of([_tool(t) for t in values.get("tools", ()) if t.get("type", "custom") in ("custom", "function")])
    choice = values.get("tool_choice", {"type": "auto"})
    kind = choice.get("type")
    if kind == "tool":
        named = choice_of({"name": choice.get("name")}, tools)
    elif isinstance(kind, str) and kind in _CHOICES:
        named = choice_of(_CHOICES[kind], tools)
    else:
        raise invalid("tool_choice.type must be one of auto, any, tool, none", "tool_choice")
    kwargs = dict(values.get("chat_template_kwargs", {}))
    thinking = values.get("thinking", {}).get("type")
    if thinking is not None:
        kwargs.setdefault("enable_thinking", thinking != "disabled")
    return Conversation(messages, tools, named, not choice.get("disable_parallel_tool_use", False), kwargs)


def _system(system: str | list[Any]) -> str:
    blocks = [system] if isinstance(system, str) else [text_of([block], "system") for block in system]
    return "\n\n".join(block for block in blocks if block and not block.startswith(_NOISE))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    return {"type": "function", "function": facts}


def _messages_of(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A message as templates have it; results of tools are messages of their own there."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role must be user or assistant", where)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise invalid(f"{where}.content must be a text or a list of blocks", where)
    texts: list[Any] = []
    results: list[dict[str, Any]] = []
    made: dict[str, Any] = {"role": role, "content": ""}
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            if not isinstance(block.get("name"), str) or not isinstance(block.get("input", {}), dict):
                raise invalid(f"{where}.content: a tool_use needs a name and an input", where)
            function = {"name": block["name"], "arguments": block.get("input", {})}
            call = {"id": str(block.get("id", "")), "type": "function", "function": function}
            made.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result":
            said = text_of(block.get("content"), f"{where}.content")
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": said})
        elif kind == "thinking":
            made["reasoning_content"] = made.get("reasoning_content", "") + str(block.get("thinking", ""))
        elif kind != "redacted_thinking":
            texts.append(block)
    made["content"] = text_of(texts, f"{where}.content")
    return results if results and not texts else [*results, made]


class MessagesWriter(SegmentWriter):
    """Writes an answer as a message of Anthropic's API."""

    after = ""

    def __init__(self, model: str, answer: Answer):
        super().__init__(answer)
        self._head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}

    def start(self) -> list[Event]:
        """The message without content."""
        usage = {**_usage(usage_of([self._answer])), "output_tokens": 0}
        stop = dict.fromkeys(("stop_reason", "stop_sequence", "stop_details", "container"))
        message: dict[str, Any] = {**self._head, "content": [], **stop, "usage": usage}
        return [_event("message_start", message=message), _event("ping")]

    def opened(self, place: int, segment: Segment) -> list[Event]:
        """A block begins."""
        block = {**_block(segment), **_EMPTY[segment.kind]}
        return [_event("content_block_start", index=place, content_block=block)]

    def added(self, place: int, segment: Segment, text: str) -> list[Event]:
        """A block goes on."""
        kind, key = _DELTAS[segment.kind]
        return [_event("content_block_delta", index=place, delta={"type": kind, key: text})]

    def closed(self, place: int, segment: Segment) -> list[Event]:
        """A block is whole; thoughts have a signature, which says nothing here."""
        signed = [] if segment.kind != "reasoning" else [{"type": "signature_delta", "signature": ""}]
        deltas = [_event("content_block_delta", index=place, delta=delta) for delta in signed]
        return [*deltas, _event("content_block_stop", index=place)]

    def finish(self, usage: Usage) -> list[Event]:
        """Why the message ended."""
        return [_event("message_delta", delta=self._stop(), usage=_usage(usage)), _event("message_stop")]

    def failed(self, error: APIError) -> list[Event]:
        """The error."""
        return [("error", error.anthropic())]

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The message."""
        content = [_block(segment) for segment in self._answer.segments]
        return {**self._head, "content": content, **self._stop(), "usage": _usage(usage)}

    def _stop(self) -> dict[str, Any]:
        generation = self._answer.generation
        reason = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}[self._answer.finish_reason]
        if generation.stop_text is not None and reason == "end_turn":
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": generation.stop_text, "stop_details": None, "container": None}


_EMPTY: dict[str, dict[str, Any]] = {
    "call": {"input": {}},
    "content": {"text": ""},
    "reasoning": {"thinking": "", "signature": ""},
}
_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _event(kind: str, **data: Any) -> Event:
    return kind, {"type": kind, **data}


def _block(segment: Segment) -> dict[str, Any]:
    if segment.kind == "call":
        facts = {"id": f"toolu_{segment.id}", "name": segment.name, "input": segment.arguments or {}}
        return {"type": "tool_use", **facts, "caller": {"type": "direct"}}
    if segment.kind == "reasoning":
        return {"type": "thinking", "thinking": segment.text, "signature": ""}
    return {"type": "text", "text": segment.text, "citations": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
        **dict.fromkeys(("cache_creation", "inference_geo", "server_tool_use", "service_tier")),
    }
