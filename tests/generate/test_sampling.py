"""Sampling against transformers' logits processors, and the distributions that follow from the definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from ggpy.errors import Error
from ggpy.generate.sampling import Sampler

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits_of(n=1000, seed=0, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, n).astype(np.float32)


def dense(sampler, logits, recent=()):
    """The distribution over all ids."""
    ids, probabilities = sampler.distribution(logits, recent)
    out = np.zeros(len(logits))
    out[ids] = probabilities
    return out


def softmax(scores):
    return torch.softmax(scores.double(), -1).numpy()[0]


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 40}, TopKLogitsWarper(40)),
        ({"top_k": 5000}, TopKLogitsWarper(5000)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"top_p": 1e-6}, TopPLogitsWarper(1e-6)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
    ],
)
@pytest.mark.parametrize("n", [7, 1000, 30_000])
def test_each_cut_equals_transformers(options, warper, n):
    logits = logits_of(n)
    expected = softmax(warper(None, torch.from_numpy(logits)[None]))
    np.testing.assert_allclose(dense(Sampler(**OFF | options), logits), expected, rtol=1e-5)


def test_cuts_follow_each_other_as_in_llama_cpp():
    logits = logits_of()
    scores = torch.from_numpy(logits)[None]
    for warper in (TopKLogitsWarper(40), TopPLogitsWarper(0.95), MinPLogitsWarper(0.05)):
        scores = warper(None, scores)
    sampler = Sampler(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05)
    np.testing.assert_allclose(dense(sampler, logits), softmax(scores / 0.7), rtol=1e-5)


def test_repetition_penalty_equals_transformers_within_its_window():
    logits = logits_of()
    recent = [1, 2, 3, 500, 7, 500]
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    expected = softmax(penalty(torch.tensor([recent[-4:]]), torch.from_numpy(logits.copy())[None]))
    sampler = Sampler(**OFF | {"repetition_penalty": 1.3, "penalty_window": 4})
    np.testing.assert_allclose(dense(sampler, logits, recent), expected, rtol=1e-5)


def test_penalty_leaves_the_callers_logits_alone():
    logits = logits_of()
    before = logits.copy()
    Sampler(repetition_penalty=2.0).sample(logits, [1, 2, 3])
    np.testing.assert_array_equal(logits, before)


def test_temperature_zero_takes_the_lowest_id_of_the_highest():
    logits = np.array([0, 3, 1, 3], np.float32)
    sampler = Sampler(temperature=0)
    assert sampler.sample(logits) == 1
    assert Sampler(temperature=0, repetition_penalty=1.5).sample(logits, [1]) == 3


def test_tokens_come_as_often_as_they_are_likely():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(**OFF, seed=1)
    n = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0.05])
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts - n * expected) < 5 * np.sqrt(n * expected * (1 - expected)))


def test_a_seed_repeats_and_seeds_differ():
    logits = logits_of(spread=0.1)

    def draws(seed):
        sampler = Sampler(**OFF, seed=seed)
        return [sampler.sample(logits) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_ruled_out_tokens_are_never_chosen():
    logits = np.full(600, -np.inf, np.float32)
    logits[[5, 599]] = 1
    sampler = Sampler(temperature=2.0, seed=0)
    assert {sampler.sample(logits) for _ in range(60)} == {5, 599}


def test_nearly_equal_logits_of_a_large_vocabulary_keep_their_share():
    logits = logits_of(50_000, spread=0.1)
    ids, probabilities = Sampler(**OFF | {"top_p": 0.5}).distribution(logits)
    order = np.argsort(-logits, kind="stable")
    np.testing.assert_array_equal(ids, order[: len(ids)])
    everything = np.exp(logits[order].astype(np.float64))
    held = everything.cumsum() / everything.sum()
    assert held[len(ids) - 2] < 0.5 + 1e-6
    assert held[len(ids) - 1] > 0.5 - 1e-6
    assert probabilities.sum() == pytest.approx(1)


@given(
    arrays(np.float32, st.integers(1, 700), elements=st.floats(-30, 30, width=32)),
    st.floats(0.01, 5),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_the_most_likely_token_is_always_left(logits, temperature, top_k, top_p, min_p):
    ids, probabilities = Sampler(temperature, top_k, top_p, min_p).distribution(logits)
    assert int(np.argmax(logits)) in ids
    assert len(set(ids.tolist())) == len(ids) <= (top_k or len(logits))
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(np.diff(logits[ids]) <= 0) or (top_k == 0 and top_p == 1 and min_p == 0)


@given(arrays(np.float32, st.integers(1, 3000), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_top_k_takes_lower_ids_of_equal_logits(logits, k):
    ids, _ = Sampler(**OFF | {"top_k": k}).distribution(logits)
    expected = np.argsort(-logits, kind="stable")[:k]
    assert sorted(ids.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(value, temperature):
    logits = logits_of()
    logits[17] = value
    with pytest.raises(Error, match=f"the highest is {value}, of token 17"):
        Sampler(temperature=temperature).sample(logits)


def test_nothing_left_to_choose_is_refused():
    with pytest.raises(Error, match="the highest is -inf"):
        Sampler().sample(np.full(9, -np.inf, np.float32))


@pytest.mark.parametrize("shape", [(0,), (2, 5)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(Error, match=r"shape \(n_vocab,\)"):
        Sampler().sample(np.zeros(shape, np.float32))


def test_recent_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(Error, match="from 0 to 999, got 3 to 1000"):
        Sampler(repetition_penalty=1.1).sample(logits_of(), [3, 1000])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("penalty_window", -1),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    with pytest.raises(Error, match=f"{name} must be .*; got"):
        Sampler(**{name: value})
