"""A mixture of experts within a budget of memory: the same results, and no more memory than that."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import ggpy
from ggpy.generate import expert_memory
from ggpy.generate.expert_memory import ExpertMemory
from tests.graph import guards
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no madvise")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("budget"), made("V2-Lite"))


@pytest.fixture
def others(path, monkeypatch):
    """Bytes of what all tokens need, with a context of 64; the process itself isn't counted."""
    monkeypatch.setattr(expert_memory, "_OWN", 0)
    with ggpy.load(path, n_ctx=64) as model:
        weights = sum(t.n_bytes for name, t in model.file.tensors.items() if "_exps." not in name)
        model.logits(ids(2))
        return weights + model.kv_bytes // 512  # of 512 pages


EXPERT = 3 * 32 * 64 * 4  # gate, up and down in float32
LAYER = 8 * EXPERT


def test_results_are_the_same_within_any_budget(path, others):
    with ggpy.load(path, n_ctx=64) as model:
        expected = model.logits(ids(20)), "".join(model.generate(ids(20), max_tokens=30, temperature=0))
    for room in (LAYER, LAYER + 3 * EXPERT, 2 * LAYER):
        with ggpy.load(path, n_ctx=64, ram_budget=others + room) as model:
            memory = model.expert_memory
            assert memory.room == room
            np.testing.assert_array_equal(model.logits(ids(20)), expected[0])
            assert "".join(model.generate(ids(20), max_tokens=30, temperature=0)) == expected[1]
            assert 0 < memory.held <= room and memory.held % EXPERT == 0
            assert 0 < memory.n_found < memory.n_chosen
            if room == 2 * LAYER:
                assert memory.n_chosen - memory.n_found <= 16, "what fits is read once"


def test_every_step_writes_what_is_its_own(path, others):
    """Also with buffers that are full, and with one token."""
    with ggpy.load(path, n_ctx=64) as model:
        expected = model.logits(ids(17))
    with guards.guarded(), ggpy.load(path, n_ctx=64, n_batch=16, ram_budget=others + LAYER) as model:
        np.testing.assert_array_equal(model.logits(ids(17)), expected)
        assert model.expert_memory.n_chosen > 0


def test_hooks_on_routes_go_on_working(path, others):
    seen = []
    with ggpy.load(path, n_ctx=64, ram_budget=others + LAYER) as model:

        def all_to_five(name, value):
            seen.append(name)
            return np.where([True, False], 5, value)

        model.hooks["blk.2.route"] = all_to_five
        model.logits(ids(4))
        kept = model.expert_memory._worth
    assert seen == ["blk.2.route"] and {e for router, e in kept if router == "blk.2.route"} == {5}


def test_least_used_experts_leave_and_missing_ones_are_read(path, others):
    with ggpy.load(path, n_ctx=64) as model:
        calls = []

        def spy(name, n_bytes):
            def log(what):
                return lambda first, n: calls.append((what, name, first // n))

            return SimpleNamespace(n_bytes=n_bytes, prefetch=log("read"), drop=log("drop"))

        tensors = {name: spy(name, t.n_bytes) for name, t in model.file.tensors.items()}
        file = SimpleNamespace(path=path, tensors=tensors)
        memory = ExpertMemory(file, model.graph(), others + LAYER, others - sum(t.n_bytes for t in tensors.values()))
        memory.room = 4 * EXPERT

    def choose(layer, *experts):
        calls.clear()
        memory.choose(f"blk.{layer}.route", np.array([[[e, 0.5] for e in experts]], np.float32))
        return {(what, int(name.split(".")[1]), e) for what, name, e in calls}

    assert choose(1, 0, 1) == {("read", 1, 0), ("read", 1, 1)}
    assert len(calls) == 6  # gate, up and down
    assert choose(1, 0, 1) == set()
    assert choose(2, 0, 7) == {("read", 2, 0), ("read", 2, 7)}
    assert choose(2, 7) == set()
    # Of four, (2, 0) has been used least, and of the others (1, 0) longest ago.
    assert choose(1, 5) == {("drop", 2, 0), ("read", 1, 5)}
    assert choose(2, 7) == set()
    assert choose(1, 6, 0) == {("drop", 1, 5), ("read", 1, 6)}
    assert memory.held == 4 * EXPERT


def test_budgets_that_cannot_be_kept_are_refused(path, others, tmp_path):
    with pytest.raises(ggpy.Error, match=rf"a RAM budget of {others + LAYER - 1:,} bytes; {others + LAYER:,} are needed"):
        ggpy.load(path, n_ctx=64, ram_budget=others + LAYER - 1)
    with pytest.raises(ggpy.UnsupportedError, match="for models with experts"):
        ggpy.load(converted(tmp_path, made("qwen3")), ram_budget=1 << 40)
