"""Sampling against transformers' logits processors, and the distributions that follow from the definitions."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

import ggpy
from ggpy.errors import Error
from ggpy.generate import sampling
from ggpy.generate.options import checked_options, option_table
from ggpy.generate.sampling import Candidates, StandardSampler, ranked

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
    np.testing.assert_allclose(dense(StandardSampler(**OFF | options), logits), expected, rtol=1e-5)


def test_cuts_follow_each_other_as_in_llama_cpp():
    logits = logits_of()
    scores = torch.from_numpy(logits)[None]
    for warper in (TopKLogitsWarper(40), TopPLogitsWarper(0.95), MinPLogitsWarper(0.05)):
        scores = warper(None, scores)
    sampler = StandardSampler(temperature=0.7, top_k=40, top_p=0.95, min_p=0.05)
    np.testing.assert_allclose(dense(sampler, logits), softmax(scores / 0.7), rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"min_p": 1.0}, {"min_p": 1.5}, {"top_p": 0.0, "min_p": 1.5}], ids=str)
def test_the_narrowest_choice_leaves_the_likeliest_token(options):
    """llama.cpp, too, keeps one, whatever min-p above 1 says."""
    logits = logits_of()
    ids, probabilities = StandardSampler(**OFF | options).distribution(logits)
    assert ids.tolist() == [int(logits.argmax())] and probabilities.tolist() == [1.0]


def test_tokens_at_the_edge_of_top_p_are_those_of_float64():
    """Equal probabilities, whose float32 sums pass the edge too early: 0.1 ten times."""
    logits = np.zeros(10, np.float32)
    for n in range(1, 10):
        ids, _ = StandardSampler(**OFF | {"top_p": n / 10 - 1e-9}).distribution(logits)
        assert len(ids) == n


def test_repetition_penalty_equals_transformers_within_its_window():
    logits = logits_of()
    recent = [1, 2, 3, 500, 7, 500]
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    expected = softmax(penalty(torch.tensor([recent[-4:]]), torch.from_numpy(logits.copy())[None]))
    sampler = StandardSampler(**OFF | {"repetition_penalty": 1.3, "penalty_window": 4})
    np.testing.assert_allclose(dense(sampler, logits, recent), expected, rtol=1e-5)


def test_penalty_leaves_the_callers_logits_alone():
    logits = logits_of()
    before = logits.copy()
    StandardSampler(repetition_penalty=2.0).sample(logits, [1, 2, 3])
    np.testing.assert_array_equal(logits, before)


def test_temperature_zero_takes_the_lowest_id_of_the_highest():
    logits = np.array([0, 3, 1, 3], np.float32)
    sampler = StandardSampler(temperature=0)
    assert sampler.sample(logits) == 1
    assert StandardSampler(temperature=0, repetition_penalty=1.5).sample(logits, [1]) == 3


def test_tokens_come_as_often_as_they_are_likely():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = StandardSampler(**OFF, seed=1)
    n = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=4)
    expected = np.array([0.5, 0.3, 0.15, 0.05])
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts - n * expected) < 5 * np.sqrt(n * expected * (1 - expected)))


def test_a_seed_repeats_and_seeds_differ():
    logits = logits_of(spread=0.1)

    def draws(seed):
        sampler = StandardSampler(**OFF, seed=seed)
        return [sampler.sample(logits) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_ruled_out_tokens_are_never_chosen():
    logits = np.full(600, -np.inf, np.float32)
    logits[[5, 599]] = 1
    sampler = StandardSampler(temperature=2.0, seed=0)
    assert {sampler.sample(logits) for _ in range(60)} == {5, 599}


def test_nearly_equal_logits_of_a_large_vocabulary_keep_their_share():
    logits = logits_of(50_000, spread=0.1)
    ids, probabilities = StandardSampler(**OFF | {"top_p": 0.5}).distribution(logits)
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
    ids, probabilities = StandardSampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).distribution(
        logits
    )
    assert int(np.argmax(logits)) in ids
    assert len(set(ids.tolist())) == len(ids) <= (top_k or len(logits))
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(np.diff(logits[ids]) <= 0) or (top_k == 0 and top_p == 1 and min_p == 0)


@given(arrays(np.float32, st.integers(1, 3000), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_top_k_takes_lower_ids_of_equal_logits(logits, k):
    ids, _ = StandardSampler(**OFF | {"top_k": k}).distribution(logits)
    expected = np.argsort(-logits, kind="stable")[:k]
    assert sorted(ids.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("k", [1, 40, 700, 2000])
@pytest.mark.parametrize("n", [4096, 5000, 20_001])
def test_top_k_of_large_vocabularies_takes_the_highest_in_order(n, k):
    rng = np.random.default_rng(n + k)
    for values in (rng.normal(0, 3, n), rng.integers(0, 5, n), np.where(rng.random(n) < 10 / n, 1.0, -np.inf)):
        logits = values.astype(np.float32)
        logits[-1] = max(logits[-1], 2)  # the remainder behind the last whole row of groups counts
        expected = np.argsort(-logits, kind="stable")[:k]
        left = sampling.top_k(Candidates(np.arange(n), logits), k)
        np.testing.assert_array_equal(left.ids, expected[logits[expected] > -np.inf])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(value, temperature):
    logits = logits_of()
    logits[17] = value
    with pytest.raises(Error, match=f"the highest is {value}, of token 17"):
        StandardSampler(temperature=temperature).sample(logits)


def test_nothing_left_to_choose_is_refused():
    with pytest.raises(Error, match="the highest is -inf"):
        StandardSampler().sample(np.full(9, -np.inf, np.float32))


@pytest.mark.parametrize("shape", [(0,), (2, 5)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(Error, match=r"shape \(n_vocab,\)"):
        StandardSampler().sample(np.zeros(shape, np.float32))


def test_recent_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(Error, match="from 0 to 999, got 3 to 1000"):
        StandardSampler(repetition_penalty=1.1).sample(logits_of(), [3, 1000])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0),
        ("presence_penalty", np.inf),
        ("penalty_window", -2),
        ("logit_bias", [1, 2]),
        ("logit_bias", {1: np.inf}),
        ("logit_bias", {1: np.nan}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("dry_base", 0.5),
        ("dry_sequence_breakers", "\n"),
        ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", [1]),
        ("mirostat", 1),
        ("seed", -1),
        ("seed", 1.5),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    with pytest.raises(Error, match=f"{name} must be .*; got"):
        StandardSampler(**{name: value})


def test_an_unknown_option_is_named_with_those_there_are():
    with pytest.raises(TypeError, match=r"no option 'topk'; there are .*top_k"):
        StandardSampler(topk=3)


def test_numpy_numbers_are_numbers():
    options = StandardSampler(top_k=np.int32(5), top_p=np.float32(0.5), logit_bias={np.int64(3): np.float32(2)}).options
    assert (options["top_k"], options["top_p"], options["logit_bias"]) == (5, 0.5, {3: 2.0})


def test_the_table_reaches_docs_and_signatures():
    for where in (StandardSampler, ggpy.Model.generate, ggpy.Model.generate_batch):
        for name, (_, option) in option_table().items():
            assert f" {name} : " in where.__doc__
            assert option.help[:40] in where.__doc__
            assert inspect.signature(where).parameters[name].default == option.default


# ---- Each step against its definition, written as it reads ----


def probabilities_of(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def naive_typical(logits, p):
    probabilities = probabilities_of(logits)
    surprise = -np.log(probabilities)
    entropy = sum(probabilities * surprise)
    kept, total = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: abs(surprise[i] - entropy)):
        kept.add(i)
        total += probabilities[i]
        if total >= p:
            return kept
    return kept


def naive_top_n_sigma(logits, n):
    return {i for i, x in enumerate(logits.astype(float)) if x >= logits.max() - n * np.std(logits.astype(float))}


def naive_xtc(logits, threshold):
    probabilities = probabilities_of(logits)
    likely = sorted((i for i, p in enumerate(probabilities) if p >= threshold), key=lambda i: (-probabilities[i], i))
    return set(range(len(logits))) - set(likely[:-1])


def naive_mirostat(logits, temperature, most):
    bits = -np.log2(probabilities_of(logits / np.float32(temperature)))
    return {i for i, b in enumerate(bits) if b <= most} or {int(np.argmax(logits))}


def naive_dry(recent, multiplier, base, allowed_length, breakers):
    """By token, what it loses."""
    start = max((i + 1 for i, t in enumerate(recent) if t in breakers), default=0)
    lost = {}
    for end in range(len(recent) - 1):
        n = 0
        while n <= end and len(recent) - 1 - n >= start and recent[end - n] == recent[len(recent) - 1 - n]:
            n += 1
        after = recent[end + 1]
        if n >= allowed_length and after not in breakers:
            lost[after] = max(lost.get(after, 0), multiplier * base ** (n - allowed_length))
    return lost if len(recent) > allowed_length and len(recent) - start >= allowed_length else {}


ONE_BY_ONE = [
    (sampling.typical_p, naive_typical, [0.05, 0.3, 0.9]),
    (sampling.top_n_sigma, naive_top_n_sigma, [0.5, 1.0, 3.0]),
    (sampling.xtc, naive_xtc, [0.0, 0.02, 0.1, 0.5]),
]


@pytest.mark.parametrize("is_ranked", [False, True])
@pytest.mark.parametrize("n", [2, 50, 3000])
@pytest.mark.parametrize(("step", "naive", "values"), ONE_BY_ONE)
def test_each_step_leaves_what_its_definition_says(step, naive, values, n, is_ranked):
    for seed, value in enumerate(values):
        logits = logits_of(n, seed, spread=1.5)
        candidates = Candidates(np.arange(n), logits)
        left = step(ranked(candidates) if is_ranked else candidates, value)
        assert set(left.ids.tolist()) == naive(logits, value)
        np.testing.assert_array_equal(left.logits, logits[left.ids])
        order = np.lexsort((left.ids, -left.logits)) if left.ranked else np.argsort(left.ids)
        np.testing.assert_array_equal(order, np.arange(len(order)))


@pytest.mark.parametrize("most", [-1.0, 0.5, 3.0, 8.0])
def test_mirostat_leaves_what_surprises_little(most):
    logits = logits_of(500)
    left = sampling.mirostat(Candidates(np.arange(500), logits), 0.7, most)
    assert set(left.ids.tolist()) == naive_mirostat(logits, 0.7, most)


def test_mirostat_comes_near_to_its_surprise():
    sampler = StandardSampler(mirostat=2, mirostat_tau=3.0, mirostat_eta=0.1, temperature=1, seed=0)
    bits = []
    for i in range(300):
        logits = logits_of(2000, seed=i % 20, spread=2.0)
        ids, probabilities = sampler.distribution(logits)
        before = sampler._most_surprise
        token = sampler.sample(logits)
        bits.append(-np.log2(probabilities[ids.tolist().index(token)]))
        assert sampler._most_surprise == pytest.approx(before - 0.1 * (bits[-1] - 3.0))
    assert np.mean(bits[50:]) == pytest.approx(3.0, abs=0.3)


@given(
    st.lists(st.integers(0, 4), max_size=60),
    st.sampled_from([1.0, 1.2, 1.75]),
    st.integers(0, 4),
    st.sets(st.integers(0, 4), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_dry_takes_what_its_definition_says(recent, base, allowed_length, breakers):
    logits = np.arange(5, dtype=np.float32)
    found = sampling.dry_penalized(logits, recent, 0.8, base, allowed_length, {i: [()] for i in breakers})
    lost = naive_dry(recent, 0.8, base, allowed_length, breakers)
    np.testing.assert_allclose(found, [x - lost.get(i, 0) for i, x in enumerate(logits)], rtol=1e-5)


def test_dry_breakers_of_several_tokens_count_from_their_end():
    recent = [1, 2, 3, 8, 9, 1, 2, 3]  # 8 9 is one
    logits = np.zeros(10, np.float32)
    broken = sampling.dry_penalized(logits, [*recent, 8, 9, 1, 2], 1.0, 2.0, 2, {8: [(9,)]})
    assert broken[3] == -1 and np.count_nonzero(broken) == 1  # only "1 2" counts
    whole = sampling.dry_penalized(logits, [*recent, 8, 9, 1, 2], 1.0, 2.0, 2, {8: [(7,)]})
    assert whole[3] == -(2.0 ** (7 - 2))  # "1 2 3 8 9 1 2"


def test_penalties_count_as_their_definition_says():
    logits = logits_of(50)
    recent = [3, 7, 3, 3, 49]
    expected = logits.astype(np.float64)
    for i in set(recent):
        expected[i] = expected[i] / 1.3 if expected[i] > 0 else expected[i] * 1.3
        expected[i] -= 0.2 * recent.count(i) + 0.7
    np.testing.assert_allclose(sampling.penalized(logits, recent, 1.3, 0.2, 0.7), expected, rtol=1e-6)


def test_windows_bound_what_is_recent():
    logits = logits_of(50)
    recent = [*range(40), *range(40)]
    for window, n in ((0, 0), (5, 5), (64, 40), (-1, 40)):
        penalized = dense(StandardSampler(**OFF | {"presence_penalty": 1.0, "penalty_window": window}), logits, recent)
        plain = dense(StandardSampler(**OFF), logits)
        ratio = penalized / plain
        assert np.count_nonzero(ratio < ratio[-1] * 0.99) == n


def test_biases_come_first_and_rule_out():
    logits = logits_of()
    best = int(np.argmax(logits))
    assert StandardSampler(temperature=0, logit_bias={best: -math.inf}).sample(logits) != best
    assert StandardSampler(temperature=0, logit_bias={17: 100.0}).sample(logits) == 17
    assert StandardSampler(logit_bias={17: 1e300}, seed=0).sample(logits) == 17
    with pytest.raises(Error, match="from 0 to 999, got 1000 to 1000"):
        StandardSampler(logit_bias={1000: 1.0}).sample(logits)
    with pytest.raises(Error, match="the highest is -inf"):
        StandardSampler(logit_bias=dict.fromkeys(range(1000), -math.inf)).sample(logits)


def test_xtc_comes_as_often_as_asked():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    sampler = StandardSampler(**OFF, xtc_probability=0.25, xtc_threshold=0.15, seed=0)
    n = sum(sampler.distribution(logits)[0].tolist() == [2, 3] for _ in range(4000))
    assert abs(n - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)


def test_zero_and_more_than_one_leave_one():
    logits = np.array([1, 3, 3, 2], np.float32)
    for options in ({"top_p": 0.0}, {"min_p": 1.5}, {"top_k": 1}, {"min_p": 1e300}):
        assert StandardSampler(**OFF | options).distribution(logits)[0].tolist() == [1]
    assert StandardSampler(**OFF | {"min_p": 1.0}).distribution(logits)[0].tolist() == [1, 2]
    assert len(StandardSampler(**OFF, typical_p=0.0).distribution(logits)[0]) == 1


def test_equal_tokens_reach_their_share_exactly():
    for n in (10, 50, 100, 300):
        logits = np.full(n, 5, np.float32)
        for k in range(1, n):
            for options in ({"top_p": k / n}, {"top_p": k / n, "top_k": n}):
                ids, _ = StandardSampler(**OFF | options).distribution(logits)
                assert ids.tolist() == list(range(k))


def test_dynamic_temperature_follows_the_entropy():
    even, sure = np.zeros(8, np.float32), np.array([50, 0, 0], np.float32)
    for logits, expected in ((even, 1.5), (sure, 0.5)):
        candidates = Candidates(np.arange(len(logits)), logits)
        assert sampling.dynamic_temperature(candidates, 1.0, 0.5, 1.0) == pytest.approx(expected, abs=1e-6)
    halfway = Candidates(np.arange(4), np.array([9, 9, -90, -90], np.float32))
    assert sampling.dynamic_temperature(halfway, 1.0, 1.0, 2.0) == pytest.approx(2 * 0.5**2)


def test_a_seed_repeats_with_all_that_draws():
    for options in ({**OFF, "xtc_probability": 0.5, "xtc_threshold": 0.01}, {"mirostat": 2}):

        def draws(seed, options=options):
            sampler = StandardSampler(**options, seed=seed)
            return [sampler.sample(logits_of(60, i, spread=1)) for i in range(30)]

        assert draws(3) == draws(3) != draws(4)


NUMBERS = {
    name: (
        st.integers(0, 60) if kind is int else st.floats(0, 1) | st.floats(0, 3) | st.floats(0, allow_infinity=False)
    ).filter(option.allowed)
    for name, (kind, option) in option_table().items()
    if kind in (int, float)
}
WILD = st.fixed_dictionaries(
    {},
    optional={
        **NUMBERS,
        "frequency_penalty": st.floats(allow_nan=False, allow_infinity=False),
        "presence_penalty": st.floats(-5, 5),
        "logit_bias": st.dictionaries(st.integers(0, 3), st.floats(-1e300, 1e300) | st.just(-math.inf)),
        "mirostat": st.sampled_from([0, 2]),
        "seed": st.integers(0, 9),
    },
)
EXTREME = [-math.inf, float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)]


@given(
    arrays(np.float32, st.integers(5, 700), elements=st.floats(-30, 30, width=32) | st.sampled_from(EXTREME)),
    st.lists(st.integers(0, 4), max_size=30),
    WILD,
)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("error")
def test_whatever_the_options_a_possible_token_is_chosen(logits, recent, options):
    options = checked_options({**options, "dry_sequence_breakers": ()})
    logits[4] = max(logits[4], -30.0)  # one at least that is possible and isn't ruled out
    before = logits.copy()
    sampler = StandardSampler(**options)
    for _ in range(3):
        token = sampler.sample(logits, recent)
        assert 0 <= token < len(logits)
        assert logits[token] > -math.inf and options["logit_bias"].get(token) != -math.inf
        recent = [*recent, token]
    np.testing.assert_array_equal(logits, before)
    ids, probabilities = sampler.distribution(logits, recent)
    assert len(set(ids.tolist())) == len(ids) > 0
    assert probabilities.sum() == pytest.approx(1) and probabilities.min() >= 0


def test_penalties_beyond_all_numbers_leave_numbers():
    sampler = StandardSampler(repetition_penalty=5e-324, frequency_penalty=5.992310449541053e307, seed=1)
    assert 0 <= sampler.sample(np.ones(5, np.float32), [4, 4, 4, 4]) < 5
