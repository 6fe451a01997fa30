"""OpenAI's responses, by the package `openai`."""

import openai
import pytest

import ggpy

TOOL = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def api(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def test_a_response_says_what_the_model_says_whole_and_streamed(api, demo):
    with ggpy.load(demo, n_ctx=1024) as model:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        expected = model.chat(messages, max_tokens=6, temperature=0)
    how = {"model": "demo", "instructions": "Be brief.", "input": "Hello", "max_output_tokens": 6, "temperature": 0}
    got = api.responses.create(**how)
    assert got.output_text == expected.answer
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (got.usage.input_tokens, got.usage.output_tokens) == (len(expected.prompt_ids), 6)
    events = list(api.responses.create(stream=True, **how))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected.answer
    assert events[-1].response.output_text == expected.answer
    assert {e.item_id for e in events if hasattr(e, "item_id")} == {events[-1].response.output[0].id}


def test_a_tool_is_called_and_its_result_goes_back(api):
    how = {"model": "demo", "max_output_tokens": 80, "temperature": 0}
    tools = [TOOL, {"type": "web_search"}, {"type": "local_shell"}]
    events = list(
        api.responses.create(
            input="Hello", tools=tools, tool_choice="required", stream=True, parallel_tool_calls=False, **how
        )
    )
    response = events[-1].response
    (call,) = response.output
    assert response.status == "completed" and call.type == "function_call" and call.name == "add"
    assert "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta") == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    said = [{"role": "user", "content": "Hello"}, call.model_dump(), output]
    assert api.responses.create(input=said, **how).output[0].type == "message"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "Hello"}, "model"),
        ({"model": "demo"}, "input"),
        ({"model": "demo", "input": []}, "input"),
        ({"model": "demo", "input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"model": "demo", "input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"model": "demo", "input": "x", "text": {"format": {"type": "x"}}}, "text.format"),
        ({"model": "demo", "input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
    ],
)
def test_mistakes_are_named(client, body, param):
    response = client.post("/v1/responses", json=body)
    assert response.status_code == 400
    assert param is None or response.json()["error"]["param"] == param
