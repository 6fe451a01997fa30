"""`Model.hooks` on whole models: what they see is the reference executor's, and what they put in changes the rest."""

import numpy as np
import pytest

import ggpy
from ggpy.graph import Pages, Reference
from ggpy.graph.ops import OPS
from ggpy.models import run_inputs
from tests.graph.runs import of_ids
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made

N = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = converted(tmp_path_factory.mktemp("hooks"), made("V3"))
    with ggpy.load(path, n_ctx=64, n_threads=2, kv_type="f32") as model:
        yield model


@pytest.fixture(autouse=True)
def unhooked(model):
    yield
    model.hooks.clear()


def expected(model):
    """Every value of N tokens, by the reference executor."""
    batch = of_ids(ids(N))
    return Reference(model.graph(N), Pages(1, "F32")).run(run_inputs(model.architecture, batch), batch)


def test_hooks_see_every_node_as_the_reference_executor_computes_it(model):
    names = [t.name for t in model.graph() if t.op in OPS and t.name != "logits"]
    seen = {}
    for name in names:
        model.hooks[name] = lambda name, value: seen.update({name: value.copy()})
    model.logits(ids(N))
    values = expected(model)
    assert set(seen) == set(names)
    for name in names:
        np.testing.assert_allclose(seen[name], values[name], atol=2e-3 * np.abs(values[name]).max(), err_msg=name)


def test_a_replaced_value_changes_what_follows_and_only_that(model):
    before = model.logits(ids(N))
    # The last token but four: those before it can't see it.
    model.hooks["blk.1.experts"] = lambda name, value: np.where(np.arange(len(value))[:, None] == N - 5, 0, value)
    after = model.logits(ids(N))
    np.testing.assert_array_equal(after[: N - 5], before[: N - 5])
    assert (np.abs(after - before).max(-1)[N - 5 :] > 1e-3).all()
    model.hooks.clear()
    np.testing.assert_array_equal(model.logits(ids(N)), before)


def test_a_route_can_be_replaced(model):
    """All tokens go to expert 3 alone: the experts' sum is that of one matrix product after another."""
    seen = {}

    def route(name, value):
        value = value.copy()
        value[..., 0], value[..., 1] = 3, 0
        value[:, 0, 1] = 1
        return value

    model.hooks["blk.2.route"] = route
    for name in ("blk.2.ffn_norm", "blk.2.experts"):
        model.hooks[name] = lambda name, value: seen.update({name: value.copy()})
    model.logits(ids(N))
    gate, up, down = (model.file.tensors[f"blk.2.ffn_{p}_exps.weight"].dequantize()[3] for p in ("gate", "up", "down"))
    x = seen["blk.2.ffn_norm"]
    g = x @ gate.T
    np.testing.assert_allclose(seen["blk.2.experts"], (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T, atol=1e-3)


def test_hooks_run_for_each_generated_token(model):
    lengths = []
    model.hooks["blk.0.out"] = lambda name, value: lengths.append(len(value))
    generation = model.generate(ids(N), max_tokens=4, temperature=0)
    list(generation)
    assert lengths == [N] + [1] * (len(generation.ids) - 1)


def test_what_was_cached_under_other_hooks_is_computed_anew(model):
    prompt = ids(N)
    plain = model.generate(prompt, max_tokens=8, temperature=0)
    list(plain)
    model.hooks["blk.0.out"] = lambda name, value: value * 0
    list(model.generate(prompt, max_tokens=8, temperature=0))
    model.hooks.clear()
    again = model.generate(prompt, max_tokens=8, temperature=0)
    list(again)
    assert again.ids == plain.ids and again.n_reused == 0


def test_programs_of_hooks_that_are_gone_are_let_go(model):
    for _ in range(30):
        with model.hooked({"blk.1.ffn_out": lambda name, value: None}):
            model.logits(ids(2))
    assert len(model._runner._programs) <= 6
