"""Chat templates: the Jinja programs that come with models, run as what they are, the programs of strangers.

Most are rendered here, counted (`templates`). One that needs more gets a process with limits of time and memory, kept as
long as the template.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from . import templates

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

#: names under which messages hold what a model thought; templates read one of them (transformers 5 copies likewise)
_REASONING = ("reasoning_content", "thinking", "reasoning")

_START_SECONDS = 60.0
#: by the clock, for a text; its processor time has a shorter limit of its own
_CLOCK_SECONDS = 4.0 * templates.MOST_SECONDS
_WORKER = f"import sys; sys.path[0] = {str(Path(__file__).parents[2])!r}; from {templates.__name__} import serve; serve"


class ChatTemplate:
    """A model's chat template.

    Parameters
    ----------
    source : str
        The Jinja template (`tokenizer.chat_template`).
    bos, eos : str
        The texts of the tokens that begin and end a text; templates know them as `bos_token` and `eos_token`.
    tool_use : str, optional
        The template for conversations with tools, where it is another (`tokenizer.chat_template.tool_use`).
    more : mapping, optional
        Texts of other special tokens, such as `pad_token` and `unk_token`.

    Raises
    ------
    TokenizerError
        The template isn't valid Jinja.
    """

    def __init__(
        self, source: str, bos: str = "", eos: str = "", tool_use: str = "", more: Mapping[str, str] | None = None
    ):
        self.source = source
        self.bos = bos
        self.eos = eos
        self.more = dict(more or {})
        self.tool_use = ChatTemplate(tool_use, bos, eos, more=more) if tool_use else None
        self._process: _Process | None = None
        try:
            self._template = templates.compile_template(source, counted=True)
        except templates.BeyondError:
            self._process = _Process(source)
        except Exception as error:
            raise TokenizerError(templates.failure("the chat template can't be read", error)) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt of a conversation.

        Parameters
        ----------
        messages : sequence of mappings
            Each with `role` and `content`. What a model thought may be named `reasoning_content`, `thinking` or
            `reasoning`, whatever the template reads.
        add_generation_prompt : bool
            Whether the prompt ends with the beginning of the model's answer.
        tools : sequence of mappings, optional
            JSON schemas of functions that the model may ask for.
        **extra
            Whatever else this template knows, such as `enable_thinking`.

        Raises
        ------
        TokenizerError
            The template refuses the conversation, fails, or uses up too much time, memory or text.
        """
        if tools is not None and self.tool_use is not None:
            return self.tool_use.render(messages, add_generation_prompt, tools, **extra)
        context = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
            **self.more,
            **extra,
        }
        if self._process is None:
            try:
                return templates.render_counted(self._template, context)
            except templates.BeyondError:
                self._process = _Process(self.source)
            except Exception as error:
                raise TokenizerError(templates.failure("the chat template failed", error, self._template)) from None
        return self._process.render(context)

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The tokens of a conversation's prompt.

        Most templates write the beginning-of-sequence token themselves; where one doesn't, it is put in front if the
        tokenizer's file says so. An end-of-sequence token never follows, whatever the file says: the answer does.

        Parameters
        ----------
        tokenizer : Tokenizer
            The model's.
        messages : sequence of mappings
        **options
            See `render`.

        Raises
        ------
        TokenizerError
            See `render`.
        """
        return tokenizer.encode_prompt(self.render(messages, **options))


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with what the model thought under each of its names that isn't there."""
    if not isinstance(message, Mapping):
        return message
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if thought is None:
        return message
    return {**message, **{name: thought for name in _REASONING if message.get(name) is None}}


class _Process:
    """A process that renders one template; started when it is needed, and again after it has failed."""

    def __init__(self, source: str):
        self._source = source
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def render(self, context: Mapping[str, Any]) -> str:
        """The template's text. Raises TokenizerError where it has none within the limits."""
        try:
            given = pickle.dumps(context)
        except Exception as error:
            raise TokenizerError(f"the chat template takes plain values only: {error}") from None
        with self._lock:
            try:
                return self._answer(self._started(), given)
            except TokenizerError:
                raise
            except BaseException:
                self._end()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is not None and self._pid == os.getpid():  # a fork has no right to its parent's
            return self._running
        limits = templates.MOST_SECONDS, templates.MOST_MEMORY, templates.MOST_TEXT
        try:
            self._running = process = subprocess.Popen(
                [sys.executable, "-c", f"{_WORKER}{limits}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            what = f"{sys.executable or 'no Python'} doesn't start: {error}"
            raise TokenizerError(f"the chat template needs a process of its own, and {what}") from None
        self._pid = os.getpid()
        weakref.finalize(self, _kill, process, self._pid)
        assert process.stdin and process.stdout
        with _Clock(process, _START_SECONDS):
            ready = any(line.endswith(templates.READY) for line in process.stdout)
            with suppress(OSError):
                templates.write_message(process.stdin, templates.TEXT, self._source.encode("utf-8", "surrogatepass"))
        if not ready:
            code = self._end()
            raise TokenizerError(f"the chat template needs a process of its own, which ended with code {code}")
        return process

    def _answer(self, process: subprocess.Popen[bytes], given: bytes) -> str:
        assert process.stdin and process.stdout
        with _Clock(process, _CLOCK_SECONDS):
            try:
                templates.write_message(process.stdin, templates.TEXT, given)
                kind, content = templates.read_message(process.stdout, 4 * templates.MOST_TEXT)
            except (OSError, EOFError):
                self._end()
                limits = f"{templates.MOST_SECONDS} s, {templates.MOST_MEMORY >> 20} MB or {templates.MOST_TEXT} characters"
                raise TokenizerError(f"the chat template failed: it takes more than {limits}") from None
        if kind != templates.TEXT:
            raise TokenizerError(content.decode("utf-8", "replace"))
        return content.decode("utf-8", "surrogatepass")

    def _end(self) -> int:
        process, self._running = self._running, None
        return 0 if process is None else _kill(process, self._pid)


class _Clock:
    """Kills a process unless the block ends in time."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float):
        self._timer = threading.Timer(seconds, process.kill)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()


def _kill(process: subprocess.Popen[bytes], pid: int) -> int:
    """Ends a process that this one has started, and waits for that; its exit status."""
    if pid != os.getpid():
        return 0
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    return process.wait()
