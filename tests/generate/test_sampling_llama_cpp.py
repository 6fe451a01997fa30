"""Samplers beside llama.cpp's on the same logits, through llama-cpp-python where that is installed."""

import ctypes

import numpy as np
import pytest

from ggpy.generate.sampling import StandardSampler
from tests.generate.test_tokenizer import smollm2, smollm2_path

llama = pytest.importorskip("llama_cpp")

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
RECENT = [5, 9, 2, 7, 5, 9, 2, 4, 5, 9, 2]
N = 2000


def logits_of(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.choice([0.5, 2, 4]), N).astype(np.float32)
    logits[rng.integers(0, 10, 3)] += 6  # some of the recent ones are likely
    return logits


class Chain:
    """A chain of llama.cpp's samplers that has seen some tokens."""

    def __init__(self, *samplers, recent=RECENT):
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for sampler in samplers:
            llama.llama_sampler_chain_add(self.chain, sampler)
        for token in recent:
            llama.llama_sampler_accept(self.chain, token)

    def __del__(self):
        llama.llama_sampler_free(self.chain)

    def __call__(self, logits):
        """What it leaves: the probability of each token, and which one it chose, if any."""
        data = (llama.llama_token_data * len(logits))(*((i, float(x), 0.0) for i, x in enumerate(logits)))
        array = llama.llama_token_data_array(data, len(logits), -1, False)
        llama.llama_sampler_apply(self.chain, ctypes.byref(array))
        left = [(array.data[i].id, array.data[i].logit) for i in range(array.size)]
        out = np.full(len(logits), -np.inf)
        out[[i for i, _ in left]] = [x for _, x in left]
        weights = np.exp(out - out.max())
        return weights / weights.sum(), left[array.selected][0] if array.selected >= 0 else None


def ours(logits, **options):
    ids, probabilities = StandardSampler(**options).distribution(logits, RECENT)
    out = np.zeros(len(logits))
    out[ids] = probabilities
    return out


def bias(values):
    pairs = (llama.llama_logit_bias * len(values))(*values.items())
    return llama.llama_sampler_init_logit_bias(N, len(values), pairs)


def penalties(window, repetition, frequency, presence):
    return llama.llama_sampler_init_penalties(N, window, repetition, frequency, presence)


def dry(multiplier, base, allowed_length, window, vocab=None, breakers=()):
    texts = (ctypes.c_char_p * len(breakers))(*(text.encode() for text in breakers))
    return llama.llama_sampler_init_dry(vocab, multiplier, base, allowed_length, window, texts, len(breakers))


STEPS = {
    "logit_bias": (lambda: [bias({3: 5.0, 9: -4.0})], {"logit_bias": {3: 5.0, 9: -4.0}}),
    "repetition": (lambda: [penalties(64, 1.3, 0, 0)], {"repetition_penalty": 1.3}),
    "penalties": (
        lambda: [penalties(6, 1.1, 0.4, 0.3)],
        {"repetition_penalty": 1.1, "frequency_penalty": 0.4, "presence_penalty": 0.3, "penalty_window": 6},
    ),
    "dry": (lambda: [dry(0.8, 1.75, 2, 4096)], {"dry_multiplier": 0.8}),
    "dry with a window": (
        lambda: [dry(2.0, 1.5, 1, 6)],
        {"dry_multiplier": 2.0, "dry_base": 1.5, "dry_allowed_length": 1, "dry_window": 6},
    ),
    "top_n_sigma": (lambda: [llama.llama_sampler_init_top_n_sigma(1.5)], {"top_n_sigma": 1.5}),
    "top_k": (lambda: [llama.llama_sampler_init_top_k(40)], {"top_k": 40}),
    "typical_p": (lambda: [llama.llama_sampler_init_typical(0.6, 0)], {"typical_p": 0.6}),
    "top_p": (lambda: [llama.llama_sampler_init_top_p(0.7, 0)], {"top_p": 0.7}),
    "top_p 0": (lambda: [llama.llama_sampler_init_top_p(0, 0)], {"top_p": 0}),
    "min_p": (lambda: [llama.llama_sampler_init_min_p(0.1, 0)], {"min_p": 0.1}),
    "xtc": (lambda: [llama.llama_sampler_init_xtc(1, 0.05, 0, 1)], {"xtc_probability": 1, "xtc_threshold": 0.05}),
    "xtc that never comes": (
        lambda: [llama.llama_sampler_init_xtc(1, 0.6, 0, 1)],
        {"xtc_probability": 1, "xtc_threshold": 0.6},
    ),
    "temperature": (lambda: [llama.llama_sampler_init_temp(0.7)], {"temperature": 0.7}),
    "temperature 0": (lambda: [llama.llama_sampler_init_temp(0)], {"temperature": 0}),
    "dynatemp": (
        lambda: [llama.llama_sampler_init_temp_ext(0.8, 0.6, 1.5)],
        {"temperature": 0.8, "dynatemp_range": 0.6, "dynatemp_exponent": 1.5},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_each_step_alone(name):
    samplers, options = STEPS[name]
    chain = Chain(*samplers())
    for seed in range(20):
        logits = logits_of(seed)
        np.testing.assert_allclose(
            ours(logits, **OFF | {"dry_sequence_breakers": ()} | options), chain(logits)[0], atol=5e-6
        )


def test_the_default_chain():
    chain = Chain(
        penalties(64, 1, 0, 0),
        dry(0, 1.75, 2, 4096),
        llama.llama_sampler_init_top_n_sigma(-1),
        llama.llama_sampler_init_top_k(40),
        llama.llama_sampler_init_typical(1, 0),
        llama.llama_sampler_init_top_p(0.95, 0),
        llama.llama_sampler_init_min_p(0.05, 0),
        llama.llama_sampler_init_xtc(0, 0.1, 0, 1),
        llama.llama_sampler_init_temp_ext(0.8, 0, 1),
    )
    for seed in range(50):
        logits = logits_of(seed)
        np.testing.assert_allclose(ours(logits), chain(logits)[0], atol=5e-6)


def test_a_chain_of_all():
    chain = Chain(
        bias({3: 2.0}),
        penalties(64, 1.1, 0.1, 0.2),
        dry(0.8, 1.75, 2, 4096),
        llama.llama_sampler_init_top_n_sigma(2.5),
        llama.llama_sampler_init_top_k(30),
        llama.llama_sampler_init_typical(0.9, 0),
        llama.llama_sampler_init_top_p(0.9, 0),
        llama.llama_sampler_init_min_p(0.02, 0),
        llama.llama_sampler_init_xtc(1, 0.1, 0, 1),
        llama.llama_sampler_init_temp_ext(0.9, 0.3, 1),
    )
    options = {
        "logit_bias": {3: 2.0},
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "dry_multiplier": 0.8,
        "dry_sequence_breakers": (),
        "top_n_sigma": 2.5,
        "top_k": 30,
        "typical_p": 0.9,
        "top_p": 0.9,
        "min_p": 0.02,
        "xtc_probability": 1,
        "temperature": 0.9,
        "dynatemp_range": 0.3,
    }
    for seed in range(50):
        logits = logits_of(seed)
        np.testing.assert_allclose(ours(logits, **options), chain(logits)[0], atol=5e-6)


def test_mirostat_step_by_step():
    """llama.cpp chooses; the state that its choice leads to must leave the same tokens at the next step."""
    chain = Chain(llama.llama_sampler_init_temp(0.9), llama.llama_sampler_init_mirostat_v2(1, 4.0, 0.1))
    sampler = StandardSampler(temperature=0.9, mirostat=2, mirostat_tau=4.0, mirostat_eta=0.1)
    for seed in range(40):
        logits = logits_of(seed)
        expected, chosen = chain(logits)
        ids, probabilities = sampler.distribution(logits)
        out = np.zeros(N)
        out[ids] = probabilities
        np.testing.assert_allclose(out, expected, atol=5e-6)
        sampler._random = Draws(probabilities, ids.tolist().index(chosen))
        assert sampler.sample(logits) == chosen


class Draws:
    """A generator that gives the middle of a token's share."""

    def __init__(self, probabilities, at):
        self.value = probabilities[:at].sum() + probabilities[at] / 2

    def random(self):
        return self.value


@pytest.fixture(scope="module")
def vocabulary():
    path = str(smollm2_path()).encode()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(path, params)
    yield llama.llama_model_get_vocab(model)
    llama.llama_model_free(model)


@pytest.mark.parametrize("texts", [("\n", ":", '"', "*"), ("END",), (", three E",), (" th",), ()])
def test_dry_breakers_of_a_tokenizer(vocabulary, texts):
    text = "one two, three: one two, three * one two, three\n one two, three one two, three END one two, three"
    recent = smollm2().encode(text, bos=False)
    options = {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": texts}
    logits = np.zeros(smollm2().n_vocab, np.float32)
    n_penalized = 0
    for n in range(4, len(recent) + 1):
        chain = Chain(dry(0.8, 1.75, 1, 4096, vocabulary, texts), recent=recent[:n])
        sampler = StandardSampler(**OFF | options, tokenizer=smollm2())
        ids, probabilities = sampler.distribution(logits, recent[:n])
        np.testing.assert_allclose(probabilities, chain(logits)[0][ids], rtol=1e-4)
        n_penalized += probabilities.min() < 0.9 * probabilities.max()
    assert n_penalized > 0
