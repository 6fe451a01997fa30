"""Replies and conversations, and what of a reply is thought."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggpy
from ggpy.generate.chat import ChatTemplate
from ggpy.generate.replies import FAMILIES, ReplyParser, parse_reply
from ggpy.generate.streaming import StreamDecoder
from tests.models.checkpoints import converted
from tests.models.test_moe import made

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}[assistant]{{ begin }}{% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("session"), made("qwen3"), "q8_0")


@pytest.fixture
def model(path):
    with ggpy.load(path, n_ctx=256, n_threads=1) as model:
        model.__dict__["chat_template"] = ChatTemplate(TEMPLATE)
        yield model


OPTIONS = {"max_tokens": 8, "temperature": 0}


def test_a_reply_is_what_the_template_and_the_tokens_give(model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt = "[system]Be brief.\n[user]Hello\n[assistant]"
    assert model.chat_prompt(messages) == prompt
    expected = model.generate(prompt, **OPTIONS).run()
    reply = model.chat(messages, **OPTIONS)
    assert reply.text == expected.text and reply.ids == expected.ids
    assert reply.message == {"role": "assistant", "content": expected.text}
    streamed = model.chat(iter(messages), stream=True, **OPTIONS)
    assert streamed.text == "" and "".join(streamed) == expected.text
    with_tools = model.chat_prompt(messages, tools=[{"name": "f"}], chat_template_kwargs={"begin": "<think>"})
    assert with_tools == "[system]Be brief.\n[user]Hello\n" + '[{"name": "f"}][assistant]<think>'


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hello", "messages are a list of mappings"),
        ({"role": "user", "content": "Hello"}, "messages are a list of mappings"),
        (["Hello"], "message 1 is no mapping with a role"),
        ([{"role": "user", "content": ""}, {"content": "x"}], "message 2 is no mapping with a role"),
    ],
)
def test_messages_that_are_none_are_told(model, messages, words):
    with pytest.raises(ggpy.Error, match=words):
        model.chat(messages)


def test_without_a_template_there_is_no_chat(path):
    with ggpy.load(path, n_ctx=64, n_threads=1) as model:
        model.__dict__["chat_template"] = None
        with pytest.raises(ggpy.UnsupportedError, match="the file has no chat template"):
            model.chat([{"role": "user", "content": "Hello"}])


def test_a_session_keeps_what_was_said(model):
    session = model.session([{"role": "system", "content": "Be brief."}])
    first = session.send("Hello", **OPTIONS)
    second = session.send("And now?", **OPTIONS)
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert session.messages[2] == first.message and session.messages[4] == second.message
    assert second.text == model.chat(session.messages[:4], **OPTIONS).text
    assert second.n_reused > 0  # what was said isn't computed again
    session.undo()
    assert session.messages == session.messages[:3] and session.messages[-1] == first.message


def test_a_reply_may_be_given_once_more_and_messages_set(model):
    session = model.session()
    with pytest.raises(ggpy.Error, match="no message of a user"):
        session.retry()
    first = session.send("Hello", **OPTIONS)
    again = session.retry(max_tokens=8, temperature=5, seed=1)
    assert again.text != first.text
    assert session.messages == [{"role": "user", "content": "Hello"}, again.message]
    assert session.retry(**OPTIONS).text == first.text
    with pytest.raises(ggpy.ContextFullError):
        session.messages = [{"role": "user", "content": "word " * 400}, first.message]
        session.retry(**OPTIONS)
    assert session.messages[1] == first.message
    session.messages = [{"role": "system", "content": "Be brief."}]
    session.send("Hello", **OPTIONS)
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant"]
    with pytest.raises(ggpy.Error, match="message 1 is no mapping"):
        session.messages = ["Hello"]


def test_of_a_reply_that_is_left_what_was_taken_stays(model):
    session = model.session()
    reply = session.send("Hello", stream=True, max_tokens=50, temperature=0)
    taken = next(reply) + next(reply)
    assert session.messages[1:] == [{"role": "assistant", "content": taken}]
    session.send("Go on", stream=True, **OPTIONS)
    assert reply.finish_reason == "cancelled"
    assert [m["content"] for m in session.messages] == ["Hello", taken, "Go on"]


def test_a_full_context_is_told_and_the_session_goes_on(model):
    session = model.session([{"role": "system", "content": "Be brief."}])
    session.send("Hello", **OPTIONS)
    before = session.messages
    with pytest.raises(
        ggpy.ContextFullError, match=r"the conversation has \d+ tokens and 64 for the reply; the context holds 256"
    ):
        session.send("word " * 400)
    assert session.messages == before
    assert session.send("Still there?", **OPTIONS).finish_reason is not None


def test_the_oldest_turns_are_dropped_if_asked(model):
    session = model.session([{"role": "system", "content": "Be brief."}], drop_oldest=True)
    n_dropped = 0
    for i in range(12):
        reply = session.send(f"Tell me about number {i}", **OPTIONS)
        n_dropped += reply.n_dropped
        assert session.messages[0]["role"] == "system" and session.messages[1]["role"] == "user"
        assert len(reply.prompt_ids) + 8 <= model.n_ctx
        assert reply.ids == model.chat(session.messages[:-1], **OPTIONS).ids
    assert session.n_dropped == n_dropped > 0 and n_dropped % 2 == 0
    with pytest.raises(ggpy.ContextFullError):  # alone too long: nothing is left to drop
        session.send("word " * 400)
    assert session.messages[-1]["role"] == "assistant"


def test_sessions_are_saved_and_loaded(model, tmp_path):
    session = model.session()
    session.send("Grüße", **OPTIONS)
    session.save(tmp_path / "talk.json")
    other = model.session()
    other.load(tmp_path / "talk.json")
    assert other.messages == session.messages
    assert other.send("And?", **OPTIONS).text == session.send("And?", **OPTIONS).text
    for text in ("", "{}", "[]", "[" * 100_000, '{"messages": [3]}', '{"messages": "hi"}', "\xff"):
        (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ggpy.Error, match="not a saved conversation"):
            other.load(tmp_path / "bad.json")
    with pytest.raises(ggpy.Error, match="No such file"):
        other.load(tmp_path / "none.json")
    with pytest.raises(ggpy.Error, match="there is no folder"):
        other.save(tmp_path / "none" / "talk.json")


# Calls of tools, and thoughts


def test_a_reply_has_the_calls_of_tools_apart(model):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    model.__dict__["chat_template"] = ChatTemplate(TEMPLATE + "{# <tool_call> #}")
    ids = model.tokenize("Well. " + call, bos=False)

    def said(before, logits):
        n = len(before) - len(prompt)
        logits[:] = 0
        logits[ids[n] if n < len(ids) else min(model.tokenizer.end_tokens)] = 100
        return logits

    messages = [{"role": "user", "content": "Call"}]
    prompt = model.tokenizer.encode_prompt(model.chat_prompt(messages, tools=tools))
    options = {"processors": [said], "temperature": 0, "max_tokens": len(ids) + 1}
    message = model.chat(messages, tools=tools, **options).message
    (made_call,) = message["tool_calls"]
    assert message == {"role": "assistant", "content": "Well.", "tool_calls": [made_call]}
    assert made_call["type"] == "function" and made_call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert len(made_call["id"]) == 9 and made_call["id"].isalnum()
    assert model.chat(messages, tools=tools, **options).tool_calls == [made_call]  # the same reply has the same ids
    # While the reply goes on, only whole calls count.
    reply = model.chat(messages, tools=tools, stream=True, **options)
    while not reply.text.endswith('"x"'):
        next(reply)
    assert reply.tool_calls == [] and reply.answer == "Well."
    # Cut off, it is text.
    cut = model.chat(messages, tools=tools, **(options | {"max_tokens": len(ids) - 3}))
    assert cut.tool_calls == [] and cut.answer == cut.text
    # Without tools on offer, nothing is a call.
    prompt = model.tokenizer.encode_prompt(model.chat_prompt(messages))
    assert model.chat(messages, **options).answer == "Well. " + call


def test_control_tokens_that_are_marks_are_written(model):
    control = next(i for i in range(model.tokenizer.n_vocab) if model.tokenizer.is_hidden(i))
    name = model.tokenizer.token_bytes(control).decode()
    assert StreamDecoder(model.tokenizer).push(control) == ""
    assert StreamDecoder(model.tokenizer, shown={control}).push(control) == name


@pytest.mark.parametrize(
    ("prompt", "text", "thinking", "answer"),
    [
        ("", "Hello", "", "Hello"),
        ("", "<think>\nWell\n</think>\n\nHello", "Well", "Hello"),
        ("<think>\n", "Well\n</think>\n\nHello", "Well", "Hello"),
        ("<think>", "Well, no end", "Well, no end", ""),
        ("", "<think></think>Hello", "", "Hello"),
        ("<think>\n\n</think>\n\n", "Hello", "", "Hello"),
        ("", "\n<think>a</think> b <think>c</think>", "a", "b <think>c</think>"),
        ("", "[THINK]so[/THINK]Yes", "so", "Yes"),
        ("", "<thin air", "", "<thin air"),
        ("", "<think", "", "<think"),
        ("", "  text ", "", "  text "),
        ("", "<think>a < b </thin k</think>c", "a < b </thin k", "c"),
    ],
)
@given(data=st.data())
def test_thoughts_are_told_from_the_answer_however_the_text_is_cut(prompt, text, thinking, answer, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    splitter = ReplyParser(FAMILIES["plain"], None, prompt)
    parts = [p for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for p in splitter.push(text[a:b])]
    parts += splitter.flush()
    for events in (parts, parse_reply(text, FAMILIES["plain"], None, prompt)):
        got = tuple("".join(e.text for e in events if e.kind == kind) for kind in ("reasoning", "content"))
        assert got == (thinking, answer)
