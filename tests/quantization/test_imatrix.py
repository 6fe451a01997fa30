"""Importance matrices against libgguf's reader and the layout of llama.cpp's tools/imatrix."""

import struct

import gguf
import libgguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.errors import Error, GGUFError
from ggpy.quantization import ImportanceMatrix, Override, quantize_model, read_imatrix, write_imatrix

from .shapes import write_gguf

ONE = np.ones(1, np.float32)


def matrix(rng):
    """Of a dense matrix and a stack of three, one of which met no token."""
    sums = {"blk.0.attn_q.weight": (1, 64), "blk.0.ffn_up_exps.weight": (3, 32)}
    sums = {name: rng.gamma(1, 5, shape).astype(np.float32) for name, shape in sums.items()}
    counts = {"blk.0.attn_q.weight": [512], "blk.0.ffn_up_exps.weight": [100, 0, 7]}
    sums["blk.0.ffn_up_exps.weight"][1] = 0
    return ImportanceMatrix(sums, {n: np.array(c, np.float32) for n, c in counts.items()}, ["text.txt", "b"], 4, 512)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_what_was_written_is_read_again(seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "m.gguf"
    written = matrix(np.random.default_rng(seed))
    write_imatrix(path, written)
    read = read_imatrix(path)
    assert (read.datasets, read.n_chunks, read.chunk_size) == (["text.txt", "b"], 4, 512)
    for name in written.sums:
        assert np.array_equal(read.sums[name], written.sums[name])
        assert np.array_equal(read.counts[name], written.counts[name])


def test_libgguf_reads_the_same_weights(tmp_path):
    path = tmp_path / "m.gguf"
    written = matrix(np.random.default_rng(0))
    write_imatrix(path, written)
    theirs = libgguf.load_imatrix(path)
    assert set(theirs) == set(written.sums)
    for name in theirs:
        assert np.array_equal(theirs[name], written.weights(name).reshape(-1))


def test_the_file_is_laid_out_as_llama_cpp_writes_it(tmp_path):
    """Keys and shapes of tools/imatrix/imatrix.cpp, save_imatrix."""
    path = tmp_path / "m.gguf"
    write_imatrix(path, matrix(np.random.default_rng(0)))
    reader = gguf.GGUFReader(path)
    assert {t.name: t.shape.tolist() for t in reader.tensors} == {
        "blk.0.attn_q.weight.in_sum2": [64, 1],
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.ffn_up_exps.weight.in_sum2": [32, 3],
        "blk.0.ffn_up_exps.weight.counts": [1, 3],
    }
    kinds = {key: field.types for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    kind = gguf.GGUFValueType
    assert kinds == {
        "general.type": [kind.STRING],
        "imatrix.datasets": [kind.ARRAY, kind.STRING],
        "imatrix.chunk_count": [kind.UINT32],
        "imatrix.chunk_size": [kind.UINT32],
    }


def test_columns_without_activations_keep_a_little_weight():
    weights = ImportanceMatrix({"w": np.array([[4, 0, 0, 0], [0, 0, 0, 0]], np.float32)}, {"w": np.ones(2)}).weights("w")
    assert weights.dtype == np.float32
    assert np.allclose(weights, [[4, 1e-6, 1e-6, 1e-6], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    "keys, values, message",
    [
        ({}, {"w.in_sum2": (1, 2), "w.counts": (1, 1)}, "general.type"),
        ({"general.type": "imatrix"}, {"w.in_sum2": (1, 2)}, "'w.counts' is missing"),
        ({"general.type": "imatrix"}, {"w.in_sum2": (1, 2), "w.counts": (1, 1), "v.counts": (1, 1)}, "'v.counts' has no"),
        ({"general.type": "imatrix"}, {"w.in_sum2": (1, 3), "w.counts": (2, 1)}, "3 sums for 2 counts"),
        ({"general.type": "imatrix"}, {"w.in_sum2": (1, 0), "w.counts": (1, 1)}, "0 sums for 1 counts"),
        ({"general.type": "imatrix"}, {"v": (2,)}, "'v' has no partner"),
    ],
)
def test_other_files_are_refused(keys, values, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys, values, arch="llama")
    with pytest.raises(GGUFError, match=message):
        read_imatrix(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_sums_that_cannot_be_are_refused(bad, tmp_path):
    written = matrix(np.random.default_rng(0))
    written.sums["blk.0.attn_q.weight"][0, 3] = bad
    write_imatrix(tmp_path / "m.gguf", written)
    with pytest.raises(GGUFError, match=r"attn_q.weight.in_sum2' has negative or infinite"):
        read_imatrix(tmp_path / "m.gguf")


def test_a_folder_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(Error, match="no folder"):
        write_imatrix(tmp_path / "nowhere" / "m.gguf", matrix(np.random.default_rng(0)))


def old_form(sums, n_calls=4, tail=True):
    """What llama.cpp's imatrix tool wrote until 2025."""
    content = struct.pack("<i", len(sums))
    for name, values in sums.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<2i", n_calls, values.size)
        content += values.astype("<f4").tobytes()
    return content + (struct.pack("<2i", 7, 8) + b"text.txt" if tail else b"")


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("n_calls", [0, 4])
def test_the_older_form_is_read_as_libgguf_reads_it(n_calls, tail, tmp_path):
    path = tmp_path / "m.dat"
    sums = matrix(np.random.default_rng(1)).sums
    path.write_bytes(old_form(sums, n_calls, tail))
    read, theirs = read_imatrix(path), libgguf.load_imatrix(path)
    assert set(theirs) == set(read.sums)
    for name, values in sums.items():
        read.split(name, *values.shape)
        found = read.weights(name)
        assert found.shape == values.shape
        np.testing.assert_array_equal(found[values > 0], theirs[name].reshape(values.shape)[values > 0])
    assert (read.n_chunks, read.datasets) == ((7, ["text.txt"]) if tail else (0, []))


def test_a_model_is_quantized_alike_with_both_forms(tmp_path):
    rng = np.random.default_rng(2)
    tensors = {"blk.0.ffn_up_exps.weight": rng.standard_normal((3, 8, 256), np.float32)}
    shapes = {name: values.shape for name, values in tensors.items()}
    keys = {"llama.block_count": 1, "general.architecture": "llama"}
    write_gguf(tmp_path / "model.gguf", keys, shapes, tensors, "llama")
    means = rng.gamma(1, 5, (3, 256)).astype(np.float32)
    (tmp_path / "m.dat").write_bytes(old_form({"blk.0.ffn_up_exps.weight": means * 4}))
    write_imatrix(
        tmp_path / "m.gguf",
        ImportanceMatrix({"blk.0.ffn_up_exps.weight": means * 4}, {"blk.0.ffn_up_exps.weight": np.full(3, 4, np.float32)}),
    )
    written = []
    for form in ("dat", "gguf"):
        quantize_model(tmp_path / "model.gguf", tmp_path / f"{form}.out", "q4_0", imatrix=tmp_path / f"m.{form}")
        written.append(gguf.GGUFReader(tmp_path / f"{form}.out").tensors[0].data.tobytes())
    assert written[0] == written[1]


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 500), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_older_file_is_read_or_refused(at, byte, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("imatrix") / "m.dat"
    content = bytearray(old_form({"a": np.ones(32, np.float32), "b": np.ones(64, np.float32)}))
    at %= len(content)
    content[at] = byte
    path.write_bytes(content[:at] if cut else content)
    try:
        read_imatrix(path)
    except Error as error:
        assert str(path) in str(error)


def test_values_too_large_for_their_counts_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_imatrix(path, ImportanceMatrix({"a": np.full((1, 32), 3e38, np.float32)}, {"a": np.array([1e-3], np.float32)}))
    with pytest.raises(GGUFError, match="sums too large for its counts"):
        read_imatrix(path)


def test_datasets_of_another_type_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.datasets", 5)
    for end in ("in_sum2", "counts"):
        writer.add_tensor(f"a.{end}", np.ones((1, 32 if end == "in_sum2" else 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"imatrix\.datasets' must be StringArray, not int"):
        read_imatrix(tmp_path / "m.gguf")


@pytest.mark.parametrize("pattern", ["((((", "(" * 100_000, "a{99999999999999999999}", "[", "*"])
def test_patterns_that_are_no_regular_expressions_are_refused(pattern):
    with pytest.raises(Error, match="is no regular expression") as caught:
        Override.parse(f"{pattern}=q8_0")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["q4_k", "q5_1", "q2_k", "iq4_xs"])
@pytest.mark.parametrize("size", [1e38, 1e-30])
def test_whatever_the_sums_are_what_is_encoded_is_finite(kind, size, tmp_path):
    """With weights that mean the same: the bytes are those of sums near 1."""
    rng, written = np.random.default_rng(3), []
    values = {"blk.0.ffn_up.weight": rng.standard_normal((4, 256), np.float32)}
    shapes = {name: value.shape for name, value in values.items()}
    write_gguf(tmp_path / "model.gguf", {"llama.block_count": 1}, shapes, values, "llama")
    sums = rng.uniform(0.5, 1, (1, 256)).astype(np.float32)
    for scale in (2.0 ** np.floor(np.log2(size)), 1):
        matrix = ImportanceMatrix({"blk.0.ffn_up.weight": (sums * scale).astype(np.float32)}, {"blk.0.ffn_up.weight": ONE})
        write_imatrix(tmp_path / "m.gguf", matrix)
        override = Override.parse(f"ffn_up={kind}")
        quantize_model(tmp_path / "model.gguf", tmp_path / "out", "q8_0", imatrix=tmp_path / "m.gguf", overrides=[override])
        written.append(gguf.GGUFReader(tmp_path / "out").tensors[0])
    assert written[0].tensor_type.name == kind.upper()
    assert np.isfinite(gguf.quants.dequantize(written[0].data, written[0].tensor_type)).all()
    assert written[0].data.tobytes() == written[1].data.tobytes()


def test_a_number_of_chunks_that_cannot_be_is_refused(tmp_path):
    for n in (-1, -(2**31)):
        (tmp_path / "m.dat").write_bytes(old_form({"a": np.ones(32, np.float32)}, tail=False) + struct.pack("<2i", n, 0))
        with pytest.raises(GGUFError, match=f"of {n} chunks"):
            read_imatrix(tmp_path / "m.dat")
