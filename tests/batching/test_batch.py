"""Batches: each row once, whatever happens, with the text that it has alone."""

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggpy
from ggpy.batching.output import Output
from ggpy.batching.rows import Row
from ggpy.batching.tasks import Settings, task_of
from ggpy.cli import main
from ggpy.hub import model_file


@pytest.fixture(scope="module")
def model():
    with ggpy.load("demo", n_ctx=256, n_threads=2) as model:
        yield model


def written(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_id(path):
    found = {result["id"]: result for result in read(path)}
    assert len(found) == len(read(path))
    return found


ROWS = [{"id": i, "prompt": f"And the king said {i}", "options": {"max_tokens": 1 + i * 7 % 30}} for i in range(40)]


# Answers


def test_each_row_has_the_text_that_it_has_alone(model, tmp_path):
    summary = ggpy.batch(model, ROWS, tmp_path / "out.jsonl", temperature=0.9)
    found = by_id(tmp_path / "out.jsonl")
    assert summary.n_rows == summary.n_new == len(found) == 40 and summary.n_errors == 0
    assert summary.completion_tokens == sum(r["completion_tokens"] for r in found.values()) > 0
    for row in ROWS[::9]:
        ggpy.batch(model, [row], tmp_path / f"{row['id']}.jsonl", temperature=0.9)
        assert read(tmp_path / f"{row['id']}.jsonl") == [found[row["id"]]]
    greedy = ggpy.batch(model, ROWS, tmp_path / "greedy.jsonl", temperature=0)
    assert greedy.n_errors == 0
    for row in ROWS[::9]:
        alone = model.generate(row["prompt"], temperature=0, **row["options"]).run()
        assert by_id(tmp_path / "greedy.jsonl")[row["id"]]["text"] == alone.text


def test_seeds_come_from_ids(model, tmp_path):
    rows = [{"id": i, "prompt": "And the king said"} for i in ("a", "b", 1)]
    for name, how in {"first": {}, "again": {}, "other": {"seed": 1}}.items():
        ggpy.batch(model, rows[:: -1 if name == "again" else 1], tmp_path / name, max_tokens=16, temperature=1.5, **how)
    first, again, other = ({i: r["text"] for i, r in by_id(tmp_path / n).items()} for n in ("first", "again", "other"))
    assert first == again and len({*first.values(), *other.values()}) == 6
    own = [{**row, "options": {"seed": 7}} for row in rows]
    ggpy.batch(model, own, tmp_path / "own", max_tokens=16, temperature=1.5)
    assert len({r["text"] for r in read(tmp_path / "own")}) == 1


def test_all_kinds_of_rows(model, tmp_path):
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    rows = [
        {"id": "ids", "prompt": model.tokenize("In the beginning"), "options": {"max_tokens": 4, "temperature": 0}},
        {"id": "text", "prompt": "In the beginning", "options": {"max_tokens": 4, "temperature": 0, "logprobs": 2}},
        {"id": "chat", "messages": [{"role": "user", "content": "Hello"}], "options": {"max_tokens": 4}},
        {"id": "json", "prompt": "A number:", "options": {"json_schema": schema}},
        {"id": "label", "prompt": "In the", "labels": [" beginning", " zebra"]},
        {"id": "chat label", "messages": json.dumps([{"role": "user", "content": "Hello"}]), "labels": '["a", "b"]'},
        {"id": "bias", "prompt": "In the", "options": {"logit_bias": {"5": 100}, "max_tokens": 1}},
    ]
    assert ggpy.batch(model, rows, tmp_path / "out").n_errors == 0
    found = by_id(tmp_path / "out")
    assert found["ids"]["text"] == found["text"]["text"]
    pieces = model.generate("In the beginning", max_tokens=4, temperature=0, logprobs=2).run().pieces
    assert [p["logprob"] for p in found["text"]["logprobs"]] == [p.logprob for p in pieces]
    assert [[t["token"] for t in p["top"]] for p in found["text"]["logprobs"]] == [[*p.top_logprobs] for p in pieces]
    assert found["json"]["finish_reason"] == "stop" and 0 <= json.loads(found["json"]["text"])["n"] <= 99
    scores = model.score("In the", [" beginning", " zebra"])
    assert found["label"]["label"] == " beginning"
    assert [s["logprob"] for s in found["label"]["scores"]] == [s.logprob for s in scores]
    assert found["chat label"]["label"] in "ab"
    assert found["bias"]["text"] == model.detokenize([5])


def test_embeddings(model, tmp_path):
    rows = [{"prompt": f"And the king said {i}"} for i in range(70)] + [{"prompt": "long " * 300}]
    summary = ggpy.batch(model, rows, tmp_path / "out", embed=True)
    found = by_id(tmp_path / "out")
    assert summary.n_errors == 1 and "256" in found["row 71"]["error"]
    vectors = model.embed([row["prompt"] for row in rows[:70]])
    assert np.array_equal(np.array([found[f"row {i + 1}"]["embedding"] for i in range(70)], np.float32), vectors)


def test_bad_rows_have_errors_and_stop_nobody(model, tmp_path):
    bad = {
        "no json": "no JSON",
        '"text"': "object with columns",
        "[1]": "object with columns",
        '{"id": 1.5, "prompt": "x"}': "an id is",
        '{"id": 1}': "a prompt or messages",
        '{"id": 2, "prompt": "x", "messages": []}': "not both",
        '{"id": 3, "prompt": "x", "max_tokens": 3}': "belongs into its options",
        '{"id": 4, "prompt": "x", "options": {"max_token": 3}}': "no option 'max_token'",
        '{"id": 5, "prompt": "x", "options": {"temperature": -1}}': "temperature must be",
        '{"id": 6, "prompt": "x", "options": {"stop": 1}}': "stop is",
        '{"id": 7, "prompt": "x", "options": {"regex": "("}}': "regex",
        '{"id": 8, "prompt": "x", "options": {"sampler": 1}}': "no option 'sampler'",
        '{"id": 9, "prompt": "x", "options": {"tools": []}}': "goes with messages",
        '{"id": 10, "prompt": [999999]}': "vocabulary",
        '{"id": 11, "prompt": 5}': "a prompt is",
        '{"id": 12, "messages": [5]}': "messages are",
        '{"id": 13, "messages": [{"content": "x"}]}': "role",
        '{"id": 14, "prompt": "x", "labels": []}': "labels are",
        '{"id": 15, "prompt": "x", "labels": ["a", "a"]}': "twice",
        '{"id": 16, "prompt": "x", "labels": ["a"], "options": {"seed": 1}}': "no effect",
        json.dumps({"id": 17, "prompt": "word " * 300}): "the context holds",
        '{"id": 18, "prompt": "x", "options": {"json_schema": {"type": "nothing"}}}': "json_schema",
        '{"id": 19, "prompt": "x", "options": "{"}': "isn't JSON",
        '{"id": 20, "prompt": "x", "options": {"json_schema": true, "regex": "a"}}': "one of",
        '{"id": 21, "prompt": "x", "options": {"logit_bias": {"a": 1}}}': "logit_bias",
        '{"id": 22, "prompt": []}': "empty",
        '{"id": 23, "prompt": "x", "prompt": "y"}': '"prompt" stands there twice',
        '{"id": 24, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "type 'image_url'",
        '{"id": 25, "messages": [{"role": "user", "content": {"text": "x"}}]}': "a content is a text",
        '{"id": 26, "messages": [{"role": "user"}]}': "has no content",
        "[" * 100_000: "no JSON",
    }
    rows = written(tmp_path / "in.jsonl", [*bad, *ROWS[27:]])
    summary = ggpy.batch(model, rows, tmp_path / "out", temperature=0, ordered=True)
    found = read(tmp_path / "out")
    assert summary.n_errors == len(bad) and summary.n_new == len(bad) + 13
    assert all(row.get("text") for row in found[len(bad) :])
    for result, words in zip(found, bad.values(), strict=False):
        assert words in result["error"] and "\n" not in result["error"], result
    assert ggpy.batch(model, rows, tmp_path / "out", temperature=0, ordered=True).n_new == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=4),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=5,
)
OPTION = st.sampled_from([*ggpy.ChatOptions.__annotations__, "other"])


@settings(max_examples=150, deadline=None)
@given(
    columns=st.dictionaries(st.sampled_from(["id", "prompt", "messages", "labels"]), JSON),
    own=st.dictionaries(OPTION, JSON, max_size=2),
)
def test_no_row_of_json_raises(model, columns, own):
    from ggpy.batching.answers import answers

    row = {"prompt": "x", **columns, "options": {**own, "max_tokens": 1}}
    for settings_ in (Settings(), Settings(embed=True), Settings(labels=("a",))):
        task = task_of(Row(1, row), settings_, "")
        ((_, answer),) = [pair for pairs in answers(model, [task]) for pair in pairs]
        json.dumps(answer)


# OpenAI's form


def request(id, url, **body):
    return {"custom_id": id, "method": "POST", "url": url, "body": {"model": "demo", **body}}


def test_openai_lines(model, tmp_path):
    chat = [{"role": "user", "content": "Hello"}]
    rows = [
        request("a", "/v1/completions", prompt="In the", max_tokens=3, temperature=0, logprobs=1),
        request("b", "/v1/chat/completions", messages=chat, max_completion_tokens=3, temperature=0, logprobs=True),
        request("c", "/v1/embeddings", input=["In the", "beginning"]),
        request("d", "/v1/embeddings", input="In the", encoding_format="base64"),
        request("e", "/v1/chat/completions", messages=chat, response_format={"type": "json_object"}, max_tokens=60),
        request("f", "/v1/completions", prompt="In the", n=2),
        request("g", "/v1/completions", prompt="In the", temperature=-1),
        request("h", "/v1/completions", prompt="In the", strange=1),
        request("i", "/v1/images", prompt="In the"),
        "no json",
        request("k", "/v1/responses", input="Hello", instructions="Be brief.", max_output_tokens=3, temperature=0),
        request("l", "/v1/responses", input=chat, max_output_tokens=60, text={"format": {"type": "json_object"}}),
        request("m", "/v1/responses", input=[{"type": "item_reference", "id": "x"}]),
        request("n", "/v1/responses", input="Hello", previous_response_id="resp_1"),
        request("o", "/v1/responses", input="Hello", tools=[{"type": "web_search"}]),
        request("p", "/v1/chat/completions", messages=[{"role": "developer", "content": "Be brief."}, *chat], max_tokens=3),
    ]
    written(tmp_path / "in.jsonl", rows)
    summary = ggpy.batch(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}
    assert len(found) == 16 and summary.n_errors == 8
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in found.values())
    body = {id: line["response"]["body"] for id, line in found.items() if line["response"]}
    done = model.generate("In the", max_tokens=3, temperature=0, logprobs=1).run()
    assert body["a"]["choices"][0]["text"] == done.text and body["a"]["usage"]["completion_tokens"] == 3
    assert body["a"]["choices"][0]["logprobs"]["token_logprobs"] == [p.logprob for p in done.pieces]
    reply = model.chat(chat, max_tokens=3, temperature=0)
    assert body["b"]["choices"][0]["message"] == {"role": "assistant", "content": reply.answer}
    assert len(body["b"]["choices"][0]["logprobs"]["content"]) == 3
    vectors = model.embed(["In the", "beginning"])
    assert np.array_equal(np.array([d["embedding"] for d in body["c"]["data"]], np.float32), vectors)
    import base64

    assert base64.b64decode(body["d"]["data"][0]["embedding"]) == vectors[0].tobytes()
    assert body["e"]["choices"][0]["message"]["content"].startswith("{")
    said = model.chat([{"role": "system", "content": "Be brief."}, *chat], max_tokens=3, temperature=0).answer
    assert body["k"]["output"][0]["content"][0]["text"] == said and body["k"]["status"] == "incomplete"
    assert body["l"]["output"][0]["content"][0]["text"].startswith("{")
    refused = {"f": "n 2", "g": "temperature", "h": "strange", "i": "/v1/images", "row 10": "no JSON"}
    for id, words in {**refused, "m": "item_reference", "n": "previous_response_id", "o": "web_search"}.items():
        assert found[id]["response"] is None and words in found[id]["error"]["message"]
    assert ggpy.batch(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl").n_new == 0


def test_openai_lines_are_of_its_types():
    pytest.importorskip("openai")
    from openai.types import Completion, CreateEmbeddingResponse
    from openai.types.chat import ChatCompletion
    from openai.types.responses import Response

    from ggpy.batching import openai

    piece = {"token": 1, "text": "\u00e9", "logprob": -0.5, "top": [{"token": 2, "text": "b", "logprob": -1.0}]}
    text = {"text": "x", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "logprobs": [piece]}
    call = {"id": "a1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
    for url, type_, column, answer, more in (
        ("/v1/completions", Completion, "prompt", text, {}),
        ("/v1/chat/completions", ChatCompletion, "messages", {**text, "thinking": "y", "tool_calls": [call]}, {}),
        ("/v1/responses", Response, "input", {**text, "thinking": "y", "tool_calls": [call]}, {"tools": tools}),
        ("/v1/responses", Response, "input", {**text, "finish_reason": "length"}, {}),
        ("/v1/embeddings", CreateEmbeddingResponse, "input", {"embeddings": [[0.5]], "prompt_tokens": 3}, {}),
    ):
        given = [{"role": "user", "content": "Hi"}] if column == "messages" else "Hi"
        task = openai.task_of(Row(1, request("a", url, **{column: given}, **more)), Settings(), "")
        assert not task.error
        line = openai.result_of(task, answer, "demo")
        assert line["error"] is None and line["response"]["status_code"] == 200
        type_.model_validate(line["response"]["body"])


# Files


def test_parquet_in_and_out(model, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(
        [
            {"id": 1, "prompt": "In the", "messages": None, "options": {"max_tokens": 3, "stop": None}, "other": 1.5},
            {"id": 2, "prompt": None, "messages": [{"role": "user", "content": "Hello"}], "options": None, "other": 2.5},
            {"id": 3, "prompt": "x", "messages": None, "options": {"max_tokens": None, "stop": [""]}, "other": 2.5},
        ]
    )
    pq.write_table(table, tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    summary = ggpy.batch(model, tmp_path / "in.parquet", out, max_tokens=5, temperature=0)
    assert summary.n_errors == 1 and not (tmp_path / "out.parquet.partial").exists()
    assert ggpy.batch(model, tmp_path / "in.parquet", out, max_tokens=5, temperature=0).n_new == 0
    found = {row["id"]: row for row in pq.read_table(out).to_pylist()}
    assert found[1]["text"] == model.generate("In the", max_tokens=3, temperature=0).run().text
    assert found[2]["completion_tokens"] == 5 and "stop" in found[3]["error"] and found[3]["text"] is None
    more = pa.concat_tables([table, pa.Table.from_pylist([{"id": 4, "prompt": "In the"}])], promote_options="default")
    pq.write_table(more, tmp_path / "in.parquet")
    assert ggpy.batch(model, tmp_path / "in.parquet", out, max_tokens=5, temperature=0).n_new == 1
    assert pq.read_table(out)["id"].to_pylist()[-1] == 4 and len(pq.read_table(out)) == 4
    ggpy.batch(model, ["text", *ROWS[:1]], tmp_path / "mixed.parquet")  # ids of both kinds are texts
    assert sorted(pq.read_table(tmp_path / "mixed.parquet")["id"].to_pylist()) == ["0", "row 1"]
    assert ggpy.batch(model, ["text", *ROWS[:1]], tmp_path / "mixed.parquet").n_new == 0
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "twice.parquet")
    with pytest.raises(ggpy.Error, match=r"twice\.parquet: two columns 'prompt'"):
        ggpy.batch(model, tmp_path / "twice.parquet", tmp_path / "out.jsonl")


def test_lines_of_any_kind(model, tmp_path, monkeypatch):
    monkeypatch.setattr("ggpy.batching.rows._MOST_BYTES", 64)
    (tmp_path / "in").write_bytes(
        b'\xef\xbb\xbf{"id": 1, "prompt": "x"}\r\n\n{"id": 2, "prompt": "\xff"}\n'
        + b'{"id": 3, "prompt": "%s"}\n' % (b"x" * 500)
        + b'{"id": 4, "prompt": "%s"}\n{"id": 5, "prompt": "\xe2\x80\xa8"}' % (b"x" * 40)
    )
    ggpy.batch(model, tmp_path / "in", tmp_path / "out", max_tokens=2, ordered=True)
    found = by_id(tmp_path / "out")
    assert [*found] == [1, "row 3", "row 4", 4, 5] and all(found[i]["text"] for i in (1, 4, 5))
    assert "utf-8" in found["row 3"]["error"] and found["row 4"]["error"] == "a line of more than 64 bytes"


def test_shards_together_are_the_whole(model, tmp_path):
    ggpy.batch(model, ROWS, tmp_path / "all", temperature=1.0)
    parts = {}
    for i in (1, 2, 3):
        ggpy.batch(model, ROWS, tmp_path / f"{i}", temperature=1.0, shard=(i, 3))
        assert not parts.keys() & by_id(tmp_path / f"{i}").keys()
        parts |= by_id(tmp_path / f"{i}")
    assert parts == by_id(tmp_path / "all")


def refused(tmp_path, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["batch", *map(str, arguments)])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 1 and said.startswith("ggpy: ") and "\n" not in said
    return said


def test_what_is_refused_is_refused_in_a_line(tmp_path, capsys):
    demo, out = model_file("demo"), tmp_path / "out.jsonl"
    rows = written(tmp_path / "in.jsonl", ROWS)
    assert "no such file" in refused(tmp_path, capsys, demo, tmp_path / "none.jsonl", "-o", out)
    assert "regular" in refused(tmp_path, capsys, demo, tmp_path, "-o", out)
    assert "no folder" in refused(tmp_path, capsys, demo, rows, "-o", tmp_path / "none" / "out")
    assert "I/N" in refused(tmp_path, capsys, demo, rows, "-o", out, "--shard", "1")
    assert "the first is 1" in refused(tmp_path, capsys, demo, rows, "-o", out, "--shard", "0/3")
    assert "regex" in refused(tmp_path, capsys, demo, rows, "-o", out, "--regex", "(")
    rows = written(tmp_path / "in.jsonl", ROWS)
    assert "own file" in refused(tmp_path, capsys, demo, rows, "-o", rows)
    table = written(tmp_path / "in.csv", ["id,prompt", "1,x"])
    assert "no row can be read; the first: no JSON" in refused(tmp_path, capsys, demo, table, "-o", out)
    wrong = written(tmp_path / "wrong.jsonl", [{"question": "Why?", "answer": 1}] * 3)
    assert "question, answer" in refused(tmp_path, capsys, demo, wrong, "-o", out)
    twice = written(tmp_path / "twice.jsonl", [*ROWS, ROWS[3]])
    assert "two rows with id 3" in refused(tmp_path, capsys, demo, twice, "-o", out)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing of the kind PAR1")
    assert "broken.parquet" in refused(tmp_path, capsys, demo, broken, "-o", out)
    assert not out.exists()
    for content in ("My notes\n", '{"id": 1, "prompt": "x"}\n', '{"id": 1, "prompt": "x"}', '{"id": "key"}'):
        out.write_text(content)
        assert "something else" in refused(tmp_path, capsys, demo, rows, "-o", out)
        assert out.read_text() == content


def test_a_broken_page_of_parquet_is_found_before_anything_is_written(model, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist([{"id": i, "prompt": f"text {i} " * 20} for i in range(2000)])
    pq.write_table(table, tmp_path / "in.parquet")
    data = bytearray((tmp_path / "in.parquet").read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    (tmp_path / "in.parquet").write_bytes(data)
    with pytest.raises(ggpy.Error, match=r"in\.parquet"):
        ggpy.batch(model, tmp_path / "in.parquet", tmp_path / "out", max_tokens=1)
    assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused(model, tmp_path):
    ggpy.batch(model, ROWS[:5], tmp_path / "out", temperature=0)
    before = (tmp_path / "out").read_bytes()
    other = [{**ROWS[0], "prompt": "And the queen said"}, *ROWS[1:]]
    for rows, how in ((ROWS, {"temperature": 0.5}), (ROWS, {"temperature": 0, "seed": 1}), (other, {"temperature": 0})):
        with pytest.raises(ggpy.Error, match=r"id '0' is of another row, model, option or version"):
            ggpy.batch(model, rows, tmp_path / "out", **how)
    with pytest.raises(ggpy.Error, match="no row"):
        ggpy.batch(model, ROWS[1:], tmp_path / "out", temperature=0)
    with pytest.raises(ggpy.Error, match="order"):
        ggpy.batch(model, ROWS[::-1], tmp_path / "out", temperature=0, ordered=True)
    with ggpy.load("demo", n_ctx=128) as shorter, pytest.raises(ggpy.Error, match="another"):
        ggpy.batch(shorter, ROWS, tmp_path / "out", temperature=0)
    assert (tmp_path / "out").read_bytes() == before
    assert ggpy.batch(model, ROWS, tmp_path / "out", temperature=0).n_before == 5


def test_two_processes_dont_write_one_file(tmp_path):
    pytest.importorskip("fcntl")
    first = Output(tmp_path / "out", lambda r: (r["id"], r["key"]))
    with pytest.raises(ggpy.Error, match="another process"):
        Output(tmp_path / "out", lambda r: (r["id"], r["key"]))
    first.close()
    assert not (tmp_path / "out").exists()


def test_a_file_may_end_anywhere(model, tmp_path):
    """What is there of a last line is cut off, wherever it was torn."""
    out = tmp_path / "out"
    ggpy.batch(model, ROWS[:3], out, temperature=0, ordered=True)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    last = ends[1]
    for end in [0, 1, 5, ends[0] - 1, *range(last, len(whole), 7), len(whole) - 1]:
        out.write_bytes(whole[:end])
        ggpy.batch(model, ROWS[:3], out, temperature=0, ordered=True)
        assert out.read_bytes() == whole
    out.write_bytes(whole[:last] + bytes(4096))  # what a machine without power may leave
    ggpy.batch(model, ROWS[:3], out, temperature=0, ordered=True)
    assert out.read_bytes() == whole
    out.write_bytes(whole[:last].replace(b"}\n", b"\n", 1) + whole[last:])
    with pytest.raises(ggpy.Error, match="line 1 is no result"):
        ggpy.batch(model, ROWS[:3], out, temperature=0)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_killed_at_random_moments(tmp_path, name):
    rows = written(tmp_path / "in.jsonl", [{**r, "id": f"{r['id']}"} for r in ROWS] + ["no json"])
    command = [sys.executable, "-m", "ggpy", "batch", str(model_file("demo")), str(rows), "-c", "256", "--ordered"]
    subprocess.run([*command, "-o", str(tmp_path / f"whole-{name}")], check=True, capture_output=True)

    def n_bytes():
        return sum(path.stat().st_size for path in tmp_path.glob(f"{name}*") if path.is_file())

    at_random, killed = random.Random(5), 0
    for _ in range(3 if name == "out.jsonl" else 1):
        enough = n_bytes() + at_random.uniform(1, 1000)
        process = subprocess.Popen([*command, "-o", str(tmp_path / name)], stderr=subprocess.DEVNULL)
        while process.poll() is None and n_bytes() < enough:
            time.sleep(0.001)
        killed += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run([*command, "-o", str(tmp_path / name)], check=True, capture_output=True)
    assert killed
    if name.endswith("parquet"):
        from pyarrow import parquet

        assert parquet.read_table(tmp_path / name).equals(parquet.read_table(tmp_path / f"whole-{name}"))
        assert not (tmp_path / f"{name}.partial").exists()
    else:
        assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    """Where a write ends in the middle, what was whole before is what there is."""
    import errno

    out = Output(tmp_path / "out", lambda r: (r["id"], r["key"]))
    out.add([{"id": 1, "key": "a"}])

    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            if len(data) < 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data[:20])

        def __getattr__(self, name):
            return getattr(self._file, name)

    out._file = Full(out._file)
    with pytest.raises(ggpy.Error, match=r"out: No space left on device; the results before are whole"):
        out.add([{"id": 2, "key": "b" * 40}, {"id": 3, "key": "c"}])
    out.close()
    assert read(tmp_path / "out") == [{"id": 1, "key": "a"}]
