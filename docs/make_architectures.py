"""Writes docs/architectures.md from what the tests find: python docs/make_architectures.py [pytest's arguments]

It runs the tests that compare architectures with other implementations, takes from each that passes which architecture it
loaded, which class of transformers it compared it with and how far apart the values were, and whether llama.cpp ran the
same file. So an architecture is in the table as its tests are. Takes some minutes. With arguments, such as -k NAME, what is
found is added to the page.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "architectures.md"
#: what is run: tests that compare with transformers, llama.cpp or real models
TESTS = (
    *("tests/models", "tests/generate/test_embedding.py", "tests/converters/test_families.py"),
    "-k",
    "equal_transformers or equals_ or llama_cpp or smollm2 or minilm or experts or indexer or minicpm or embedding",
)
#: parts of tests' names -> the real model that they run
REAL = {"smollm2": "SmolLM2-135M-Instruct", "minilm": "all-MiniLM-L6-v2", "gemma_3_270m": "Gemma 3 270M"}

HEAD = """# Architectures

What ggpy runs, by GGUF's names, and what each was compared with. The classes are transformers': of each, random models of
odd sizes were converted and run, whole, in pieces and token by token. The difference is the largest between its logits (of
encoders, the vectors of tokens) and ours, with float32 caches; the tests allow 0.002. llama.cpp says whether it ran files
of ours and agreed with ggpy or transformers. The last column names models that aren't random. The table is made of the
tests' results, by `python docs/make_architectures.py`.
"""


@dataclass
class Evidence:
    """What was found of one architecture.

    Attributes
    ----------
    classes : set of str
        Of transformers.
    differences : list of float
        The largest one of each comparison.
    llama_cpp : bool
    real : set of str
    tests : set of str
        That passed.
    """

    classes: set[str] = field(default_factory=set)
    differences: list[float] = field(default_factory=list)
    llama_cpp: bool = False
    real: set[str] = field(default_factory=set)
    tests: set[str] = field(default_factory=set)


class Recorder:
    """A plugin of pytest that notes what passing tests have compared."""

    def __init__(self) -> None:
        self.found: dict[str, Evidence] = {}
        self.failed: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self._item: Any = None
        self._archs: set[str] = set()
        self._in_llama_cpp: set[str] = set()
        self._classes: set[str] = set()
        self._expected: list[np.ndarray] = []
        self._differences: list[float] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        """Notes belong to one test."""
        self._forget()
        self._item = item
        return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keeps the notes of a test that passed."""
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when != "call" or not report.passed:
            return
        name = report.nodeid.rpartition("::")[2]
        for arch in self._archs | self._in_llama_cpp:
            evidence = self.found.setdefault(arch, Evidence())
            evidence.tests.add(re.sub(r"\[.*", "", name))
            evidence.llama_cpp |= arch in self._in_llama_cpp
            evidence.real |= {real for part, real in REAL.items() if part in name}
            if len(self._archs) == 1 and self._differences:
                evidence.classes |= self._classes
                evidence.differences += self._differences

    # What tests call, and what is noted of it

    def loaded(self, path: object) -> str:
        """The architecture of a file."""
        import ggpy

        with ggpy.GGUFFile(str(path)) as file:
            return file.get("general.architecture", str)

    def made(self, cls: type, *_: object) -> None:
        """A random model of transformers was made."""
        self._classes.add(cls.__name__)

    def compare(self, got: np.ndarray) -> None:
        """Values of ours, float32 (n_tokens, n): how far they are from those expected of this shape."""
        item = self._item
        if "equal_transformers" not in item.name:
            return
        given = [value for value in item.funcargs.values() if isinstance(value, tuple)]
        listed = [array for value in given for part in value if isinstance(part, list) for array in part]
        expected = [e for e in (*self._expected, *listed) if isinstance(e, np.ndarray) and e.shape == got.shape]
        if expected:
            self._differences.append(min(float(np.abs(got - e).max()) for e in expected))


@contextmanager
def watched(recorder: Recorder) -> Iterator[None]:
    """Has the recorder see what tests call. Before test modules are imported, which name these functions as they are."""
    import xllamacpp

    import ggpy
    from tests.models import checkpoints

    replaced = [
        (ggpy.Model, "__init__", lambda _, model, *__: recorder._archs.add(model.metadata["general.architecture"])),
        (ggpy.Model, "logits", lambda result, *_: recorder.compare(result)),
        (ggpy.Model, "embed", lambda result, *_: [recorder.compare(v) for v in result if np.ndim(v) == 2]),
        (checkpoints, "random_model", lambda _, *arguments: recorder.made(*arguments)),
        (checkpoints, "transformers_logits", lambda result, *_: recorder._expected.append(result)),
    ]
    originals = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    server = xllamacpp.Server

    def noted_server(params: Any) -> Any:
        recorder._in_llama_cpp.add(recorder.loaded(params.model.path))
        return server(params)

    for place, name, note in replaced:
        setattr(place, name, _noted(getattr(place, name), note))
    xllamacpp.Server = noted_server
    try:
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)
        xllamacpp.Server = server


def _noted(function: Callable[..., Any], note: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        note(result, *arguments)
        return result

    return called


def row(name: str, evidence: Evidence) -> str:
    """An architecture's row of the table."""
    classes = ", ".join(sorted(evidence.classes)) or ("code of the tests" if evidence.tests else "nothing yet")
    difference = f"{max(evidence.differences):.1e}" if evidence.differences else ""
    cells = (f"`{name}`", classes, difference, "yes" if evidence.llama_cpp else "", ", ".join(sorted(evidence.real)))
    return f"| {' | '.join(cells)} |"


def read_rows(text: str) -> dict[str, Evidence]:
    """What a page says."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            name, classes, difference, llama_cpp, real = (cell.strip() for cell in line.strip("|").split("|"))
            evidence = found[name.strip("`")] = Evidence(llama_cpp=llama_cpp == "yes")
            evidence.classes |= {c for c in classes.split(", ") if " " not in c}
            evidence.tests |= {"of the page"} if "code" in classes else set()
            evidence.differences += [float(difference)] if difference else []
            evidence.real |= {r for r in real.split(", ") if r}
    return found


def page(found: dict[str, Evidence]) -> str:
    """The text of docs/architectures.md."""
    from ggpy.models import ARCHITECTURES

    rows = [row(name, found.get(name, Evidence())) for name in sorted(ARCHITECTURES)]
    table = ["| architecture | compared with | difference | llama.cpp | real model |", "|---|---|--:|---|---|", *rows]
    with_llama_cpp = sum("| yes |" in line for line in rows)
    return "\n".join([HEAD, *table, "", f"{len(rows)} architectures, {with_llama_cpp} of them with llama.cpp, too.", ""])


def main() -> None:
    """Runs the tests and writes the page."""
    sys.path.insert(0, str(ROOT))
    recorder, more = Recorder(), sys.argv[1:]
    recorder.found = read_rows(OUT.read_text("utf-8")) if more and OUT.exists() else {}
    with watched(recorder):
        pytest.main([*TESTS, "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider", *more], plugins=[recorder])
    for nodeid in recorder.failed:
        print(f"failed, and not counted: {nodeid}", file=sys.stderr)
    OUT.write_text(page(recorder.found), "utf-8")


if __name__ == "__main__":
    main()
