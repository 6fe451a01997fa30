"""Errors of weights against gguf's own dequantization."""

import gguf
import numpy as np
import pytest

import ggpy
from ggpy.errors import Error
from ggpy.measure import weights
from ggpy.measure.weights import decibels, together, weight_errors
from ggpy.quantization import quantize_model
from tests.models.checkpoints import converted
from tests.models.test_moe import made


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A mixture of experts as f32, and as Q4_0."""
    folder = tmp_path_factory.mktemp("weights")
    path = converted(folder, made("V2-Lite"))
    quantize_model(path, folder / "q4.gguf", "q4_0", n_threads=1)
    with ggpy.GGUFFile(path) as a, ggpy.GGUFFile(folder / "q4.gguf") as b:
        yield a, b


def values(file):
    """All tensors as gguf's reader decodes them."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file.path).tensors}


@pytest.mark.parametrize("at_once", [1 << 20, 96])
def test_errors_are_those_of_ggufs_dequantization(pair, monkeypatch, at_once):
    monkeypatch.setattr(weights, "_VALUES", at_once)
    a, b = pair
    x, y = values(a), values(b)
    errors = weight_errors(a, b)
    assert [e.name for e in errors] == list(x)
    for e in errors:
        u, v = x[e.name].astype(np.float64), y[e.name].astype(np.float64)
        expected = np.sqrt(((u - v) ** 2).sum() / (u**2).sum())
        assert e.relative_rmse == pytest.approx(expected, rel=1e-5)
        assert e.n_values == u.size and (e.type_a == e.type_b) == (expected == 0)
        if "_exps" in e.name:
            for i, (signal, noise) in enumerate(zip(e.signal, e.noise, strict=True)):
                assert noise / signal == pytest.approx(((u[i] - v[i]) ** 2).sum() / (u[i] ** 2).sum(), rel=1e-5)
    assert 0.02 < max(e.relative_rmse for e in errors) < 0.2


def test_groups_have_the_error_of_their_values_together(pair):
    a, b = pair
    x, y = values(a), values(b)
    layers = together(weight_errors(a, b), lambda e: e.layer)
    assert set(layers) == {None, 0, 1, 2}
    for layer, e in layers.items():
        names = [n for n in x if (f"blk.{layer}." in n if layer is not None else "blk" not in n)]
        noise = sum(np.square(x[n] - y[n], dtype=np.float64).sum() for n in names)
        signal = sum(np.square(x[n], dtype=np.float64).sum() for n in names)
        assert e.relative_rmse == pytest.approx(np.sqrt(noise / signal), rel=1e-5)
        assert e.n_values == sum(x[n].size for n in names)


def test_kinds_are_parts_of_the_model(pair):
    kinds = {e.kind for e in weight_errors(*pair)}
    assert {"token_embd", "output_norm", "attn_kv_a_mqa", "ffn_down_exps", "ffn_norm"} <= kinds


def test_a_file_equals_itself(pair):
    errors = weight_errors(pair[0], pair[0])
    assert all(e.relative_rmse == 0 and e.snr == float("inf") for e in errors)


def test_progress_ends_with_all_bytes(pair):
    seen = []
    weight_errors(*pair, progress=lambda *state: seen.append(state))
    assert seen[-1][0] == seen[-1][1] == sum(t.n_bytes for file in pair for t in file.tensors.values())


def test_decibels():
    assert decibels(0.1) == pytest.approx(20) and decibels(0.0) == float("inf")


def test_other_models_are_refused(pair, files):
    with ggpy.GGUFFile(files[0]) as other, pytest.raises(Error, match=r"no tensor|different models"):
        weight_errors(pair[0], other)


def test_values_that_are_no_numbers_are_refused(pair, monkeypatch):
    kind = type(ggpy.quant.block_type("F32"))
    monkeypatch.setattr(kind, "dequantize", lambda self, data: np.full((*data.shape[:-1], 32), np.nan, np.float32))
    with pytest.raises(Error, match=r"token_embd\.weight: has values that aren't finite"):
        weight_errors(*pair)
