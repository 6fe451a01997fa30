"""Many sequences in one run: each one's values are what it has alone, bit for bit, and what numpy computes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggpy.errors import GraphError
from ggpy.graph import Graph, Pages, Program, Reference, Span, pack, pages_of
from ggpy.kernels.table import KV_TYPES, SLAB

from .weights import random_weight

SETTINGS = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


#: attentions over keys and values
ATTENTIONS = {"plain": {}, "window": {"window": 70}, "sinks": {"window": 300, "cap": 5.0}}


class Model:
    """Attentions over keys and values, and one latent, in a pool of pages."""

    def __init__(self, team, kv_type, sizes, n_pages=80, n_ctx=20 * SLAB):
        self.team, self.sizes = team, sizes
        self.sinks = random_weight("s", "F32", (sizes[0],), np.random.default_rng(0))
        self.pages, self.slow = (Pages(n_pages, kv_type, n_ctx) for _ in range(2))
        self._programs = {}

    def graph(self, n_tokens):
        n_head, n_head_kv, head_dim, head_dim_v = self.sizes
        g = Graph(n_tokens)
        q, k, v = (
            g.input(*x) for x in (("q", (n_head, head_dim)), ("k", (n_head_kv, head_dim)), ("v", (n_head_kv, head_dim_v)))
        )
        for name, how in ATTENTIONS.items():
            cache, sinks = g.cache(f"{name}.cache", n_head_kv, head_dim, head_dim_v), [self.sinks] * (name == "sinks")
            y = g.op("ATTENTION", q, k, v, cache, *map(g.weight, sinks), scale=0.2, **how)
            g.output(y, name)
        parts = [g.input(*x) for x in (("ql", (n_head, 48)), ("qr", (n_head, 16)), ("l", (48,)), ("kr", (1, 16)))]
        g.output(g.op("ATTENTION_LATENT", *parts, g.cache("l.c", 64), scale=0.2), "latent")
        return g

    def inputs(self, tokens):
        """Of each token by its seed: the same wherever it is run."""
        shapes = {t.name: t.shape[1:] for t in self.graph(1) if t.op == "INPUT"}
        rows = [np.random.default_rng(t) for t in tokens]
        return {k: np.stack([r.standard_normal(s).astype(np.float32) for r in rows]) for k, s in shapes.items()}

    def run(self, spans):
        """What each span's tokens give, by the kernels."""
        batch, rows = pack(spans)
        n = 1 if len(batch.ids) == 1 else 512
        if n not in self._programs:
            self._programs[n] = Program(self.graph(n), self.pages, self.team)
        inputs = self.inputs(batch.ids)
        got = self._programs[n].run(inputs, batch)
        expected = Reference(self.graph(len(batch.ids)), self.slow).run(inputs, batch)
        for name, value in got.items():
            np.testing.assert_allclose(value, expected[name], atol=2e-5 * np.abs(expected[name]).max())
        return [[got[name][r].tobytes() for name in (*ATTENTIONS, "latent")] for r in rows]


@pytest.mark.parametrize("kv_type", KV_TYPES)
@SETTINGS
@given(
    sizes=st.sampled_from([(3, 1, 32, 32), (6, 2, 64, 48), (8, 8, 16, 16), (18, 1, 80, 128), (6, 2, 20, 10)]),
    lengths=st.lists(st.sampled_from([1, 2, 60, 64, 65, 250, 256, 257, 600]), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_company_gives_the_same_bits(teams, kv_type, sizes, lengths, cuts, threads, seed):
    rng = np.random.default_rng(seed)
    model, alone = Model(teams(threads), kv_type, sizes), Model(teams(1), kv_type, sizes)
    sequences = [rng.integers(0, 1 << 30, n).tolist() for n in lengths]
    # Each alone, token by token where it is short, and else in one run: all its keys by then are there.
    wanted = []
    for tokens in sequences:
        pages = [alone.pages.take() for _ in range(pages_of(len(tokens)))]
        step = 1 if len(tokens) < 70 else 301
        parts = [
            alone.run([Span(tokens[i : i + step], i, pages, len(tokens[i : i + step]))])[0]
            for i in range(0, len(tokens), step)
        ]
        wanted.append([b"".join(p[j] for p in parts) for j in range(1 + len(ATTENTIONS))])
    # All together, in pieces of any length, with pages in any order.
    free = rng.permutation(80).tolist()
    held = [[free.pop() for _ in range(pages_of(n))] for n in lengths]
    done, got = [0] * len(lengths), [[b""] * (1 + len(ATTENTIONS)) for _ in lengths]
    turn = 0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        spans, whose = [], []
        for i, tokens in enumerate(sequences):
            n = min(cuts[turn % len(cuts)], len(tokens) - done[i], 120)
            turn += 1
            if n and rng.random() < 0.8:
                spans.append(Span(tokens[done[i] : done[i] + n], done[i], held[i], n))
                whose.append(i)
                done[i] += n
        if spans:
            for i, values in zip(whose, model.run(spans), strict=True):
                got[i] = [a + b for a, b in zip(got[i], values, strict=True)]
    assert got == wanted


def test_many_short_runs_use_whole_items_and_give_the_same_bits(teams):
    """Enough spans of one token for all threads: no parts of their own."""
    model, alone = Model(teams(2), "F16", (6, 2, 64, 64)), Model(teams(2), "F16", (6, 2, 64, 64))
    n = 300
    page_lists = [[model.pages.take() for _ in range(5)] for _ in range(10)]
    for i, pages in enumerate(page_lists):
        model.run([Span(range(1000 * i, 1000 * i + n), 0, pages)])
    together = model.run([Span([7 * i], n, pages, 1) for i, pages in enumerate(page_lists)])
    for i in range(10):
        pages = [alone.pages.take() for _ in range(5)]
        alone.run([Span(range(1000 * i, 1000 * i + n), 0, pages)])
        assert alone.run([Span([7 * i], n, pages, 1)])[0] == together[i]


def test_spans_are_packed_with_single_tokens_first():
    batch, rows = pack([Span([5, 6, 7], 62, [9, 4], 2), Span([8], 64, [1, 3], 1), Span([2], 0, [6], slot=7)])
    assert batch.ids.tolist() == [8, 2, 5, 6, 7]
    assert batch.positions.tolist() == [64, 0, 62, 63, 64]
    assert batch.places.tolist() == [3 * 64, 6 * 64, 9 * 64 + 62, 9 * 64 + 63, 4 * 64]
    assert batch.spans.tolist() == [[0, 1, 64, 0, 0], [1, 1, 0, 2, 7], [2, 3, 62, 3, 0]]
    assert batch.pages.tolist() == [1, 3, 6, 9, 4]
    assert batch.outputs.tolist() == [0, 3, 4]
    assert rows == [slice(1, 3), slice(0, 1), slice(1, 1)]
    assert all(a.dtype == np.int32 for a in batch)


def test_spans_without_room_or_tokens_are_refused():
    for span in (Span([1, 2], 63, [0]), Span([], 0, [0]), Span([1], 0, [0], 2), Span([1], -1, [0])):
        with pytest.raises(GraphError, match="a span of"):
            pack([span])


def test_pages_that_do_not_exist_and_positions_beyond_the_context_are_refused(teams):
    model = Model(teams(1), "F16", (3, 1, 32, 32), n_pages=8, n_ctx=2 * SLAB)
    for wrong in (Span([1], 0, [8]), Span([1], 0, [-1]), Span([1] * 70, 0, [0, 9]), Span([1], 2 * SLAB, [0, 1, 2])):
        with pytest.raises(GraphError, match="there are 8 pages and 128 positions"):
            model.run([wrong])
