"""Talking in a terminal."""

import io
import json
import os
import select
import stat
import subprocess
import sys
import time
from threading import Thread

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from transformers import LlamaConfig, LlamaForCausalLM

import ggpy
from ggpy.cli.talk import Talk
from ggpy.cli.terminal import AnswerWriter, Editor, is_open, unechoed, unquoted
from ggpy.generate.chat import ChatTemplate
from ggpy.generate.replies import FAMILIES, ReplyParser
from ggpy.kernels import build
from ggpy.printable import visible
from tests.models.checkpoints import converted, random_model
from tests.models.test_llama import SIZES

fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("talk"), random_model(LlamaForCausalLM, LlamaConfig(**SIZES)))


@pytest.fixture(scope="module")
def model(path):
    with ggpy.load(path, n_ctx=256, n_threads=1) as model:
        model.__dict__["chat_template"] = ChatTemplate(TEMPLATE)
        yield model


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True

    def take(self):
        """What has been written since the last time."""
        written = self.getvalue()
        self.seek(0)
        self.truncate()
        return written


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Screen()


@pytest.fixture
def talk(model, screen):
    return Talk(model, model.session(), {"max_tokens": 6, "temperature": 0.0, "stop": None}, screen)


# What is typed


def typed(folder, *keys):
    """The messages that an editor reads from keys. What they take from its history has been read before."""
    with create_pipe_input() as pipe:
        editor = Editor(folder / "history", input=pipe, output=DummyOutput())

        def type_all():
            for some in keys:
                while len(editor._session.default_buffer._working_lines) <= some.count(UP):
                    time.sleep(0.005)
                pipe.send_bytes(some.encode("utf-8", "surrogateescape"))

        typist = Thread(target=type_all)
        typist.start()
        messages = []
        while True:
            try:
                messages.append(editor.read())
            except EOFError:
                typist.join()
                return messages
            except KeyboardInterrupt:
                messages.append(None)


PROMPT = b"\x1b[?2004h"  # the editor is there
UP, LEFT, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[A", "\x1b[D", "\x03", "\x04", "\x1b\r"


@pytest.mark.parametrize(
    ("keys", "messages"),
    [
        (["hello\r"], ["hello"]),
        (["helo", LEFT, "l\r"], ["hello"]),
        (["one\r", UP + "!\r", UP + UP + "?\r"], ["one", "one!", "one?"]),
        (["one", ALT_ENTER, "two\r"], ["one\ntwo"]),
        (["one\\\rtwo\r"], ["one\ntwo"]),
        (['"""one\rtwo\\\rthree"""\r'], ['"""one\ntwo\nthree"""']),
        (["\x1b[200~one\rtwo\x1b[201~\r"], ["one\ntwo"]),
        (["nonsense", CTRL_C, "sense\r"], ["sense"]),
        ([CTRL_C], [None]),
        (["grüße, 世界 👩‍💻\r"], ["grüße, 世界 👩‍💻"]),
        (["\udcff\r"], ["\ufffd"]),
    ],
)
def test_lines_are_edited(tmp_path, keys, messages):
    assert typed(tmp_path, *keys, CTRL_D) == messages


def test_the_history_is_kept_across_starts_for_its_owner_alone(tmp_path):
    typed(tmp_path, "one", ALT_ENTER, "more\r", CTRL_D)
    assert typed(tmp_path, UP + "\r", CTRL_D) == ["one\nmore"]
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_no_hindrance(tmp_path):
    (tmp_path / "history").mkdir()
    assert typed(tmp_path, "one\r", UP + "\r", CTRL_D) == ["one", "one"]


@pytest.mark.parametrize(
    ("text", "opened", "message"),
    [
        ("hello", False, "hello"),
        ('"""hello', True, "hello"),
        ('"""', True, ""),
        ('"""hello\nyou"""', False, "hello\nyou"),
        ('"""\nhello\n"""', False, "hello"),
        ('/system """one', True, "/system one"),
        ('/system """one\ntwo"""', False, "/system one\ntwo"),
        ('say """ twice', False, 'say """ twice'),
    ],
)
def test_three_quotes_hold_many_lines(text, opened, message):
    assert is_open(text) == opened and unquoted(text) == message


# What is shown


def shown(pieces, screen, prompt=None, **how):
    parser = None if prompt is None else ReplyParser(FAMILIES["plain"], None, prompt)
    AnswerWriter(screen, parser, **how).write(iter(pieces))
    return screen.take()


def test_thoughts_are_shown_apart(screen):
    pieces = ["<thi", "nk>we", "ll</thi", "nk>\n\nHello"]
    assert shown(pieces, screen, prompt="") == (
        "\x1b[2mthinking…\n\x1b[22m\x1b[2mwe\x1b[22m\x1b[2mll\x1b[22m\x1b[2m\n…done thinking\n\n\x1b[22mHello\n"
    )
    assert shown(pieces, screen, prompt="", thinking=False) == "\x1b[2mthinking…\x1b[22m\r\x1b[KHello\n"
    assert shown(["well</think>Hello"], screen, prompt="<think>\n").endswith("Hello\n")
    assert shown(["<think>well"], screen, prompt="").endswith("\x1b[2mwell\x1b[22m\n")
    assert shown(pieces, screen) == "<think>well</think>\n\nHello\n"  # no reply to a conversation


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_terminals_that_obey_no_escapes_get_none(screen, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    pieces = ["<think>well</think>Hello"]
    assert shown(pieces, screen, prompt="") == "thinking…\nwell\n…done thinking\n\nHello\n"
    assert shown(pieces, screen, prompt="", thinking=False) == "thinking…\nHello\n"


def test_a_terminal_gets_no_control_characters_of_a_model_and_a_file_gets_all(screen):
    text = "a\x1b]0;title\x07\x9b2J\x08\r\n\tb\x7f 世界 👩‍💻"
    assert shown([text], screen) == "a\\x1b]0;title\\x07\\x9b2J\\x08\\r\n\tb\\x7f 世界 👩‍💻\n"
    out = io.StringIO()
    AnswerWriter(out).write([text])
    assert out.getvalue() == text + "\n"


def test_what_is_typed_in_the_middle_of_an_answer_is_not_shown(monkeypatch):
    main, other = pty.openpty()
    with open(other) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(stdin)
        with pytest.raises(KeyboardInterrupt), unechoed():
            assert termios.tcgetattr(stdin)[3] == before[3] & ~termios.ECHO != before[3]
            raise KeyboardInterrupt
        assert termios.tcgetattr(stdin) == before
    os.close(main)


# Commands


def roles(talk):
    return [m["role"] for m in talk._session.messages]


def test_a_message_is_answered_and_the_conversation_goes_on(talk, model, screen):
    talk.take("Hello")
    expected = model.chat([{"role": "user", "content": "Hello"}], max_tokens=6, temperature=0)
    assert screen.take() == visible(expected.answer) + "\n\n"
    assert talk._session.messages == [{"role": "user", "content": "Hello"}, expected.message]
    talk.take('"""And\nmore"""')
    assert talk._session.messages[2]["content"] == "And\nmore"
    talk.take("/etc/passwd is a path")
    assert roles(talk) == ["user", "assistant"] * 3


def test_commands_change_the_conversation(talk, screen, tmp_path):
    talk.take("/system Be brief.")
    talk.take("Hello")
    first = talk._session.messages
    assert first[0] == {"role": "system", "content": "Be brief."} and len(first) == 3
    talk.take(f"/save {tmp_path}/my talk.json")
    assert json.loads((tmp_path / "my talk.json").read_text())["messages"] == first
    talk.take("/retry")
    assert talk._session.messages == first
    talk.take("/set seed 3")
    talk.take("/set temperature 3")
    talk.take("/retry")
    assert roles(talk) == ["system", "user", "assistant"] and talk._session.messages != first
    talk.take("/undo")
    assert roles(talk) == ["system"]
    talk.take(f"/load {tmp_path}/my talk.json")
    assert talk._session.messages == first
    talk.take("/clear")
    assert roles(talk) == ["system"]
    screen.take()
    talk.take("/system")
    assert screen.take() == "system  Be brief.\n"
    talk.take("/system none")
    assert roles(talk) == []
    talk.take("/stats")
    assert "of 256 tokens" in screen.take()
    talk.take("/?")
    assert "/retry" in screen.take()


def test_options_are_set_as_they_are_shown(talk, screen):
    talk.take("/set")
    lines = dict(line.split(None, 1) for line in screen.take().splitlines())
    assert lines["max_tokens"] == "6" and lines["dry_sequence_breakers"] == r'"\n" ":" "\"" "*"' and lines["stop"] == "none"
    for name, value in lines.items():
        talk.take(f"/set {name} {value}")
    assert screen.take() == ""
    talk.take("/set")
    assert dict(line.split(None, 1) for line in screen.take().splitlines()) == lines
    for text, name, value in (
        ("top-p 0.5", "top_p", 0.5),
        ("logit_bias 5=-1 7=-inf", "logit_bias", {5: -1.0, 7: -float("inf")}),
        (r'stop "User:" "\n\n"', "stop", ["User:", "\n\n"]),
        ("stop none", "stop", []),
        ("max_tokens none", "max_tokens", None),
        ("seed 7", "seed", 7),
    ):
        talk.take(f"/set {text}")
        assert talk._options[name] == value
    talk.take("/set thinking off")
    talk.take("/set drop-oldest on")
    assert not talk._thinking and talk._session.drop_oldest and screen.take() == ""
    talk.take("/set top_p")
    assert screen.take() == "top_p  0.5\n"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("/nonsense", "there is no /nonsense; /help lists the commands"),
        ("/set nonsense 3", "there is no option nonsense"),
        ("/set top_p 3", "top_p must be a number from 0 to 1; got 3"),
        ("/set top_p x\x1b[2J", "got 'x\\x1b[2J'"),
        ("/set max_tokens few", "max_tokens must be a whole number"),
        ("/set thinking maybe", "thinking is on or off"),
        ("/set logit_bias 5", "is written as ID=NUMBER"),
        ('/set stop "', "no closing quotation"),
        ("/save", "name a file"),
        ("/save {folder}/other", "not overwritten"),
        ("/save {folder}/none/talk", "there is no folder"),
        ("/load {folder}/other", "not a saved conversation"),
        ("/load {folder}/none", "No such file"),
        ("/undo", "no message of a user"),
        ("/retry", "no message of a user"),
        ("word " * 400, "the context holds 256; /undo, /clear or /set drop_oldest on makes room"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_talk_goes_on(talk, screen, tmp_path, typed, words):
    (tmp_path / "other").write_text("GGUF")
    talk.take(typed.format(folder=tmp_path))
    lines = screen.take().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ggpy: ") and words in lines[0]
    assert roles(talk) == [] and (tmp_path / "other").read_text() == "GGUF"
    talk.take("Hello")
    assert roles(talk) == ["user", "assistant"]


def test_a_full_context_drops_the_oldest_if_asked(talk, screen):
    talk._session.drop_oldest = True
    for i in range(8):
        talk.take(f"Tell me everything about number {i}")
    assert "dropped 2 messages, the oldest" in screen.take()
    talk.take("/clear")
    talk.take("/set max_tokens none")
    talk.take("/set drop_oldest off")
    talk.take("/set logit_bias " + " ".join(f"{i}=-inf" for i in talk._model.tokenizer.end_tokens))
    talk.take("Go on")
    assert "(the context of 256 tokens is full)" in screen.take() and roles(talk)[-2:] == ["user", "assistant"]
    talk.take("More")
    assert "ggpy: the conversation has" in screen.take() and roles(talk)[-2:] == ["user", "assistant"]


def interrupt(talk, after):
    """Ctrl-C while the next answer has this many tokens."""
    n = len(talk._model.chat_prompt(talk._session.messages))

    def processor(ids, logits):
        if talk._n == after:
            talk._n = None
            raise KeyboardInterrupt
        talk._n = None if talk._n is None else talk._n + 1
        return logits

    talk._n = 0
    talk._options["processors"] = [processor]
    return n


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_stops_the_answer_only_and_its_beginning_stays(talk, model, screen, after):
    talk.take("Hello")
    before = talk._session.messages
    interrupt(talk, after)
    talk.take("And now?")
    expected = model.chat([*before, {"role": "user", "content": "And now?"}], max_tokens=after, temperature=0)
    said = [{"role": "user", "content": "And now?"}, expected.message] if after else []
    assert talk._session.messages == [*before, *said]
    assert ("the message isn't kept" in screen.take()) == (not after)
    talk.take("Hello again")
    assert len(talk._session.messages) == len(before) + len(said) + 2


# The whole program


def program(path, folder, arguments, steps):
    """Runs `ggpy run` in a terminal. For each step, types something until a text appears after it: arrows again and again,
    since the history is read while the first prompt is there already. All that it wrote, and its exit code."""
    if not (folder / "kernels").exists():
        (folder / "kernels").symlink_to(build.cache_dir() / "kernels")
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "GGPY_CACHE": str(folder)}
    command = [sys.executable, "-m", "ggpy", "run", str(path), *arguments]
    process = subprocess.Popen(
        command,
        stdin=other,
        stdout=other,
        stderr=other,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose Ctrl-C is a signal
    )
    os.close(other)
    everything, new, deadline = b"", b"", time.monotonic() + 60
    for keys, wanted in [(b"", PROMPT), *steps]:
        os.write(main, keys)
        while wanted not in new:
            assert time.monotonic() < deadline, (everything, keys, wanted)
            if select.select([main], [], [], 0.5)[0]:
                read = os.read(main, 4096)
                everything, new = everything + read, new + read
            elif keys == UP.encode():
                os.write(main, keys)
        new = new.partition(wanted)[2]
    code = process.wait(60)
    os.close(main)
    return everything.decode(), code


def test_a_talk_in_a_terminal(path, tmp_path):
    arguments = ["-n", "4", "--temp", "0", "--prompt-cache", str(tmp_path / "cache")]
    steps = [
        (b"hello\r", PROMPT),
        (b"word " * 600 + b"\r", b"the context holds 512"),
        (b"", PROMPT),
        (b"/stats\r", PROMPT),
        (b"\x03", b"(Ctrl-D or /bye ends)"),
        (b"", PROMPT),
        (b"/bye\r", b"/bye"),
    ]
    out, code = program(path, tmp_path, arguments, steps)
    assert code == 0 and "4 tokens" in out and "reused         0" in out
    steps = [(UP.encode(), b"hello"), (b"\r", PROMPT), (b"/stats\r", PROMPT), (b"\x04", b"\n")]
    out, code = program(path, tmp_path, arguments, steps)
    assert code == 0 and "4 tokens" in out and "reused         0" not in out
