"""Conversations: a reply to messages, and a session that keeps them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ContextFullError, Error
from ..file import writing_aside
from .generation import Generation
from .options import ChatOptions, with_options
from .replies import Event, Family, ReplyParser
from .request import Request
from .scheduler import Scheduler

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .model import Model

#: A message of a conversation, as chat templates and OpenAI's API have it: `role` and `content`, and whatever else the
#: model's template knows, such as `tool_calls`.
Message: TypeAlias = Mapping[str, Any]

#: Tokens that a session keeps free for a reply whose length isn't limited, but no more than a quarter of the context.
_REPLY_ROOM = 256


class Reply(Generation):
    """A model's reply to a conversation: a generation whose text has thoughts, an answer and calls of tools.

    The text has the marks that tell them apart, also those that are control tokens.

    Attributes
    ----------
    n_dropped : int
        Messages that a session has left out, since they didn't fit into the context.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        request: Request,
        prompt: str,
        family: Family,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ):
        super().__init__(scheduler, request)
        self.prompt = prompt
        self.n_dropped = 0
        self._family, self._tools = family, tools

    def parser(self) -> ReplyParser:
        """What tells the parts of the text apart as its pieces come."""
        return ReplyParser(self._family, self._tools, self.prompt)

    def _events(self) -> list[Event]:
        """The parts of the text taken so far; while it goes on, those that are certain."""
        parser = self.parser()
        events = parser.push(self.text)
        return events if self.finish_reason is None else [*events, *parser.flush()]

    @property
    def answer(self) -> str:
        """The text taken so far, without thoughts and calls."""
        return _text(self._events(), "content")

    @property
    def thinking(self) -> str:
        """The thoughts taken so far, where the model's family marks them in a known way; see `replies.FAMILIES`."""
        return _text(self._events(), "reasoning")

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of tools that are whole so far, as OpenAI's API has them; none if no tools were given."""
        return self._calls(self._events())

    def _calls(self, events: list[Event]) -> list[dict[str, Any]]:
        calls = []
        for i, event in enumerate(event for event in events if event.kind == "call"):
            # Mistral's templates want ids of nine letters and digits. The same reply has the same ids.
            said = "\0".join((self.prompt, self.text, str(self.choice), str(i)))
            key = hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()[:9]
            calls.append({"id": key, "type": "function", "function": {"name": event.name, "arguments": event.text}})
        return calls

    @property
    def message(self) -> dict[str, Any]:
        """The reply taken so far as a message; with `reasoning_content` and `tool_calls`, if there are any."""
        events = self._events()
        message: dict[str, Any] = {"role": "assistant", "content": _text(events, "content")}
        if thinking := _text(events, "reasoning"):
            message["reasoning_content"] = thinking
        if calls := self._calls(events):
            message["tool_calls"] = calls
        return message


class Session:
    """A conversation with a model. Made by `Model.session`.

    What has been said isn't computed again, as long as the model's room for keys and values lasts.

    Attributes
    ----------
    drop_oldest : bool
        Whether the oldest messages are dropped when the context is full.
    n_dropped : int
        How many messages have been.
    """

    def __init__(self, model: "Model", messages: Iterable[Message] = (), drop_oldest: bool = False):
        self._model = model
        self._messages: list[Message] = checked_messages(messages)
        self._reply: Reply | None = None
        self.drop_oldest = drop_oldest
        self.n_dropped = 0

    @property
    def messages(self) -> list[Message]:
        """The messages so far. Of a reply that goes on, what has been taken of it; of one that gave nothing, nothing.

        May be set: the conversation goes on with these."""
        if self._reply is None or not self._reply.text:
            return list(self._messages)
        return [*self._messages, self._reply.message]

    @messages.setter
    def messages(self, messages: Iterable[Message]) -> None:
        checked = checked_messages(messages)
        self.end_reply()
        self._messages = checked

    @with_options(ChatOptions)
    def send(self, message: str | Message, *, stream: bool = False, **options: "Unpack[ChatOptions]") -> Reply:
        """Says something; the model's reply.

        Parameters
        ----------
        message : str or mapping
            What the user says; or a whole message, such as a tool's result.
        stream : bool
            False: the reply is whole. True: iterate over it for its pieces; what has been taken of it when the next
            message is sent belongs to the conversation.
        **options

        Raises
        ------
        ContextFullError
            The conversation doesn't fit into the context any more. The session is as before.
        """
        self.end_reply()
        new = {"role": "user", "content": message} if isinstance(message, str) else message
        return self._reply_to([*self._messages, *checked_messages([new])], stream, **options)

    @with_options(ChatOptions)
    def retry(self, *, stream: bool = False, **options: "Unpack[ChatOptions]") -> Reply:
        """Another reply to the user's last message, in place of the last one.

        Parameters
        ----------
        stream : bool
            As for `send`.
        **options

        Raises
        ------
        ContextFullError
            As for `send`.
        Error
            No user has said anything.
        """
        self.end_reply()
        return self._reply_to(self._messages[: self._last_said() + 1], stream, **options)

    def _reply_to(self, messages: list[Message], stream: bool, **options: "Unpack[ChatOptions]") -> Reply:
        """A reply to the last of these messages, which are the conversation from now on, if they fit."""
        n_dropped = 0
        while True:
            try:
                reply = self._model._reply(messages, _REPLY_ROOM, **options)
                break
            except ContextFullError:
                shorter = _without_oldest(messages) if self.drop_oldest else messages
                if len(shorter) == len(messages):
                    raise
                n_dropped += len(messages) - len(shorter)
                messages = shorter
        self._messages, self._reply = messages, reply
        self.n_dropped += n_dropped
        reply.n_dropped = n_dropped
        return reply if stream else reply.run()

    def end_reply(self) -> None:
        """Ends the reply that is under way; what was taken of it belongs to the conversation."""
        if self._reply is not None:
            if self._reply.finish_reason is None:
                self._reply.cancel()
            self._messages, self._reply = self.messages, None

    def undo(self) -> None:
        """Forgets the last message of the user and everything after it."""
        self.end_reply()
        del self._messages[self._last_said() :]

    def _last_said(self) -> int:
        """The place of the user's last message."""
        said = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if not said:
            raise Error("the conversation has no message of a user")
        return said[-1]

    def save(self, path: str | Path) -> None:
        """Writes the messages to a file, as JSON.

        Raises
        ------
        Error
            The file can't be written.
        """
        with writing_aside(Path(path)) as aside:
            aside.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n", "utf-8")

    def load(self, path: str | Path) -> None:
        """Goes on with the messages that `save` wrote, in place of these.

        Raises
        ------
        Error
            The file can't be read, or isn't one.
        """
        try:
            self.messages = json.loads(Path(path).read_text("utf-8"))["messages"]
        except OSError as error:
            raise Error(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, RecursionError, Error):
            raise Error(f"{path}: not a saved conversation") from None


def _text(events: list[Event], kind: str) -> str:
    return "".join(event.text for event in events if event.kind == kind)


def checked_messages(messages: Iterable[Message]) -> list[Message]:
    """The messages as a list, contents in parts as one text: many templates would write out the parts' Python.

    Raises
    ------
    Error
        One isn't a mapping with a role, has no content, unless it is the assistant's, or one that isn't text.
    """
    if isinstance(messages, (str, Mapping)):
        raise Error("messages are a list of mappings with role and content")
    checked = list(messages)
    for i, message in enumerate(checked):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Error(f"message {i + 1} is no mapping with a role and content")
        content = message.get("content")
        if content is None and message["role"] != "assistant":
            raise Error(f"message {i + 1}, of {message['role']!r}, has no content")
        if not isinstance(content, (str, NoneType)):
            checked[i] = {**message, "content": _joined(content, f"message {i + 1}")}
    return checked


def _joined(content: object, where: str) -> str:
    """The text of a content in parts."""
    if not isinstance(content, Sequence):
        raise Error(f"{where}: a content is a text, or a list of parts that are text, not {type(content).__name__}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Error(f"{where}: a part of type {kind!r}; models see text alone")
        texts.append(text)
    return "\n".join(texts)


def _without_oldest(messages: Sequence[Message]) -> list[Message]:
    """Without the oldest exchange: the first message of a user and what follows up to the next one. The same, if there is
    only one."""
    said = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return [*messages[: said[0]], *messages[said[1] :]] if len(said) > 1 else list(messages)
