"""A minute of `tests.fuzz`."""

import sys

import pytest

from .fuzz import campaign, make_seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux tells it")
@pytest.mark.parametrize(("kind", "runs"), [("gguf", 120), ("checkpoint", 60), ("logits", 100), ("sequence", 40)])
def test_changed_files_run_or_are_refused(seeds, kind, runs):
    counts, failures = campaign(kind, range(runs), seeds)
    assert not failures and sum(counts.values()) == runs and counts["ran"] and counts["refused"]
