"""What clients do wrong is told them, in their API's words."""

import json
import re
import threading

import pytest

from ggpy.server.guard import Limits
from ggpy.server.models import Served

from .conftest import serving

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
USER = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hello"}, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            None,
        ),
        (CHAT, {**HELLO, "temperature": "hot"}, "temperature"),
        (CHAT, {**HELLO, "temperature": -1}, "temperature"),
        (CHAT, {**HELLO, "top_p": 2}, "top_p"),
        (CHAT, {**HELLO, "max_tokens": 1.5}, "max_tokens"),
        (CHAT, {**HELLO, "n": 0}, "n"),
        (CHAT, {**HELLO, "stop": ""}, None),
        (CHAT, {**HELLO, "stop": [1]}, "stop"),
        (CHAT, {**HELLO, "logit_bias": {"1": "x"}}, "logit_bias"),
        (CHAT, {**HELLO, "logit_bias": {"99999999": 1}}, None),
        (CHAT, {**HELLO, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {**HELLO, "response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, None),
        (CHAT, {**HELLO, "grammar": "root ::= ("}, None),
        (CHAT, {**HELLO, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {**HELLO, "tools": [{"type": "function", "function": {}}]}, "tools"),
        (CHAT, {**HELLO, "messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls"),
        (COMPLETION, {}, "prompt"),
        (COMPLETION, {"prompt": []}, "prompt"),
        (COMPLETION, {"prompt": [99999999]}, "prompt"),
        (COMPLETION, {"prompt": {"x": 1}}, "prompt"),
        (COMPLETION, {"prompt": "a \ud800 b"}, None),
        (COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix"),
        (CHAT, {**HELLO, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        (CHAT, {**HELLO, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        (COMPLETION, {"prompt": "a", "stop": 10**400}, "stop"),
        ("/v1/responses", {"model": "x", "input": [{"type": "reasoning", "content": 3}]}, "input[0]"),
        ("/v1/responses", {"model": "x", "input": [{"role": "user", "content": [[]]}]}, None),
        ("/tokenize", {}, "content"),
        ("/detokenize", {"tokens": [99999999]}, None),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(client, path, body, param):
    response = client.post(path, content=json.dumps(body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(client, body):
    assert client.post(CHAT, content=body).status_code == 400


def test_unknown_fields_are_ignored(client):
    body = {**HELLO, "store": True, "service_tier": "auto", "whatever": {"a": 1}, "user": None, "temperature": None}
    assert client.post(CHAT, json=body).status_code == 200


def test_whole_numbers_may_have_a_point(client):
    assert client.post("/detokenize", content='{"tokens": [65.0]}').status_code == 200
    assert client.post("/v1/embeddings", content='{"input": [[65.0]], "dimensions": 8.0}').status_code == 200
    body = '{"prompt": [65.0, 66], "max_tokens": 2.0, "top_k": 1e300, "seed": 1e300, "repeat_last_n": 1e300, "n": 1.0}'
    assert client.post(COMPLETION, content=body).status_code == 200


def test_halves_of_characters_may_be_anywhere(client):
    body = json.dumps({"prompt": "a", "n_predict": 1, "stop": "\ud800"})
    assert client.post("/completion", content=body).json()["generation_settings"]["stop"] == "\ud800"
    assert client.post("/v1/chat/completions", content='{"model": "\\udfff", "messages": 3}').status_code == 400


def test_a_prompt_that_is_too_long_says_by_how_much(client):
    messages = [{"role": "user", "content": "word " * 3000}]
    error = client.post(CHAT, json={"messages": messages}).json()["error"]
    assert error["type"] == "exceed_context_size_error" and error["n_prompt_tokens"] > error["n_ctx"] == 1024
    assert client.post(COMPLETION, json={"prompt": "word " * 3000}).json()["error"]["code"] == "context_length_exceeded"
    # Claude Code and LiteLLM know it by these words.
    message = client.post("/v1/messages", json={**HELLO, "messages": messages}).json()["error"]["message"]
    assert re.search(r"prompt is too long: \d+ tokens > 1024", message)


def test_places_and_methods_that_are_none(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get(CHAT).status_code == 405 and "error" in client.get(CHAT).json()


def test_only_own_names_and_own_pages_are_served(client):
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "192.168.1.2", "a.localhost"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080"):
        assert client.get("/health", headers={"Host": host}).status_code == 403
    assert client.post(CHAT, json=HELLO, headers={"Origin": "http://evil.example"}).status_code == 403
    own = str(client.base_url).rstrip("/")
    response = client.post(CHAT, json=HELLO, headers={"Origin": own})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_key_is_wanted_if_there_is_one(demo):
    limits = Limits(api_key="sécret", body=1000, max_queue=0, hosts=["me.example"])
    with serving([Served("demo", demo, {"n_ctx": 256})], limits) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": ""}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
        key = "sécret".encode()
        assert client.get("/v1/models", headers={"Authorization": b"Bearer " + key}).status_code == 200
        assert client.get("/v1/models", headers={"X-Api-Key": key, "Host": "me.example"}).status_code == 200
        long = client.post(CHAT, content=b" " * 2000, headers={"X-Api-Key": key})
        assert long.status_code == 413

        def chunks():
            yield from [b" " * 600] * 3

        assert client.post(CHAT, content=chunks(), headers={"X-Api-Key": key}).status_code == 413


def test_too_many_at_once_are_told_when_to_come_back(demo):
    with serving([Served("demo", demo, {"n_ctx": 512, "n_batch": 2})], Limits(max_queue=1)) as client:
        answers = []

        def ask():
            answers.append(client.post(COMPLETION, json={"prompt": "Once", "max_tokens": 40, "ignore_eos": True}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [a for a in answers if a.status_code == 429]
        assert 0 < len(refused) < 8 and all(int(a.headers["retry-after"]) > 0 for a in refused)
        assert {a.status_code for a in answers} == {200, 429}


def test_a_client_that_leaves_ends_its_answer(demo):
    served = Served("demo", demo, {"n_ctx": 1024})
    with serving([served]) as client:
        body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETION, json=body) as response:
            lines = response.iter_lines()  # which closes the response when it is forgotten
            next(lines)
            (stream,) = served.engine._streams
        generation = stream.generations[0]
        for _ in range(200):
            if generation.finish_reason is not None:
                break
            threading.Event().wait(0.01)
        assert generation.finish_reason == "cancelled" and len(generation.ids) < 900
        assert served.n_answers == 0


def test_models_are_loaded_when_they_are_asked_for_and_make_room(demo):
    served = [Served(name, demo, {"n_ctx": 256}) for name in ("a", "b")]
    with serving(served, memory=1) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["a", "b"]
        for name in ("b", "a", "b"):
            response = client.post(CHAT, json={**HELLO, "model": name})
            assert response.json()["model"] == name
            assert [one.is_loaded for one in served] == [name == "a", name == "b"]
        error = client.post(CHAT, json={**HELLO, "model": "c"})
        assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
