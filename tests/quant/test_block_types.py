"""Block types against `gguf.quants` (bit for bit) and the C code in `libgguf`."""

import math
import tracemalloc

import gguf
import libgguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ggpy.errors import UnsupportedError
from ggpy.quant import BLOCK_TYPES, block_type

NUMBERS = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}
DECODED_BY_GGUF = [name for name, kind in BLOCK_TYPES.items() if kind.decode and name not in NUMBERS]
IN_BLOCKS = [name for name in DECODED_BY_GGUF if BLOCK_TYPES[name].block_size > 1]
ENCODED = [name for name, kind in BLOCK_TYPES.items() if kind.encode]
OPAQUE = [name for name, kind in BLOCK_TYPES.items() if not kind.decode]


def bits(values):
    return values.view(np.uint32)


def gguf_dequantize(name, blocks):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, GGMLQuantizationType[name])


def gguf_quantize(name, values):
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(values, GGMLQuantizationType[name]).view(np.uint8)


def random_blocks(name, n_rows, n_values, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_rows, block_type(name).row_bytes(n_values)), dtype=np.uint8)


def test_the_types_that_were_asked_for_are_there():
    decoded = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    decoded += ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]
    decoded += ["MXFP4", "TQ1_0", "TQ2_0"]
    assert sorted(DECODED_BY_GGUF) == sorted(decoded)
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"} <= set(ENCODED)


@pytest.mark.parametrize("known", GGMLQuantizationType, ids=lambda known: known.name)
def test_number_and_sizes_are_ggmls(known):
    kind = block_type(known.name)
    assert kind.id == known
    assert kind is block_type(int(known))
    n_bytes = libgguf.type_size(known) or GGML_QUANT_SIZES[known][1]  # gguf errs on Q8_1, libgguf has no integers
    assert (kind.block_size, kind.n_bytes) == (GGML_QUANT_SIZES[known][0], n_bytes)


def test_every_name_and_number_is_there_once():
    assert len({kind.id for kind in BLOCK_TYPES.values()}) == len(BLOCK_TYPES)
    assert all(name == kind.name for name, kind in BLOCK_TYPES.items())


@pytest.mark.parametrize("name", DECODED_BY_GGUF)
def test_dequantize_equals_gguf_on_any_bits(name):
    blocks = random_blocks(name, 7, 1024 * 37)
    assert np.array_equal(bits(block_type(name).dequantize(blocks)), bits(gguf_dequantize(name, blocks)))


@pytest.mark.parametrize("name", DECODED_BY_GGUF)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_dequantize_equals_gguf_on_chosen_bits(name, data):
    kind = block_type(name)
    shape = (data.draw(st.integers(1, 3)), kind.n_bytes * data.draw(st.integers(1, 3)))
    blocks = data.draw(hnp.arrays(np.uint8, shape))
    assert np.array_equal(bits(kind.dequantize(blocks)), bits(gguf_dequantize(name, blocks)))


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_dequantize_equals_the_c_code_to_its_last_bit_or_two(name):
    blocks = random_blocks(name, 5, 2048)
    ours, theirs = block_type(name).dequantize(blocks), libgguf.dequantize_rows(blocks, block_type(name).id)
    finite = np.isfinite(theirs)
    assert np.array_equal(finite, np.isfinite(ours))
    # C may fuse a product and a sum; their difference may cancel, so that the row's largest value sets the bound.
    bound = 4 * np.finfo(np.float32).eps * np.abs(np.where(finite, theirs, 0)).reshape(-1, 32).max(axis=1)
    difference = np.abs(np.where(finite, ours, 0).astype(np.float64) - np.where(finite, theirs, 0)).reshape(-1, 32)
    assert np.all(difference <= bound[:, None])


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_become_float32(name):
    values = np.array([[-3, 0, 1], [100, -128, 127]], NUMBERS[name])
    got = block_type(name).dequantize(values.view(np.uint8))
    assert got.dtype == np.float32
    assert np.array_equal(got, values.astype(np.float32))


def spread(seed, shape):
    """Values of very different sizes, with runs of zeros, equal values and ties."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).reshape(-1, 32) * 10.0 ** rng.integers(-43, 38, (math.prod(shape) // 32, 1))
    values[1::7] = 0.0
    values[2::7] = -0.0
    values[3::7] = rng.standard_normal((len(values[3::7]), 1))
    values[4::7] = rng.integers(-4, 5, values[4::7].shape) / 2
    return values.astype(np.float32).reshape(shape)


@pytest.mark.parametrize("name", ENCODED)
def test_quantize_equals_gguf(name):
    values = spread(1, (6, 32 * 501))
    assert np.array_equal(block_type(name).quantize(values), gguf_quantize(name, values))


@pytest.mark.parametrize("name", ENCODED)
@given(values=hnp.arrays(np.float32, (2, 64), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@settings(max_examples=25, deadline=None)
def test_quantize_equals_gguf_on_any_finite_values(name, values):
    assert np.array_equal(block_type(name).quantize(values), gguf_quantize(name, values))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_special_values_are_rounded_as_gguf_does(name):
    patterns = np.array(
        [0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x7F7FFFFF, 0x00000001, 0x3F808000, 0x3F818000],
        np.uint32,
    )
    values = patterns.view(np.float32)[None, :]
    assert np.array_equal(block_type(name).quantize(values), gguf_quantize(name, values))


@pytest.mark.parametrize("name", ENCODED)
@given(values=hnp.arrays(np.float32, (1, 64), elements=st.floats(-1000, 1000, width=32)))
@settings(max_examples=25, deadline=None)
def test_quantized_values_stay_within_a_step(name, values):
    kind = block_type(name)
    back = kind.dequantize(kind.quantize(values))
    levels = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31}.get(name)
    if levels is None:
        tolerance = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}[name] * np.abs(values) + 2.0**-24 * (name != "F32")
    else:
        # One step (the symmetric types clip their far end), and float16's rounding of the scale and of the offset.
        blocks = values.reshape(-1, 32)
        span = blocks.max(axis=1) - blocks.min(axis=1) if name.endswith("_1") else np.abs(blocks).max(axis=1)
        largest = np.abs(blocks).max(axis=1)
        tolerance = np.repeat(span / levels + (span + largest) * 2.0**-11 + (levels + 1) * 2.0**-24, 32)[None, :]
        tolerance = tolerance * (1 + 1e-5)
    assert np.all(np.abs(back - values) <= tolerance)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_quantize_equals_the_c_code_on_ordinary_weights(name):
    values = np.random.default_rng(2).standard_normal((16, 1024)).astype(np.float32)
    assert np.array_equal(block_type(name).quantize(values), libgguf.quantize_rows(values, block_type(name).id))


@pytest.mark.parametrize("name", DECODED_BY_GGUF)
@pytest.mark.parametrize("shape", [(512,), (3, 256), (2, 3, 256), (0, 256), (3, 0), (1, 1, 1, 768)])
def test_shapes_follow_rows(name, shape):
    kind = block_type(name)
    blocks = np.zeros((*shape[:-1], kind.row_bytes(shape[-1])), np.uint8)
    values = kind.dequantize(blocks)
    assert (values.dtype, values.shape) == (np.float32, shape)
    if kind.encode:
        assert kind.quantize(values).shape == blocks.shape


@pytest.mark.parametrize("name", ENCODED)
def test_tensors_of_many_chunks_and_odd_strides_are_whole(name, monkeypatch):
    kind = block_type(name)
    values = spread(3, (14, 96))[::2, :64]
    unaligned = np.zeros(values.size * 4 + 1, np.uint8)[1:].view(np.float32).reshape(values.shape)
    unaligned[...] = values
    whole = kind.quantize(values)
    monkeypatch.setattr("ggpy.quant.blocks.CHUNK", 32)
    assert np.array_equal(kind.quantize(unaligned), whole)
    padded = np.zeros((7, whole.shape[1] + 3), np.uint8)
    padded[:, 3:] = whole
    assert np.array_equal(bits(kind.dequantize(padded[:, 3:])), bits(gguf_dequantize(name, whole)))


def test_the_result_is_new_memory():
    blocks = np.zeros((2, 8), np.uint8)
    assert not np.shares_memory(block_type("F32").dequantize(blocks), blocks)


@pytest.mark.parametrize("name", OPAQUE)
def test_types_without_decoder_say_so(name):
    with pytest.raises(UnsupportedError, match=name):
        block_type(name).dequantize(np.zeros((1, block_type(name).n_bytes), np.uint8))


@pytest.mark.parametrize("name", sorted(set(BLOCK_TYPES) - set(ENCODED)))
def test_types_without_encoder_say_so(name):
    with pytest.raises(UnsupportedError, match=name):
        block_type(name).quantize(np.zeros((1, 256), np.float32))


@pytest.mark.parametrize("unknown", ["Q9_9", 4, -1, 1 << 40])
def test_unknown_types_are_refused_with_a_list_of_the_known(unknown):
    with pytest.raises(UnsupportedError, match=r"F32.*Q6_K"):
        block_type(unknown)


def test_rows_that_are_not_whole_blocks_are_refused():
    kind = block_type("Q4_0")
    with pytest.raises(ValueError, match="33 values"):
        kind.row_bytes(33)
    with pytest.raises(ValueError, match="33 values"):
        kind.quantize(np.zeros((2, 33), np.float32))
    with pytest.raises(ValueError, match="18 bytes"):
        kind.dequantize(np.zeros((2, 19), np.uint8))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float64"):
        block_type("Q4_0").quantize(np.zeros((2, 32)))
    with pytest.raises(ValueError, match="int8"):
        block_type("Q4_0").dequantize(np.zeros((2, 18), np.int8))


@pytest.mark.parametrize("name", DECODED_BY_GGUF)
def test_big_tensors_need_little_memory_beside_the_result(name):
    kind = block_type(name)
    blocks = np.zeros((64, kind.row_bytes(1 << 16)), np.uint8)
    tracemalloc.start()
    try:
        values = kind.dequantize(blocks)
        beside_values = tracemalloc.get_traced_memory()[1] - values.nbytes
        tracemalloc.reset_peak()
        encoded = kind.quantize(values) if kind.encode else blocks
        beside_encoded = tracemalloc.get_traced_memory()[1] - values.nbytes - encoded.nbytes
    finally:
        tracemalloc.stop()
    assert values.nbytes == 1 << 24
    assert max(beside_values, beside_encoded) < 1 << 23
