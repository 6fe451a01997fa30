"""Hooks see what the reference executor computes, and replace it."""

import numpy as np
import pytest

from ggpy.errors import GraphError
from ggpy.graph import Graph, Pages, Program, Reference, Team

from .runs import alone
from .weights import random_weight


@pytest.fixture
def team():
    team = Team(2)
    yield team
    team.close()


@pytest.fixture
def graph():
    rng = np.random.default_rng(0)
    g = Graph(5)
    x = g.input("x", (64,))
    w = [g.weight(random_weight(f"w{i}", "F32", (64, 64), rng)) for i in range(2)]
    y = g.op("ADD", x, g.op("MUL_MAT", w[0], x, name="first"), name="sum")
    g.output(g.op("MUL_MAT", w[1], y, name="second"), "out")
    return g


def test_hooks_see_every_value_even_fused_ones(graph, team):
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)}
    seen = {}
    names = ("first", "sum", "second")
    hooks = dict.fromkeys(names, lambda name, value: seen.update({name: value.copy()}))
    got = Program(graph, Pages(1), team, hooks).run(inputs, alone(3))["out"]
    expected = Reference(graph, Pages(1)).run(inputs, alone(3))
    for name in names:
        np.testing.assert_allclose(seen[name], expected[name], atol=1e-4)
    np.testing.assert_array_equal(got, Program(graph, Pages(1), team).run(inputs, alone(3))["out"])


def test_a_replaced_value_is_what_comes_after_sees(graph, team):
    inputs = {"x": np.ones((3, 64), np.float32)}
    zero = Program(graph, Pages(1), team, {"sum": lambda name, value: value * 0}).run(inputs, alone(3))["out"]
    assert (zero == 0).all()


def test_hooks_on_nothing_are_refused(graph, team):
    for name in ("nothing", "x", "w0"):
        with pytest.raises(GraphError, match=name):
            Program(graph, Pages(1), team, {name: print})
