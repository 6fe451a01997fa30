"""Answers and calls that are bound to schemas, over HTTP; `jsonschema` judges. Many more: benchmarks/bound_answers.py."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bound_answers import judged


def test_answers_and_calls_are_valid(client):
    faults = asyncio.run(judged(str(client.base_url), 16, 2, 8, 0))
    assert faults == {"answers": [], "calls": []}
