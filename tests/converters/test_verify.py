"""Conversions beside transformers."""

import sys

import gguf
import numpy as np
import pytest

from converters import convert, verify
from ggpy.errors import ConversionError


def test_a_right_file_is_found_right(damaged_folder, tmp_path):
    convert(damaged_folder, tmp_path / "model.gguf", "f32")
    found = verify(damaged_folder, tmp_path / "model.gguf", n_threads=1)
    assert found.kl < 1e-5 and found.n_same == found.n_tokens > 30


def test_a_wrong_file_is_found_wrong(damaged_folder, tmp_path):
    convert(damaged_folder, tmp_path / "model.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    weight = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    weight[:] = np.roll(weight, 1, axis=0)  # as if the rows for rotary embedding were in another order
    del reader, weight
    with pytest.raises(ConversionError, match=r"computes something else than transformers does: mean KL divergence \d"):
        verify(damaged_folder, tmp_path / "model.gguf", n_threads=1)


def test_without_transformers_it_is_said(damaged_folder, tmp_path, monkeypatch):
    convert(damaged_folder, tmp_path / "model.gguf", "f32")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConversionError, match="needs the packages transformers and torch"):
        verify(damaged_folder, tmp_path / "model.gguf", n_threads=1)
