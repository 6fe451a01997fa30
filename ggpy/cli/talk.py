"""`ggpy run` in a terminal: a conversation, and commands beside it."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import ContextFullError, Error
from ..generate.options import option_table
from ..printable import counted, visible
from .sampling import read_number, read_texts, read_value
from .terminal import AnswerWriter, unechoed, unquoted
from .timings import timings

if TYPE_CHECKING:
    from ..generate.model import Model
    from ..generate.session import Message, Reply, Session


class Talk:
    """A conversation in a terminal.

    Parameters
    ----------
    model : Model
    session : Session
    options : dict
        Of `Session.send`; `/set` changes them.
    out : file
        Where answers go.
    verbose : bool
        Whether timings follow each answer.

    Attributes
    ----------
    reply : Reply or None
        The last one.
    """

    def __init__(self, model: "Model", session: "Session", options: dict[str, Any], out: TextIO, verbose: bool = False):
        self._model, self._session, self._options, self._out = model, session, options, out
        self._verbose = verbose
        self._thinking = True
        self._goes_on = True
        self.reply: Reply | None = None

    def run(self, read: Callable[[], str]) -> None:
        """Talks until the user ends it.

        Parameters
        ----------
        read : callable
            Gives the next message; raises EOFError and KeyboardInterrupt.
        """
        self._note(
            f"{self._model.file.path.name}, a context of {self._model.n_ctx} tokens. /help lists commands, Ctrl-D ends."
        )
        while self._goes_on:
            try:
                self.take(read())
            except EOFError:
                self._note("")
                return
            except KeyboardInterrupt:
                self._note("(Ctrl-D or /bye ends)")

    def take(self, typed: str) -> None:
        """Answers a message, or does what a command says."""
        name, _, rest = typed.strip().partition(" ")
        try:
            if name.startswith("/") and "/" not in name[1:]:  # a path is no command
                known = _COMMANDS.get(_OTHER_NAMES.get(name, name))
                if known is None:
                    raise Error(f"there is no {name}; /help lists the commands")
                known[1](self, unquoted(rest))
            elif name:
                self._answer(lambda: self._session.send(unquoted(typed), stream=True, **self._options))
        except (Error, MemoryError) as error:
            hint = "; /undo, /clear or /set drop_oldest on makes room" if isinstance(error, ContextFullError) else ""
            self._note(f"ggpy: {error if str(error) else 'out of memory'}{hint}")

    def _answer(self, ask: Callable[[], "Reply"]) -> None:
        """Shows a reply as it comes. Ctrl-C ends it; what has come stays in the conversation."""
        before = self._session.messages
        reply = None
        try:
            reply = self.reply = ask()
            if reply.n_dropped:
                self._note(f"(the context is full: dropped {counted(reply.n_dropped, 'message')}, the oldest)")
            with unechoed():
                AnswerWriter(self._out, reply.parser(), self._thinking).write(reply)
            self._out.write("\n")
        except KeyboardInterrupt:
            pass
        finally:
            self._session.end_reply()
            answered = reply is not None and bool(reply.text)
            if not answered:  # two messages of the user in a row are more than some templates take
                self._session.messages = before
        if not answered:
            self._note("(no answer; the message isn't kept)")
        elif reply is not None and reply.finish_reason == "context":
            self._note(f"(the context of {self._model.n_ctx} tokens is full)")
        if self._verbose:
            self._stats("")

    def _note(self, text: str) -> None:
        """A line of the program's own: to the terminal, not among answers that go elsewhere."""
        print(visible(text), file=self._out if self._out.isatty() else sys.stderr, flush=True)

    # What commands do with what follows them

    def _help(self, _: str) -> None:
        width = max(map(len, _COMMANDS)) + max(len(takes) for takes, _, _ in _COMMANDS.values())
        lines = [f"{name + ' ' + takes:{width}}  {does}" for name, (takes, _, does) in _COMMANDS.items()]
        self._note("\n".join([*lines, *_KEYS]))

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        settings = self._settings()
        if name and name not in settings:
            raise Error(f"there is no option {name}; /set shows all")
        if not value:
            shown = {name: settings[name]} if name else settings
            width = max(map(len, shown))
            self._note("\n".join(f"{name:{width}}  {_written(value)}" for name, value in shown.items()))
        elif name == "system":
            new = [] if value == "none" else [{"role": "system", "content": unquoted(value)}]
            self._session.messages = [*new, *self._without_system()]
        elif name == "thinking":
            self._thinking = _read_switch(name, value)
        elif name == "drop_oldest":
            self._session.drop_oldest = _read_switch(name, value)
        elif name == "stop":
            self._options[name] = read_texts(value)
        elif name == "max_tokens":
            self._options[name] = _read_limit(value)
        else:
            self._options[name] = read_value(name, value)

    def _settings(self) -> dict[str, Any]:
        """What `/set` changes, by name."""
        messages = self._session.messages
        values = {
            "system": messages[0]["content"] if len(self._without_system()) < len(messages) else None,
            "thinking": self._thinking,
            "drop_oldest": self._session.drop_oldest,
            "max_tokens": self._options.get("max_tokens"),
            "stop": self._options.get("stop"),
        }
        return values | {name: self._options.get(name, option.default) for name, (_, option) in option_table().items()}

    def _without_system(self) -> "list[Message]":
        messages = self._session.messages
        return messages[1:] if messages and messages[0]["role"] == "system" else messages

    def _clear(self, _: str) -> None:
        messages = self._session.messages
        self._session.messages = messages[: len(messages) - len(self._without_system())]

    def _save(self, file: str) -> None:
        path = _path(file)
        if path.is_file():
            with open(path, "rb") as old:
                if old.read(1) not in (b"{", b""):
                    raise Error(f"{path}: not overwritten, for it is no saved conversation")
        self._session.save(path)
        self._note(f"({counted(len(self._session.messages), 'message')} in {path})")

    def _load(self, file: str) -> None:
        path = _path(file)
        self._session.load(path)
        self._note(f"({counted(len(self._session.messages), 'message')} from {path})")

    def _stats(self, _: str) -> None:
        self._note("\n".join(timings(self._model, self.reply)))

    def _undo(self, _: str) -> None:
        self._session.undo()
        self._note(f"({counted(len(self._session.messages), 'message')} left)")

    def _retry(self, _: str) -> None:
        self._answer(lambda: self._session.retry(stream=True, **self._options))

    def _bye(self, _: str) -> None:
        self._goes_on = False


#: by name: what follows it, the function, what it does
_COMMANDS: dict[str, tuple[str, Callable[[Talk, str], None], str]] = {
    "/help": ("", Talk._help, "Lists these commands."),
    "/system": ("TEXT", lambda talk, text: talk._set(f"system {text}"), "The system message from now on; none ends it."),
    "/save": ("FILE", Talk._save, "Writes the conversation to a file."),
    "/load": ("FILE", Talk._load, "Goes on with a conversation from a file."),
    "/set": ("OPTION VALUE", Talk._set, "Changes an option; without VALUE shows it, alone shows all."),
    "/stats": ("", Talk._stats, "Speed and sizes of the last answer."),
    "/retry": ("", Talk._retry, "Answers the last message once more."),
    "/undo": ("", Talk._undo, "Forgets the last message and its answer."),
    "/clear": ("", Talk._clear, "Forgets all but the system message."),
    "/bye": ("", Talk._bye, "Ends, as Ctrl-D does."),
}
_OTHER_NAMES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
_KEYS = (
    "",
    "Alt-Enter, or a backslash and Enter, begins a new line; so does Enter between two lines of",
    'which the first begins and the last ends with """. Ctrl-C stops an answer.',
)


def _path(file: str) -> Path:
    if not file:
        raise Error("name a file")
    return Path(file).expanduser()


def _read_switch(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise Error(f"{name} is on or off")
    return text == "on"


def _read_limit(text: str) -> int | None:
    n = read_number(text)
    if n is not None and (not isinstance(n, int) or n < -1):
        raise Error("max_tokens must be a whole number, 0 or more, or none")
    return n


def _written(value: Any) -> str:
    """A value as `/set` takes it."""
    if value is None or value in ((), {}, []):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return " ".join(f"{i}={bias}" for i, bias in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(json.dumps(text, ensure_ascii=False) for text in value)
    return str(value)
