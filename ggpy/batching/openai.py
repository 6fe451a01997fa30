"""OpenAI's batch files: a request in each line, and the line that answers it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import Error
from ..generate.fields import CHAT, COMPLETION, EMBEDDINGS, RESPONSES, Field, format_options, options_of, read
from .rows import Row
from .tasks import Kind, Settings, Task, failed, id_of, is_id, is_ids, made

#: where requests go: what is made of them, the field of the body that holds the prompt, and what fields there are
_URLS: dict[str, tuple[Kind, str, Mapping[str, Field]]] = {
    "/v1/completions": ("text", "prompt", COMPLETION),
    "/v1/chat/completions": ("chat", "messages", CHAT),
    "/v1/responses": ("chat", "input", RESPONSES),
    "/v1/embeddings": ("embed", "input", EMBEDDINGS),
}

#: fields that say more than an option does
_READ = ("logprobs", "top_logprobs", "response_format", "text", "encoding_format", "instructions")
#: fields that are columns of ours
_SAME = ("tools", "chat_template_kwargs")
#: fields that don't change the answer
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "include")
#: fields that must have a value, which is what there is
_FIXED: dict[str, Sequence[object]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto",),
    "background": (False,),
    "truncation": ("disabled",),
}


def is_request(columns: Mapping[str, Any]) -> bool:
    """Whether a line is one of OpenAI's."""
    return "custom_id" in columns and "body" in columns


def task_of(row: Row, settings: Settings, digest: str) -> Task:
    """The task of a request's line."""
    id, line = id_of(row, "custom_id"), row.columns
    try:
        if row.error:
            raise Error(row.error)
        if not is_id(line.get("custom_id")):
            raise Error("custom_id is missing")
        body, url = line.get("body"), line.get("url")
        if line.get("method", "POST") != "POST" or not isinstance(url, str) or url not in _URLS:
            raise Error(f"{line.get('method')} {url}; there is POST {', '.join(_URLS)}")
        if not isinstance(body, Mapping):
            raise Error("body is an object")
        kind, column, fields = _URLS[url]
        if body.get(column) is None:
            raise Error(f"body has no {column}")
        own = _options(body, column, fields)
        given = body[column]
        digest = f"{digest} {url}"
        if kind == "embed":
            given = [given] if isinstance(given, str) or (given and is_ids(given)) else given
            if not isinstance(given, list) or not given or not all(isinstance(g, str) or is_ids(g) for g in given):
                raise Error("input is a text, token ids or a list of them")
            return Task(id, made(id, kind, given, {}, settings, digest).key, kind, given, own, url=url)
        if kind == "text" and not isinstance(given, str) and not is_ids(given):
            raise Error("prompt is one text, or its token ids")
        if url == "/v1/responses":
            given = _items(given, own.pop("instructions", None))
            own |= {"tools": [_nested(tool) for tool in own["tools"]]} if "tools" in own else {}
        if kind == "chat":
            given = _messages(given)
        return replace(made(id, kind, given, own, settings, digest), url=url)
    except Error as error:
        return failed(id, row, str(error), digest)


def _messages(given: object) -> list[Any]:
    if not isinstance(given, list):
        raise Error("messages are a list")
    is_developer = [isinstance(m, Mapping) and m.get("role") == "developer" for m in given]
    return [{**m, "role": "system"} if renamed else m for m, renamed in zip(given, is_developer, strict=True)]


def _items(given: object, instructions: str | None) -> list[Any]:
    """The messages that a response is wanted to."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise Error("input is a text or a list of messages")
    for i, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, Mapping) else type(item).__name__
        if kind != "message":
            raise Error(f"input[{i}] of type {kind!r} can't be had, only messages")
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    return [*system, *({"role": item.get("role"), "content": item.get("content")} for item in items)]


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat completions have it."""
    if tool.get("type") != "function":
        raise Error(f"a tool of type {tool.get('type')!r} can't be had")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _options(body: Mapping[str, Any], column: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """What a body says beside its prompt."""
    said = {name: value for name, value in body.items() if name not in (column, *_IGNORED) and value is not None}
    try:
        for name, value in said.items():
            if name in _FIXED and value not in _FIXED[name]:
                raise Error(f"{name} {value!r} can't be had")
            known = name in fields and (fields[name].option or name in (*_READ, *_SAME))
            if name not in _FIXED and not known:
                raise Error(f"{name} isn't known")
        values = read(said, {name: field for name, field in fields.items() if name not in _FIXED})
        own = {**options_of(values, fields), **format_options(values.get("response_format"))}
        own |= format_options(values.get("text", {}).get("format"), "text.format")
    except Error as error:
        raise Error(f"body: {error}") from None
    # A number in completions; in chats, whether there are any, and how many of the likeliest beside.
    logprobs = values.get("top_logprobs", values.get("logprobs"))
    if logprobs is not None and logprobs is not False:
        own["logprobs"] = 0 if logprobs is True else logprobs
    return own | {name: values[name] for name in (*_SAME, "encoding_format", "instructions") if name in values}


# Results


def result_of(task: Task, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The line for an answer; see `answers`. It doesn't say when it was made: the same request has the same line."""
    if task.error:
        error = {"code": "invalid_request", "message": task.error}
        return {"id": f"batch_req_{task.key}", "custom_id": task.id, "response": None, "error": error}
    status = 400 if "error" in answer else 200
    if status == 200:
        body = _BODIES[task.url](task, answer, model)
    else:
        body = {"error": {"message": answer["error"], "type": "invalid_request_error", "param": None, "code": None}}
    response = {"status_code": status, "request_id": f"req_{task.key}", "body": body}
    return {"id": f"batch_req_{task.key}", "custom_id": task.id, "response": response, "error": None}


def known(line: Mapping[str, Any]) -> tuple[object, object]:
    """The id and key of a result's line."""
    return line.get("custom_id"), str(line.get("id")).removeprefix("batch_req_")


def _usage(answer: Mapping[str, Any]) -> dict[str, int]:
    prompt, completion = answer.get("prompt_tokens", 0), answer.get("completion_tokens", 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _body(task: Task, answer: Mapping[str, Any], model: str, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    reason = "length" if answer.get("finish_reason") == "context" else answer.get("finish_reason")
    choice = {"index": 0, **choice, "finish_reason": "tool_calls" if answer.get("tool_calls") else reason}
    name = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{task.key}"
    return {"id": name, "object": kind, "created": 0, "model": model, "choices": [choice], "usage": _usage(answer)}


def _completion(task: Task, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    logprobs = None
    if "logprobs" in answer:
        pieces, at, offsets = answer["logprobs"], 0, []
        for piece in pieces:
            offsets.append(at)
            at += len(piece["text"])
        logprobs = {
            "tokens": [p["text"] for p in pieces],
            "token_logprobs": [p["logprob"] for p in pieces],
            "top_logprobs": [{t["text"]: t["logprob"] for t in p["top"]} for p in pieces],
            "text_offset": offsets,
        }
    return _body(task, answer, model, "text_completion", {"text": answer.get("text", ""), "logprobs": logprobs})


def _chat(task: Task, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.get("text", "")}
    message |= {"reasoning_content": answer["thinking"]} if "thinking" in answer else {}
    message |= {"tool_calls": answer["tool_calls"]} if "tool_calls" in answer else {}
    logprobs = None
    if "logprobs" in answer:
        logprobs = {"content": [{**_token(p), "top_logprobs": [_token(t) for t in p["top"]]} for p in answer["logprobs"]]}
    return _body(task, answer, model, "chat.completion", {"message": message, "logprobs": logprobs})


def _token(piece: Mapping[str, Any]) -> dict[str, Any]:
    text = piece["text"]
    return {"token": text, "logprob": piece["logprob"], "bytes": list(text.encode(errors="surrogatepass"))}


def _embeddings(task: Task, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    data = []
    for index, vector in enumerate(answer.get("embeddings", [])):
        if task.options.get("encoding_format") == "base64":
            vector = base64.b64encode(np.asarray(vector, np.float32).tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    prompt = answer.get("prompt_tokens", 0)
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": prompt, "total_tokens": prompt}}


def _response(task: Task, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    def item(kind: str, prefix: str, /, **facts: Any) -> dict[str, Any]:
        return {"id": f"{prefix}_{task.key}", "type": kind, "status": "completed", **facts}

    def part(kind: str, text: str, **more: Any) -> list[dict[str, Any]]:
        return [{"type": kind, "text": text, **more}]

    is_whole = answer["finish_reason"] == "stop"
    status = "completed" if is_whole else "incomplete"
    output = []
    if "thinking" in answer:
        output.append(item("reasoning", "rs", summary=[], content=part("reasoning_text", answer["thinking"])))
    if answer["text"] or "tool_calls" not in answer:
        logprobs = [{**_token(p), "top_logprobs": [_token(t) for t in p["top"]]} for p in answer.get("logprobs", [])]
        content = part("output_text", answer["text"], annotations=[], logprobs=logprobs)
        output.append(item("message", "msg", status=status, role="assistant", content=content))
    for call in answer.get("tool_calls", []):
        output.append(item("function_call", f"fc_{call['id']}", call_id=f"call_{call['id']}", **call["function"]))
    usage = _usage(answer)
    return {
        "id": f"resp_{task.key}",
        "object": "response",
        "created_at": 0,
        "status": status,
        "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
        "error": None,
        "model": model,
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
        "tools": [{"type": "function", "strict": None, **tool["function"]} for tool in task.options.get("tools") or ()],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }


_BODIES = {
    "/v1/completions": _completion,
    "/v1/chat/completions": _chat,
    "/v1/responses": _response,
    "/v1/embeddings": _embeddings,
}
