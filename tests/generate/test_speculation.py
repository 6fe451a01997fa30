"""Speculation changes how many runs a text takes, and nothing of the text."""

import threading
from contextlib import suppress

import numpy as np
import pytest

import ggpy
from ggpy.generate.generation import Generation
from ggpy.generate.request import Request
from ggpy.generate.speculation import DraftModel, Lookup
from ggpy.generate.tokenizer import UNUSED, Tokenizer
from tests.converters.conftest import N_VOCAB
from tests.generate.test_many import KINDS, SYSTEM, Recorder, by_itself, page_bytes
from tests.generate.test_tokenizer import spm_metadata, trained_spm
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made
from tests.models.test_states import made as made_with_states

STATES = ["qwen35", "lfm2", "granitehybrid"]
ENDS = [0, 2]  # the tiny models' end tokens, which are kept from being chosen
GREEDY = {"temperature": 0, "logit_bias": dict.fromkeys(ENDS, -np.inf)}
SAMPLED = {**GREEDY, "temperature": 0.7, "seed": 5, "top_k": 5}
PENALIZED = {**SAMPLED, "temperature": 0.5, "seed": 1, "repetition_penalty": 1.3, "dry_multiplier": 0.8, "logprobs": 2}
PROMPT = [*ids(30), *ids(30)]


class Knows:
    """Proposes what it is told: the tokens at the same places of a sequence, all that it has."""

    def __init__(self, sequence):
        self.sequence = list(sequence)

    def propose(self, ids, most):
        return self.sequence[len(ids) :]


class Sometimes:
    """Proposes right and wrong tokens, by turns more or less of both."""

    def __init__(self, sequence):
        self.sequence, self.calls = list(sequence), 0

    def propose(self, ids, most):
        self.calls += 1
        n = self.calls * 7 % 11
        wrong = [(i * 31 + self.calls) % N_VOCAB for i in range(5)]
        return [*self.sequence[len(ids) : len(ids) + n], *wrong]


def draft_of(model):
    """A draft model that isn't spared: by its size it would cost as much as what it saves."""
    return DraftModel(model._runner, N_VOCAB, 0.0)


def pieces(generation):
    return [(str(p), p.token, p.logprob, dict(p.top_logprobs), p.finish_reason) for p in generation]


@pytest.fixture(scope="module", params=[*KINDS, "qwen35"])
def any_model(request, tmp_path_factory):
    name = request.param
    checkpoint = made_with_states(name) if name in STATES else made(KINDS[name][0])
    path = converted(tmp_path_factory.mktemp("speculation"), checkpoint, "q8_0")
    with ggpy.load(path, n_ctx=512, n_threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("dense"), made("qwen3"), "q8_0")


@pytest.fixture(scope="module", params=STATES)
def with_states(request, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("states"), made_with_states(request.param), "q8_0")


@pytest.fixture
def model(dense):
    with ggpy.load(dense, n_ctx=512, n_threads=2) as model:
        yield model


@pytest.fixture
def runs(model, monkeypatch):
    """How many tokens each of the model's runs had."""
    seen, run = [], model._runner.run
    monkeypatch.setattr(model._runner, "run", lambda spans: (seen.append(sum(len(s.ids) for s in spans)), run(spans))[1])
    return seen


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
def test_the_text_is_that_of_plain_decoding(any_model, options):
    model = any_model
    plain = model.generate(PROMPT, max_tokens=70, **options)
    expected = pieces(plain)
    whole = PROMPT + plain.ids
    for draft in (Knows(whole), Sometimes(whole), draft_of(model), None):
        generation = model.generate(PROMPT, max_tokens=70, lookup=draft is None, draft=draft, **options)
        assert pieces(generation) == expected
        assert generation.ids == plain.ids and generation.text == plain.text
        assert 0 <= generation.n_accepted <= generation.n_drafted
        if isinstance(draft, Knows):
            assert generation.n_drafted == generation.n_accepted > 50
        if isinstance(draft, Sometimes):
            assert 0 < generation.n_accepted < generation.n_drafted


def test_right_guesses_save_runs(model, runs):
    plain = model.generate(PROMPT, max_tokens=65, **SAMPLED).run().ids
    assert len(runs) == 65
    runs.clear()
    generation = model.generate(PROMPT, max_tokens=65, draft=Knows(PROMPT + plain), **SAMPLED).run()
    assert generation.ids == plain
    # All of the prompt but its last token is there; a run has 32 guesses at most, none behind the last token.
    assert runs == [1, 33, 31] and generation.n_accepted == 62


def test_a_repeated_text_is_looked_up(model, runs):
    def copies(seen, logits):
        """Makes the model repeat its prompt, but for every 40th token."""
        logits[(seen[len(seen) - 60] + (len(seen) % 40 == 0)) % N_VOCAB] += 1000
        return logits

    options = {"max_tokens": 150, "processors": [copies], **SAMPLED}
    plain = model.generate(PROMPT, **options).run().ids
    assert len(runs) == 150
    runs.clear()
    generation = model.generate(PROMPT, lookup=True, **options).run()
    assert generation.ids == plain and len(runs) < 40 and generation.n_accepted > 110
    runs.clear()
    few = model.generate(PROMPT, lookup=2, **options).run()
    assert few.ids == plain and max(runs) == 3 and len(runs) < 80


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_endings_within_a_draft(model, options):
    plain = model.generate(PROMPT, max_tokens=40, **options)
    all_pieces = pieces(plain)
    knows = Knows(PROMPT + plain.ids + ids(200))
    for n in (1, 2, 17, 32, 33):
        generation = model.generate(PROMPT, max_tokens=n, draft=knows, **options)
        assert pieces(generation) == pieces(model.generate(PROMPT, max_tokens=n, **options))
        assert generation.finish_reason == "length" and len(generation.ids) == n
    text = "".join(p[0] for p in all_pieces)
    for stop in (text[5:9], text[20:22], text[-3:]):
        expected = model.generate(PROMPT, max_tokens=40, stop=stop, **options).run()
        generation = model.generate(PROMPT, max_tokens=40, stop=stop, draft=knows, **options).run()
        assert (generation.text, generation.ids, generation.finish_reason) == (expected.text, expected.ids, "stop")
        assert stop not in generation.text


def test_an_end_token_within_a_draft(model):
    def ends(seen, logits):
        logits[ENDS] = 1e9 if len(seen) == len(PROMPT) + 10 else -np.inf
        return logits

    expected = model.generate(PROMPT, processors=[ends], seed=3)
    known = pieces(expected)
    assert expected.ids[-1] in ENDS and len(expected.ids) == 11
    knows = Knows(PROMPT + expected.ids + expected.ids)
    generation = model.generate(PROMPT, processors=[ends], draft=knows, seed=3)
    assert pieces(generation) == known and generation.finish_reason == "stop"
    assert generation.n_accepted == 10 < generation.n_drafted


def test_the_edge_of_the_context(dense):
    with ggpy.load(dense, n_ctx=130, n_threads=1) as model:
        expected = model.generate(PROMPT, **SAMPLED).run()
        assert expected.finish_reason == "context" and len(expected.ids) == 71
        for draft in (Knows(PROMPT + expected.ids + ids(50)), draft_of(model)):
            generation = model.generate(PROMPT, draft=draft, **SAMPLED).run()
            assert generation.ids == expected.ids and generation.finish_reason == "context"
        # A draft model whose context is shorter than this one's has nothing more to say at its end.
        with ggpy.load(dense, n_ctx=90, n_threads=1) as short:
            generation = model.generate(PROMPT, draft=draft_of(short), **SAMPLED).run()
            assert generation.ids == expected.ids and 0 < generation.n_accepted < 40
            assert short._runner.pages.n_free + len(short._runner._dropped) == short._runner.pages.n_pages


@pytest.mark.parametrize("n_batch", [512, 16, 3, 1])
def test_batches_with_and_without(dense, n_batch):
    batches_with_and_without(dense, n_batch)


@pytest.mark.parametrize("n_batch", [512, 20, 3])
def test_batches_of_models_with_states(with_states, n_batch):
    batches_with_and_without(with_states, n_batch)


def batches_with_and_without(path, n_batch):
    prompts = [SYSTEM[: 37 * i % 151] + ids(3 + i, seed=i) for i in range(9)]
    with ggpy.load(path, n_ctx=256, n_threads=1) as model:
        plain = [model.generate(p, max_tokens=40, **SAMPLED | {"seed": i}).run().ids for i, p in enumerate(prompts)]
    with ggpy.load(path, n_ctx=256, n_threads=1, n_batch=n_batch) as model:
        kinds = (None, Sometimes, Knows, "lookup", "model", "cancelled")
        together = []
        for i, p in enumerate(prompts):
            kind, whole = kinds[i % len(kinds)], p + plain[i]
            draft = kind(whole) if isinstance(kind, type) else draft_of(model) if kind in ("model", "cancelled") else None
            options = {"lookup": kind == "lookup", "draft": draft, **SAMPLED, "seed": i}
            together.append(model.generate(p, max_tokens=40, **options))
            if kind == "cancelled":
                next(together[-1])
                together[-1].cancel()
        for i, generation in enumerate(together):
            generation.run()
            assert generation.ids == plain[i][: len(generation.ids)]
            assert generation.finish_reason == "cancelled" or len(generation.ids) == 40
            assert generation._request.drafter is None, "what it held is given back"
        batch = model.generate_batch(prompts, max_tokens=40, lookup=True, **SAMPLED | {"seed": 0})
        assert {g.index: g.ids for g in batch} == dict(enumerate(plain))
        model._runner.prefixes.clear()
        model._runner.take_page()
        assert model._runner.pages.n_free == model._runner.pages.n_pages - 1


def test_drafts_send_nobody_away_and_leave_no_pages_taken(dense):
    prompts = [ids(60, seed=i) for i in range(4)]
    with ggpy.load(dense, n_ctx=256, n_threads=1, kv_memory=5 * page_bytes(dense, "f16")) as model:
        plain = [model.generate(p, max_tokens=100, **SAMPLED).run().ids for p in prompts]
        drafters = [Sometimes(p + t) for p, t in zip(prompts, plain, strict=True)]
        sent_away, release = [], model._scheduler._release
        model._scheduler._release = lambda r: (sent_away.append(r) if r.sequence and not r.done else None, release(r))[1]
        alone = model.generate(prompts[0], max_tokens=100, draft=drafters[0], **SAMPLED)
        assert alone.run().ids == plain[0] and not sent_away
        together = [model.generate(p, max_tokens=100, draft=d, **SAMPLED) for p, d in zip(prompts, drafters, strict=True)]
        assert [g.run().ids for g in together] == plain and sent_away
        assert model._runner.prefixes.n_unused() + model._runner.pages.n_free == 5
        model.logits(ids(256))


def test_what_wrong_guesses_left_is_not_shared(model):
    """Pages that drafts have filled are known only with what was chosen, and written anew where they were wrong."""
    plain = model.generate(PROMPT, max_tokens=150, **SAMPLED).run().ids
    model._runner.prefixes.clear()
    whole = PROMPT + plain
    assert model.generate(PROMPT, max_tokens=150, draft=Sometimes(whole), **SAMPLED).run().ids == plain
    for n in (64, 70, 135, 190, len(whole) - 1):
        recorder = Recorder(temperature=1.0, seed=2)
        again = Generation(model._scheduler, Request(model.tokenizer, [*whole[:n], 7], recorder, 5, ())).run()
        assert again.n_reused == n
        assert recorder.seen == by_itself(model, again)


def test_states_go_back_to_the_last_right_token(with_states, monkeypatch):
    """A run after a wrong guess evaluates again what was right before it; and what is known then are the right tokens."""
    with ggpy.load(with_states, n_ctx=512, n_threads=1) as model:
        plain = model.generate(PROMPT, max_tokens=60, **SAMPLED).run().ids
        whole = PROMPT + plain

        class OneWrong:
            def propose(self, seen, most):
                draft = whole[len(seen) : len(seen) + 4]
                return [*draft[:2], draft[2] ^ 1, *draft[3:]] if len(seen) in (66, 69, 87) else draft

        seen, run = [], model._runner.run
        monkeypatch.setattr(model._runner, "run", lambda spans: (seen.append([len(s.ids) for s in spans]), run(spans))[1])
        generation = model.generate(PROMPT, max_tokens=60, draft=OneWrong(), **SAMPLED).run()
        assert generation.ids == plain and generation.n_drafted - generation.n_accepted == 6
        # Each run has the last token and 4 guesses, and what runs with wrong ones left: 3 tokens, then 6.
        assert [n for (n,) in seen][:7] == [60, 5, 5, 8, 11, 5, 5]
        again = model.generate([*whole, 7], max_tokens=5, **SAMPLED).run()
        assert again.n_reused == len(whole) - 1
        model._runner.prefixes.clear()
        assert again.ids == model.generate([*whole, 7], max_tokens=5, **SAMPLED).run().ids


def test_snapshots_are_left_in_spite_of_guesses(with_states, monkeypatch):
    monkeypatch.setattr("ggpy.generate.scheduler.SNAPSHOT_TOKENS", 64)
    with ggpy.load(with_states, n_ctx=512, n_threads=1) as model:
        plain = model.generate(PROMPT, max_tokens=150, **SAMPLED).run().ids
        model._runner.prefixes.clear()
        whole = PROMPT + plain
        model.generate(PROMPT, max_tokens=150, draft=Sometimes(whole), **SAMPLED).run()
        again = model.generate([*whole[:200], 7], max_tokens=1, **SAMPLED).run()
        assert again.n_reused == 192


def run_through_interrupts(runner, generation, name):
    """Runs a generation to its end; every third run is interrupted when its work is done."""
    calls, run = [], getattr(runner, name)

    def interrupted(*given):
        results = run(*given)
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, name, interrupted)
        while generation.finish_reason is None:
            with suppress(KeyboardInterrupt):
                generation.run()
    return len(calls)


def test_interrupts_of_runs_with_guesses(with_states):
    with ggpy.load(with_states, n_ctx=512, n_threads=1) as model:
        plain = model.generate(PROMPT, max_tokens=60, **SAMPLED).run().ids
        generation = model.generate(PROMPT, max_tokens=60, draft=Sometimes(PROMPT + plain), **SAMPLED)
        assert run_through_interrupts(model._runner, generation, "run") > 9
        assert generation.ids == plain and generation.n_accepted
        again = model.generate([*PROMPT, *plain, 7], max_tokens=5, **SAMPLED).run()
        model._runner.prefixes.clear()
        assert again.ids == model.generate([*PROMPT, *plain, 7], max_tokens=5, **SAMPLED).run().ids


@pytest.mark.parametrize("n_slots", [4, 8])
def test_few_slots(with_states, n_slots, monkeypatch):
    """Drafts go without where there is no room for another state, and nobody is sent away for them."""
    prompts = [ids(20, seed=i) for i in range(4)]
    monkeypatch.setattr("ggpy.generate.runner._SLOTS", n_slots // 4)
    with ggpy.load(with_states, n_ctx=256, n_threads=1) as model:
        assert model._runner.pages.states.n_slots == n_slots
        plain = [model.generate(p, max_tokens=50, **SAMPLED).run().ids for p in prompts]
        together = [
            model.generate(p, max_tokens=50, draft=Sometimes(p + t), **SAMPLED) for p, t in zip(prompts, plain, strict=True)
        ]
        held = [model.new_sequence() for _ in range(2)]
        for sequence in held:
            sequence.extend(ids(3))
        assert [g.run().ids for g in together] == plain
        assert (sum(g.n_accepted for g in together) > 20) == (n_slots == 8)


def test_a_draft_model_with_states_is_right_wherever_it_is_asked(with_states, monkeypatch):
    monkeypatch.setattr("ggpy.generate.speculation._COST", 0.01)  # random models are sure of nothing
    with ggpy.load(with_states, n_ctx=256, n_threads=1) as model, ggpy.load(with_states, n_ctx=256, n_threads=1) as other:
        plain = model.generate(PROMPT, max_tokens=60, **SAMPLED).run()
        generation = model.generate(PROMPT, max_tokens=60, draft=draft_of(other), **SAMPLED).run()
        assert generation.ids == plain.ids and generation.n_accepted < generation.n_drafted
        counts, run = [], other._runner.run
        other._runner.run = lambda spans: (counts.append(len(spans[0].ids)), run(spans))[1]
        greedy = model.generate(PROMPT, max_tokens=60, draft=draft_of(other), **GREEDY).run()
        assert greedy.n_accepted == greedy.n_drafted > 5
        assert max(counts[1:]) < 40


def test_hooks_see_guesses_and_change_the_same(model):
    def turned(name, value):
        return -value

    with model.hooked({"blk.1.out": turned}):
        plain = model.generate(PROMPT, max_tokens=30, **SAMPLED).run().ids
        generation = model.generate(PROMPT, max_tokens=30, draft=Sometimes(PROMPT + plain), **SAMPLED).run()
        assert generation.ids == plain and generation.n_accepted


class Wrong:
    """Proposes what it is given."""

    def __init__(self, proposal):
        self.proposal = proposal

    def propose(self, ids, most):
        ids.clear()  # its own copy
        if isinstance(self.proposal, Exception):
            raise self.proposal
        return self.proposal


@pytest.mark.parametrize(
    ("proposal", "words"),
    [
        ([1, N_VOCAB], f"the drafter Wrong proposed {N_VOCAB}, which is no token of {N_VOCAB}"),
        ([-1], "proposed -1"),
        ([1.5], "proposed 1.5"),
        (["a"], "proposed 'a'"),
        (None, "a list of token ids, not NoneType"),
        (ValueError("no idea"), "no idea"),
    ],
)
def test_a_drafter_that_fails_ends_its_generation_alone(model, proposal, words):
    bad = model.generate(PROMPT, max_tokens=10, draft=Wrong(proposal), **GREEDY)
    good = model.generate(ids(9), max_tokens=10, lookup=True, **GREEDY)
    with pytest.raises((ggpy.Error, ValueError), match=words):
        bad.run()
    assert good.run().ids == model.generate(ids(9), max_tokens=10, **GREEDY).run().ids
    assert model._scheduler._running == []


@pytest.mark.parametrize("proposal", [[], [3] * 1000, np.array([1, 2]), (5,), [0]])
def test_any_list_of_tokens_may_be_proposed(model, proposal):
    plain = model.generate(PROMPT, max_tokens=40, **SAMPLED).run().ids
    generation = model.generate(PROMPT, max_tokens=40, draft=Wrong(proposal), **SAMPLED).run()
    assert generation.ids == plain


def test_what_cannot_draft_is_refused(model, tmp_path):
    for options, words in (
        ({"lookup": -1}, "lookup"),
        ({"lookup": 2.5}, "lookup"),
        ({"draft": "small.gguf"}, "propose"),
        ({"lookup": True, "draft": model}, "not from both"),
    ):
        with pytest.raises(ggpy.Error, match=words):
            model.generate(PROMPT, **options)
    with (
        ggpy.load("demo") as other,
        pytest.raises(ggpy.Error, match=r"not the vocabulary of .*: token 1 is '!', not") as error,
    ):
        model.generate(PROMPT, draft=other)
    assert "\n" not in str(error.value)


def test_vocabularies_may_differ_in_what_fills_them_up():
    metadata = spm_metadata(trained_spm())
    tokens, scores, types = (np.array(metadata[f"tokenizer.ggml.{k}"]).tolist() for k in ("tokens", "scores", "token_type"))

    def with_more(more, kind):
        fields = {"tokens": tokens + more, "scores": scores + [0.0] * len(more), "token_type": types + [kind] * len(more)}
        return Tokenizer.from_metadata(metadata | {f"tokenizer.ggml.{k}": v for k, v in fields.items()})

    plain, padded, other = with_more([], 1), with_more(["[PAD1]", "[PAD2]"], UNUSED), with_more(["more"], 1)
    assert plain.difference(padded) == padded.difference(plain) == ""
    assert plain.difference(other) == f"{len(tokens)} tokens, not {len(tokens) + 1}"
    assert "'more'" in padded.difference(other)


def test_draft_models_draft_for_each_other(dense):
    """Locks are taken in no circle."""
    with ggpy.load(dense, n_ctx=256, n_threads=1) as one, ggpy.load(dense, n_ctx=256, n_threads=1) as two:
        plain = one.generate(PROMPT, max_tokens=60, **SAMPLED).run().ids
        texts = {}

        def work(model, draft, i):
            texts[i] = model.generate(PROMPT, max_tokens=60, draft=draft_of(draft), **SAMPLED).run().ids

        threads = [
            threading.Thread(target=work, args=(*m, i), daemon=True) for i, m in enumerate([(one, two), (two, one)] * 2)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert [texts.get(i) for i in range(4)] == [plain] * 4


def test_a_closed_draft_model_ends_the_generation_in_a_line(model, dense):
    other = ggpy.load(dense, n_ctx=256, n_threads=1)
    generation = model.generate(PROMPT, max_tokens=50, draft=draft_of(other), **GREEDY)
    next(generation)
    other.close()
    with pytest.raises(ggpy.Error, match="the model is closed"):
        generation.run()
    with pytest.raises(ggpy.Error, match="the model is closed"):
        model.generate(PROMPT, draft=other)


def test_a_draft_model_that_agrees_is_followed(model, dense):
    """Of the same weights, it is right wherever it is asked, and its runs serve all generations at once."""
    with ggpy.load(dense, n_ctx=256, n_threads=1) as other:
        counts, run = [], other._runner.run
        other._runner.run = lambda spans: (counts.append(len(spans)), run(spans))[1]
        together = [model.generate(ids(20, seed=i), max_tokens=30, draft=draft_of(other), **GREEDY) for i in range(3)]
        for g in together:
            g.run()
            assert g.n_accepted == g.n_drafted > 0
        assert max(counts) == 3


def test_a_draft_model_that_is_always_wrong_is_hardly_asked(model):
    calls = []

    class Opposite(DraftModel):
        def _guess(self, logits):
            calls.append(1)
            self._guesses.append((int(logits.argmin()), 0.9))
            return self._trust * 0.9

    generation = model.generate(ids(20), max_tokens=200, draft=Opposite(model._runner, N_VOCAB, 0.0), **GREEDY).run()
    assert generation.n_accepted == 0 and len(calls) < 100


def test_lookup_takes_the_longest_match_of_the_latest_places():
    """Against a search through the whole sequence, in texts of few different tokens."""
    for seed in range(30):
        tokens = np.random.default_rng(seed).integers(0, 3 + seed % 5, 60).tolist()
        lookup = Lookup()
        for end in range(2, len(tokens)):
            before = lookup._guess
            found, length = lookup._find(tokens[:end])
            lookup.propose(tokens[:end], 5)
            assert lookup._guess == (end, found, length)
            places = [at for at in range(2, end) if tokens[at - 2 : at] == tokens[end - 2 : end]]
            assert bool(places) == bool(found)

            def match(at, end=end, tokens=tokens):
                return next((n for n in range(min(at, 16)) if tokens[at - 1 - n] != tokens[end - 1 - n]), min(at, 16))

            if places:
                assert length == match(found) >= max(match(at) for at in places[-7:])
                assert found in places and (before[1] or found in places[-8:])


def test_lookup_costs_the_same_at_any_length():
    class Counting(list):
        n = 0

        def __getitem__(self, at):
            Counting.n += 1
            return super().__getitem__(at)

    most = []
    for length in (2_000, 20_000):
        tokens = Counting(np.random.default_rng(0).integers(0, 4, length).tolist())
        lookup, seen = Lookup(), []
        lookup.propose(tokens, 31)
        for i in range(100):
            tokens.append(i % 4)
            Counting.n = 0
            lookup.propose(tokens, 31)
            seen.append(Counting.n)
        most.append(max(seen))
    assert max(most) < 2 * 8 * 17 + 2 * 31 + 20


def test_lookup_proposes_what_followed_and_learns_how_often_it_is_right():
    lookup = Lookup()
    text = ids(50)
    assert lookup.propose(text[:1], 9) == lookup.propose(text, 9) == []
    for n, least in ((10, 5), (30, 9)):
        proposal = lookup.propose(text + text[:n], 9)
        assert proposal == text[n : n + len(proposal)] and len(proposal) >= least
    assert Lookup().propose([1, 2, 3] * 6, 5) == [1, 2, 3, 1, 2], "guesses go on from guesses"
    # Pairs that are followed by another token each time.
    wrong, tokens = Lookup(), []
    for i in range(400):
        tokens += [1, 2, 3 + i]
    proposed = [len(wrong.propose(tokens[: 3 * i + 2], 9)) for i in range(400)]
    assert sum(proposed[:20]) > 0 and sum(proposed[100:]) == 0
