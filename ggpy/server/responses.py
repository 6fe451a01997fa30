"""OpenAI's responses, as Codex and the Open Responses specification have them. Nothing is stored."""

import time
from collections.abc import Mapping
from typing import Any

from ..generate.fields import format_options
from .answers import Answer, Segment, Usage, new_id
from .chat import conversation_of as chat_conversation
from .conversation import Conversation
from .errors import APIError, invalid
from .writer import Event, SegmentWriter


def conversation_of(values: Mapping[str, Any]) -> Conversation:
    """The conversation of a request.

    Raises
    ------
    APIError
        An item, a tool or the choice isn't understood, or it refers to what isn't stored.
    """
    if "model" not in values:
        raise invalid("model is required", "model")
    if "previous_response_id" in values:
        raise invalid("responses aren't stored: send the whole conversation as input", "previous_response_id")
    if "input" not in values:
        raise invalid("input is required", "input")
    given = values["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages: list[dict[str, Any]] = []
    if "instructions" in values:
        messages.append({"role": "system", "content": values["instructions"]})
    thoughts = ""
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            if thoughts and message["role"] == "assistant":
                message["reasoning_content"], thoughts = thoughts, ""
            messages.append(message)
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            if not isinstance(parts, list):
                raise invalid(f"{where}.content must be a list of parts", where)
            thoughts = "".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            last = messages[-1] if messages else {}
            if last.get("role") != "assistant":
                last = {"role": "assistant", "content": None}
                messages.append(last)
            if thoughts:
                last["reasoning_content"], thoughts = thoughts, ""
            last.setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind == "item_reference":
            raise invalid(f"{where}: responses aren't stored: send the item itself", where)
    made = {
        name: values[name]
        for name in ("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs")
        if name in values
    }
    effort = values.get("reasoning", {}).get("effort")
    if isinstance(effort, str):
        made["reasoning_effort"] = effort
    if not messages:
        raise invalid("input is empty", "input")
    return chat_conversation({"messages": messages, **made})


def options_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `text` means for a generation."""
    form = values.get("text", {}).get("format")
    if form is not None and not isinstance(form, dict):
        raise invalid("text.format must be an object", "text")
    return format_options(form, "text.format")


#: fields that mean what they mean in chat completions
_SHARED = ("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs")


class ResponsesWriter(SegmentWriter):
    """Writes an answer as a response."""

    after = ""

    def __init__(self, model: str, answer: Answer, values: Mapping[str, Any]):
        super().__init__(answer)
        self._values, self._model = values, model
        self._id, self._created = new_id("resp_"), int(time.time())
        self._n_events = 0
        self._items: list[dict[str, Any]] = []  # those that are whole, and the one that is open

    def start(self) -> list[Event]:
        """The response without output."""
        return [self._event(kind, response=self._response("in_progress")) for kind in ("created", "in_progress")]

    def waiting(self, index: int) -> list[Event]:
        """The response without output, again."""
        return [self._event("in_progress", response=self._response("in_progress"))]

    def opened(self, place: int, segment: Segment) -> list[Event]:
        """An item begins."""
        item = _item(segment, "in_progress")
        empty = {**item, "content": []} if segment.kind != "call" else {**item, "arguments": ""}
        self._items.append(item)
        events = [self._event("output_item.added", output_index=place, item=empty)]
        if segment.kind != "call":
            part = {**item["content"][0], "text": ""}
            where = {"item_id": item["id"], "output_index": place, "content_index": 0}
            events.append(self._event("content_part.added", **where, part=part))
        return events

    def added(self, place: int, segment: Segment, text: str) -> list[Event]:
        """An item goes on."""
        kind, _, more = _DELTAS[segment.kind]
        return [self._event(f"{kind}.delta", item_id=self._items[place]["id"], output_index=place, delta=text, **more)]

    def closed(self, place: int, segment: Segment) -> list[Event]:
        """An item is whole."""
        kind, key, more = _DELTAS[segment.kind]
        is_whole = segment.kind != "call" or segment.arguments is not None
        item = _item(segment, "completed" if is_whole else "incomplete")
        item = self._items[place] = {**item, "id": self._items[place]["id"]}
        where = {"item_id": item["id"], "output_index": place}
        name = {"name": segment.name} if segment.kind == "call" else {}
        events = [self._event(f"{kind}.done", **where, **more, **name, **{key: segment.text})]
        if segment.kind != "call":
            events.append(self._event("content_part.done", **where, content_index=0, part=item["content"][0]))
        return [*events, self._event("output_item.done", output_index=place, item=item)]

    def finish(self, usage: Usage) -> list[Event]:
        """The whole response."""
        status = self._status()
        return [self._event(status, response=self._response(status, usage))]

    def failed(self, error: APIError) -> list[Event]:
        """The error, and the response as far as it went."""
        response = {**self._response("failed"), "error": {"code": "server_error", "message": error.message}}
        return [self._event("failed", response=response)]

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The response."""
        self._items = [_item(segment, "completed") for segment in self._answer.segments]
        return self._response(self._status(), usage)

    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason == "length" else "completed"

    def _event(self, kind: str, **data: Any) -> Event:
        self._n_events += 1
        return f"response.{kind}", {"type": f"response.{kind}", "sequence_number": self._n_events - 1, **data}

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        values = self._values
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "error": None,
            "model": self._model,
            "output": self._items,
            "usage": None if usage is None else _usage(usage),
            "instructions": values.get("instructions"),
            "tools": [_tool(tool) for tool in values.get("tools", ())],
            "tool_choice": values.get("tool_choice", "auto"),
            "parallel_tool_calls": values.get("parallel_tool_calls", True),
            "text": {"format": {"type": "text"}, **values.get("text", {})},
            "reasoning": {"effort": None, "summary": None, **values.get("reasoning", {})},
            "metadata": values.get("metadata", {}),
            "max_output_tokens": values.get("max_output_tokens"),
            **{name: values.get(name, default) for name, default in _ECHOED.items()},
            "previous_response_id": None,
            "truncation": "disabled",
            "max_tool_calls": None,
            "store": False,
            "background": False,
            "service_tier": "default",
            "safety_identifier": None,
            "prompt_cache_key": None,
        }


#: fields that a response repeats, and what they are if a request doesn't say
_ECHOED = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_logprobs": 0}
#: of each kind of segment: its events, the key of its text when it is whole, and what else its events have
_DELTAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "content": ("output_text", "text", {"content_index": 0, "logprobs": []}),
    "reasoning": ("reasoning_text", "text", {"content_index": 0}),
    "call": ("function_call_arguments", "arguments", {}),
}


def _item(segment: Segment, status: str) -> dict[str, Any]:
    if segment.kind == "call":
        facts = {"call_id": f"call_{segment.id}", "name": segment.name, "arguments": segment.text}
        return {"id": new_id("fc_"), "type": "function_call", "status": status, **facts}
    if segment.kind == "reasoning":
        content = [{"type": "reasoning_text", "text": segment.text}]
        return {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": content, "status": status}
    content = [{"type": "output_text", "text": segment.text, "annotations": [], "logprobs": []}]  # type: ignore[dict-item]
    return {"id": new_id("msg_"), "type": "message", "status": status, "role": "assistant", "content": content}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        return dict(tool)
    return {"description": None, "parameters": None, "strict": None, **tool, "type": "function"}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.total,
    }
