"""The KV cache: what it takes, how it rounds, and that kernels write what numpy writes."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggpy.errors import ContextFullError, UnsupportedError
from ggpy.graph import Graph, Pages, Program, Reference, Team, pages_of
from ggpy.kernels.table import KV_TYPES

from .runs import alone

BITS = {"F16": 16, "Q8_0": 8.5, "F32": 32}


def test_pages_take_the_bits_of_their_type():
    for name in KV_TYPES:
        pages = Pages(16, name)
        graph = Graph(1)
        both, latent = graph.cache("both", 3, 64, 128), graph.cache("latent", 576)
        sizes = [1024 * 3 * (64 + 128), 1024 * 576]
        for cache, n in zip((both, latent), sizes, strict=True):
            assert sum(a.nbytes for a in pages.arrays(cache)) == n * BITS[name] / 8
        assert pages.n_bytes == sum(sizes) * BITS[name] / 8 == 16 * pages.page_bytes(graph)


def test_scales_of_unfilled_blocks_are_counted():
    graph = Graph(1)
    graph.cache("c", 1, 48, 80)
    assert Pages(1, "Q8_0").page_bytes(graph) == 64 * (48 + 2 * 2 + 80 + 3 * 2)


def test_other_types_are_refused():
    with pytest.raises(UnsupportedError, match=r"'Q4_0'; there are F16, Q8_0, F32"):
        Pages(1, "Q4_0")


def test_pages_are_shared_copied_and_given_back():
    pages = Pages(3)
    (keys, values) = pages.arrays(Graph(1).cache("c", 2, 32, 16))
    a = pages.take()
    keys["values"][a], values["values"][a] = 1, 2
    assert pages.own(a) == a and pages.n_free == 2
    pages.share(a)
    b = pages.own(a)
    assert b != a and pages.holders(a) == pages.holders(b) == 1
    assert keys[b].tobytes() == keys[a].tobytes() and values[b].tobytes() == values[a].tobytes()
    keys["values"][b] = 3
    assert (keys["values"][a] == 1).all()
    c = pages.take()
    with pytest.raises(ContextFullError, match="all 3 pages"):
        pages.take()
    for page in (a, b, c):
        pages.give(page)
    assert pages.n_free == 3 and pages.take() == 0


def append(x, n_head_kv=1, head_dim=None):
    """Keys and values of a Q8_0 cache after (n_tokens, n) were stored as both."""
    n_tokens, n = x.shape
    shape = (n_tokens, n_head_kv, n // n_head_kv)
    cache, batch = Graph(1).cache("c", n_head_kv, shape[2], shape[2]), alone(n_tokens)
    view = Pages(pages_of(n_tokens), "Q8_0").view(cache)
    given = (x.reshape(shape), x.reshape(shape))
    return [a.reshape(x.shape) for a in view.append(*given, batch.places, batch.pages, n_tokens)]


def test_q8_0_is_as_near_as_ggmls_and_within_half_a_step():
    x = np.random.default_rng(0).standard_normal((100, 128)).astype(np.float32) * np.logspace(-3, 3, 128, dtype=np.float32)
    ggml = gguf.quants.dequantize(gguf.quants.quantize(x, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    blocks = x.reshape(100, 4, 32)
    step = (np.abs(blocks).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
    for got in append(x, n_head_kv=2):
        error = np.abs(got - x).reshape(blocks.shape)
        # The largest value may lie beyond 127 steps by what float16 took from the step.
        assert (error <= step * (0.5 + 127 / 2048)).all()
        assert np.square(got - x).mean() <= 1.0001 * np.square(ggml - x).mean()


def test_q8_0_keeps_zeros_and_the_smallest_numbers_in_bounds():
    x = np.zeros((3, 64), np.float32)
    x[1], x[2, ::2] = 1e-7, -8e-6
    for got in append(x):
        assert (np.abs(got - x) <= 127 * 2.0**-24).all()  # half of float16's least step, 127 times
        assert (got[0] == 0).all()


@pytest.mark.parametrize("kv_type", KV_TYPES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head_dim=st.sampled_from([16, 32, 48, 128]),
    runs=st.lists(st.sampled_from([1, 3, 64, 77]), min_size=1, max_size=3),
    scale=st.sampled_from([1e-7, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_kernels_store_what_numpy_stores(simd_form, kv_type, head_dim, runs, scale, seed):
    rng = np.random.default_rng(seed)
    fast, slow, n_past = Pages(5, kv_type), Pages(5, kv_type), 0
    team = Team(2)
    for n_tokens in runs:
        g = Graph(n_tokens)
        heads = {name: g.input(name, (2, head_dim)) for name in "qkv"}
        cache, rows = g.cache("cache", 2, head_dim, head_dim), g.cache("rows", head_dim + 16)
        g.output(g.op("ATTENTION", *heads.values(), cache, scale=0.1), "out")
        parts = {"latent": g.input("latent", (head_dim,)), "k_rot": g.input("k_rot", (1, 16))}
        q_rot = g.input("q_rot", (2, 16))
        g.output(g.op("ATTENTION_LATENT", heads["q"], q_rot, *parts.values(), rows, scale=0.1), "latent out")
        shapes = {**heads, **parts, "q_rot": q_rot}
        inputs = {k: scale * rng.standard_normal((n_tokens, *t.shape[1:])).astype(np.float32) for k, t in shapes.items()}
        batch = alone(n_tokens, n_past)
        Program(g, fast, team).run(inputs, batch)
        Reference(g, slow).run(inputs, batch)
        n_past += n_tokens
        for node in (cache, rows):
            for a, b in zip(fast.arrays(node), slow.arrays(node), strict=True):
                assert a.tobytes() == b.tobytes()
    team.close()
