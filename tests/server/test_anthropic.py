"""Anthropic's API, by the package `anthropic`."""

import anthropic
import pytest

import ggpy

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "name": "add",
    "input_schema": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def api(client):
    return anthropic.Anthropic(base_url=str(client.base_url), api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(demo):
    with ggpy.load(demo, n_ctx=1024) as model:
        yield model


def test_a_message_says_what_the_model_says_whole_and_streamed(api, model):
    expected = model.chat([{"role": "system", "content": "Be brief."}, *HELLO], max_tokens=6, temperature=0)
    how = {"model": "demo", "system": "Be brief.", "messages": HELLO, "max_tokens": 6, "extra_body": {"temperature": 0}}
    got = api.messages.create(**how)
    assert [block.text for block in got.content] == [expected.answer] and got.stop_reason == "max_tokens"
    n = got.usage.input_tokens + got.usage.cache_read_input_tokens
    assert (n, got.usage.output_tokens) == (len(expected.prompt_ids), 6)
    assert api.messages.count_tokens(model="demo", system="Be brief.", messages=HELLO).input_tokens == n
    with api.messages.stream(**how) as stream:
        assert "".join(stream.text_stream) == expected.answer
        assert stream.get_final_message().stop_reason == "max_tokens"


def test_blocks_of_a_stream_are_opened_and_closed_in_order(client):
    body = {"messages": HELLO, "max_tokens": 60, "stream": True, "tools": [TOOL], "tool_choice": {"type": "any"}}
    text = client.post("/v1/messages?beta=true", json=body).text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
    assert names[2] == "content_block_start" and names[-3] == "content_block_stop"
    assert len(names) > 7 and set(names[3:-3]) == {"content_block_delta"}


def test_a_tool_is_called_and_its_result_goes_back(api):
    how = {"model": "demo", "max_tokens": 80, "tools": [TOOL], "extra_body": {"temperature": 0}}
    with api.messages.stream(messages=HELLO, tool_choice={"type": "tool", "name": "add"}, **how) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert message.stop_reason == "tool_use" and call.name == "add" and call.input["n"] <= 99
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "7"}]}
    said = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert api.messages.create(messages=said, tool_choice={"type": "none"}, **how).content[0].type == "text"


def test_billing_headers_of_a_system_prompt_are_no_part_of_it(client):
    def prompt_tokens(*blocks):
        body = {"messages": HELLO, "system": [{"type": "text", "text": block} for block in blocks]}
        return client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]

    assert prompt_tokens("x-anthropic-billing-header: cc_version=2; cch=abcde", "Be brief.") == prompt_tokens("Be brief.")


def test_stop_sequences_are_named(api, model):
    text = model.chat(HELLO, max_tokens=12, temperature=0).answer
    how = {"model": "demo", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
    got = api.messages.create(stop_sequences=["no such text", text[4:7]], **how)
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", text[4:7])
    assert "".join(block.text for block in got.content) == text[: text.index(text[4:7])]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": HELLO},
        {"messages": HELLO, "max_tokens": "1"},
        {"messages": [{"role": "tool", "content": "x"}], "max_tokens": 1},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}], "max_tokens": 1},
        {"messages": [{"role": "user", "content": [1]}], "max_tokens": 1},
        {"messages": HELLO, "max_tokens": 1, "tool_choice": {"type": "tool", "name": "x"}},
        {"messages": HELLO, "max_tokens": 1, "tool_choice": {"type": []}},
        {"messages": HELLO, "max_tokens": 1, "tools": [{"input_schema": {}}]},
    ],
)
def test_mistakes_have_the_form_that_clients_read(client, body):
    response = client.post("/v1/messages", json=body)
    assert response.status_code == 400
    assert response.json()["type"] == "error" and response.json()["error"]["type"] == "invalid_request_error"
