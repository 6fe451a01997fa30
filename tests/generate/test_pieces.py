"""What generations say of each token, and what continuations are scored with."""

import asyncio
import pickle

import numpy as np
import pytest

import ggpy
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = converted(tmp_path_factory.mktemp("pieces"), made("qwen3"), "q8_0")
    with ggpy.load(path, n_ctx=512, n_batch=128, n_threads=1) as model:
        yield model


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_pieces_are_texts_with_their_token(model):
    generation = model.generate(ids(7), max_tokens=20, temperature=1, seed=3)
    pieces = list(generation)
    assert [p.token for p in pieces] == generation.ids and pieces == generation.pieces
    assert "".join(pieces) == generation.text and all(type(p.text) is str for p in pieces)
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + [generation.finish_reason]
    assert all(p.logprob is None and not p.top_logprobs for p in pieces)

    async def collected():
        return [p async for p in model.generate(ids(7), max_tokens=20, temperature=1, seed=3)]

    assert [p.token for p in asyncio.run(collected())] == generation.ids
    copy = pickle.loads(pickle.dumps(pieces[0]))
    assert copy == pieces[0] and copy.token == pieces[0].token


@pytest.mark.parametrize("n", [0, 1, 7])
def test_logprobs_are_the_models_own(model, n):
    """Before processors and options: those of a float64 softmax of `Model.logits`."""
    prompt = ids(9)
    generation = model.generate(
        prompt, max_tokens=12, temperature=2, seed=5, logit_bias={3: 5.0}, top_k=9, logprobs=n, repetition_penalty=1.5
    ).run()
    expected = log_softmax(model.logits(prompt + generation.ids))[len(prompt) - 1 : -1]
    for piece, row in zip(generation.pieces, expected, strict=True):
        assert piece.logprob == pytest.approx(row[piece.token], abs=1e-6)
        best = np.argsort(-row, kind="stable")[:n]
        assert list(piece.top_logprobs) == best.tolist()
        np.testing.assert_allclose(list(piece.top_logprobs.values()), row[best], atol=1e-6)


@pytest.mark.parametrize("n_prompt", [1, 2, 64, 65, 200, 301])
def test_the_prompt_comes_first_with_echo(model, n_prompt):
    prompt = ids(n_prompt, seed=n_prompt)
    model.generate(prompt, max_tokens=1).run()  # its keys and values are known then; its logits aren't
    generation = model.generate(prompt, max_tokens=4, temperature=0, logprobs=2, echo=True).run()
    expected = log_softmax(model.logits(prompt + generation.ids))
    assert [p.token for p in generation.pieces] == prompt + generation.ids
    assert generation.pieces[0].logprob is None
    for i, piece in enumerate(generation.pieces[1:]):
        assert piece.logprob == pytest.approx(expected[i, piece.token], abs=1e-6)
        assert next(iter(piece.top_logprobs)) == expected[i].argmax()
    alone = model.generate(prompt, max_tokens=4, temperature=0, echo=True).run()
    assert alone.text == generation.text and {p.logprob for p in alone.pieces} == {None}
    only = model.generate(prompt, max_tokens=0, logprobs=2, echo=True).run()
    assert only.finish_reason == "length" and only.ids == []
    assert [p.logprob for p in only.pieces] == [p.logprob for p in generation.pieces[:n_prompt]]


def test_echoed_text_is_the_prompts(model):
    text = "One two, three"
    ids_ = model.tokenizer.encode_prompt(text)
    pieces = model.generate(text, max_tokens=0, echo=True).run().pieces
    assert [p.token for p in pieces] == ids_ and "".join(pieces) == text


def test_logprobs_are_the_same_in_any_company(model):
    prompts = [ids(n, seed=n) for n in (3, 70, 200, 9, 150)]
    options = {"max_tokens": 5, "temperature": 1, "logprobs": 1, "echo": True}
    alone = [model.generate(p, seed=i, **options).run().pieces for i, p in enumerate(prompts)]
    others = [model.generate(ids(120, seed=90 + i), max_tokens=30, seed=i) for i in range(2)]
    next(others[0], None)
    together = sorted(model.generate_batch(prompts, seed=0, **options), key=lambda g: g.index)
    for generation, expected in zip(together, alone, strict=True):
        assert [(p, p.token, p.logprob, p.top_logprobs) for p in generation.pieces] == [
            (p, p.token, p.logprob, p.top_logprobs) for p in expected
        ]


def test_echo_goes_on_when_pages_are_few(tmp_path):
    """Generations that are sent away come back, and no log-probability is lost."""
    path = converted(tmp_path, made("qwen3"), "q8_0")
    with ggpy.load(path, n_ctx=320, n_batch=64, n_threads=1) as big:
        page = big.kv_bytes // 512
        expected = [
            big.generate(ids(250, seed=i), max_tokens=40, temperature=0, echo=True, logprobs=0).run() for i in range(4)
        ]
    with ggpy.load(path, n_ctx=320, n_batch=64, n_threads=1, kv_memory=8 * page) as small:
        prompts = [ids(250, seed=i) for i in range(4)]
        batch = small.generate_batch(prompts, max_tokens=40, temperature=0, echo=True, logprobs=0)
        for got in batch:
            assert [p.logprob for p in got.pieces] == [p.logprob for p in expected[got.index].pieces]


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_logprobs_are_a_count(model, value):
    with pytest.raises(ggpy.Error, match="logprobs must be a whole number, 0 or more"):
        model.generate(ids(3), logprobs=value)


def test_several_generations_of_a_prompt(model):
    prompts = [ids(6, seed=1), ids(80, seed=2)]
    expected = [
        model.generate(p, max_tokens=6, temperature=1, seed=7 + 3 * i + j).run().ids
        for i, p in enumerate(prompts)
        for j in range(3)
    ]
    got = sorted(model.generate_batch(prompts, max_tokens=6, temperature=1, seed=7, n=3), key=lambda g: (g.index, g.choice))
    assert [g.ids for g in got] == expected and [(g.index, g.choice) for g in got] == [
        (i, j) for i in (0, 1) for j in (0, 1, 2)
    ]

    best = sorted(
        model.generate_batch(prompts, max_tokens=6, temperature=1, seed=7, n=2, best_of=3),
        key=lambda g: (g.index, g.choice),
    )
    for index in (0, 1):
        candidates = [
            model.generate(prompts[index], max_tokens=6, temperature=1, seed=7 + 3 * index + j, logprobs=0).run()
            for j in range(3)
        ]
        means = sorted((np.mean([p.logprob for p in g.pieces]), g.ids) for g in candidates)[::-1]
        assert [g.ids for g in best if g.index == index] == [tokens for _, tokens in means[:2]]
    with pytest.raises(ggpy.Error, match="best_of must be a whole number, 2 or more; got 1"):
        model.generate_batch(prompts, n=2, best_of=1)
    with pytest.raises(ggpy.Error, match="n must be a whole number, 1 or more; got 0"):
        model.generate_batch(prompts, n=0)


def test_scores_are_sums_of_log_probabilities(model):
    prompt = ids(100, seed=4)
    greedy = model.generate(prompt, max_tokens=5, temperature=0).run().ids
    continuations = [greedy, ids(3, seed=8), [greedy[0]], ids(150, seed=9), [*greedy[:2], (greedy[2] + 1) % 50]]
    for score, continuation in zip(model.score(prompt, continuations), continuations, strict=True):
        rows = log_softmax(model.logits(prompt + continuation))[len(prompt) - 1 : -1]
        assert score.ids == continuation
        np.testing.assert_allclose(score.logprobs, rows[np.arange(len(continuation)), continuation], atol=1e-6)
        assert score.logprob == sum(score.logprobs)
        assert score.is_greedy == (rows.argmax(axis=1).tolist() == continuation)
    assert model.score(prompt, []) == []


def test_texts_are_scored_as_they_are_tokenized_together(model):
    encode = model.tokenizer.encode_prompt
    begins = model.tokenizer.eos if model.tokenizer.bos is None else model.tokenizer.bos
    for prompt, continuation in (("The king", " said unto"), ("The king ", "said unto"), ("", "In the beginning")):
        (score,) = model.score(prompt, [continuation])
        whole = encode(prompt + continuation)
        start = encode(prompt.rstrip()) or [begins]
        assert (start + score.ids)[-len(whole) :] == whole
        assert score == model.score(start, [score.ids])[0]


@pytest.mark.parametrize(
    ("prompt", "continuation", "words"),
    [
        ([1, 2], "text", "either all texts or all token ids"),
        ("text", [1, 2], "either all texts or all token ids"),
        ([1, 2], [], "has no tokens"),
        ("text", "", "has no tokens"),
        ([1] * 400, [1] * 200, "the context holds 512"),
    ],
)
def test_what_can_not_be_scored_is_said(model, prompt, continuation, words):
    with pytest.raises(ggpy.Error, match=words):
        model.score(prompt, [continuation])
