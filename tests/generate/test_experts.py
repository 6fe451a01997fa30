"""The use of experts against counts from the reference executor, numbers by hand, and a naive cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggpy
from ggpy.generate.experts import ExpertUse, expert_use, simulate_cache
from ggpy.graph import Pages, Reference
from ggpy.models import run_inputs
from tests.graph.runs import of_ids
from tests.models.checkpoints import converted, ids
from tests.models.test_moe import made


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("experts"), made("V2-Lite"))


@pytest.fixture(scope="module")
def values(path):
    """All values of 40 tokens in a context of 24: what the reference executor computes of 24 and 16 tokens."""
    tokens = ids(40)
    with ggpy.load(path, n_ctx=24) as model:
        runs = []
        for piece in (tokens[:24], tokens[24:]):
            batch = of_ids(piece)
            reference = Reference(model.graph(len(piece)), Pages(1, "F32"))
            runs.append(reference.run(run_inputs(model.architecture, batch), batch))
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


def test_use_equals_what_the_reference_executor_routes(path, values):
    with ggpy.load(path, n_ctx=24, kv_type="f32") as model:
        model.hooks["blk.0.out"] = lambda name, value: None
        use = expert_use(model, ids(40))
        assert list(model.hooks) == ["blk.0.out"], "hooks are put back"
    assert use.layers == (1, 2)
    for row, layer in enumerate(use.layers):
        logits, route = values[f"blk.{layer}.router"], values[f"blk.{layer}.route"]
        best = np.argsort(-logits, -1)[:, :3]
        np.testing.assert_array_equal(use.trace[:, row], best)
        np.testing.assert_array_equal(use.counts[row], [(best == e).sum() for e in range(8)])
        np.testing.assert_allclose(use.weights[row], [route[best == e][:, 1].sum() for e in range(8)], atol=1e-4)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(use.probabilities[row], p.mean(0), atol=1e-5)
        chosen = np.sort(p, -1)[:, :-4:-1]
        np.testing.assert_allclose(use.confidence[row], (chosen[:, 0] / chosen.sum(-1)).mean(), atol=1e-5)


def test_dense_models_have_no_experts(tmp_path):
    path = converted(tmp_path, made("qwen3"))
    with ggpy.load(path, n_ctx=32) as model, pytest.raises(ggpy.UnsupportedError, match="no experts"):
        expert_use(model, [1, 2, 3])


def use_of(counts, probabilities):
    counts = np.array(counts)
    return ExpertUse(
        layers=tuple(range(len(counts))),
        counts=counts,
        weights=counts.astype(float),
        probabilities=np.array(probabilities),
        trace=np.zeros((1, len(counts), 1), int),
        confidence=np.ones(len(counts)),
    )


def test_balance_by_hand():
    even, lopsided = use_of([[5, 5, 5, 5], [6, 2, 0, 0]], [[0.25] * 4, [0.5, 0.3, 0.1, 0.1]]).table()
    assert even["cv"] == 0 and even["entropy"] == pytest.approx(1) and even["aux_loss"] == pytest.approx(1)
    assert even["unused"] == 0 and even["most_share"] == even["least_share"] == 0.25
    assert lopsided["cv"] == pytest.approx(np.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert lopsided["entropy"] == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) / 2)
    assert lopsided["aux_loss"] == pytest.approx(4 * (0.75 * 0.5 + 0.25 * 0.3))
    assert (lopsided["most_used"], lopsided["most_share"], lopsided["unused"]) == (0, 0.75, 2)


def naive_cache(trace, n_slots, policy):
    """A cache that looks through the whole past or future for whom to drop."""
    reads = [(layer, e) for token in trace.tolist() for layer, chosen in enumerate(token) for e in chosen]
    held, hits = set(), 0
    for at, key in enumerate(reads):
        if key in held:
            hits += 1
            continue
        if len(held) == n_slots:
            past = reads[:at]

            def last_use(k, past=past):
                return max(i for i, r in enumerate(past) if r == k)

            if policy == "lru":
                leaves = min(held, key=last_use)
            elif policy == "lfu":
                leaves = min(held, key=lambda k, past=past: (past.count(k), last_use(k)))
            else:
                never = len(reads)
                leaves = max(held, key=lambda k, at=at: next((i for i in range(at, never) if reads[i] == k), never))
            held.remove(leaves)
        held.add(key)
    return hits / len(reads)


@st.composite
def traces(draw):
    """Like a router's: an expert comes once for a token and layer."""
    n_layers, n_used = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.floats(0, 2))
    logits = rng.normal(0, skew, (1, n_layers, 6)) + rng.gumbel(size=(draw(st.integers(1, 25)), n_layers, 6))
    return np.argsort(-logits, -1)[..., :n_used]


@given(trace=traces(), n_slots=st.integers(1, 20))
def test_simulated_caches_hit_as_naive_ones_and_none_beats_the_best(trace, n_slots):
    rates = {policy: simulate_cache(trace, n_slots, policy) for policy in ("lru", "lfu", "best")}
    for policy, rate in rates.items():
        assert rate == naive_cache(trace, n_slots, policy), policy
    assert rates["best"] >= max(rates["lru"], rates["lfu"])


def test_a_cache_that_holds_everything_misses_each_expert_once():
    trace = np.array([[[0, 1]], [[1, 2]], [[0, 1]]])
    for policy in ("lru", "lfu", "best"):
        assert simulate_cache(trace, 3, policy) == 0.5
