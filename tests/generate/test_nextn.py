"""Drafts by the layer that a model carries for them: lossless as all drafts, and what transformers' layers would guess."""

import pytest
import torch

import ggpy
from ggpy.generate.speculation import NextTokens
from tests.models.checkpoints import ids
from tests.models.test_nextn import with_mtp

from .test_speculation import GREEDY, PENALIZED, PROMPT, SAMPLED, Sometimes, pieces, run_through_interrupts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return with_mtp(tmp_path_factory.mktemp("nextn"), "qwen35")


@pytest.fixture
def eager(monkeypatch):
    """Drafters that guess all the time; what they were asked and have proposed."""
    asked = []
    propose = NextTokens.propose_together.__func__

    def recorded(cls, work):
        for drafter, _, _ in work:
            drafter._trust = 3.0
        proposals = propose(cls, work)
        asked.extend((list(text), p) for (_, text, _), p in zip(work, proposals, strict=True))
        return proposals

    monkeypatch.setattr(NextTokens, "propose_together", classmethod(recorded))
    return asked


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
def test_the_text_is_that_of_plain_decoding(tiny, eager, options):
    with ggpy.load(tiny[2], n_ctx=512, n_threads=2) as model:
        expected = pieces(model.generate(PROMPT, max_tokens=70, **options))
        generation = model.generate(PROMPT, max_tokens=70, draft="mtp", **options)
        assert pieces(generation) == expected and generation.n_drafted > 20


@pytest.mark.parametrize("n_batch", [512, 20, 3])
def test_in_company(tiny, eager, n_batch):
    prompts = [ids(5 + 31 * i, seed=i % 3) for i in range(6)]
    with ggpy.load(tiny[2], n_ctx=256, n_threads=1) as model:
        plain = [model.generate(p, max_tokens=30, **SAMPLED | {"seed": i}).run().ids for i, p in enumerate(prompts)]
    with ggpy.load(tiny[2], n_ctx=256, n_threads=1, n_batch=n_batch) as model:
        together = []
        for i, p in enumerate(prompts):
            draft = (None, "mtp", "mtp", Sometimes(p + plain[i]))[i % 4]
            together.append(model.generate(p, max_tokens=30, draft=draft, **SAMPLED | {"seed": i}))
        assert [g.run().ids for g in together] == plain
        nextn = model._nextn
        assert nextn.pages.n_free + len(nextn._dropped) == nextn.pages.n_pages
    with pytest.raises(ggpy.Error, match="closed"):
        nextn.check()


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_guesses_are_those_of_transformers_layers(tiny, eager, options):
    model, mtp, path = tiny
    with ggpy.load(path, n_ctx=256, kv_type="f32", n_threads=1, n_batch=50) as ours:
        ours.generate(ids(130), max_tokens=25, draft="mtp", **options).run()
    with torch.no_grad():
        known = model.model(torch.tensor([max((text for text, _ in eager), key=len)])).last_hidden_state[0]
    n_further = 0
    for text, proposal in eager:
        if not proposal:
            continue
        with torch.no_grad():
            hidden, tokens = known[: len(text) - 1], text[1:]
            for guess in proposal:
                made = mtp(model, hidden, torch.tensor(tokens))[-1:]
                assert int(model.lm_head(made).argmax()) == guess
                hidden, tokens = torch.cat([hidden, made]), [*tokens, guess]
        n_further += len(proposal) > 1
    assert n_further > 3 and sum(bool(p) for _, p in eager) > 10


def test_a_known_beginning_is_not_seen_again(tiny, eager):
    """Guesses then go by what came after it: other ones, for the same text."""
    with ggpy.load(tiny[2], n_ctx=512, n_threads=1) as model:
        prompt = ids(200)
        plain = model.generate(prompt, max_tokens=40, **SAMPLED).run()
        generation = model.generate(prompt, max_tokens=40, draft="mtp", **SAMPLED).run()
        assert generation.n_reused > 100 and generation.ids == plain.ids and generation.n_drafted > 10


def test_interrupts(tiny, eager):
    with ggpy.load(tiny[2], n_ctx=512, n_threads=1) as model:
        plain = model.generate(PROMPT, max_tokens=40, **SAMPLED).run().ids
        generation = model.generate(PROMPT, max_tokens=40, draft="mtp", **SAMPLED)
        run_through_interrupts(model._runner, generation, "run_both")
        assert generation.ids == plain and generation.n_drafted
        generation = model.generate(PROMPT, max_tokens=40, draft="mtp", **SAMPLED)
        run_through_interrupts(model._nextn, generation, "run_both")
        assert generation.ids == plain and generation.n_drafted


def test_models_without_such_a_layer_say_so(tmp_path):
    with ggpy.load("demo") as model:
        with pytest.raises(ggpy.UnsupportedError, match="no layer that predicts further tokens"):
            model.generate("a", draft="mtp")
        with pytest.raises(ggpy.Error, match="'eagle' has none"):
            model.generate("a", draft="eagle")
