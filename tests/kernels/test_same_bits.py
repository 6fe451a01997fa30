"""What a token gives doesn't depend on its company: kernels for many tokens have the bits of those for one."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggpy.graph import Graph, Pages, Program, pages_of
from ggpy.kernels.table import FLOAT, QUANTIZED

from ..graph.runs import alone
from ..graph.test_ops import EACH
from ..graph.weights import random_weight

SETTINGS = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = (*QUANTIZED, *FLOAT)
n_threads = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)
# 27 and more sit in lanes, 32 at a time, and 128 are taken at once.
numbers_of_tokens = st.sampled_from([*range(1, 21), 27, 32, 43, 139])


def outputs(build, n_tokens, inputs, team):
    """What a graph for up to n_tokens, made by `build`, gives for all tokens of the inputs."""
    graph = Graph(n_tokens)
    for name, node in build(graph).items():
        graph.output(node, name)
    batch = alone(len(next(iter(inputs.values()))))
    got = Program(graph, Pages(pages_of(n_tokens)), team).run(inputs, batch)
    return {name: value.copy() for name, value in got.items()}


def assert_same_alone(build, inputs, teams, threads, room=0):
    """Together, in a graph with room for more tokens, and one by one, in a graph for one: the same bytes."""
    n = len(next(iter(inputs.values())))
    together = outputs(build, n + room, inputs, teams(threads))
    graph = Graph(1)
    for name, node in build(graph).items():
        graph.output(node, name)
    one = Program(graph, Pages(1), teams(threads % 3 + 1))
    for t in range(n):
        by_itself = one.run({name: value[t : t + 1] for name, value in inputs.items()}, alone(1))
        for name, value in by_itself.items():
            assert np.isfinite(value).all()
            assert value[0].tobytes() == together[name][t].tobytes(), f"{name} of token {t} among {n}"


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def columns(kind):
    """Numbers of columns: one block and less than a panel of 512, several panels, with and without a rest."""
    return st.sampled_from([256, 512, 768, 1536] if QUANTIZED.get(kind) == "q8_256" else [32, 96, 512, 544, 1056])


@pytest.mark.parametrize("kind", TYPES)
@SETTINGS
@given(
    data=st.data(),
    n_rows=st.sampled_from([1, 7, 16, 40, 75]),
    n_tokens=numbers_of_tokens,
    room=st.sampled_from([0, 1, 30]),
    residual=st.booleans(),
    threads=n_threads,
    seed=seeds,
)
def test_products(teams, kind, data, n_rows, n_tokens, room, residual, threads, seed):
    rng = np.random.default_rng(seed)
    n_cols = data.draw(columns(kind))
    n_rows = 16 * n_rows if residual else n_rows  # sums are taken by 16 values
    w = random_weight("w", kind, (n_rows, n_cols), rng)

    def build(g):
        product = g.op("MUL_MAT", g.weight(w), g.input("x", (n_cols,)))
        return {"out": g.op("ADD", product, g.input("y", (n_rows,))) if residual else product}

    inputs = {"x": normal(rng, n_tokens, n_cols)} | ({"y": normal(rng, n_tokens, n_rows)} if residual else {})
    assert_same_alone(build, inputs, teams, threads, room)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q6_K", "F16", "F32"])
@SETTINGS
@given(
    n_head=st.integers(1, 5),
    one_for_all=st.booleans(),
    n_rows=st.sampled_from([5, 16, 40]),
    n_cols=st.sampled_from([256, 768]),
    n_tokens=numbers_of_tokens,
    threads=n_threads,
    seed=seeds,
)
def test_products_by_head(teams, kind, n_head, one_for_all, n_rows, n_cols, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    w = random_weight("w", kind, (n_head, n_rows, n_cols), rng)
    x_heads = 1 if one_for_all else n_head

    def build(g):
        return {"out": g.op("MUL_MAT_HEADS", g.weight(w), g.input("x", (x_heads, n_cols)))}

    assert_same_alone(build, {"x": normal(rng, n_tokens, x_heads, n_cols)}, teams, threads)


@pytest.mark.parametrize("kind", TYPES)
@SETTINGS
@given(
    n_expert=st.sampled_from([1, 4, 9, 33]),
    n_used=st.integers(1, 4),
    n_rows=st.sampled_from([16, 32, 48]),
    spread=st.sampled_from([0.1, 10.0]),  # whether tokens choose alike
    n_tokens=numbers_of_tokens,
    room=st.sampled_from([0, 5]),
    threads=n_threads,
    seed=seeds,
)
def test_experts(teams, kind, n_expert, n_used, n_rows, spread, n_tokens, room, threads, seed):
    rng = np.random.default_rng(seed)
    n_used, n_cols = min(n_used, n_expert), 512 if kind in FLOAT else 256
    up, back = (
        random_weight(f"w{i}", kind, (n_expert, *shape), rng) for i, shape in enumerate([(256, n_cols), (n_rows, 256)])
    )

    def build(g):
        route = g.op("ROUTE", g.input("logits", (n_expert,)), n_used=n_used, gating="softmax")
        x = g.op("MUL_MAT_ID", g.weight(up), g.input("x", (n_cols,)), route)
        y = g.op("MUL_MAT_ID", g.weight(back), x, route)
        return {"route": route, "up": x, "out": g.op("COMBINE", y, route)}

    logits = normal(rng, 1, n_expert) + spread * normal(rng, n_tokens, n_expert)
    assert_same_alone(build, {"x": normal(rng, n_tokens, n_cols), "logits": logits}, teams, threads, room)


@pytest.mark.parametrize("fmt", ["Q8_0", "Q4_K", "F32"])
@SETTINGS
@given(n=st.integers(1, 4), watched=st.booleans(), n_tokens=st.integers(1, 20), threads=n_threads, seed=seeds)
def test_norms_and_swiglu_quantized_at_once_or_not(teams, fmt, n, watched, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    n *= 256
    w = random_weight("w", fmt, (32, n), rng)
    norm = random_weight("norm", "F32", (n,), rng)

    def build(g, watched=watched):
        x, y = g.input("x", (n,)), g.input("y", (n,))
        normed = g.op("RMS_NORM", x, g.weight(norm), eps=1e-5)
        acted = g.op("SWIGLU", x, y)
        seen = {"normed": normed, "acted": acted} if watched else {}  # outputs aren't fused away
        return seen | {f"out{i}": g.op("MUL_MAT", g.weight(w), v) for i, v in enumerate((normed, acted))}

    inputs = {name: normal(rng, n_tokens, n) for name in "xy"}
    assert_same_alone(build, inputs, teams, threads)
    fused = outputs(lambda g: build(g, False), n_tokens, inputs, teams(threads))
    seen = outputs(lambda g: build(g, True), n_tokens, inputs, teams(threads))
    for name, value in fused.items():
        assert value.tobytes() == seen[name].tobytes()


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@SETTINGS
@given(
    n_tokens=st.integers(1, 20),
    n_group=st.sampled_from([1, 4]),
    normalize=st.booleans(),
    bias=st.booleans(),
    threads=n_threads,
    seed=seeds,
)
def test_routes(teams, gating, n_tokens, n_group, normalize, bias, threads, seed):
    rng = np.random.default_rng(seed)
    b = random_weight("bias", "F32", (2, 16), rng)
    how = {"n_used": 3, "gating": gating, "normalize": normalize, "n_group": n_group, "n_group_used": min(n_group, 2)}

    def build(g):
        return {"out": g.op("ROUTE", g.input("logits", (16,)), *([g.weight(b)] if bias else []), **how)}

    assert_same_alone(build, {"logits": 3 * normal(rng, n_tokens, 16)}, teams, threads)


@SETTINGS
@given(n=st.integers(1, 9), n_tokens=st.integers(1, 20), threads=n_threads, seed=seeds)
def test_element_by_element(teams, n, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    bias = random_weight("bias", "F32", (16 * n,), rng)

    def build(g):
        x, y = g.input("x", (16 * n,)), g.input("y", (16 * n,))
        out = {f"{op} {how}": g.op(op, *[x, y][: len(given)], **how) for op, given, how in EACH}
        out["bias"] = g.op("ADD_BIAS", x, g.weight(bias))
        out["norm"] = g.op("LAYER_NORM", x, g.weight(bias), eps=1e-5)
        out["gate"] = g.op("SIGMOID_GATE", x, g.input("gate", (1,)))
        return out | {"scale": g.op("SCALE", x, factor=0.3), "soft_max": g.op("SOFT_MAX", y)}

    inputs = {"x": normal(rng, n_tokens, 16 * n), "y": normal(rng, n_tokens, 16 * n), "gate": normal(rng, n_tokens, 1)}
    assert_same_alone(build, inputs, teams, threads)
