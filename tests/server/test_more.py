"""Vectors, gaps, experts, numbers, and the page."""

import base64
import json
import re
from datetime import date, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import openai
import pytest

import ggpy
from ggpy.cli.serve import _template_kwargs
from ggpy.errors import Error
from ggpy.generate.chat import ChatTemplate
from ggpy.server.chat import conversation_of
from ggpy.server.completions import gap_ids
from ggpy.server.conversation import Prompt
from ggpy.server.endpoints import Server
from ggpy.server.guard import Limits
from ggpy.server.models import Models, Served

from .conftest import serving

BODY = {"prompt": "Once upon", "n_predict": 8, "temperature": 0}
TEXTS = ["The cat sat on the mat.", "Stars", "Grüße"]


def test_embeddings_are_those_of_the_model_also_as_openais_client_asks_for_them(client, demo):
    with ggpy.load(demo, n_ctx=1024) as model:
        expected = model.embed(TEXTS)
        ids = [model.tokenize(text) for text in TEXTS]
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")  # asks for base64
    got = api.embeddings.create(model="demo", input=TEXTS)
    np.testing.assert_array_equal(np.array([d.embedding for d in got.data], np.float32), expected)
    assert got.usage.prompt_tokens == sum(map(len, ids))
    plain = client.post("/v1/embeddings", json={"input": ids}).json()["data"]
    np.testing.assert_allclose([d["embedding"] for d in plain], expected, rtol=1e-6)
    coded = client.post("/v1/embeddings", json={"input": TEXTS[1], "encoding_format": "base64", "dimensions": 8}).json()
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, expected[1, :8] / np.linalg.norm(expected[1, :8]), rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {}),
        ("/v1/embeddings", {"input": "x", "dimensions": 99999}),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}),
        ("/v1/embeddings", {"input": "word " * 3000}),
        ("/v1/rerank", {"query": "x"}),
        ("/v1/rerank", {"query": "x", "documents": ["a model that isn't made for this"]}),
        ("/infill", {"input_prefix": "x"}),
        ("/infill", {"input_prefix": "x", "input_suffix": "y"}),
        ("/completion", {}),
        ("/completion", {"prompt": {"prompt_string": "x", "multimodal_data": ["aGk="]}}),
        ("/completion", {"prompt": [{}]}),
        ("/v1/embeddings", {"input": {"content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}}),
    ],
)
def test_mistakes_are_refused(client, path, body):
    assert client.post(path, json=body).status_code == 400


@pytest.mark.parametrize("extra", [{}, {"filename": "a.py"}, {"filename": 1, "text": "x"}, {"text": 1}])
def test_files_beside_a_gap_are_texts(client, extra):
    refused = client.post("/infill", json={"input_prefix": "x", "input_suffix": "y", "input_extra": [extra]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "input_extra"


def test_a_gap_stands_between_the_tokens_that_the_file_names(demo):
    marks = dict(zip(("fim_pre", "fim_suf", "fim_mid"), (300, 301, 302), strict=True))
    with ggpy.load(demo) as model:
        file = SimpleNamespace(get=lambda key, *_, **__: marks[key.split(".")[2].removesuffix("_token_id")])
        ids = gap_ids(SimpleNamespace(file=file, tokenizer=model.tokenizer), "def f(", "return 1", "a.py\n")
        inside = model.tokenizer.encode_inside
        start = [model.tokenizer.bos] if model.tokenizer.add_bos else []
        assert ids == [*start, *inside("a.py\n"), 300, *inside("def f("), 301, *inside("return 1"), 302]


def test_llama_cpps_completion(client, demo):
    with ggpy.load(demo, n_ctx=1024) as model:
        expected = model.generate("Once upon", max_tokens=8, temperature=0).run()
        ends = model.tokenizer.end_tokens
    got = client.post("/completion", json={**BODY, "return_tokens": True}).json()
    assert (got["content"], got["tokens"]) == (expected.text, expected.ids)
    assert (got["stop_type"], got["tokens_predicted"], got["timings"]["predicted_n"]) == ("limit", 8, 8)
    assert got["generation_settings"]["n_predict"] == 8
    assert got["generation_settings"]["logit_bias"] == []
    settings = client.post("/completion", json={**BODY, "ignore_eos": True}).json()["generation_settings"]
    assert {(bias["token"], bias["bias"]) for bias in settings["logit_bias"]} == {(i, None) for i in ends}
    assert got["has_new_line"] == ("\n" in expected.text)


def test_llama_cpps_completion_says_that_the_context_was_full(client):
    body = {"prompt": [65] * 1022, "ignore_eos": True, "n_predict": 2, "return_tokens": True}
    whole = client.post("/completion", json=body).json()
    cut = client.post("/completion", json={**body, "n_predict": -1}).json()
    assert (whole["stop_type"], whole["truncated"], len(whole["tokens"])) == ("limit", False, 2)
    assert (cut["stop_type"], cut["truncated"], len(cut["tokens"])) == ("limit", True, 3)


def test_llama_cpps_completion_of_several_prompts_is_a_list(client):
    one = client.post("/completions", json=BODY).json()
    ids = client.post("/tokenize", json={"content": "Once upon", "add_special": True}).json()["tokens"]
    many = client.post("/completion", json={**BODY, "prompt": [ids, "Once upon", {"prompt_string": "Once upon"}]}).json()
    assert [(answer["index"], answer["content"]) for answer in many] == [(i, one["content"]) for i in range(3)]
    assert one["tokens"] == []


def test_prompts_may_be_tokens_with_texts_among_them_or_objects(client):
    def prompt(given):
        return client.post("/completion", json={**BODY, "prompt": given}).json()["prompt"]

    ids = client.post("/tokenize", json={"content": "Once upon"}).json()["tokens"]
    assert prompt([*ids, " a time", *ids]) == "Once upon a timeOnce upon"
    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]
    got = client.post("/v1/embeddings", json={"input": ["Once upon", {"content": parts}, [*ids, "!"]]}).json()["data"]
    assert got[0]["embedding"] == got[1]["embedding"] != got[2]["embedding"]


def test_a_prompt_without_the_beginning_of_an_answer(demo):
    messages = [{"role": "user", "content": "Hello"}]
    ending = [*messages, {"role": "assistant", "content": "Well"}]
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    with ggpy.load(demo) as model:
        model.chat_template = ChatTemplate(template)

        def text(**values):
            return Prompt(model, conversation_of(values), False).text

        assert text(messages=messages) == "[user]Hello[bot]"
        assert text(messages=messages, add_generation_prompt=False) == "[user]Hello"
        assert text(messages=ending, add_generation_prompt=False) == "[user]Hello[bot]Well"


def test_the_servers_template_kwargs_and_todays_date_are_for_requests_that_have_none(demo):
    messages = [{"role": "user", "content": "Hello"}]
    with ggpy.load(demo) as model:
        model.chat_template = ChatTemplate("{{ enable_thinking }} {{ effort }}")
        server = Server(Models([], 0), Limits(), {}, {"enable_thinking": False, "effort": "low"})

        def text(**values):
            return server.prompt(SimpleNamespace(model=model), conversation_of({"messages": messages, **values})).text

        assert text() == "False low"
        assert text(chat_template_kwargs={"enable_thinking": True}) == "True low"
        model.chat_template = ChatTemplate("{{ date_string or '26 Jul 2024' }}")
        assert datetime.strptime(text(), "%d %b %Y").date() in (date.today(), date.today() - timedelta(1))
        assert text(chat_template_kwargs={"date_string": "1 Jan 1970"}) == "1 Jan 1970"


@pytest.mark.parametrize("given", ["[]", "{", "1"])
def test_template_kwargs_that_are_no_object_are_refused(given):
    with pytest.raises(Error, match="JSON object"):
        _template_kwargs(given)


@pytest.mark.parametrize("stream", [False, True])
def test_llama_cpps_completion_has_probabilities(client, demo, stream):
    with ggpy.load(demo, n_ctx=1024) as model:
        expected = list(model.generate("Once upon", max_tokens=8, temperature=0, logprobs=3))
    got = client.post("/completion", json={**BODY, "n_probs": 3, "stream": stream})
    if stream:
        chunks = [json.loads(line[6:]) for line in got.text.split("\n") if line.startswith("data: ")]
        assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        said = [one for chunk in chunks[:-1] for one in chunk["completion_probabilities"]]
    else:
        said = got.json()["completion_probabilities"]
    assert [one["id"] for one in said] == [piece.token for piece in expected]
    for one, piece in zip(said, expected, strict=True):
        assert one["logprob"] == pytest.approx(piece.logprob)
        assert {top["id"]: top["logprob"] for top in one["top_logprobs"]} == pytest.approx(piece.top_logprobs)


def test_llama_cpps_facts(client):
    props, slots = client.get("/props").json(), client.get("/slots").json()
    assert props["model_path"].endswith(".gguf") and "messages" in props["chat_template"]
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert len(slots) == props["total_slots"]
    assert not any(slot["is_processing"] for slot in slots)


def test_tokens_of_a_conversation_are_counted_as_its_answer_counts_them(client):
    body = {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 1}
    counted = client.post("/v1/chat/completions/input_tokens", json=body).json()
    answer = client.post("/chat/completions", json=body).json()
    assert counted["input_tokens"] == answer["usage"]["prompt_tokens"]
    timings = answer["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == counted["input_tokens"]
    body = {"model": "demo", "input": "How many?"}
    assert client.post("/v1/responses/input_tokens", json=body).json()["input_tokens"] == counted["input_tokens"]


def test_experts_at_work_are_counted_for_all_that_is_computed_after_the_first_look(client, demo):
    before = client.get("/experts").json()
    client.post("/v1/completions", json={"prompt": "Look at these experts", "max_tokens": 5, "ignore_eos": True})
    after = client.get("/experts?model=demo").json()
    with ggpy.load(demo) as model:
        n_prompt = len(model.tokenizer.encode_prompt("Look at these experts"))
        assert client.get("/v1/models").json()["data"][0]["meta"]["n_expert"] == model.n_expert == len(after["counts"][0])
    new = np.array(after["counts"]) - np.array(before["counts"])
    assert new.shape[0] == len(after["layers"])
    # The last token isn't evaluated.
    assert (new.sum(1) == (n_prompt + 4) * after["n_expert_used"]).all()


def test_prometheus_is_told_what_was_done(client):
    def value(name):
        return float(re.search(rf"^{name} (\S+)$", client.get("/metrics").text, re.M)[1])

    before = value("ggpy_completion_tokens_total")
    client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 5, "ignore_eos": True})
    assert value("ggpy_completion_tokens_total") == before + 5
    assert value(r'ggpy_requests_total\{path="/v1/completions",status="200"\}') >= 1
    before = value("ggpy_prompt_tokens_total")
    used = client.post("/v1/embeddings", json={"input": ["Once", "upon a time"]}).json()["usage"]["prompt_tokens"]
    assert value("ggpy_prompt_tokens_total") == before + used > before
    before = [value(f"llamacpp:{name}_total") for name in ("prompt_tokens", "prompt_tokens_cached", "tokens_predicted")]
    timings = [client.post("/completion", json=BODY).json()["timings"] for _ in range(2)]
    after = [value(f"llamacpp:{name}_total") for name in ("prompt_tokens", "prompt_tokens_cached", "tokens_predicted")]
    sums = [sum(t[name] for t in timings) for name in ("prompt_n", "cache_n", "predicted_n")]
    assert np.subtract(after, before).tolist() == sums and sums[1] > 0
    client.get("/no/such/path")
    assert value(r'ggpy_requests_total\{path="other",status="404"\}') >= 1


def test_the_page_takes_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "frame-ancestors 'none'" in str(page.headers)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page.text)


def test_the_description_has_the_fields_that_are_checked(client):
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["top_logprobs"] == {"type": "integer", "minimum": 0, "maximum": 20}
    assert set(paths) >= {"/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank", "/metrics"}


def chunks_of(response):
    return [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]


def test_biases_may_be_of_texts(client):
    first = client.post("/completion", json={**BODY, "return_tokens": True}).json()
    word = first["content"].split()[0]
    for bias in ([[f" {word}", False]], {f" {word}": -100}):
        assert word not in client.post("/completion", json={**BODY, "logit_bias": bias}).json()["content"].split()


def test_some_fields_of_an_answer(client):
    whole = client.post("/completion", json=BODY).json()
    body = {**BODY, "response_fields": ["content", "generation_settings/n_predict", "prompt", "no/such"]}
    expected = {"content": whole["content"], "generation_settings/n_predict": 8, "prompt": whole["prompt"]}
    assert client.post("/completion", json=body).json() == expected
    assert chunks_of(client.post("/completion", json={**body, "stream": True}))[-1] == {**expected, "content": ""}


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_that_a_token_was_drawn_with(client, stream):
    body = {**BODY, "temperature": 1, "top_k": 5, "seed": 3}
    plain = client.post("/completion", json=body).json()
    got = client.post("/completion", json={**body, "n_probs": 10, "post_sampling_probs": True, "stream": stream})
    answers = chunks_of(got)[:-1] if stream else [got.json()]
    assert "".join(answer["content"] for answer in answers) == plain["content"]
    drawn = [one for answer in answers for one in answer["completion_probabilities"]]
    assert len(drawn) == 8
    for one in drawn:
        assert 0 < len(one["top_probs"]) <= 5 and sum(top["prob"] for top in one["top_probs"]) == pytest.approx(1)
        assert one["prob"] == {top["id"]: top["prob"] for top in one["top_probs"]}[one["id"]]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/completion"])
def test_how_far_a_prompt_is_evaluated(demo, path):
    text = "Once upon a time " * 60
    prompt = {"messages": [{"role": "user", "content": text}], "input": text, "prompt": text, "model": "demo"}
    how = {"max_tokens": 2, "stream": True, "return_progress": True, "timings_per_token": True}
    with serving([Served("demo", demo, {"n_ctx": 1024, "n_batch": 64})]) as client:
        for is_known in (False, True):
            chunks = chunks_of(client.post(path, json={**prompt, **how}))
            told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
            assert [chunk["timings"]["prompt_n"] for chunk in chunks if "prompt_progress" in chunk] == [
                one["processed"] - one["cache"] for one in told
            ]
            total, cached = told[0]["total"], told[0]["cache"]
            assert (cached > 0) == is_known and total > 240
            processed = [one["processed"] for one in told]
            assert processed[0] == cached and processed == sorted(set(processed)) and processed[-1] == total
            assert is_known or len(told) >= total // 64
            assert all((one["total"], one["cache"]) == (total, cached) for one in told)
            assert any("timings" in chunk and "prompt_progress" not in chunk for chunk in chunks)
