"""What `Model.generate` takes: prompts, limits, samplers, processors."""

import math

import numpy as np
import pytest

import ggpy
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = converted(tmp_path_factory.mktemp("generate"), made("qwen3"), "q8_0")
    with ggpy.load(path, n_ctx=128, n_threads=1) as model:
        yield model


class Stays:
    """A sampler that repeats the last token."""

    def __init__(self):
        self.seen = []

    def sample(self, logits, ids):
        self.seen.append((logits.shape, list(ids)))
        logits[:] = 0  # a copy: harms nobody
        ids.clear()
        return self.seen[-1][1][-1]


def test_any_object_with_sample_chooses(model):
    sampler = Stays()
    generation = model.generate([5, 6, 7], max_tokens=3, sampler=sampler).run()
    assert generation.ids == [7, 7, 7] and generation.prompt_ids == [5, 6, 7]
    assert sampler.seen == [((model.architecture.n_vocab,), [5, 6, 7] + [7] * n) for n in range(3)]


def test_processors_see_ids_and_logits_and_come_in_turn(model):
    seen = []

    def only_even(ids, logits):
        seen.append((list(ids), logits.copy()))
        logits[1::2] = -np.inf  # in its own copy
        return logits

    def only_small(ids, logits):
        assert np.all(logits[1::2] == -np.inf)
        return np.where(np.arange(len(logits)) < 50, logits, np.float32(-np.inf))

    prompt = ids(10)
    generation = model.generate(prompt, max_tokens=8, temperature=2, seed=0, processors=[only_even, only_small]).run()
    assert all(token < 50 and token % 2 == 0 for token in generation.ids)
    everything = prompt + generation.ids
    expected = model.logits(everything)
    for i, (given, logits) in enumerate(seen):
        assert given == everything[: len(prompt) + i]
        np.testing.assert_array_equal(logits, expected[len(given) - 1])


def test_processors_leave_the_logits_of_others_alone(model):
    def zeros(ids, logits):
        logits[:] = 0
        return logits

    alone = model.generate(ids(9), max_tokens=10, temperature=1, seed=4).run().ids
    generations = [model.generate(ids(9), max_tokens=10, seed=i, processors=[zeros]) for i in range(3)]
    generations.append(model.generate(ids(9), max_tokens=10, temperature=1, seed=4))
    assert [g.run().ids for g in generations][-1] == alone


@pytest.mark.parametrize(
    ("processor", "got"),
    [
        (lambda ids, logits: None, "NoneType"),
        (lambda ids, logits: logits[:-1], r"float32 \(\d+,\)"),
        (lambda ids, logits: logits.astype(np.float64), "float64"),
        (lambda ids, logits: logits.tolist(), "list"),
    ],
)
def test_a_processor_that_returns_no_logits_is_named(model, processor, got):
    bad = model.generate(ids(4), max_tokens=3, processors=[processor])
    good = model.generate(ids(5), max_tokens=3, temperature=0)
    with pytest.raises(
        ggpy.Error, match=rf"processor <lambda> must return float32 logits of the shape \(\d+,\), not {got}"
    ):
        bad.run()
    assert len(good.run().ids) == 3


@pytest.mark.parametrize("token", [-1, 10**9, 1.0, None, True])
def test_a_sampler_that_chooses_no_token_is_told(model, token):
    class Wrong:
        def sample(self, logits, ids):
            return token

    with pytest.raises(ggpy.Error, match=r"the sampler chose .*, which is no token of"):
        model.generate(ids(4), sampler=Wrong()).run()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": Stays(), "top_k": 3}, "a sampler or sampling options, not both: top_k"),
        ({"sampler": "greedy"}, "has a method sample"),
        ({"processors": [3]}, "processors are a list of functions"),
        ({"processors": lambda ids, logits: logits}, "processors are a list of functions"),
        ({"max_tokens": -2}, "max_tokens must be"),
        ({"max_tokens": 1.5}, "max_tokens must be"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"stop": [""]}, "stop string must not be empty"),
        ({"stop": [3]}, "stop must be texts"),
        ({"temperature": -1}, "temperature must be a number, 0 or more; got -1"),
        ({"logit_bias": {10**6: 1.0}}, "token 1000000"),
    ],
)
def test_what_generate_can_not_take_is_said_at_once(model, options, words):
    with pytest.raises(ggpy.Error, match=words):
        model.generate(ids(4), **options)


@pytest.mark.parametrize(
    "prompt",
    [b"hi", bytearray(b"hi"), [1.5], ["a"], [{"role": "user", "content": "hi"}], [True], 7, None, np.ones(3), [[1]]],
)
def test_a_prompt_that_is_neither_text_nor_ids_is_refused(model, prompt):
    with pytest.raises(ggpy.Error, match="a prompt is text or token ids"):
        model.generate(prompt)


def test_arrays_and_tuples_of_ids_are_prompts(model):
    expected = model.generate([5, 6, 7], max_tokens=3, temperature=0).run()
    for prompt in (np.array([5, 6, 7]), (5, 6, 7), [np.int32(5), 6, 7], range(5, 8)):
        assert model.generate(prompt, max_tokens=3, temperature=0).run().ids == expected.ids


def test_limits(model):
    nothing = model.generate(ids(4), max_tokens=0)
    assert nothing.run().ids == [] and nothing.finish_reason == "length"
    texts = [model.generate(ids(100), max_tokens=n, temperature=1, seed=1).run() for n in (None, -1)]
    assert texts[0].ids == texts[1].ids and texts[0].finish_reason in ("context", "stop")
    assert model.generate(ids(4), max_tokens=2, stop=None).run().finish_reason in ("length", "stop")
    text = model.generate(ids(4), max_tokens=20, temperature=1, seed=1).run().text
    assert (
        model.generate(ids(4), max_tokens=20, temperature=1, seed=1, stop=text[3:5]).run().text
        == text[: text.index(text[3:5])]
    )


OPTIONS = [
    {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 3.0},
    {"temperature": 1.2, "xtc_probability": 0.5, "xtc_threshold": 0.01, "top_k": 0, "min_p": 0.0},
    {"temperature": 1.0, "dry_multiplier": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.2},
    {"temperature": 1.0, "dynatemp_range": 0.5, "typical_p": 0.9, "logit_bias": {3: -math.inf}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: list(o)[1])
def test_seeds_repeat_whatever_the_company(model, options):
    prompts = [ids(5 + i, seed=i) for i in range(6)]
    alone = [model.generate(p, max_tokens=12, seed=10 + i, **options).run().ids for i, p in enumerate(prompts)]
    together = [model.generate(p, max_tokens=12, seed=10 + i, **options) for i, p in enumerate(prompts)]
    others = [model.generate(ids(3), max_tokens=30, seed=i) for i in range(3)]
    next(others[0], None)
    assert [g.run().ids for g in reversed(together)] == alone[::-1]
    batch = sorted(model.generate_batch(prompts, max_tokens=12, seed=10, **options), key=lambda g: g.index)
    assert [g.ids for g in batch] == alone
    assert all(3 not in ids for ids in alone) or "logit_bias" not in options


def test_batches_take_a_sampler_for_each_place(model):
    prompts = [ids(4, seed=i) for i in range(4)]
    made = {}

    def sampler(i):
        made[i] = ggpy.StandardSampler(temperature=1, seed=20 + i)
        return made[i]

    batch = sorted(model.generate_batch(iter(prompts), max_tokens=6, samplers=sampler), key=lambda g: g.index)
    expected = [model.generate(p, max_tokens=6, temperature=1, seed=20 + i).run().ids for i, p in enumerate(prompts)]
    assert [g.ids for g in batch] == expected and sorted(made) == [0, 1, 2, 3]
    with pytest.raises(ggpy.Error, match="seed must be"):
        next(model.generate_batch(prompts, seed=-1))


def test_dry_ends_a_loop(model):
    prompt = [5, 6, 7, 8] * 12
    favourite = [{5: 6, 6: 7, 7: 8, 8: 5}]

    def likes_the_loop(ids, logits):
        logits[favourite[0].get(ids[-1], 5)] = logits.max() + 3
        return logits

    options = {"max_tokens": 12, "temperature": 0, "processors": [likes_the_loop]}
    assert model.generate(prompt, **options).run().ids == [5, 6, 7, 8] * 3
    assert model.generate(prompt, **options, dry_multiplier=0.8).run().ids[0] != 5
