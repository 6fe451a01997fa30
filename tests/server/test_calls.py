"""Calls of tools, while they are generated, in each API's words."""

import json
from types import SimpleNamespace

import pytest

import ggpy
from ggpy.generate.piece import Piece
from ggpy.generate.replies import FAMILIES, ForcedCalls, ReplyParser
from ggpy.server.answers import Answer, usage_of
from ggpy.server.chat import ChatWriter
from ggpy.server.conversation import Conversation, Prompt, replies
from ggpy.server.messages import MessagesWriter
from ggpy.server.responses import ResponsesWriter

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {}}}}}
    for name in ("weather", "map")
]
ARGUMENTS = {"city": 'Köln "am" Rhein', "days": [1, 2.5, None]}


def events_of(text, kind, parser):
    """The events of an API for a text that comes letter by letter, and the whole answer."""
    facts = {"finish_reason": "stop", "stop_text": None, "prompt_ids": [1], "ids": [1], "n_reused": 0, "index": 0}
    times = {"prompt_seconds": 1.0, "decode_seconds": 1.0, "prompt_rate": 1.0, "decode_rate": 1.0}
    answer = Answer(SimpleNamespace(**facts, **times), parser)
    writers = {
        "chat": lambda: ChatWriter("m", [answer], None, False, False),
        "messages": lambda: MessagesWriter("m", answer),
        "responses": lambda: ResponsesWriter("m", answer, {}),
    }
    writer = writers[kind]()
    events = writer.start()
    for letter in text:
        events += writer.take(0, answer.take([Piece(letter, 1)], False))
    events += writer.take(0, answer.take([], True)) + writer.end(0) + writer.finish(usage_of([answer]))
    return [data for _, data in events]


def read(kind, events):
    """The calls of a stream, each its name and arguments in pieces, and why it ended."""
    calls, reason = [], None
    if kind == "chat":
        for choice in (choice for event in events for choice in event["choices"]):
            reason = choice["finish_reason"] or reason
            for delta in choice["delta"].get("tool_calls", ()):
                if "id" in delta:
                    assert delta["index"] == len(calls) and delta["type"] == "function"
                    calls.append((delta["function"]["name"], []))
                assert ("name" in delta["function"]) == ("id" in delta)
                calls[delta["index"]][1].append(delta["function"]["arguments"])
    if kind == "messages":
        for event in events:
            if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
                assert event["content_block"]["input"] == {}
                calls.append((event["content_block"]["name"], []))
            elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
                calls[-1][1].append(event["delta"]["partial_json"])
            elif event["type"] == "message_delta":
                reason = {"tool_use": "tool_calls", "end_turn": "stop"}[event["delta"]["stop_reason"]]
    if kind == "responses":
        items = events[-1]["response"]["output"]
        for event in events:
            if event["type"] == "response.output_item.added" and event["item"]["type"] == "function_call":
                assert event["item"]["arguments"] == "" and event["item"]["status"] == "in_progress"
                calls.append((event["item"]["name"], []))
            elif event["type"] == "response.function_call_arguments.delta":
                assert event["item_id"] == items[event["output_index"]]["id"]
                calls[-1][1].append(event["delta"])
            elif event["type"] == "response.function_call_arguments.done":
                assert event["arguments"] == "".join(calls[-1][1])
        statuses = [item["status"] for item in items if item["type"] == "function_call"]
        reason = "tool_calls" if "completed" in statuses else "stop"
    return calls, reason


@pytest.mark.parametrize("kind", ["chat", "messages", "responses"])
@pytest.mark.parametrize("forced", [False, True])
def test_arguments_come_while_they_are_generated(kind, forced):
    calls = [{"name": name, "arguments": ARGUMENTS} for name in ("weather", "map")]
    if forced:
        text, parser = json.dumps(calls), ForcedCalls(growing=True)
    else:
        text = "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
        parser = ReplyParser(FAMILIES["hermes"], TOOLS, growing=True)
    got, reason = read(kind, events_of(text, kind, parser))
    assert reason == "tool_calls"
    assert [(name, "".join(pieces)) for name, pieces in got] == [
        (call["name"], json.dumps(ARGUMENTS, ensure_ascii=False)) for call in calls
    ]
    assert all(len(pieces) > 20 for _, pieces in got)


@pytest.mark.parametrize("forced", [False, True])
def test_long_calls_are_looked_at_seldom(forced):
    words = {"text": "x" * 100_000}
    parser = ForcedCalls(growing=True) if forced else ReplyParser(FAMILIES["hermes"], TOOLS, growing=True)
    call = json.dumps({"name": "map", "arguments": words})
    text = f"[{call}]" if forced else f"<tool_call>{call}</tool_call>"
    events = [event for at in range(0, len(text), 4) for event in parser.push(text[at : at + 4])] + parser.flush()
    assert json.loads("".join(event.text for event in events)) == words
    assert len(events) < 2000


@pytest.mark.parametrize("kind", ["chat", "messages", "responses"])
def test_a_call_that_breaks_off_is_none(kind):
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Köln "am" Rhein"}}</tool_call>'
    events = events_of(text, kind, ReplyParser(FAMILIES["hermes"], TOOLS, growing=True))
    ((name, pieces),), reason = read(kind, events)
    assert (name, "".join(pieces), reason) == ("weather", '{"city": "Köln "', "stop")
    assert "Rhein" in json.dumps(events)


class Caller:
    """Chooses the tokens of a text, then the likeliest ones."""

    def __init__(self, tokens):
        self._tokens = tokens

    def sample(self, logits, ids):
        return self._tokens.pop(0) if self._tokens else int(logits.argmax())


def test_a_free_answer_that_begins_a_call_writes_one_of_the_tools(demo):
    size = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "resize", "parameters": size}}]
    with ggpy.load(demo, n_ctx=512) as model:
        prompt = Prompt(model, Conversation([{"role": "user", "content": "Make it larger."}], tools), False)
        sampler = Caller(model.tokenizer.encode_inside("Yes.\n<tool_call>"))
        (reply,) = replies(model, prompt, {"sampler": sampler, "max_tokens": 80}, 1)
        text = reply.run().text
    assert text.startswith("Yes.\n<tool_call>")
    call, _ = json.JSONDecoder().raw_decode(text.partition("<tool_call>")[2].strip())
    assert call["name"] == "resize" and set(call["arguments"]) == {"n"} and isinstance(call["arguments"]["n"], int)
