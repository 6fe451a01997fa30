"""The fields of OpenAI's requests: tables by which servers and batches check them, and what they mean for a generation.

A field's form is a JSON schema, of which `fault` knows the keywords that stand here. Null counts as left out.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

from ..errors import Error
from .options import checked_option, option_table

Schema = Mapping[str, Any]


class FieldError(Error):
    """A field of a request isn't what it must be.

    Attributes
    ----------
    name : str
    """

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


def whole(least: int | None = None, most: int | None = None) -> Schema:
    """A whole number."""
    bounds = {"minimum": least, "maximum": most}
    return {"type": "integer", **{k: v for k, v in bounds.items() if v is not None}}


def list_of(items: Schema, least: int = 0) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **({"minItems": least} if least else {})}


def one_of(*schemas: Schema) -> Schema:
    """One of several forms."""
    return {"anyOf": list(schemas)}


def among(*names: str) -> Schema:
    """One of some texts."""
    return {"type": "string", "enum": list(names)}


BOOL: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
ANY: Schema = {}
TOKENS = list_of(whole(0), 1)
TEXTS = list_of(TEXT)

_KINDS = {
    "boolean": (lambda x: isinstance(x, bool), "true or false"),
    "string": (lambda x: isinstance(x, str), "a text"),
    "integer": (lambda x: not isinstance(x, bool) and isinstance(x, (int, float)) and x == x // 1, "a whole number"),
    "number": (lambda x: not isinstance(x, bool) and isinstance(x, (int, float)) and isfinite(x), "a number"),
    "object": (lambda x: isinstance(x, dict), "an object"),
    "array": (lambda x: isinstance(x, list), "a list"),
}


def fault(value: object, schema: Schema) -> str:
    """What a value must be and isn't, in words; none if it is."""
    if "anyOf" in schema:
        faults = [fault(value, one) for one in schema["anyOf"]]
        return "" if not all(faults) else " or ".join(dict.fromkeys(faults))
    if "type" not in schema:
        return ""
    is_kind, words = _KINDS[schema["type"]]
    if not is_kind(value):
        return words
    if "enum" in schema and value not in schema["enum"]:
        return "one of " + ", ".join(schema["enum"])
    least, most = schema.get("minimum", -inf), schema.get("maximum", inf)
    if schema["type"] in ("integer", "number") and not least <= value <= most:  # type: ignore[operator]
        bounds = ([f"{least} or more"] if least > -inf else []) + ([f"{most} or less"] if most < inf else [])
        return f"{words}, {' and '.join(bounds)}"
    if schema["type"] == "array":
        if len(value) < schema.get("minItems", 0):  # type: ignore[arg-type]
            return "a list that isn't empty"
        inside = next(filter(None, (fault(item, schema["items"]) for item in value)), "")  # type: ignore[attr-defined]
        return f"a list, each item {inside}" if inside else ""
    return ""


def _settled(value: Any, schema: Schema) -> Any:
    """A value of that form, with whole numbers as such: JSON doesn't tell 1.0 from 1."""
    if "anyOf" in schema:
        schema = next(one for one in schema["anyOf"] if not fault(value, one))
    if schema.get("type") == "integer":
        return int(value)
    return [_settled(item, schema["items"]) for item in value] if schema.get("type") == "array" else value


class Field(NamedTuple):
    """A field of a request: its form, and the option of a generation that it is, if it is one."""

    schema: Schema
    option: str = ""


_OPTION_SCHEMAS: dict[Any, Schema] = {
    int: whole(),
    float: NUMBER,
    int | None: whole(),
    Mapping[int, float]: one_of(OBJECT, list_of(list_of(ANY))),
    Sequence[str]: TEXTS,
}
#: other names of options, as llama.cpp's server and OpenAI's API have them
_OTHER_NAMES = {
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "typ_p": "typical_p",
    "dry_penalty_last_n": "dry_window",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "stop_sequences": "stop",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_json": "json_schema",
}
_OPTIONS: dict[str, Field] = {
    **{name: Field(_OPTION_SCHEMAS[kind], name) for name, (kind, _) in option_table().items()},
    "max_tokens": Field(whole(-1), "max_tokens"),
    "stop": Field(one_of(TEXT, TEXTS), "stop"),
    "regex": Field(TEXT, "regex"),
    "grammar": Field(TEXT, "grammar"),
    "json_schema": Field(one_of(OBJECT, TEXT), "json_schema"),
}
#: what all requests for text have in common
GENERATION: dict[str, Field] = {
    **_OPTIONS,
    **{name: _OPTIONS[option] for name, option in _OTHER_NAMES.items()},
    "model": Field(TEXT),
    "stream": Field(BOOL),
    "ignore_eos": Field(BOOL),
    "return_progress": Field(BOOL),
    "timings_per_token": Field(BOOL),
}
#: what all conversations have in common
CONVERSATION = {
    **GENERATION,
    "messages": Field(list_of(OBJECT, 1)),
    "tools": Field(list_of(OBJECT)),
    "chat_template_kwargs": Field(OBJECT),
}
_OPENAI = {"n": Field(whole(1, 128)), "stream_options": Field(OBJECT)}

CHAT = {
    **CONVERSATION,
    **_OPENAI,
    "logprobs": Field(BOOL),
    "top_logprobs": Field(whole(0, 20)),
    "response_format": Field(OBJECT),
    "tool_choice": Field(one_of(TEXT, OBJECT)),
    "parallel_tool_calls": Field(BOOL),
    "reasoning_effort": Field(TEXT),
    "add_generation_prompt": Field(BOOL),
    "continue_final_message": Field(BOOL),
}
RESPONSES = {
    **CONVERSATION,
    "input": Field(one_of(TEXT, list_of(OBJECT))),
    "instructions": Field(TEXT),
    "tool_choice": Field(one_of(TEXT, OBJECT)),
    "parallel_tool_calls": Field(BOOL),
    "text": Field(OBJECT),
    "reasoning": Field(OBJECT),
    "metadata": Field(OBJECT),
    "previous_response_id": Field(TEXT),
    "top_logprobs": Field(whole(0, 20)),
}
_MIXED = list_of(one_of(whole(0), TEXT), 1)
PROMPT = one_of(TEXT, OBJECT, _MIXED, list_of(one_of(TEXT, OBJECT, _MIXED), 1))
COMPLETION = {
    **GENERATION,
    **_OPENAI,
    "prompt": Field(PROMPT),
    "echo": Field(BOOL),
    "logprobs": Field(whole(0, 20)),
    "best_of": Field(whole(1, 128)),
    "suffix": Field(TEXT),
    "response_format": Field(OBJECT),
}
EMBEDDINGS = {
    "model": Field(TEXT),
    "input": Field(PROMPT),
    "content": Field(PROMPT),
    "encoding_format": Field(among("float", "base64")),
    "dimensions": Field(whole(1)),
}


def read(body: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The known fields of a request, checked.

    Raises
    ------
    FieldError
        One isn't of its form.
    """
    known = {name: body[name] for name in fields if body.get(name) is not None}
    for name, value in known.items():
        if words := fault(value, fields[name].schema):
            raise FieldError(f"{name} must be {words}", name)
    return {name: _settled(value, fields[name].schema) for name, value in known.items()}


def options_of(
    values: Mapping[str, Any], fields: Mapping[str, Field], encode: Callable[[str], list[int]] | None = None
) -> dict[str, Any]:
    """The options of a generation among a request's fields.

    Parameters
    ----------
    values : mapping
        Checked fields.
    fields : mapping of str to Field
    encode : callable, optional
        Gives the tokens of texts that have a bias.

    Raises
    ------
    FieldError
        A value is out of its range.
    """
    options: dict[str, Any] = {}
    for name, value in values.items():
        option = fields[name].option
        if not option:
            continue
        try:
            options[option] = _bias(value, encode) if option == "logit_bias" else value
            if option == "seed" and value < 0:  # a random one
                options[option] = None
            if option in option_table():
                options[option] = checked_option(option, options[option])
        except Error as error:
            raise FieldError(str(error).replace(option, name, 1), name) from None
    return options


def format_options(form: Mapping[str, Any] | None, where: str = "response_format") -> dict[str, Any]:
    """What a `response_format` means for a generation.

    Raises
    ------
    FieldError
        It isn't understood.
    """
    if form is None:
        return {}
    kind = form.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        schema = form.get("schema")
        if schema is not None and not isinstance(schema, dict):
            raise FieldError(f"{where}.schema must be an object", where)
        return {"json_schema": schema or True}
    if kind == "json_schema":
        inside = form.get("json_schema", form)
        schema = inside.get("schema") if isinstance(inside, dict) else None
        if not isinstance(schema, dict):
            raise FieldError(f"{where}: a json_schema needs a schema", where)
        return {"json_schema": schema}
    raise FieldError(f'{where}.type must be "text", "json_object" or "json_schema"', where)


def _bias(value: Any, encode: Callable[[str], list[int]] | None) -> dict[int, float]:
    """Biases by token, from pairs or an object; that of a text is one of each of its tokens. In an object, a number is a
    token."""
    made: dict[int, float] = {}
    try:
        for key, bias in value.items() if isinstance(value, dict) else value:
            is_text = isinstance(key, str) and not (isinstance(value, dict) and key.isdecimal())
            tokens = encode(key) if is_text and encode is not None else [int(key)]
            made |= dict.fromkeys(tokens, -inf if bias is False else bias)
    except (TypeError, ValueError):
        raise Error("logit_bias must be token ids, or texts, with numbers") from None
    return made
