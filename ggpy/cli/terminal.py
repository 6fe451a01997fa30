"""The terminal: what is typed, and text of models shown safely."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..generate.replies import Event, ReplyParser
from ..printable import visible

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

_PROMPT, _MORE = ">>> ", "... "
_QUOTES = '"""'


def obeys_escapes(out: TextIO) -> bool:
    """Whether text may be dimmed and lines erased."""
    return out.isatty() and not os.environ.get("NO_COLOR") and not _is_dumb()


def _is_dumb() -> bool:
    return os.environ.get("TERM", "dumb" if os.name == "posix" else "").lower() in ("dumb", "unknown")


class AnswerWriter:
    """Writes a model's text as it comes: to a terminal without control characters and with its thoughts apart.

    Parameters
    ----------
    out : file
    parser : ReplyParser, optional
        Of a reply. None: the text has no thoughts.
    thinking : bool
        Whether thoughts are shown.
    """

    def __init__(self, out: TextIO, parser: ReplyParser | None = None, thinking: bool = True):
        self._out, self._thinking = out, thinking
        self._styled = obeys_escapes(out)
        self._parser = parser
        self._in_thoughts = False

    def write(self, pieces: Iterable[str]) -> None:
        """Writes pieces, each as it comes, and ends the line, after an interrupt too."""
        try:
            for piece in pieces:
                self._write([Event("content", piece)] if self._parser is None else self._parser.push(piece))
        finally:
            if self._parser is not None:
                self._write(self._parser.flush())
            self._put("\n")
            self._out.flush()

    def _write(self, events: list[Event]) -> None:
        for kind, text, _ in events:
            is_thought = kind == "reasoning"
            if is_thought and not self._in_thoughts:
                self._put("thinking…\n" if self._thinking else "thinking…", dim=True)
            elif self._in_thoughts and not is_thought:
                self._end_thoughts()
            self._in_thoughts = is_thought
            if self._thinking or not is_thought:
                self._put(text, dim=is_thought)
        self._out.flush()

    def _end_thoughts(self) -> None:
        self._in_thoughts = False
        if self._thinking:
            self._put("\n…done thinking\n\n", dim=True)
        elif self._styled:
            self._out.write("\r\x1b[K")
        else:
            self._put("\n")

    def _put(self, text: str, dim: bool = False) -> None:
        text = visible(text) if self._out.isatty() else text
        self._out.write(f"\x1b[2m{text}\x1b[22m" if dim and self._styled else text)


# Reading


@contextmanager
def unechoed() -> Iterator[None]:
    """What is typed meanwhile isn't shown among what is written: the next prompt takes it."""
    if os.name != "posix" or sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = before[:]
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def reader(history: Path) -> Callable[[], str]:
    """What gives the next message that is typed: with editing where there is a terminal, else line by line.

    It raises EOFError at the end, and KeyboardInterrupt.
    """
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()) and not _is_dumb():
        return Editor(history).read
    return _read_lines


def is_open(text: str) -> bool:
    """Whether a message goes on with the next line: it, or what is given to its command, begins with three quotes and
    doesn't end with three others."""
    said = _of_command(text)[1].strip()
    return said.startswith(_QUOTES) and not (len(said) >= 2 * len(_QUOTES) and said.endswith(_QUOTES))


def unquoted(text: str) -> str:
    """A message without the three quotes around it, or around what is given to its command."""
    command, said = _of_command(text)
    said = said.strip()
    if said.startswith(_QUOTES):
        said = said.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return command + said


def _of_command(text: str) -> tuple[str, str]:
    """A command at the beginning of a message, with the space after it, and the rest."""
    first, space, rest = text.lstrip().partition(" ")
    return (first + space, rest) if first.startswith("/") else ("", text)


def _read_lines() -> str:
    text = ""
    while True:
        try:
            text += input(_MORE if text else _PROMPT)
        except KeyboardInterrupt:
            print()  # the terminal has shown a ^C
            raise
        if text.endswith("\\"):
            text = text[:-1]
        elif not is_open(text):
            return _sound(text)
        text += "\n"


def _sound(text: str) -> str:
    """Text as it was typed, of Unicode characters only: bytes that are none come as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Editor:
    """Lines that are edited, with a history that a file keeps.

    Enter ends a message, unless it is open or ends with a backslash; Alt-Enter begins a new line.

    Parameters
    ----------
    history : Path
    input, output : optional
        prompt_toolkit's, in place of the terminal.
    """

    def __init__(self, history: Path, input: "Input | None" = None, output: "Output | None" = None):
        # It takes 0.1 s to import: what doesn't read from a terminal goes without.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("enter")
        def enter(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            elif is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def alt_enter(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        # Where the cursor stands matters only to menus; asking would wait for terminals that don't answer.
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            multiline=True,
            key_bindings=keys,
            prompt_continuation=lambda width, line, wraps: " " * width if wraps else _MORE,
            enable_suspend=True,
            complete_while_typing=False,
            reserve_space_for_menu=0,
            history=_history(history),
            input=input,
            output=output or create_output(always_prefer_tty=True),
        )

    def read(self) -> str:
        """The next message; Ctrl-C begins it anew.

        Raises
        ------
        EOFError
            Ctrl-D, with nothing typed.
        KeyboardInterrupt
            Ctrl-C, with nothing typed.
        """
        while True:
            try:
                return _sound(self._session.prompt())
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise


def _history(path: Path):  # prompt_toolkit's History, which can't be named before it is imported
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        """Kept in a file, as long as that can be written."""

        def store_string(self, string: str) -> None:
            with suppress(OSError):
                super().store_string(_sound(string))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return History(path)
