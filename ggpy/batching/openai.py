"""OpenAI's batch files: a request in each line, and the line that answers it."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import Error
from .rows import Row
from .tasks import Kind, Settings, Task, failed, id_of, is_id, is_ids, made

#: where requests go: what is made of them, and the column of the body that holds the prompt
_URLS: dict[str, tuple[Kind, str]] = {
    "/v1/completions": ("text", "prompt"),
    "/v1/chat/completions": ("chat", "messages"),
    "/v1/embeddings": ("embed", "input"),
}

#: fields of a body that say what an option of ours says
_SAME = (
    *("frequency_penalty", "grammar", "logit_bias", "max_tokens", "min_p", "presence_penalty", "regex", "seed", "stop"),
    *("temperature", "top_k", "top_p", "typical_p", "chat_template_kwargs"),
)
#: fields that don't change the answer
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
#: fields that must have a value, which is what there is
_FIXED: dict[str, Sequence[object]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto",),
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
        kind, column = _URLS[url]
        if body.get(column) is None:
            raise Error(f"body has no {column}")
        own: dict[str, Any] = {}
        for name, value in body.items():
            if name != column and name not in _IGNORED and value is not None:
                _READ.get(name, _other)(own, name, value, kind)
        given = body[column]
        if kind == "embed":
            given = [given] if isinstance(given, str) or (given and is_ids(given)) else given
            if not isinstance(given, list) or not given or not all(isinstance(g, str) or is_ids(g) for g in given):
                raise Error("input is a text, token ids or a list of them")
            return Task(id, made(id, kind, given, {}, settings, digest).key, kind, given, own)
        if kind == "text" and not isinstance(given, str) and not is_ids(given):
            raise Error("prompt is one text, or its token ids")
        if kind == "chat" and not isinstance(given, list):
            raise Error("messages are a list")
        return made(id, kind, given, own, settings, digest)
    except Error as error:
        return failed(id, row, str(error), digest)


def _other(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    if name in _FIXED and value in _FIXED[name]:
        return
    raise Error(f"body: {name} {value!r} can't be had" if name in _FIXED else f"body: {name} isn't known")


def _same(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    if kind == "embed":
        raise Error(f"body: {name} has no effect on an embedding")
    own[name] = value


def _logprobs(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    """A number in completions; in chats, whether there are any, and how many of the likeliest beside."""
    if kind == "chat" and name == "logprobs":
        if value is True:
            own.setdefault("logprobs", 0)
    else:
        own["logprobs"] = value


def _response_format(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    how = value.get("type") if isinstance(value, Mapping) else value
    if how == "json_object":
        own["json_schema"] = True
    elif how == "json_schema" and isinstance(value.get("json_schema"), Mapping) and "schema" in value["json_schema"]:
        own["json_schema"] = value["json_schema"]["schema"]
    elif how != "text":
        raise Error(f"body: response_format {how!r} isn't known")


def _tools(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    own["tools"] = value


def _max_completion_tokens(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    own["max_tokens"] = value


def _encoding_format(own: dict[str, Any], name: str, value: Any, kind: Kind) -> None:
    if kind != "embed" or value not in ("float", "base64"):
        raise Error(f"body: encoding_format {value!r} can't be had")
    own["encoding_format"] = value


_READ: dict[str, Callable[[dict[str, Any], str, Any, Kind], None]] = {
    **dict.fromkeys(_SAME, _same),
    "logprobs": _logprobs,
    "top_logprobs": _logprobs,
    "response_format": _response_format,
    "tools": _tools,
    "max_completion_tokens": _max_completion_tokens,
    "encoding_format": _encoding_format,
}


# Results


def result_of(task: Task, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The line for an answer; see `answers`. It doesn't say when it was made: the same request has the same line."""
    if task.error:
        error = {"code": "invalid_request", "message": task.error}
        return {"id": f"batch_req_{task.key}", "custom_id": task.id, "response": None, "error": error}
    status, body = 200, _BODIES[task.kind](task, answer, model)
    if "error" in answer:
        status = 400
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


_BODIES = {"text": _completion, "chat": _chat, "embed": _embeddings}
