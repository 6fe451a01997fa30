"""The examples run on the model that comes with ggpy, and the page of the API is what the docstrings say."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

#: What each must have printed.
EXPECTED = {
    "batch": r"(?s)0: In the beginning .*The two likeliest of eight:\n *-\d\.\d\d In the beginning .*\n *-\d\.\d\d In the",
    "chat": r"(?s)> And the king said.*40 tokens; 0 of \d+ .*\n> And the woman.*\(40 tokens; [1-9]\d* of \d+ of the prompt",
    "expert_trace": r"(?s)token +layer 1 +layer 2 +layer 3 *\n.*\n' LORD' +\d, \d +\d, \d +\d, \d *\n.*of the 24 experts",
    "json_schema": r"(\{'name': '.{0,20}', 'age': \d+, 'tribe': '\w+'\}\n){3}And [a-z ]+, and [a-z ]+\.\n\d+(\+\d+)+=\d+\n",
    "layer_off": r"all layers: \d\.\d\d nats a token\n(without layer \d: \d\.\d\d\n){3}",
    "logit_lens": r"(?s)before layer 0 .*before layer 3 .*at the end +' the'",
    "prompt_cache": r"\d\.\d MB for \d+ tokens\n[1-9]\d+ of \d+ tokens were there: \w",
    "quantization_sweep": r"(?s)q8_0 +4\.\d +0\.00\d\d .*\nq2_k +2\.\d +0\.0",
    "search": r"(?s)They did eat.*\n  0\.\d+ And they sat down to eat bread.*He climbed.*\n  0\.\d+ And he went up into",
    "speculation": r"(?s)\w.*\n[1-9]\d* of \d+ guesses were right; the text is the same\.\n",
    "tasks": r"(?s)Then said Jesus.*\nAnd the angel of the[^.]*\.\nNow there was a man",
}


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_says_what_it_should(path, capsys):
    loaded(path).main("demo")
    printed = capsys.readouterr().out
    assert re.search(EXPECTED[path.stem], printed), printed


def test_every_example_is_known_and_named_in_the_readme():
    assert {path.stem for path in EXAMPLES} == set(EXPECTED)
    assert "examples/" in (ROOT / "README.md").read_text("utf-8")


def test_the_api_page_is_current():
    make_api = loaded(ROOT / "docs" / "make_api.py")
    assert make_api.OUT.read_text("utf-8") == make_api.page(), "run: python docs/make_api.py"


def test_the_page_of_architectures_has_them_all():
    from ggpy.models import ARCHITECTURES

    page = (ROOT / "docs" / "architectures.md").read_text("utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    assert {name.strip(" `") for name, _ in rows} == set(ARCHITECTURES), "run: python docs/make_architectures.py"
    assert not [name for name, evidence in rows if evidence.strip() == "nothing yet"]
