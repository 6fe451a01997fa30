"""The router's values are a model's and its tokens': none of them may make a kernel choose an expert twice, or hang."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggpy.errors import GraphError
from ggpy.graph import Graph, Pages, Program, Team

from ..graph.runs import alone
from ..graph.weights import FakeWeight, random_weight

SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1.0]


def of_each(bias):
    """These biases, and factors of 1."""
    values = np.stack([bias, np.ones_like(bias)])
    return FakeWeight("bias", "F32", values.shape, values.view(np.uint8))


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@SETTINGS
@given(
    data=st.data(),
    n_tokens=st.integers(1, 12),
    n_used=st.integers(1, 16),
    n_group=st.sampled_from([1, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_experts_of_a_token_are_distinct_whatever_the_scores(
    simd_form, gating, data, n_tokens, n_used, n_group, bias, seed
):
    rng = np.random.default_rng(seed)
    n_expert = 16
    n_group_used = data.draw(st.integers(-(-n_used * n_group // n_expert), 9))  # also more than there are
    odd = st.lists(st.sampled_from(ODD), min_size=n_expert, max_size=n_expert)
    g = Graph(n_tokens)
    extra = []
    if bias:
        values = np.array(data.draw(odd), np.float32)
        extra = [g.weight(of_each(values))]
    how = {"n_used": n_used, "gating": gating, "n_group": n_group, "n_group_used": n_group_used}
    route = g.op("ROUTE", g.input("logits", (n_expert,)), *extra, **how)
    g.output(route, "route")
    w = g.weight(random_weight("w", "Q8_0", (n_expert, 16, 64), rng))
    g.output(g.op("MUL_MAT_ID", w, g.input("x", (64,)), route), "out")
    logits = rng.standard_normal((n_tokens, n_expert)).astype(np.float32)
    logits[0] = data.draw(odd)
    team = Team(2)
    inputs = {"logits": logits, "x": np.ones((n_tokens, 64), np.float32)}
    got = Program(g, Pages(1), team).run(inputs, alone(n_tokens))
    team.close()
    experts = got["route"][..., 0]
    for chosen in experts:
        assert len(set(chosen.tolist())) == n_used
        assert ((chosen >= 0) & (chosen < n_expert)).all()
    # Of a token whose router is damaged no weight is a number; -inf only rules an expert out.
    damaged = ~(logits < np.inf).all(-1) | (bias and not all(values < np.inf))
    assert np.isnan(got["route"][damaged, :, 1]).all()
    # All experts' rows are computed, each by its own matrix.
    alike = {e: got["out"][experts == e] for e in np.unique(experts)}
    assert all((rows == rows[0]).all() for rows in alike.values())


def test_scores_that_are_no_numbers_come_last(simd_form):
    g = Graph(2)
    bias = np.array([np.nan, 0, -np.inf, 0.5, np.nan, 0, 0, np.inf], np.float32)
    g.output(g.op("ROUTE", g.input("logits", (8,)), g.weight(of_each(bias)), n_used=8, gating="sigmoid"), "route")
    team = Team(1)
    got = Program(g, Pages(1), team).run({"logits": np.zeros((2, 8), np.float32)}, alone(2))["route"][..., 0]
    team.close()
    assert got.tolist() == 2 * [[7, 3, 1, 5, 6, 2, 0, 4]]


@pytest.mark.parametrize("n_group, n_group_used", [(0, 1), (3, 1), (4, 0), (-4, -4)])
def test_groups_that_dont_divide_the_experts_are_refused(n_group, n_group_used):
    g = Graph(2)
    with pytest.raises(GraphError):
        g.op("ROUTE", g.input("logits", (8,)), n_used=2, gating="softmax", n_group=n_group, n_group_used=n_group_used)


def test_more_groups_used_than_there_are_is_all_of_them(simd_form):
    logits = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    results = []
    for n_group_used in (4, 5, 2**40):
        g = Graph(3)
        how = {"n_used": 6, "gating": "softmax", "n_group": 4, "n_group_used": n_group_used}
        g.output(g.op("ROUTE", g.input("logits", (8,)), **how), "route")
        team = Team(1)
        results.append(Program(g, Pages(1), team).run({"logits": logits}, alone(3))["route"].copy())
        team.close()
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
