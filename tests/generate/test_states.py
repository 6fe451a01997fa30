"""Sequences of models with states: cut, forked, saved, shared; always the bits that they have alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import ggpy
from ggpy.errors import ContextFullError
from ggpy.generate import runner, scheduler, sequence
from ggpy.generate.snapshots import SNAPSHOT_TOKENS
from ggpy.kernels.table import SLAB
from tests.converters.conftest import SIZES
from tests.models.checkpoints import converted, ids, random_model

from .test_many import SETTINGS, STEPS, in_any_company

COMMON = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 4096}
RULE = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
KINDS = {
    "qwen35": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, {"full_attention_interval": 2, "head_dim": 32, **RULE}),
    "lfm2": (Lfm2ForCausalLM, Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
}


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    cls, config, changes = KINDS[request.param]
    return converted(tmp_path_factory.mktemp("states"), random_model(cls, config(**{**COMMON, **changes})))


@pytest.fixture(scope="module")
def model(path):
    with ggpy.load(path, n_ctx=2048, n_threads=2) as opened:
        yield opened


def test_cuts_evaluate_the_rest_again(model):
    tokens = ids(1400)
    wanted = model.logits(tokens)
    with model.new_sequence() as sequence:
        for n in (1399, 1100, SNAPSHOT_TOKENS, 3, 0):
            if len(sequence) < len(tokens):
                sequence.extend(tokens[len(sequence) :])
            sequence.keep(n)
            assert sequence.ids == tokens[:n]
            np.testing.assert_array_equal(sequence.extend(tokens[n : n + 1]), wanted[n])


def test_a_cut_goes_back_to_a_snapshot_not_to_the_beginning(model):
    tokens, runs = ids(1300), []
    sequence = model.new_sequence()
    sequence.extend(tokens)
    with model.hooked({"embd": lambda name, value: runs.append(len(value))}):
        sequence.keep(1200)
    assert sum(runs) == 1200 - 1024


def test_a_cut_forgets_the_snapshots_behind_it(model):
    tokens, others = ids(1024), ids(520, seed=1)
    for n in (0, SNAPSHOT_TOKENS):
        with model.new_sequence() as sequence:
            for first in range(0, 1024, SNAPSHOT_TOKENS):
                sequence.extend(tokens[first : first + SNAPSHOT_TOKENS])
            sequence.keep(n)
            sequence.extend(others[:SNAPSHOT_TOKENS])
            sequence.extend(others[SNAPSHOT_TOKENS:])
            sequence.keep(n + 516)
            np.testing.assert_array_equal(sequence.extend([7]), model.logits([*tokens[:n], *others[:516], 7])[-1])


def test_forks_go_separate_ways(model):
    tokens = ids(100)
    sequence = model.new_sequence()
    sequence.extend(tokens[:70])
    other = sequence.fork()
    assert other.slot == sequence.slot
    ends = [sequence.extend([5]), other.extend([9])]
    assert other.slot != sequence.slot
    for token, end in zip((5, 9), ends, strict=True):
        np.testing.assert_array_equal(end, model.logits([*tokens[:70], token])[-1])
    np.testing.assert_array_equal(sequence.extend(tokens), model.logits([*tokens[:70], 5, *tokens])[-1])


def test_saved_sequences_go_on_with_the_same_bits(model, path, tmp_path):
    tokens = ids(130)
    sequence = model.new_sequence()
    sequence.extend(tokens[:100])
    sequence.save(tmp_path / "saved")
    wanted = sequence.extend(tokens[100:])
    with ggpy.load(path, n_ctx=2048, n_threads=1) as other:
        loaded = other.load_sequence(tmp_path / "saved")
        np.testing.assert_array_equal(loaded.extend(tokens[100:]), wanted)
    empty = model.new_sequence()
    empty.save(tmp_path / "empty")
    np.testing.assert_array_equal(
        model.load_sequence(tmp_path / "empty").extend(tokens), model.new_sequence().extend(tokens)
    )


def test_a_run_that_fails_leaves_no_trace(model):
    tokens = ids(90)
    sequence = model.new_sequence()
    sequence.extend(tokens[:80])

    def fail(name, value):
        raise KeyboardInterrupt

    for name in ("embd", "blk.1.out"):
        with pytest.raises(KeyboardInterrupt), model.hooked({name: fail}):
            sequence.extend(tokens[80:85])
        assert not sequence.is_current and sequence.ids == tokens[:80]
    np.testing.assert_array_equal(sequence.extend(tokens[80:]), model.logits(tokens)[-1])


@SETTINGS
@given(
    steps=STEPS,
    n_threads=st.integers(1, 2),
    n_batch=st.sampled_from([512, 70, 16]),
    slots=st.sampled_from([1, 2, 16]),
    often=st.booleans(),
)
def test_any_company_gives_the_same_logits(path, tmp_path, steps, n_threads, n_batch, slots, often):
    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduler, sequence) if often else ():
            patch.setattr(module, "SNAPSHOT_TOKENS", 128)
        patch.setattr(runner, "_SLOTS", slots)
        in_any_company(path, tmp_path, steps, n_threads=n_threads, n_batch=n_batch, kv_memory=memory_for(path, 10, 8))


def memory_for(path, n_pages, n_slots):
    """Bytes that hold so many pages and slots."""
    with ggpy.load(path, n_ctx=64, n_threads=1) as model:
        pages = model._runner.pages
        return n_pages * pages.n_bytes // pages.n_pages + n_slots * pages.states.n_bytes // pages.states.n_slots


def evaluated(model, prompts, **options):
    """Generations of all prompts at once, and how many tokens were evaluated for them."""
    counts = []
    with model.hooked({"embd": lambda name, value: counts.append(len(value))}):
        model.generate(ids(2), max_tokens=1, temperature=0).run()  # hooks change: nothing is known any more
        counts.clear()
        generations = [model.generate(p, **{"max_tokens": 1, "temperature": 0, **options}) for p in prompts]
        for g in generations:
            g.run()
        yield generations, sum(counts)
        while True:
            counts.clear()
            prompts = yield
            generations = [model.generate(p, **{"max_tokens": 1, "temperature": 0, **options}) for p in prompts]
            for g in generations:
                g.run()
            yield generations, sum(counts)


def test_common_beginnings_are_computed_once(model):
    system, n = ids(230, seed=5), 6
    shared = 230 // SLAB * SLAB
    runs = evaluated(model, [system + ids(9, seed=i) for i in range(n)])
    generations, count = next(runs)
    assert count == 239 + (n - 1) * (239 - shared)
    assert sorted(g.n_reused for g in generations) == [0] + [shared] * (n - 1)


def test_a_conversation_goes_on_where_it_ended(model):
    runs = evaluated(model, [ids(100, seed=7)], max_tokens=20)
    (first,), _ = next(runs)
    next(runs)
    known = first.prompt_ids + first.ids[:-1]
    (second,), _ = runs.send([known + ids(9, seed=8)])
    assert second.n_reused == len(known)
    # One that leaves out the reply goes on at the last page of the prompt.
    next(runs)
    (third,), _ = runs.send([first.prompt_ids[:90] + ids(30, seed=9)])
    assert third.n_reused == 64


def test_a_beginning_that_comes_again_leaves_a_snapshot(model):
    """The second prompt that begins alike can't know; the third finds what the second has left."""
    system = ids(300, seed=11)
    runs = evaluated(model, [system + ids(200, seed=1)])
    next(runs)
    reused = []
    for i in range(3):
        next(runs)
        (g,), _ = runs.send([system + ids(200, seed=20 + i)])
        reused.append(g.n_reused)
    assert reused == [0, 256, 256]


def test_when_slots_are_few_the_youngest_waits_and_gives_the_same(path, monkeypatch):
    prompts = [ids(60, seed=i) for i in range(6)]
    with ggpy.load(path, n_ctx=256, n_threads=1) as model:
        alone = [model.generate(p, max_tokens=30, temperature=1, seed=i).run().ids for i, p in enumerate(prompts)]
    monkeypatch.setattr(runner, "_SLOTS", 1)
    with ggpy.load(path, n_ctx=256, n_threads=1) as model:
        holder = model.new_sequence()
        holder.extend(ids(5))
        together = [model.generate(p, max_tokens=30, temperature=1, seed=i) for i, p in enumerate(prompts)]
        assert [g.run().ids for g in together] == alone
        assert model._runner.pages.states.n_slots == 4
        sequences = [model.new_sequence() for _ in range(4)]
        with pytest.raises(ContextFullError, match="all 4 slots of states are in use"):
            for s in sequences:
                s.extend(ids(3))


def test_memory_for_less_than_a_context_is_refused(path):
    with pytest.raises(ggpy.Error, match=r"kv_memory of .* hold one context"):
        ggpy.load(path, n_ctx=256, kv_memory=memory_for(path, 4, 3))
