"""OpenAI's API: against what `Model` gives in process, and by the package `openai`."""

import json

import openai
import pytest

import ggpy

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model(demo):
    with ggpy.load(demo, n_ctx=1024) as model:
        yield model


@pytest.fixture(scope="module")
def api(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def events(response):
    """The data of a stream, and whether it ended as it must."""
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_says_what_the_model_says(api, model):
    expected = model.chat(MESSAGES, max_tokens=12, temperature=0)
    got = api.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=12, temperature=0)
    assert got.choices[0].message.content == expected.answer
    assert got.usage.prompt_tokens == len(expected.prompt_ids)
    assert got.usage.completion_tokens == len(expected.ids)
    assert got.usage.prompt_tokens_details.cached_tokens < got.usage.prompt_tokens


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed_gives_the_same_text_streamed_or_not_and_in_company(api, model, seed):
    how = {"max_tokens": 10, "seed": seed, "temperature": 1.5}
    expected = [model.chat(MESSAGES, **{**how, "seed": seed + i}).answer for i in range(3)]
    whole = api.chat.completions.create(model="demo", messages=MESSAGES, n=3, **how)
    assert [choice.message.content for choice in whole.choices] == expected
    texts = ["", "", ""]
    for chunk in api.chat.completions.create(model="demo", messages=MESSAGES, n=3, stream=True, **how):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == expected


def test_a_stream_has_the_form_that_clients_want(client):
    body = {
        "messages": MESSAGES,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }
    chunks = events(client.post("/v1/chat/completions", json=body))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert not any("role" in choice["delta"] for chunk in chunks[1:] for choice in chunk["choices"])
    *_, last, usage = chunks
    assert last["choices"][0]["finish_reason"] == "length" and last["choices"][0]["delta"] == {}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    said = [t for chunk in chunks[:-1] for t in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(said) == 4 and all(len(token["top_logprobs"]) == 2 for token in said)


def test_completions_echo_with_the_log_probabilities_of_the_prompt(api, model):
    prompt = "The capital of France is the city"
    ids = model.tokenizer.encode_prompt(prompt)
    expected = model.generate(ids, echo=True, logprobs=1, max_tokens=2, temperature=0).run()
    got = api.completions.create(model="demo", prompt=prompt, echo=True, logprobs=1, max_tokens=2, temperature=0).choices[0]
    assert got.text == expected.text and got.text.startswith(prompt)
    assert got.logprobs.token_logprobs == [piece.logprob for piece in expected.pieces]
    assert got.logprobs.text_offset[0] == 0 and len(got.logprobs.tokens) == len(ids) + 2
    for token, offset in list(zip(got.logprobs.tokens, got.logprobs.text_offset, strict=True))[1:]:
        assert got.text[offset:].startswith(token)
    by_ids = api.completions.create(model="demo", prompt=[ids, ids], echo=True, logprobs=1, max_tokens=2, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [got.text] * 2
    assert by_ids.usage.prompt_tokens == 2 * len(ids)


def test_stop_texts_end_a_text_and_are_not_in_it(api, model):
    text = model.generate("Once upon a time", max_tokens=12, temperature=0).run().text
    stop = text[5:8]
    got = api.completions.create(model="demo", prompt="Once upon a time", stop=[stop], max_tokens=12, temperature=0)
    assert got.choices[0].text == text[: text.index(stop)] and got.choices[0].finish_reason == "stop"


def test_tokens_and_texts(client, model):
    text = "Grüße 🙂"
    ids = client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert ids == model.tokenizer.encode(text, bos=False)
    assert client.post("/detokenize", json={"tokens": ids}).json()["content"] == text
    pieces = client.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    prompt = client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
    assert prompt == model.chat_prompt(MESSAGES)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {key: schema}, "required": [key], "additionalProperties": False},
        },
    }
    for name, key, schema in (
        ("weather", "city", {"type": "string", "maxLength": 9}),
        ("add", "n", {"type": "integer", "minimum": 0, "maximum": 99}),
    )
]


def test_calls_that_are_required_come_and_keep_to_their_schemas(api):
    for choice, names in (("required", {"weather", "add"}), ({"type": "function", "function": {"name": "add"}}, {"add"})):
        for seed in range(2):
            how = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "max_tokens": 200, "temperature": 1}
            got = api.chat.completions.create(model="demo", messages=MESSAGES, parallel_tool_calls=False, **how)
            assert got.choices[0].finish_reason == "tool_calls" and got.choices[0].message.content is None
            (call,) = got.choices[0].message.tool_calls
            arguments = json.loads(call.function.arguments)
            assert call.function.name in names
            assert {"weather": lambda a: isinstance(a["city"], str), "add": lambda a: isinstance(a["n"], int)}[
                call.function.name
            ](arguments)


def test_a_streamed_call_has_its_name_and_id_once(client):
    body = {
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "stream": True,
        "temperature": 0,
        "max_tokens": 100,
    }
    chunks = events(client.post("/v1/chat/completions", json=body))
    deltas = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", [])]
    assert [delta["index"] for delta in deltas] == [0] * len(deltas)
    assert deltas[0]["function"] == {"name": "add", "arguments": ""} and deltas[0]["id"]
    assert not any("id" in delta or "name" in delta["function"] for delta in deltas[1:])
    assert isinstance(json.loads("".join(d["function"]["arguments"] for d in deltas))["n"], int)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_answer_keeps_to_a_schema(api):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    got = api.chat.completions.create(model="demo", messages=MESSAGES, response_format=form, max_tokens=100, seed=3)
    assert json.loads(got.choices[0].message.content)["n"] <= 99
