"""Importance matrices against libgguf's reader and the layout of llama.cpp's tools/imatrix."""

import gguf
import libgguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.errors import Error, GGUFError
from ggpy.quantization import ImportanceMatrix, read_imatrix, write_imatrix

from .shapes import write_gguf


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
