"""Reading safetensors files, against the safetensors package and torch."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from converters import checkpoint
from converters.checkpoint import (
    FLOAT8,
    ComputedRows,
    Config,
    PickedRows,
    ScaledRows,
    StackedRows,
    TransposedRows,
    read_safetensors,
)
from ggpy.errors import ConversionError, Error, UnsupportedError

FILES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pack(header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def write(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


@FILES
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_rows_are_read_as_torch_widens_them(dtype, shape, data, tmp_path):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"before": torch.ones(3), "weight": values, "zone": torch.zeros(2)}, path)
    rows = read_safetensors(path)["weight"]
    assert rows.shape == tuple(shape)
    expected = values.float().reshape(-1, shape[-1]).numpy()
    start = data.draw(st.integers(0, len(expected) - 1))
    stop = data.draw(st.integers(start + 1, len(expected)))
    read = rows.read(start, stop)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected[start:stop])


def part_of(n_rows, data):
    start = data.draw(st.integers(0, n_rows - 1))
    return start, data.draw(st.integers(start + 1, n_rows))


@FILES
@given(n_rows=st.integers(1, 20), n_columns=st.integers(1, 5), data=st.data())
def test_picked_rows_are_those_of_the_whole_tensor(n_rows, n_columns, data, tmp_path):
    values = torch.randn(n_rows, n_columns)
    path = tmp_path / "model.safetensors"
    save_file({"weight": values, "bias": values[:, 0].clone()}, path)
    order = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=25, unique=True)))
    start, stop = part_of(len(order), data)
    tensors = read_safetensors(path)
    weight = PickedRows(tensors["weight"], order, (len(order), n_columns)).read(start, stop)
    np.testing.assert_array_equal(weight, values.numpy()[order][start:stop])
    bias = PickedRows(tensors["bias"], order, (len(order),)).read(0, 1)
    np.testing.assert_array_equal(bias, values.numpy()[None, order, 0])


SIZE = st.integers(1, 6)


@given(n=SIZE, n_rows=SIZE, n_columns=SIZE, data=st.data())
def test_stacked_and_transposed_rows_are_numpys(n, n_rows, n_columns, data):
    values = np.random.default_rng(4).standard_normal((n, n_rows, n_columns), np.float32)
    stacked = StackedRows(tuple(ComputedRows(matrix) for matrix in values))
    assert stacked.shape == values.shape
    start, stop = part_of(n * n_rows, data)
    np.testing.assert_array_equal(stacked.read(start, stop), values.reshape(-1, n_columns)[start:stop])

    transposed = TransposedRows(stacked)
    expected = np.transpose(values, (0, 2, 1))
    assert transposed.shape == expected.shape
    start, stop = part_of(n * n_columns, data)
    np.testing.assert_array_equal(transposed.read(start, stop), expected.reshape(-1, n_rows)[start:stop])


class Unreadable(ComputedRows):
    def read(self, start, stop):
        raise AssertionError("read, though no row of it is wanted")


def test_of_stacked_tensors_only_those_wanted_are_read():
    parts = [ComputedRows(np.full((4, 3), i)) for i in range(5)]
    parts[0], parts[3], parts[4] = (Unreadable(parts[i].values) for i in (0, 3, 4))
    np.testing.assert_array_equal(StackedRows(tuple(parts)).read(6, 12)[:, 0], [1, 1, 2, 2, 2, 2])


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file, or cut short"),
        (b"PK\x03\x04 and more of it", "not a safetensors file, but a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not a safetensors file, but a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "not a safetensors file, but a web page"),
        (pack(b'{"w": {}, "w": {}}'), "its header is not JSON: the key 'w' is there twice"),
        (pack({"v": ENTRY, "w": ENTRY}, bytes(24)), "tensor w: begins at byte [0-9]+, not at"),
        (pack({"w": ENTRY | {"data_offsets": [24, 48]}}, bytes(48)), "tensor w: begins at byte [0-9]+, not at"),
        (pack({"w": ENTRY}, bytes(25)), "1 bytes follow the last tensor"),
        (pack({}, length=100_000_001), "not a safetensors file, (or cut short|but)"),
        (pack(b"{no json"), "its header is not JSON"),
        (pack(b"\xff\xfe{}"), "its header is not JSON"),
        (pack(b"[" * 100_000), "its header is not JSON"),
        (pack([1]), "its header is not a JSON object"),
        (pack({"w": 1}), "tensor w: its entry is not an object"),
        (pack({"w": ENTRY | {"shape": "2, 3"}}), "tensor w: shape must be a list of sizes"),
        (pack({"w": ENTRY | {"shape": [2, -3]}}), "tensor w: shape must be a list of sizes"),
        (pack({"w": ENTRY | {"shape": [2, 3.0]}}), "tensor w: shape must be a list of sizes"),
        (pack({"w": ENTRY | {"data_offsets": [24]}}, bytes(24)), "tensor w: .* doesn't fill"),
        (pack({"w": ENTRY | {"data_offsets": [0, 20]}}, bytes(24)), "tensor w: .* doesn't fill"),
        (pack({"w": ENTRY | {"shape": [2**40, 2**40]}}, bytes(24)), "tensor w: .* doesn't fill"),
        (pack({"w": ENTRY}, bytes(23)), "tensor w: the file ends before"),
        (pack({"w": ENTRY | {"dtype": "F6"}}, bytes(24)), "tensor w: type 'F6'; known: F64, F32, F16, BF16, F8_E4M3"),
        (pack({"w": ENTRY | {"dtype": ["F32"]}}, bytes(24)), "tensor w: type .*; known"),
    ],
)
def test_unsound_file_is_refused_naming_file_and_tensor(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises((ConversionError, UnsupportedError), match=f"model.safetensors: {message}") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


@FILES
@given(data=st.data())
def test_file_cut_anywhere_is_refused(data, tmp_path):
    whole = pack({"__metadata__": {"format": "pt"}, "w": ENTRY}, bytes(24))
    path = write(tmp_path, whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ConversionError):
        read_safetensors(path)


@FILES
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_file_with_a_changed_byte_is_read_or_refused(at, byte, tmp_path):
    whole = bytearray(pack({"__metadata__": {"format": "pt"}, "w": ENTRY}, bytes(24)))
    whole[at % len(whole)] = byte
    path = write(tmp_path, bytes(whole))
    try:
        for rows in read_safetensors(path).values():
            rows.read(0, 1)
    except Error as error:
        assert str(path) in str(error)


def test_file_that_shrinks_after_opening_is_noticed(tmp_path):
    path = write(tmp_path, pack({"w": ENTRY}, bytes(24)))
    rows = read_safetensors(path)["w"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConversionError, match="ends inside tensor w"):
        rows.read(0, 2)


def test_a_header_of_very_many_tensors_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 3)
    many = {str(i): ENTRY | {"shape": [0], "data_offsets": [0, 0]} for i in range(4)}
    with pytest.raises(ConversionError, match="its header has more than 3 tensors"):
        read_safetensors(write(tmp_path, pack(many)))


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_all_values_of_8_bit_floats_are_torchs(kind):
    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[kind]
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    np.testing.assert_array_equal(FLOAT8[kind], expected)


@FILES
@given(n=SIZE, n_rows=st.integers(1, 9), n_columns=st.integers(1, 9), block=st.tuples(SIZE, SIZE), data=st.data())
def test_scaled_rows_are_multiplied_block_by_block(n, n_rows, n_columns, block, data):
    rng = np.random.default_rng(5)
    values = rng.standard_normal((n, n_rows, n_columns), np.float32)
    scales = rng.standard_normal((n, -(-n_rows // block[0]), -(-n_columns // block[1])), np.float32)
    spread = scales.repeat(block[0], 1).repeat(block[1], 2)[:, :n_rows, :n_columns]
    scaled = ScaledRows(ComputedRows(values), ComputedRows(scales), block)
    start, stop = part_of(n * n_rows, data)
    np.testing.assert_array_equal(scaled.read(start, stop), (values * spread).reshape(-1, n_columns)[start:stop])


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, [2], None, 2**31, 1e300])
def test_sizes_must_be_positive_integers(value):
    with pytest.raises(ConversionError, match=r"config\.json: size must be a positive integer"):
        Config({"size": value}, Path("config.json")).integer("size")


@pytest.mark.parametrize("value", ["1e-5", False, float("nan"), float("inf"), None, 1e300, 10**400])
def test_numbers_must_be_finite_numbers(value):
    with pytest.raises(ConversionError, match=r"config\.json: eps must be a number"):
        Config({"eps": value}, Path("config.json")).number("eps")
    assert Config({"eps": 1}, Path("config.json")).number("eps") == 1.0
