"""Layers with states: the kernels against numpy, and the same bits however sequences are cut into runs."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggpy.errors import ContextFullError, GraphError
from ggpy.graph import Graph, Pages, Program, Reference, Span, pack, pages_of, slot_bytes

from .weights import random_weight

SETTINGS = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
N_SLOTS = 5


class Layer:
    """A convolution and a delta rule over what it gives, in a pool of slots."""

    def __init__(self, team, n_head_k, group, head_dim_k, head_dim, width, tiled):
        self.team, self.tiled = team, tiled
        self.n_head_k, self.n_head, self.head_dim_k, self.head_dim = n_head_k, n_head_k * group, head_dim_k, head_dim
        self.n_keys = 2 * n_head_k * head_dim_k
        self.n_cols = self.n_keys + self.n_head * head_dim
        rng = np.random.default_rng(5)
        self.w = random_weight("w", "F32", (width, self.n_cols), rng)
        self.w.data[:] = (np.sqrt(self.n_cols, dtype=np.float32) * self.w.dequantize()).view(np.uint8)
        self.a, self.dt, self.skip = (random_weight(name, "F32", (self.n_head,), rng) for name in ("a", "dt", "skip"))
        self.dt_and_least = random_weight("dt_and_least", "F32", (self.n_head + 1,), rng)
        self.bias = random_weight("bias", "F32", (self.n_cols,), rng)
        self.row = random_weight("row", "F32", (self.n_head * head_dim,), rng)
        self.a.data[:] = (-np.abs(self.a.dequantize())).view(np.uint8)
        self.pages, self.slow = (Pages(99, n_slots=N_SLOTS) for _ in range(2))
        self._programs = {}

    def graph(self, n_tokens):
        g = Graph(n_tokens)
        x = g.input("x", (self.n_cols,))
        tail = g.state("tail", self.w.shape[0] - 1, self.n_cols)
        y = g.op("SHORT_CONV", x, g.weight(self.w), tail, g.weight(self.bias), silu=True, name="conv")
        keys = g.op("L2_NORM", y, n_head=2 * self.n_head_k, head_dim=self.head_dim_k, eps=1e-6, name="keys")
        given = [g.input(name, (self.n_head,)) for name in ("decay", "beta")]
        weights = g.weight(self.a), g.weight(self.dt)
        gates = g.op("DELTA_GATES", given[0], *weights, given[1], name="gates")
        memory = g.state("memory", self.n_head, self.head_dim_k, self.head_dim)
        y = g.op("DELTA_RULE", keys, y, gates, memory, first=self.n_keys, tiled=self.tiled, scale=0.3, name="rule")
        gate = g.input("gate", (self.n_head, 16 + self.head_dim))
        g.output(y if self.head_dim % 16 else g.op("GATED", y, gate, first=16, name="gated"), "out")
        self.scan(g, x, given[0])
        return g

    def scan(self, g, x, step):
        """Mamba-2's, after a convolution without bias."""
        x = g.op("SHORT_CONV", x, g.weight(self.w), g.state("other.tail", self.w.shape[0] - 1, self.n_cols), name="plain")
        gates = g.op("DELTA_GATES", step, g.weight(self.a), g.weight(self.dt_and_least), name="steps")
        memory = g.state("other.memory", self.n_head, self.head_dim_k, self.head_dim)
        y = g.op("STATE_SCAN", x, gates, memory, g.weight(self.skip), n_head_k=self.n_head_k, name="scan")
        y = g.op("RESHAPE", y, shape=(self.n_head * self.head_dim,), name="rows")
        g.output(g.op("MUL_ROW", y, g.weight(self.row), name="scaled"), "scan")

    def run(self, spans):
        """What each span's tokens give, by the kernels; each token's inputs follow from its id."""
        batch, rows = pack(spans)
        n = len(batch.ids)
        if (size := 1 if n == 1 else 512) not in self._programs:
            self._programs[size] = Program(self.graph(size), self.pages, self.team)
        shapes = {t.name: t.shape[1:] for t in self.graph(1) if t.op == "INPUT"}
        rngs = [np.random.default_rng(t) for t in batch.ids]
        inputs = {k: np.stack([2 * r.standard_normal(s).astype(np.float32) for r in rngs]) for k, s in shapes.items()}
        got = self._programs[size].run(inputs, batch)
        expected = Reference(self.graph(n), self.slow).run(inputs, batch)
        for name, value in got.items():
            np.testing.assert_allclose(value, expected[name], atol=1e-5 * np.abs(expected[name]).max())
        return [np.array([got["out"][r].tobytes(), got["scan"][r].tobytes()], object) for r in rows]


@SETTINGS
@given(
    sizes=st.sampled_from(
        [(1, 1, 16, 16), (2, 2, 32, 48), (3, 1, 128, 128), (2, 3, 48, 32), (2, 2, 16, 37), (1, 3, 16, 10)]
    ),
    width=st.integers(2, 4),
    tiled=st.booleans(),
    lengths=st.lists(st.sampled_from([1, 2, 3, 5, 40, 150]), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_cuts_and_company_give_the_same_bits(teams, sizes, width, tiled, lengths, cuts, threads, seed):
    rng = np.random.default_rng(seed)
    layer, alone = Layer(teams(threads), *sizes, width, tiled), Layer(teams(1), *sizes, width, tiled)
    sequences = [rng.integers(0, 1 << 30, n).tolist() for n in lengths]
    pages = range(pages_of(150))
    wanted = [alone.run([Span(tokens, 0, pages, len(tokens), 3)])[0].tolist() for tokens in sequences]
    slots = rng.permutation(N_SLOTS).tolist()
    done, got, turn = [0] * len(lengths), [np.array([b"", b""], object)] * len(lengths), 0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        spans, whose = [], []
        for i, tokens in enumerate(sequences):
            n = min(cuts[turn % len(cuts)], len(tokens) - done[i])
            turn += 1
            if n:
                spans.append(Span(tokens[done[i] : done[i] + n], done[i], pages, n, slots[i]))
                whose.append(i)
                done[i] += n
        for i, values in zip(whose, layer.run(spans), strict=True):
            got[i] = got[i] + values
    assert [x.tolist() for x in got] == wanted


@pytest.mark.parametrize("form", ["log1p", "large"])
def test_gates_at_the_ends_of_their_range(teams, form):
    values = np.array([-200, -90, -20, -1, -1e-3, 0, 1e-3, 0.5, 3, 20, 90, 200], np.float32)
    if form == "log1p":
        values = np.linspace(-16, 16, 200, dtype=np.float32)
    rng = np.random.default_rng(0)
    a, dt = (random_weight(name, "F32", (1,), rng) for name in ("a", "dt"))
    a.data[:], dt.data[:] = np.array([-0.7], np.float32).view(np.uint8), 0
    g = Graph(len(values))
    g.output(g.op("DELTA_GATES", g.input("d", (1,)), g.weight(a), g.weight(dt), g.input("b", (1,))), "out")
    batch, _ = pack([Span(range(len(values)), 0, range(9))])
    got = Program(g, Pages(9), teams(1)).run({"d": values[:, None], "b": values[:, None]}, batch)["out"][:, 0]
    x = values.astype(np.float64)
    np.testing.assert_allclose(got[:, 0], np.exp(-0.7 * np.logaddexp(x, 0)), rtol=4e-6, atol=1e-30)
    np.testing.assert_allclose(got[:, 1], 1 / (1 + np.exp(-x)), rtol=1e-6, atol=1e-30)


def test_slots_are_counted_shared_and_copied():
    g = Graph(1)
    tail, memory = g.state("tail", 3, 32), g.state("memory", 2, 16, 32)
    assert slot_bytes(g) == 4 * (3 * 32 + 2 * 16 * 32)
    states = Pages(1, n_slots=2).states
    assert states.array(tail).shape == (2, 3, 32) and states.array(memory).shape == (2, 2, 16, 32)
    slot = states.take()
    states.array(memory)[slot] = 7
    states.share(slot)
    copy = states.own(slot)
    assert copy != slot and (states.array(memory)[copy] == 7).all()
    with pytest.raises(ContextFullError, match="all 2 slots of states"):
        states.take()


def test_slots_that_do_not_exist_are_refused(teams):
    layer = Layer(teams(1), 1, 1, 16, 16, 4, False)
    for slot in (-1, N_SLOTS):
        with pytest.raises(GraphError, match=f"there are {N_SLOTS} slots"):
            layer.run([Span([1], 0, [0], 1, slot)])


def test_states_of_another_shape_are_refused():
    g = Graph(2)
    w = g.weight(random_weight("w", "F32", (4, 32), np.random.default_rng(0)))
    with pytest.raises(GraphError, match="the state holds other rows"):
        g.op("SHORT_CONV", g.input("x", (32,)), w, g.state("tail", 4, 32))
