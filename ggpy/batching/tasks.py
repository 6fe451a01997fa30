"""What a row asks for: its columns, checked and put together with the options of all rows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from ..errors import Error
from ..generate.options import ChatOptions, GenerationOptions, HasJSONSchema, option_table
from .rows import Row

#: what is made of a row: a text's continuation, a reply, a vector, a choice among labels
Kind: TypeAlias = Literal["text", "chat", "embed", "label"]

#: that a row can have: all but objects of Python's, and what replies take beside
_OPTIONS = set(ChatOptions.__annotations__) - {"sampler", "processors", "draft"}
_CHAT_ONLY = set(ChatOptions.__annotations__) - set(GenerationOptions.__annotations__)
_COLUMNS = ("id", "prompt", "messages", "options", "labels")


@dataclass(frozen=True)
class Settings:
    """What holds for all rows of a batch.

    Attributes
    ----------
    options : mapping
        Of `ChatOptions`, for rows that don't say otherwise.
    embed : bool
        Whether rows are embedded.
    labels : tuple of str
        If there are any, which of them follows each row's prompt.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    embed: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        options = {n: v.model_json_schema() if isinstance(v, HasJSONSchema) else v for n, v in self.options.items()}
        table = option_table()
        said = {n: v for n, v in checked(options).items() if n not in table or v != table[n][1].default}
        object.__setattr__(self, "options", said)
        if self.embed and self.labels:
            raise Error("rows are embedded or get labels, not both")

    def digest(self, model: str) -> str:
        """What tells these settings, with a model of that digest, from others."""
        from .. import __version__

        return _digest([__version__, model, asdict(self)])


@dataclass(frozen=True)
class Task:
    """A row's request.

    Attributes
    ----------
    id : int or str
    key : str
        Tells the row with its model and settings from others with its id.
    kind : Kind
    given : str, list of int or list of messages
        The prompt. In OpenAI's form of embeddings, a list of them.
    options : dict
        The row's and the batch's, put together.
    labels : tuple of str
    error : str
        Why there can't be an answer; "" if there can be.
    url : str
        Where OpenAI's API has such requests, if it is one.
    """

    id: int | str
    key: str
    kind: Kind = "text"
    given: Any = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    error: str = ""
    url: str = ""

    @property
    def name(self) -> str:
        """The id in messages."""
        return f"id {json.dumps(self.id)}"


def id_of(row: Row, column: str) -> int | str:
    """A row's id; where it has none that can be used, "row" and its place."""
    found: Any = row.columns.get(column)
    return found if is_id(found) else f"row {row.place}"


def is_id(value: object) -> bool:
    """Whether a value can be an id: a whole number or a text."""
    return isinstance(value, (int, str)) and not isinstance(value, bool) and value != ""


def task_of(row: Row, settings: Settings, digest: str) -> Task:
    """The task of a row with the columns id, prompt or messages, options and labels.

    A row without an id is known by its place. Other columns are the user's own.
    """
    id, columns = id_of(row, "id"), row.columns
    try:
        if row.error:
            raise Error(row.error)
        if columns.get("id") is not None and not is_id(columns["id"]):
            raise Error(f"an id is a text or a whole number, not {columns['id']!r}")
        for name in columns:
            if name in _OPTIONS:
                raise Error(f"{name} stands at the row's top; it belongs into its options")
        own = dict(_object("options", columns.get("options") or {}))
        labels = _labels(columns["labels"]) if columns.get("labels") is not None else settings.labels
        given, is_chat = _given(columns)
        kind: Kind = "embed" if settings.embed else "label" if labels else "chat" if is_chat else "text"
        if kind in ("embed", "label") and own:
            raise Error(f"options have no effect on {'an embedding' if settings.embed else 'a choice of labels'}")
        if kind == "embed" and is_chat:
            raise Error("what is embedded is a prompt, not messages")
        return made(id, kind, given, own, settings, digest, labels)
    except Error as error:
        return failed(id, row, str(error), digest)


def made(
    id: int | str,
    kind: Kind,
    given: Any,
    own: Mapping[str, Any],
    settings: Settings,
    digest: str,
    labels: Sequence[str] = (),
) -> Task:
    """A task, with the row's own options put before those of the batch.

    Raises
    ------
    Error
        An option that there isn't, or that makes no sense here.
    """
    own = checked(own)
    wrong = sorted(_CHAT_ONLY & own.keys()) if kind != "chat" else []
    if wrong:
        raise Error(f"{wrong[0]} goes with messages")
    options: dict[str, Any] = {}
    if kind in ("text", "chat"):
        options = {n: v for n, v in {**settings.options, **own}.items() if kind == "chat" or n not in _CHAT_ONLY}
        if own.get("seed") is None:
            options["seed"] = _seed(settings.options.get("seed"), id)
    try:
        key = _digest([digest, kind, given, own, list(labels)])
    except (TypeError, ValueError, RecursionError):
        raise Error("the row has values that JSON doesn't") from None
    return Task(id, key, kind, given, options, tuple(labels))


def failed(id: int | str, row: Row, message: str, digest: str) -> Task:
    """The task of a row that asks for nothing that there is."""
    return Task(id, _digest([digest, row.place if id == f"row {row.place}" else "", message]), error=message)


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names, of the kinds that JSON has for them; their ranges are seen to when they are used.

    Raises
    ------
    Error
        One that there isn't, or of another kind.
    """
    found = dict(options)
    for name, value in options.items():
        if name not in _OPTIONS:
            raise Error(f"no option {name!r}; a row can have {', '.join(sorted(_OPTIONS))}")
        if value is None:
            continue
        if name in ("regex", "grammar") and not isinstance(value, str):
            raise Error(f"{name} is a text, not {type(value).__name__}")
        if name == "stop" and not _is_texts(value):
            raise Error("stop is a text or a list of texts")
        if name == "tools" and not (isinstance(value, Sequence) and all(isinstance(t, Mapping) for t in value)):
            raise Error("tools are a list of objects")
        if name == "chat_template_kwargs":
            found[name] = dict(_object(name, value))
        if name == "logit_bias":
            found[name] = {_token(i): bias for i, bias in _object(name, value).items()}
    return found


def _token(name: object) -> object:
    """JSON's names are texts, also where they are numbers."""
    return int(name) if isinstance(name, str) and name.isdecimal() and name.isascii() else name


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(v, str) for v in value))


def _labels(value: object) -> tuple[str, ...]:
    value = _parsed("labels", value)
    if not isinstance(value, Sequence) or not value or not all(isinstance(v, str) and v for v in value):
        raise Error("labels are a list of texts")
    if len(set(value)) < len(value):
        raise Error("the same label twice")
    return tuple(value)


def _given(columns: Mapping[str, Any]) -> tuple[Any, bool]:
    """The prompt or messages, and whether it is messages."""
    prompt, messages = columns.get("prompt"), columns.get("messages")
    if (prompt is None) == (messages is None):
        raise Error("a row has a prompt or messages" + ("" if prompt is None else ", not both"))
    if prompt is None:
        found = _parsed("messages", messages)
        if not isinstance(found, Sequence) or not found or not all(isinstance(m, Mapping) for m in found):
            raise Error("messages are a list of objects with role and content")
        return list(found), True
    if not isinstance(prompt, str) and not is_ids(prompt):
        raise Error(f"a prompt is a text or a list of token ids, not {type(prompt).__name__}")
    return prompt, False


def is_ids(value: object) -> bool:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _object(name: str, value: object) -> Mapping[str, Any]:
    value = _parsed(name, value)
    if not isinstance(value, Mapping):
        raise Error(f"{name} is an object, not {type(value).__name__}")
    return value


def _parsed(name: str, value: object) -> object:
    """Columns of tables have nested values as JSON's text, often."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Error(f"{name} is a text that isn't JSON") from None


def _seed(seed: int | None, id: int | str) -> int:
    """A row's own seed: its text doesn't depend on its place, its company or who computes it."""
    return int(_digest([seed or 0, id])[:8], 16)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def has_columns(columns: Mapping[str, Any]) -> bool:
    """Whether a row can be meant for a batch: there is something to continue."""
    return any(columns.get(name) is not None for name in ("prompt", "messages"))
