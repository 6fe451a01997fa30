"""A minute of `tests.fuzz`: some files of every kind."""

import sys

import pytest

from .fuzz import Campaign, make_seeds

#: as many as take a few seconds
RUNS = {
    "gguf": 150,
    "adapter": 50,
    "safetensors": 50,
    "config": 60,
    "tokenizer": 50,
    "sentencepiece": 60,
    "imatrix": 200,
    "logits": 200,
    "sequence": 80,
    "pages": 50,
    "batch": 100,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux tells it")
@pytest.mark.parametrize("kind", RUNS)
def test_changed_files_run_or_are_refused(seeds, kind):
    campaign = Campaign(kind, range(RUNS[kind]), seeds)
    assert not campaign.failures and campaign.counts.total() == RUNS[kind]
    assert campaign.counts["ran"] and (campaign.counts["refused"] or kind == "pages")
