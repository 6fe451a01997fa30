"""The integer matrix kernels against `gguf.quants`. Both see the same int8 activations: only rounding is left."""

import ctypes
import threading

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from ggpy.graph import Graph, Pages, Program
from ggpy.kernels.build import KERNEL_TYPE, load
from ggpy.kernels.table import KERNELS, QUANTIZED, activation_bytes, scratch_bytes
from ggpy.simd.target import target

from ..graph.runs import alone
from ..graph.weights import FakeWeight, random_rows


def aligned(n_bytes):
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


def run(kernels, name, n_threads=1, **params):
    """Calls a kernel; arrays stand for their addresses, what isn't named is 0."""
    places = [params.get(key, 0) for key in KERNELS[name].params]
    values = np.array([p.ctypes.data if isinstance(p, np.ndarray) else p for p in places], np.int64)
    spare = np.zeros(2 * n_threads, np.int64)
    kernel = KERNEL_TYPE(kernels[name])

    def call(ith):
        slot = spare.ctypes.data + 16 * ith
        kernel(ctypes.c_void_p(slot), ctypes.c_void_p(slot + 8), ith, n_threads, values.ctypes.data)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(n_threads)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("n_rows, n_tokens, n_threads", [(40, 13, 1), (16, 1, 2), (7, 3, 2), (33, 16, 2), (24, 45, 2)])
def test_product_equals_dequantized_product_of_the_same_activations(simd_form, name, n_rows, n_tokens, n_threads):
    rng = np.random.default_rng(n_rows)
    n_cols, fmt = 768, QUANTIZED[name]  # more than a panel
    block = 32 if fmt == "q8_32" else 256
    kernels = load([f"mul_mat_one_{name}", f"mul_mat_{name}", f"quantize_{fmt}"])
    w = random_rows(name, (n_rows, n_cols), rng)
    n_room = -(-n_tokens // 16) * 16
    x = np.zeros((n_room, n_cols), np.float32)
    x[:n_tokens] = rng.standard_normal((n_tokens, n_cols))

    stride = activation_bytes(n_cols)
    xq, state = aligned(n_room * stride), np.array([n_tokens, 0])
    sizes = {"n_cols": n_cols, "n_rows_per_token": 1, "x_stride": 4 * n_cols, "out_stride": stride}
    run(kernels, f"quantize_{fmt}", n_threads, x=x, out=xq, state=state, **sizes)
    rows = xq.reshape(n_room, stride)[:n_tokens]
    q = rows[:, :n_cols].view(np.int8).reshape(n_tokens, -1, block)
    d = rows[:, n_cols : n_cols + 4 * (n_cols // block)].copy().view(np.float32)
    xd = (q * d[..., None]).reshape(n_tokens, n_cols)
    assert np.abs(xd - x[:n_tokens]).max() <= d.max() / 2 * 1.001

    expected = xd.astype(np.float64) @ quants.dequantize(w, GGMLQuantizationType[name]).T
    per_thread = scratch_bytes(name, n_room, w.shape[1], n_cols, target().lanes)
    scratch, counter = aligned(per_thread * n_threads), np.zeros(1, np.int64)
    residual = rng.standard_normal((n_room, n_rows)).astype(np.float32)
    for kernel, n in ((f"mul_mat_{name}", n_tokens), (f"mul_mat_one_{name}", 1)):
        out = np.zeros((n_room, n_rows), np.float32)
        counter[:] = 0
        given = {"w": w, "x": xq, "out": out, "residual": residual, "scratch": scratch, "scratch_stride": per_thread}
        sizes = {"n_slots": 1, "n_rows": n_rows, "n_cols": n_cols, "x_stride": stride, "out_stride": 4 * n_rows}
        run(kernels, kernel, n_threads, counter=counter, state=state, **given, **sizes)
        error = np.abs(out[:n] - residual[:n] - expected[:n]).max()
        assert error <= 2e-6 * np.abs(expected).max() + 1e-6


@pytest.mark.parametrize(
    "name, value", [("Q8_0", -128), ("Q8_0", 127), ("Q6_K", -1), ("Q5_1", -1), ("Q4_0", -1), ("Q4_K", -1)]
)
@pytest.mark.parametrize("n_tokens", [1, 8, 43])
def test_the_greatest_sums_of_bytes(simd_form, teams, name, value, n_tokens):
    """Weights whose bits are all ones, or -128 and 127, and activations of ±127: no sum leaves its bits."""
    n_cols, n_rows = 256, 8
    w = random_rows(name, (n_rows, n_cols), np.random.default_rng(1))
    quantized = {
        "Q8_0": slice(2, 34),
        "Q5_1": slice(4, 24),
        "Q4_0": slice(2, 18),
        "Q4_K": slice(16, 144),
        "Q6_K": slice(0, 192),
    }
    w.reshape(n_rows, -1, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1])[..., quantized[name]] = np.uint8(value % 256)
    values = quants.dequantize(w, GGMLQuantizationType[name]).astype(np.float64)
    signs = np.where(np.arange(n_tokens * n_cols).reshape(n_tokens, n_cols) % (n_cols + 3) % 7 < 3, -1, 1)
    x = np.concatenate([np.ones((1, n_cols)), signs[1:]]).astype(np.float32)
    graph = Graph(n_tokens)
    graph.output(
        graph.op("MUL_MAT", graph.weight(FakeWeight("w", name, (n_rows, n_cols), w)), graph.input("x", (n_cols,))), "out"
    )
    got = Program(graph, Pages(1), teams(1)).run({"x": x}, alone(n_tokens))["out"]
    assert np.allclose(got, x @ values.T, rtol=2e-6, atol=1e-5 * np.abs(values).max())
