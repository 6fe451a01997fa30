"""Constrained output: whether every text keeps to its schema or grammar, and what that costs for each token.

    python benchmarks/constrained.py MODEL.gguf [-n 500] [-g 50] [-t 2] [--temp 1.0]

-n JSON answers, by five schemas, as many at once as ggpy takes; `jsonschema` checks them. -g answers by regular expressions
and grammars in Lark's syntax and GBNF, checked by `re` and Python's parsers. Of each kind: how long a processor works on
masks, in their own threads, and how long steps take for constraints: what they wait for masks, adding them to the logits,
and taking the token. Then one generation with a schema beside one without, in turn.
"""

import argparse
import ast
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jsonschema

import ggpy
from ggpy.generate.constraints import Constraint


def record(required: bool = True, **properties: Any) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(properties)} if required else schema


TEXT = {"type": "string", "maxLength": 40}
CITY = record(name=TEXT, country={"enum": ["Österreich", "日本", "Côte d'Ivoire", "France"]})
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": record(
        name=TEXT,
        age={"type": "integer", "minimum": 0, "maximum": 120},
        city=CITY,
        languages={"type": "array", "items": {"enum": ["Deutsch", "English", "日本語", "العربية"]}, "maxItems": 3},
    ),
    "orders": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": record(
            id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
            amount={"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.25},
            paid={"type": "boolean"},
            note={"anyOf": [{"type": "null"}, TEXT]},
        ),
    },
    "tree": {
        "$defs": {
            "leaf": record(value={"type": "integer", "minimum": -9, "maximum": 9}),
            "branch": record(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}, label={"const": "größer als"}),
        },
        **record(
            root={"anyOf": [{"$ref": "#/$defs/branch"}, {"$ref": "#/$defs/leaf"}]},
            cities={"type": "array", "items": CITY, "maxItems": 2},
        ),
    },
    "event": record(
        title={"type": "string", "minLength": 3, "maxLength": 30},
        on={"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$"},
        host={"type": "string", "format": "ipv4"},
        kind={"enum": ["fête", "meeting", "концерт", "祭り", 'a "quoted" word']},
        guests={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
    ),
    "options": record(
        False,
        verbose={"type": "boolean"},
        level={"type": "integer", "minimum": 1, "maximum": 5},
        mark={"enum": ["✓", "✗", None]},
    ),
}

LARK = """
start: sum
sum: product (("+" | "-") product){0,2}
product: atom ("*" atom)?
atom: NUMBER | "(" NUMBER "-" NUMBER ")"
NUMBER: /[1-9][0-9]?/
"""
GBNF = """
root ::= "[" ws item ("," ws item){0,2} ws "]"
item ::= "\\"" [a-zà-ÿ ]{1,20} "\\"" | [1-9] [0-9]? | "[" item "]"
ws   ::= " "?
"""
REGEXES = (
    r"[A-Z][a-z]{2,12}, [A-Z][a-z]{2,12}",
    r"(Mon|Tues|Wednes|Thurs|Fri)day, [0-9]{2}:[0-5][0-9]",
    r"#[0-9a-f]{6}( € [0-9]{1,3})?",
)


def parses(text: str) -> bool:
    """Whether Python's own parser takes a text."""
    ast.parse(text, mode="eval")
    return True


def valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether jsonschema takes a text."""
    checker = jsonschema.Draft202012Validator
    return checker(schema, format_checker=checker.FORMAT_CHECKER).is_valid(json.loads(text))


#: kind -> what a generation is given, and what checks its text
GRAMMARS: dict[str, list[tuple[dict[str, str], Callable[[str], object]]]] = {
    "regex": [({"regex": regex}, re.compile(regex).fullmatch) for regex in REGEXES],
    "Lark": [({"grammar": LARK}, parses)],
    "GBNF, recursive": [({"grammar": GBNF}, json.loads)],
}


@contextmanager
def timed() -> Iterator[dict[str, list[float]]]:
    """Seconds of its thread's processor that each mask takes, and seconds that each call in a step takes."""
    clocks: dict[str, Callable[[], float]] = {"_compute": time.thread_time}
    seconds: dict[str, list[float]] = {"_compute": [], "forced": [], "masked": [], "accept": []}
    originals = {name: getattr(Constraint, name) for name in seconds}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            clock = clocks.get(name, time.perf_counter)
            started = clock()
            try:
                return originals[name](*arguments)
            finally:
                seconds[name].append(clock() - started)

        return call

    for name in originals:
        setattr(Constraint, name, wrapped(name))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(Constraint, name, original)


def row(
    name: str, generations: list[ggpy.Generation], n_valid: int, seconds: dict[str, list[float]], elapsed: float
) -> None:
    """Prints a row of the table; times in microseconds for each token."""
    n_tokens = sum(len(g.ids) for g in generations)
    in_steps = sum(sum(seconds[name]) for name in ("forced", "masked", "accept"))
    masks = sorted(seconds["_compute"])
    share = [1e6 * sum(masks) / n_tokens, 1e6 * masks[len(masks) // 2], 1e6 * masks[len(masks) * 99 // 100]]
    figures = [*share, 1e6 * in_steps / n_tokens, 1e6 * elapsed / n_tokens]
    done = f"{n_valid} of {len(generations)}"
    print(
        f"| {name} | {done} | {n_tokens / len(generations):.0f} | " + " | ".join(f"{x:.0f}" for x in figures) + " |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("-g", type=int, default=50)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--temp", type=float, default=1.0)
    a = parser.parse_args()
    options: ggpy.GenerationOptions = {"temperature": a.temp, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 600}
    with ggpy.load(a.model, n_ctx=2048, n_threads=a.threads) as model:
        started = time.perf_counter()
        model.generate("a", regex="b", max_tokens=1).run()
        print(f"{model.architecture.n_vocab} tokens; the first constraint took {time.perf_counter() - started:.2f} s\n")
        print(
            "| kind | kept to | tokens each | masks, µs a token | median | 99 % | in steps, µs a token | all, µs a token |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for name, schema in SCHEMAS.items():
            prompts = [f"Number {i}: write JSON for any {name}.\n" for i in range(a.n // len(SCHEMAS))]
            with timed() as seconds:
                started = time.perf_counter()
                done = list(model.generate_batch(prompts, json_schema=schema, seed=0, **options))
                elapsed = time.perf_counter() - started
            row(name, done, sum(g.finish_reason == "stop" and valid(g.text, schema) for g in done), seconds, elapsed)
        n_each = a.g // len(GRAMMARS)
        for i, (name, kinds) in enumerate(GRAMMARS.items()):
            n = a.g - n_each * (len(GRAMMARS) - 1) if i == 0 else n_each
            with timed() as seconds:
                started = time.perf_counter()
                how = [kinds[k % len(kinds)] for k in range(n)]
                done = [model.generate(f"{k}: ", seed=k, **options, **given) for k, (given, _) in enumerate(how)]
                checks = zip(done, how, strict=True)
                n_valid = sum(bool(check(g.run().text)) and g.finish_reason == "stop" for g, (_, check) in checks)
                elapsed = time.perf_counter() - started
            row(name, done, n_valid, seconds, elapsed)

        ratios = []
        endless = dict.fromkeys(model.tokenizer.end_tokens, -float("inf"))
        for i in range(7):
            prompt = f"Number {i}: write JSON for any person.\n"
            kept = model.generate(prompt, json_schema=SCHEMAS["person"], seed=i, **options).run()
            free: ggpy.GenerationOptions = {**options, "max_tokens": len(kept.ids), "logit_bias": endless}
            ratios.append(kept.decode_rate / model.generate(prompt, seed=i, **free).run().decode_rate)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"\none generation: {statistics.median(ratios):.2f} of the tokens per second without a schema ({spread})")


if __name__ == "__main__":
    main()
