"""From a conversation, as APIs have it, to a prompt, and to what reads the reply."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import Error
from ..generate.generation import Generation
from ..generate.model import Model
from ..generate.replies import FAMILIES, Event, Family, ForcedCalls, ReplyParser, calls_schema
from .errors import invalid, too_long

#: parts of a message's content that are text, and those that name something else than text
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
_OTHERS = {"image_url": "image", "input_image": "image", "image": "image", "input_audio": "audio", "audio": "audio"}

# What models are told of tools whose template doesn't know any; the form is that of the family "hermes".
_TOOLS_TEXT = """You may call functions. Their signatures, one a line:
<tools>
{tools}
</tools>
To call one, answer with a JSON object within tags, and nothing else:
<tool_call>
{{"name": <function's name>, "arguments": <its arguments as an object>}}
</tool_call>"""


#: what templates are given anyway
_OWN = {"self", "messages", "tools", "add_generation_prompt"}
# Between the parts of a required call stands one space at most.
_WRITTEN = {"whitespace_pattern": " ?", "item_separator": ",", "key_separator": ":"}


@dataclass
class Conversation:
    """What a reply is wanted to.

    Attributes
    ----------
    messages : list of dict
        As chat templates have them: `content` is a text, calls' arguments are objects.
    tools : list of dict
        Functions, as OpenAI's chat API has them.
    choice : str
        "auto", "none", "required"; or the name of the one function to be called.
    parallel : bool
        Whether several calls may come at once.
    template_kwargs : dict
        Whatever else the template knows.
    continues : bool
        Whether a last message of the assistant is gone on with.
    begins : bool
        Whether the prompt ends with the beginning of an answer, where none is gone on with.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"
    parallel: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    continues: bool = True
    begins: bool = True


def text_of(content: object, where: str, between: str = "\n") -> str:
    """The text of a message's content: itself, or its parts that are text, with something between them.

    Raises
    ------
    APIError
        It is neither text nor parts, or a part isn't text: images and the like aren't understood.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise invalid(f"{where} must be a text or a list of parts", where)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        text = next((part[key] for key in ("text", "refusal") if isinstance(part.get(key), str)), None) if kind else None
        if kind in _TEXT_PARTS and text is not None:
            texts.append(text)
        elif kind in _TEXT_PARTS or not isinstance(kind, str):
            raise invalid(f"{where}: a part needs a type and a text", where)
        else:
            raise invalid(f"{where}: {_OTHERS.get(kind, kind)} input is not supported, only text", where)
    return between.join(texts) if all(isinstance(p, dict) for p in content) else "".join(texts)


def message_of(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message of OpenAI's chat API as templates want it.

    Raises
    ------
    APIError
        It has no role, or a content that isn't understood.
    """
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}: a message needs a role", where)
    calls = message.get("tool_calls")
    if message.get("content") is None and role != "assistant":
        raise invalid(f"{where}: a message of {role!r} needs a content", where)
    if message.get("content") is None and not calls and not message.get("reasoning_content"):
        raise invalid(f"{where}: a message of the assistant needs a content or tool_calls", where)
    made: dict[str, Any] = {
        **{key: value for key, value in message.items() if value is not None},
        "role": "system" if role == "developer" else role,
        "content": text_of(message.get("content"), f"{where}.content"),
    }
    made.pop("tool_calls", None)
    if calls is not None:
        if not isinstance(calls, list):
            raise invalid(f"{where}.tool_calls must be a list", where)
        if calls:
            made["tool_calls"] = [_call_of(call, f"{where}.tool_calls") for call in calls]
    return made


def _call_of(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{where}: a call needs a function with a name", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what isn't JSON stays what the model wrote
            arguments = json.loads(arguments or "{}")
    function = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "type": "function", "function": function}  # type: ignore[dict-item]


def functions_of(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The functions among tools; kinds of tools that are the API's own (web search and the like) are left out.

    Raises
    ------
    APIError
        A function has no name.
    """
    functions = []
    for i, tool in enumerate(tools or ()):
        if tool.get("type", "function") != "function":
            continue
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise invalid(f"tools[{i}]: a function needs a name", "tools")
        known = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        if not isinstance(known.get("parameters", {}), dict):
            raise invalid(f"tools[{i}]: parameters must be a JSON schema", "tools")
        known.setdefault("parameters", {"type": "object", "properties": {}})
        functions.append({"type": "function", "function": known})
    return functions


def choice_of(choice: object, functions: Sequence[Mapping[str, Any]]) -> str:
    """A `tool_choice`, as `Conversation.choice` has it.

    Raises
    ------
    APIError
        It isn't understood, or names a function that isn't there.
    """
    if choice is None:
        return "auto"
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            return "required" if choice.get("mode") == "required" and functions else "auto"
        function = choice.get("function", choice)
        named = function.get("name") if isinstance(function, dict) else None
        if not isinstance(named, str) or named not in [f["function"]["name"] for f in functions]:
            raise invalid("tool_choice names a function that is not among the tools", "tool_choice")
        return named
    if choice not in ("auto", "none", "required"):
        raise invalid('tool_choice must be "auto", "none", "required" or name a function', "tool_choice")
    if choice == "required" and not functions:
        raise invalid("tool_choice is required, but there are no tools", "tool_choice")
    return str(choice)


class Prompt:
    """A conversation as text, and what reads the replies to it.

    Attributes
    ----------
    text : str
    forced : dict or None
        The JSON schema that a reply must keep to, since it must be a call.
    """

    def __init__(self, model: Model, conversation: Conversation, constrained: bool):
        self.family, _ = model._family
        self._tools = conversation.tools if conversation.tools and conversation.choice != "none" else None
        self.forced = None
        template = model.chat_template
        messages = list(conversation.messages)
        if taken := sorted(_OWN & conversation.template_kwargs.keys()):
            raise invalid(f"chat_template_kwargs can't have {taken[0]}", "chat_template_kwargs")
        knows_tools = template is not None and (template.tool_use is not None or "tools" in template.source)
        for_template = self._tools if knows_tools else None
        if self._tools and not knows_tools:
            self.family = FAMILIES["hermes"]
            messages = _with_tools(messages, self._tools)
        start = ""
        if conversation.continues and len(messages) > 1 and messages[-1]["role"] == "assistant":
            last = messages[-1]
            if not last.get("tool_calls"):
                start = messages.pop()["content"]
        kwargs = {**conversation.template_kwargs, "add_generation_prompt": conversation.begins or bool(start)}
        self.text = model.chat_prompt(messages, tools=for_template, chat_template_kwargs=kwargs)
        if self._tools and conversation.choice not in ("auto", "none"):
            self.forced = _forced_schema(self._tools, conversation.choice, conversation.parallel)
        self._free = not (constrained or self.forced)
        if not self._free or start:
            self.text += _answer_start(self.family, self.text)
        self.text += start

    @property
    def bound_tools(self) -> list[dict[str, Any]] | None:
        """The tools whose calls in a reply are bound to schemas, as they begin."""
        return self._tools if self._free else None

    def parser(self, growing: bool) -> "Parser":
        """What reads one reply; `growing`: its calls are given as they grow."""
        if self.forced:
            return ForcedCalls(growing)
        return ReplyParser(self.family, self._tools, self.text, growing) if self._free else Plain()


class Plain:
    """Reads a reply that is all answer."""

    def push(self, text: str) -> list[Event]:
        """Takes the next piece; what is certain now."""
        return [Event("content", text)] if text else []

    def flush(self) -> list[Event]:
        """What was held back, at the end."""
        return []


Parser = ReplyParser | ForcedCalls | Plain


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with what a model must know of tools whose template doesn't say it."""
    text = _TOOLS_TEXT.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    made = []
    for message in messages:
        if message["role"] == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        elif calls := message.get("tool_calls"):
            parts = [json.dumps(c["function"], ensure_ascii=False) for c in calls]
            written = "\n".join(f"<tool_call>\n{part}\n</tool_call>" for part in parts)
            message = {"role": message["role"], "content": f"{message['content']}\n{written}".strip()}
        made.append(message)
    if made and made[0]["role"] == "system":
        return [{**made[0], "content": f"{made[0]['content']}\n\n{text}"}, *made[1:]]
    return [{"role": "system", "content": text}, *made]


def _forced_schema(tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls."""
    call = calls_schema([tool for tool in tools if choice in ("required", tool["function"]["name"])])
    most = {} if parallel and choice == "required" else {"maxItems": 1}
    items = {"anyOf": call["anyOf"]}
    return {"type": "array", "items": items, "minItems": 1, **most, "$defs": call["$defs"], "x-guidance": _WRITTEN}


def _answer_start(family: Family, prompt: str) -> str:
    """What must follow a prompt so that it goes on with the answer itself, without thoughts."""
    if family.channels:
        return "<|channel|>final<|message|>"
    end = next((end for begin, end in family.thoughts if prompt.rstrip().endswith(begin.rstrip())), "")
    return f"\n{end}\n\n" if end else ""


def replies(model: Model, prompt: Prompt, options: Mapping[str, Any], n: int) -> list[Generation]:
    """Begins n replies.

    Raises
    ------
    APIError
        The prompt doesn't fit into the context.
    Error
        An option isn't understood.
    """
    if prompt.forced:
        given = [name for name in ("json_schema", "regex", "grammar") if name in options]
        if given:
            raise Error(f"a call is required, so that {given[0]} can't be kept to")
        options = {**options, "json_schema": prompt.forced}
    n_prompt = len(model.tokenizer.encode_prompt(prompt.text))
    if n_prompt >= model.n_ctx:
        raise too_long(n_prompt, model.n_ctx)
    family, tools = prompt.family, prompt.bound_tools
    return [model._reply_to(prompt.text, 0, tools, family, **seeded(options, i)) for i in range(n)]


def seeded(options: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The options of one of several generations: the first has the seed, the next the seed and one, and so on."""
    seed = options.get("seed")
    return dict(options) if seed is None else {**options, "seed": seed + place}
