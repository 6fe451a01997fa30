"""Every operation: the kernels against the numpy truth, in every SIMD form, for any shape and any number of threads."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggpy.errors import GraphError
from ggpy.graph import Graph, Pages, Program, Reference
from ggpy.kernels.table import FLOAT, GEGLUS, GELUS, KV_TYPES, QUANTIZED

from .runs import alone
from .weights import random_weight

SETTINGS = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = (*QUANTIZED, *FLOAT)
n_threads = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)


def both(graph, inputs, team, n_past=0, pages=None):
    """The outputs of a graph by the kernels and by numpy."""
    fast, slow = pages or (Pages(8), Pages(8))
    batch = alone(len(next(iter(inputs.values()))), n_past)
    inputs = {**inputs, "outputs": batch.outputs}
    got = Program(graph, fast, team).run(inputs, batch)
    expected = Reference(graph, slow).run(inputs, batch)
    return {k: v.copy() for k, v in got.items()}, {k: expected[k] for k in got}


def close(got, expected, tolerance):
    scale = np.abs(expected).max() + 1e-6
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", TYPES)
def test_get_rows_is_exact(teams, kind):
    rng = np.random.default_rng(0)
    g = Graph(9)
    w = g.weight(random_weight("w", kind, (37, 512), rng))
    g.output(g.op("GET_ROWS", w, g.input("ids", (), "I32")), "out")
    ids = np.array([0, 36, 5, 5, 17, 2, 1], np.int32)
    got, expected = both(g, {"ids": ids}, teams(2))
    close(got["out"], expected["out"], 1e-6)


@pytest.mark.parametrize("kind", FLOAT)
@SETTINGS
@given(
    n_rows=st.integers(1, 70),
    n_cols=st.sampled_from([1, 2, 20, 32, 33, 48, 96, 172, 288]),
    n_tokens=st.integers(1, 20),
    threads=n_threads,
    seed=seeds,
)
def test_float_products(teams, kind, n_rows, n_cols, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    w = g.weight(random_weight("w", kind, (n_rows, n_cols), rng))
    g.output(g.op("MUL_MAT", w, g.input("x", (n_cols,))), "out")
    got, expected = both(g, {"x": rng.standard_normal((n_tokens, n_cols)).astype(np.float32)}, teams(threads))
    close(got["out"], expected["out"], 1e-5)


@pytest.mark.parametrize("kind", QUANTIZED)
@SETTINGS
@given(n_rows=st.integers(1, 70), blocks=st.integers(1, 3), n_tokens=st.integers(1, 20), threads=n_threads, seed=seeds)
def test_quantized_products_within_the_rounding_of_activations(teams, kind, n_rows, blocks, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    n_cols = blocks * (256 if QUANTIZED[kind] == "q8_256" else 32)
    g = Graph(n_tokens)
    w = random_weight("w", kind, (n_rows, n_cols), rng)
    x = g.input("x", (n_cols,))
    product = g.op("MUL_MAT", g.weight(w), x)
    g.output(product, "out")
    values = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
    got, expected = both(g, {"x": values}, teams(threads))
    # Each activation is off by at most half a step of its block's scale.
    block = 256 if QUANTIZED[kind] == "q8_256" else 32
    step = np.abs(values.reshape(n_tokens, -1, block)).max(-1) / 127
    bound = np.abs(w.dequantize()).reshape(n_rows, -1, block).sum(-1) @ (step.T / 2)  # (n_rows, n_tokens)
    assert (np.abs(got["out"] - expected["out"]) <= bound.T * 1.01 + 1e-5 * np.abs(expected["out"]).max() + 1e-6).all()


#: operations element by element: names, inputs, parameters
EACH = [
    ("ADD", "xy", {}),
    ("MUL", "xy", {}),
    ("SWIGLU", "xy", {}),
    ("SWIGLU_CLAMPED", "xy", {"alpha": 1.702, "limit": 7.0}),
    *(("GEGLU", "xy", {"kind": kind}) for kind in GEGLUS),
    *(("GELU", "x", {"kind": kind}) for kind in GELUS),
    ("RELU_SQUARED", "x", {}),
    ("SCALE", "x", {"factor": -0.3}),
    ("CLAMP", "x", {"limit": 5.3}),
    ("SOFT_CAP", "x", {"cap": 30}),
]
#: values of a row: less than a vector, whole ones, and some more
ROWS = st.sampled_from([1, 2, 8, 16, 20, 48, 100, 256, 301])


@pytest.mark.parametrize("op, inputs, attrs", EACH, ids=[f"{op} {attrs}" for op, _, attrs in EACH])
@SETTINGS
@given(n=ROWS, n_tokens=st.integers(1, 9), threads=n_threads, seed=seeds)
def test_elementwise(teams, op, inputs, attrs, n, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    g.output(g.op(op, *(g.input(name, (n,)) for name in inputs), **attrs), "out")
    values = {k: 8 * rng.standard_normal((n_tokens, n)).astype(np.float32) for k in inputs}
    got, expected = both(g, values, teams(threads))
    close(got["out"], expected["out"], 2e-6)


def test_a_bound_hides_no_damage(teams):
    x = np.array([[np.nan, np.inf, -np.inf, 3.0, -3.0, 0.5, *[1.0] * 14]], np.float32)
    g = Graph(1)
    g.output(g.op("CLAMP", g.input("x", (20,)), limit=2.0), "out")
    got, expected = both(g, {"x": x}, teams(1))
    np.testing.assert_array_equal(got["out"], expected["out"])
    np.testing.assert_array_equal(got["out"][0, :6], np.array([np.nan] * 3 + [2, -2, 0.5], np.float32))


@pytest.mark.parametrize("kind", GELUS)
def test_gelu_is_torchs(teams, kind):
    torch = pytest.importorskip("torch")  # not under emulation
    x = np.linspace(-12, 12, 2001, dtype=np.float32)[None]
    g = Graph(1)
    g.output(g.op("GELU", g.input("x", (x.shape[1],)), kind=kind), "out")
    t = torch.from_numpy(x).double()
    expected = {
        "tanh": lambda: torch.nn.functional.gelu(t, approximate="tanh"),
        "erf": lambda: torch.nn.functional.gelu(t),
        "quick": lambda: t * torch.sigmoid(1.702 * t),
    }[kind]()
    np.testing.assert_allclose(both(g, {"x": x}, teams(1))[0]["out"], expected.numpy(), rtol=1e-5, atol=1e-6)


@SETTINGS
@given(n=ROWS, n_head=st.integers(1, 4), n_tokens=st.integers(1, 9), threads=n_threads, seed=seeds)
def test_norms_bias_softmax_and_rows(teams, n, n_head, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    x = g.input("x", (n_head, n))
    weight, shift = (g.weight(random_weight(name, "F32", (n,), rng)) for name in ("w", "shift"))
    g.output(g.op("RMS_NORM", x, weight, eps=1e-5), "rms_norm")
    g.output(g.op("RMS_NORM", x, eps=1e-5), "plain rms_norm")
    for weights in ((), (weight,), (weight, shift)):
        g.output(g.op("LAYER_NORM", x, *weights, eps=1e-5), f"layer_norm {len(weights)}")
    flat = g.op("RESHAPE", x, shape=(n_head * n,))
    bias = g.weight(random_weight("b", "F32", (n_head * n,), rng))
    g.output(g.op("ADD_BIAS", flat, bias), "bias")
    if n_head * n % 16 == 0:
        g.output(g.op("SOFT_MAX", flat), "soft_max")
    g.output(g.op("ROWS", flat, g.input("outputs", (), "I32", per="output")), "rows")
    inputs = {"x": 3 * rng.standard_normal((n_tokens, n_head, n)).astype(np.float32)}
    got, expected = both(g, inputs, teams(threads))
    for name in got:
        close(got[name], expected[name], 3e-6)


@pytest.mark.parametrize("kind", ["norm", "neox"])
@SETTINGS
@given(n_head=st.integers(1, 4), n_rot=st.integers(1, 16), n_tokens=st.integers(1, 9), threads=n_threads, seed=seeds)
def test_rope(teams, kind, n_head, n_rot, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    g.output(g.op("ROPE", g.input("x", (n_head, 32)), g.input("table", (2 * n_rot,)), kind=kind), "out")
    angles = rng.uniform(0, 1000, (n_tokens, n_rot))
    table = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    inputs = {"x": rng.standard_normal((n_tokens, n_head, 32)).astype(np.float32), "table": table}
    got, expected = both(g, inputs, teams(threads))
    close(got["out"], expected["out"], 1e-6)


@SETTINGS
@given(
    group=st.sampled_from([1, 2, 3, 4, 5, 8, 18]),
    n_head_kv=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 16, 20, 32, 48, 64, 80, 100, 128]),
    head_dim_v=st.sampled_from([None, 2, 16, 64, 96, 100]),
    kv_type=st.sampled_from(KV_TYPES),
    how=st.sampled_from(
        [
            {},
            {"window": 1},
            {"window": 70},
            {"window": 300, "cap": 3.0},
            {"cap": 50.0},
            {"causal": False},
            {"causal": False, "window": 60},
        ]
    ),
    has_sinks=st.booleans(),
    runs=st.lists(st.sampled_from([1, 2, 7, 8, 9, 30, 64, 100, 250]), min_size=1, max_size=5),
    threads=n_threads,
    seed=seeds,
)
def test_attention_over_runs_of_any_length(
    teams, group, n_head_kv, head_dim, head_dim_v, kv_type, how, has_sinks, runs, threads, seed
):
    rng = np.random.default_rng(seed)
    pages, n_past = (Pages(20, kv_type), Pages(20, kv_type)), 0
    for n_tokens in runs:
        g = Graph(n_tokens)
        q = g.input("q", (group * n_head_kv, head_dim))
        k, v = (g.input(name, (n_head_kv, n)) for name, n in (("k", head_dim), ("v", head_dim_v or head_dim)))
        cache = g.cache("cache", *k.shape[1:], v.shape[2])
        sinks = [g.weight(random_weight("sinks", "F32", (group * n_head_kv,), rng))] if has_sinks else []
        how["scale"] = 1 / np.sqrt(head_dim)
        g.output(g.op("ATTENTION", q, k, v, cache, *sinks, **how), "out")
        g.output(g.op("ATTENTION_AGAIN", q, cache, **how), "again")
        inputs = {t.name: 2 * rng.standard_normal((n_tokens, *t.shape[1:])).astype(np.float32) for t in (q, k, v)}
        got, expected = both(g, inputs, teams(threads), n_past, pages)
        close(got["out"], expected["out"], 5e-6)
        close(got["again"], expected["again"], 5e-6)
        assert sinks or got["again"].tobytes() == got["out"].tobytes()
        n_past += n_tokens


@SETTINGS
@given(
    n_head=st.integers(1, 5),
    n=st.integers(1, 40),
    n_y=st.integers(1, 40),
    one_for_all=st.booleans(),
    n_tokens=st.integers(1, 9),
    threads=n_threads,
)
def test_heads_are_joined_exactly(teams, n_head, n, n_y, one_for_all, n_tokens, threads):
    rng = np.random.default_rng(n)
    g = Graph(n_tokens)
    x, y = g.input("x", (n_head, 40)), g.input("y", (1 if one_for_all else n_head, n_y))
    g.output(g.op("JOIN_HEADS", x, y, n=n), "out")
    g.output(g.op("HEAD", x, index=n_head - 1), "last")
    inputs = {t.name: rng.standard_normal((n_tokens, *t.shape[1:])).astype(np.float32) for t in (x, y)}
    outputs = Program(g, Pages(1), teams(threads)).run(inputs, alone(len(inputs["x"])))
    got = outputs["out"]
    np.testing.assert_array_equal(outputs["last"], inputs["x"][:, -1])
    assert got.shape == (n_tokens, n_head, n + n_y)
    np.testing.assert_array_equal(got[..., :n], inputs["x"][..., :n])
    np.testing.assert_array_equal(got[..., n:], np.repeat(inputs["y"], n_head // y.shape[1], 1))


def test_results_do_not_depend_on_threads(teams):
    rng = np.random.default_rng(3)
    w = [random_weight(f"w{i}", t, (256, 256), rng) for i, t in enumerate(("Q4_K", "Q8_0", "F16"))]
    norm = random_weight("norm", "F32", (256,), rng)
    inputs = {"x": rng.standard_normal((50, 256)).astype(np.float32)}
    results = []
    for threads in (1, 2, 3, 5):
        g = Graph(64)
        x = g.input("x", (256,))
        for i, weight in enumerate(w):
            x = g.op("ADD", x, g.op("MUL_MAT", g.weight(weight), g.op("RMS_NORM", x, g.weight(norm), eps=1e-6)))
            heads = g.op("RESHAPE", x, shape=(4, 64))
            y = g.op("ATTENTION", heads, heads, heads, g.cache(f"cache{i}", 4, 64, 64), scale=0.1)
            x = g.op("ADD", x, g.op("RESHAPE", y, shape=(256,)))
        g.output(x, "out")
        results.append(Program(g, Pages(1), teams(threads)).run(inputs, alone(len(inputs["x"])))["out"].copy())
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_wrong_shapes_are_refused_by_name():
    g = Graph(4)
    w = g.weight(random_weight("w", "Q8_0", (8, 64), np.random.default_rng(0)))
    x = g.input("x", (32,))
    with pytest.raises(GraphError, match=r"bad: MUL_MAT of w Q8_0 .* 64 columns against rows of 32"):
        g.op("MUL_MAT", w, x, name="bad")
    with pytest.raises(GraphError, match="no operation FLY"):
        g.op("FLY", x)
    with pytest.raises(GraphError, match="takes two equal shapes"):
        g.op("ADD", x, g.input("y", (64,)))


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "F32"])
@SETTINGS
@given(
    n_head=st.integers(1, 5),
    one_for_all=st.booleans(),
    n_rows=st.integers(1, 40),
    n_tokens=st.integers(1, 12),
    threads=n_threads,
    seed=seeds,
)
def test_products_by_head(teams, kind, n_head, one_for_all, n_rows, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    w = g.weight(random_weight("w", kind, (n_head, n_rows, 64), rng))
    x = g.input("x", (1 if one_for_all else n_head, 96))
    g.output(g.op("MUL_MAT_HEADS", w, x), "out")
    got, expected = both(g, {"x": rng.standard_normal((n_tokens, *x.shape[1:])).astype(np.float32)}, teams(threads))
    close(got["out"], expected["out"], 0.03 if kind == "Q8_0" else 1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16"])
@SETTINGS
@given(
    n_expert=st.sampled_from([2, 8, 33]),
    n_rows=st.sampled_from([16, 32, 40]),
    n_tokens=st.integers(1, 30),
    threads=n_threads,
    seed=seeds,
)
def test_experts(teams, kind, n_expert, n_rows, n_tokens, threads, seed):
    rng = np.random.default_rng(seed)
    n_used = min(n_expert, 3)
    g = Graph(n_tokens)
    x = g.input("x", (256,))
    route = g.op("ROUTE", g.input("logits", (n_expert,)), n_used=n_used, gating="softmax")
    w = g.weight(random_weight("w", kind, (n_expert, n_rows, 256), rng))
    up = g.op("MUL_MAT_ID", w, x, route, name="up")
    g.output(up, "up")
    back = g.weight(random_weight("back", "F32", (n_expert, 32, 32), rng))
    if n_rows == 32:
        g.output(g.op("COMBINE", g.op("MUL_MAT_ID", back, up, route), route), "out")
    inputs = {
        "x": rng.standard_normal((n_tokens, 256)).astype(np.float32),
        "logits": 2 * rng.standard_normal((n_tokens, n_expert)).astype(np.float32),
    }
    got, expected = both(g, inputs, teams(threads))
    for name in got:
        close(got[name], expected[name], 1e-5 if kind == "F16" else 0.04)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@SETTINGS
@given(
    n_tokens=st.integers(1, 9),
    n_group=st.sampled_from([1, 4]),
    normalize=st.booleans(),
    bias=st.booleans(),
    threads=n_threads,
    seed=seeds,
)
def test_routes(teams, gating, n_tokens, n_group, normalize, bias, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    given_bias = [g.weight(random_weight("bias", "F32", (2, 16), rng))] if bias else []
    how = {"n_used": 3, "gating": gating, "normalize": normalize, "scale": 2.5, "n_group": n_group}
    g.output(g.op("ROUTE", g.input("logits", (16,)), *given_bias, **how, n_group_used=min(n_group, 2)), "out")
    logits = 3 * rng.standard_normal((n_tokens, 16)).astype(np.float32)
    got, expected = both(g, {"logits": logits}, teams(threads))
    np.testing.assert_array_equal(got["out"][..., 0], expected["out"][..., 0])
    np.testing.assert_allclose(got["out"][..., 1], expected["out"][..., 1], rtol=1e-5)


@SETTINGS
@given(n_tokens=st.integers(1, 5), n=st.integers(1, 4), threads=n_threads, seed=seeds)
def test_sigmoid_gate(teams, n_tokens, n, threads, seed):
    rng = np.random.default_rng(seed)
    g = Graph(n_tokens)
    g.output(g.op("SIGMOID_GATE", g.input("x", (16 * n,)), g.input("gate", (1,))), "out")
    inputs = {"x": rng.standard_normal((n_tokens, 16 * n)), "gate": 4 * rng.standard_normal((n_tokens, 1))}
    got, expected = both(g, {k: v.astype(np.float32) for k, v in inputs.items()}, teams(threads))
    close(got["out"], expected["out"], 2e-6)


@SETTINGS
@given(
    n_head=st.sampled_from([1, 4, 8, 16, 21]),
    n_latent=st.sampled_from([32, 48, 64]),
    kv_type=st.sampled_from(KV_TYPES),
    runs=st.lists(st.sampled_from([1, 2, 9, 64, 200, 300]), min_size=1, max_size=4),
    threads=n_threads,
    seed=seeds,
)
def test_latent_attention_over_runs_of_any_length(teams, n_head, n_latent, kv_type, runs, threads, seed):
    rng = np.random.default_rng(seed)
    pages, n_past = (Pages(20, kv_type), Pages(20, kv_type)), 0
    for n_tokens in runs:
        g = Graph(n_tokens)
        q, q_rot = g.input("q", (n_head, n_latent)), g.input("q_rot", (n_head, 32))
        latent, k_rot = g.input("latent", (n_latent,)), g.input("k_rot", (1, 32))
        cache = g.cache("cache", n_latent + 32)
        g.output(g.op("ATTENTION_LATENT", q, q_rot, latent, k_rot, cache, scale=0.2), "out")
        parts = (q, q_rot, latent, k_rot)
        inputs = {t.name: rng.standard_normal((n_tokens, *t.shape[1:])).astype(np.float32) for t in parts}
        got, expected = both(g, inputs, teams(threads), n_past, pages)
        close(got["out"], expected["out"], 1e-5)
        n_past += n_tokens
