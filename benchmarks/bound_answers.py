"""Answers that are bound to schemas, over HTTP: each must parse and be valid, and so must each tool call's arguments.

    python benchmarks/bound_answers.py [http://127.0.0.1:8080] [--answers 500] [--calls 200] [--clients 16] [--seed 0]

Schemas are drawn at random: objects in objects, lists with limits, enums, patterns, formats, numbers, unions, references.
Half of the answers are streamed. Calls are required in one half, of a named tool in the other. `jsonschema` judges.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema

WORDS = ("name", "age", "city", "tags", "size", "price", "notes", "owner", "parts", "kind", "id", "active", "score", "from")
PATTERNS = (
    "^[A-Z]{3}-[0-9]{4}$",
    "^(red|green|blue)(-(light|dark))?$",
    "^#[0-9a-f]{6}$",
    "^[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})?$",
    "^\\d{4}-(0[1-9]|1[0-2])$",
    "^[a-z0-9_]{1,12}@[a-z]{2,8}\\.(com|org)$",
    "^\\+?[1-9]\\d{6,11}$",
    "^v\\d{1,2}\\.\\d{1,2}(\\.\\d{1,3})?$",
)
FORMATS = ("date", "time", "date-time", "duration", "uuid", "ipv4")


def text(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if rng.random() < 0.2:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.choice([0, 0, 1, 5])
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 20)}


def number(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    most = least + rng.choice([0, 1, 7, 100, 100000])
    if rng.random() < 0.6:
        return {"type": "integer", "minimum": least, "maximum": most}
    if rng.random() < 0.3:
        return {"type": rng.choice(["integer", "number"])}
    low, high = ("exclusiveMinimum", "exclusiveMaximum") if rng.random() < 0.5 else ("minimum", "maximum")
    return {"type": "number", low: least - 0.5, high: most + 0.25, "multipleOf": 0.25}


def choice(rng: random.Random) -> dict[str, Any]:
    values = ["yes", "no", "maybe", "näher", 'a "b" c', 1, 2.5, None, True, {"x": 1}, [1, 2], ""]
    return {"enum": rng.sample(values, rng.randint(1, 5))} if rng.random() < 0.8 else {"const": rng.choice(values)}


def several(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.2:
        kinds = [schema(rng, 0) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": kinds, "items": False, "minItems": len(kinds)}
    least = rng.randint(0, 2)
    return {"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def thing(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: schema(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose values are short: parts have a bound, so that answers have an end."""
    simple: list[Callable[[random.Random], dict[str, Any]]] = [text, text, number, choice]
    simple.append(lambda _: {"type": "boolean"})
    simple.append(lambda rng: {"$ref": rng.choice(["#/$defs/point", "#/$defs/level"])})
    simple.append(lambda rng: {"anyOf": [text(rng), number(rng), {"type": "null"}]})
    if depth > 0 and rng.random() < 0.5:
        return rng.choice([thing, several])(rng, depth)
    return rng.choice(simple)(rng)


def whole(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object's schema with the definitions that its parts may name."""
    coordinate = {"type": "integer", "minimum": 0, "maximum": 99}
    point = {"type": "object", "properties": {"x": coordinate, "y": coordinate}, "required": ["x", "y"]}
    definitions = {"point": {**point, "additionalProperties": False}, "level": {"enum": ["low", "middle", "high"]}}
    return {**thing(rng, depth), "$defs": definitions}


async def message(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The message of an answer and why it ended; streamed ones are put together."""
    if not body.get("stream"):
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise ValueError(f"{response.status_code} {response.text[:300]}")
        first = response.json()["choices"][0]
        return first["message"], first["finish_reason"]
    made: dict[str, Any] = {"content": "", "tool_calls": []}
    reason = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code} {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = json.loads(line[6:])["choices"][0]
            reason = first["finish_reason"] or reason
            made["content"] += first["delta"].get("content") or ""
            for part in first["delta"].get("tool_calls", ()):
                if part["index"] == len(made["tool_calls"]):
                    made["tool_calls"].append({"id": part["id"], "function": {"name": "", "arguments": ""}})
                function = made["tool_calls"][part["index"]]["function"]
                function["name"] += part["function"].get("name") or ""
                function["arguments"] += part["function"].get("arguments") or ""
    return made, reason


async def answer(client: httpx.AsyncClient, seed: int) -> str:
    """One bound answer; what is wrong with it, or nothing."""
    rng = random.Random(seed)
    bound = whole(rng)
    jsonschema.Draft202012Validator.check_schema(bound)
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": f"Describe a {rng.choice(WORDS)} as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": bound}},
        "max_tokens": 2000,
        "seed": seed,
        "temperature": rng.choice([0, 0.7, 1.2]),
        "stream": bool(seed % 2),
    }
    made, reason = await message(client, body)
    if reason != "stop":
        return f"ended by {reason}: {made['content'][-200:]}"
    jsonschema.validate(json.loads(made["content"]), bound, cls=jsonschema.Draft202012Validator)
    return ""


async def call(client: httpx.AsyncClient, seed: int) -> str:
    """One call; what is wrong with it, or nothing."""
    rng = random.Random(-1 - seed)
    names = [f"{verb}_{noun}" for verb in ("get", "set") for noun in ("weather", "price", "user")]
    tools = {name: whole(rng, 1) for name in rng.sample(names, rng.randint(1, 4))}
    named = rng.choice(list(tools))
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": f"Please {named.replace('_', ' the ')} for me."}],
        "tools": [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in tools.items()],
        "tool_choice": {"type": "function", "function": {"name": named}} if seed % 4 < 2 else "required",
        "parallel_tool_calls": False,
        "max_tokens": 400,
        "seed": seed,
        "stream": bool(seed % 2),
    }
    made, reason = await message(client, body)
    calls = made.get("tool_calls", [])
    if reason != "tool_calls" or len(calls) != 1 or made["content"]:
        return f"{len(calls)} calls, ended by {reason}, said {made['content']!r}"
    function = calls[0]["function"]
    if function["name"] not in tools or (seed % 4 < 2 and function["name"] != named):
        return f"called {function['name']}"
    parameters = tools[function["name"]]
    jsonschema.validate(json.loads(function["arguments"]), parameters, cls=jsonschema.Draft202012Validator)
    return ""


async def judged(base: str, n_answers: int, n_calls: int, n_clients: int, seed: int) -> dict[str, list[str]]:
    """What is wrong, of answers and of calls."""
    faults: dict[str, list[str]] = {"answers": [], "calls": []}
    work = [("answers", answer, seed + i) for i in range(n_answers)] + [("calls", call, seed + i) for i in range(n_calls)]
    queue = iter(work)
    async with httpx.AsyncClient(base_url=base, timeout=900) as client:

        async def ask() -> None:
            for kind, what, number in queue:
                try:
                    fault = await what(client, number)
                except (ValueError, KeyError, httpx.HTTPError, jsonschema.ValidationError) as error:
                    fault = f"{type(error).__name__} {str(error)[:500]}"
                if fault:
                    faults[kind].append(f"seed {number}: {fault}")

        await asyncio.gather(*(ask() for _ in range(n_clients)))
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default="http://127.0.0.1:8080")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = asyncio.run(judged(options.base, options.answers, options.calls, options.clients, options.seed))
    for kind, n in (("answers", options.answers), ("calls", options.calls)):
        print(f"{n - len(faults[kind])} of {n} {kind} are valid")
        for words, n_same in Counter(faults[kind]).most_common(20):
            print(f"  {words}" + (f" ({n_same} times)" if n_same > 1 else ""))
    sys.exit(any(faults.values()))


if __name__ == "__main__":
    main()
