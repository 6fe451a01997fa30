"""A few seconds each of `tests.kills`, `tests.disturb` and `tests.soak`."""

import random
import sys

import pytest

from ggpy.hub import model_file

from . import disturb, kills, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes and memory as Linux tells of them")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    kills.make_seeds(folder)
    return folder


def test_killed_commands_leave_nothing_half_and_go_on(seeds, tmp_path):
    failures, counts = kills.campaign("state", seeds, tmp_path / "state", 2, random.Random(0))
    assert not failures and sum(counts.values()) >= 2


@pytest.mark.parametrize(("kind", "rounds"), [("interrupts", 10), ("closes", 4), ("forks", 4), ("pools", 8)])
def test_a_disturbed_model_goes_on(kind, rounds):
    said, well = disturb.campaign(kind, rounds)
    assert well, said


def test_everything_at_once_gives_the_same(seeds):
    """The growth of so short a time says nothing; texts and errors do."""
    (seeds / "demo.gguf").symlink_to(model_file("demo"))
    counts, _ = soak.soak(seeds, 3 / 60)
    assert counts
