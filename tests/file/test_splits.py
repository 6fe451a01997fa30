"""Models split into several files."""

import gguf
import numpy as np
import pytest

from ggpy.errors import Error, GGUFError
from ggpy.file import GGUFFile

from .make import gguf as gguf_bytes
from .make import info, scalar

NAMES = ["tok", "blk.0", "blk.1", "blk.2", "out"]


@pytest.fixture
def split(tmp_path):
    """A model of five tensors in three files, written by the `gguf` package; the files in order."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 3)
    for i, name in enumerate(NAMES):
        writer.add_tensor(name, np.full((2, 3 + i), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("opened", range(3))
def test_any_part_opens_all(split, opened):
    assert len(split) == 3
    with GGUFFile(split[opened]) as file:
        assert file.path == split[0]
        assert file.get("llama.block_count", int) == 3
        assert list(file.tensors) == NAMES
        for i, (name, tensor) in enumerate(file.tensors.items()):
            assert tensor.path == split[i // 2]
            assert np.array_equal(tensor.dequantize(), np.full((2, 3 + i), i)), name
            assert tensor.path.read_bytes()[tensor.offset :][: tensor.n_bytes] == tensor.data.tobytes()


def test_closing_closes_all_parts(split):
    with GGUFFile(split[0]) as file:
        pass
    for tensor in file.tensors.values():
        with pytest.raises(Error, match="closed"):
            tensor.dequantize()


def test_a_relative_path_opens_all(split, monkeypatch):
    monkeypatch.chdir(split[0].parent)
    assert list(GGUFFile(split[1].name).tensors) == NAMES


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_part_is_named(split, missing):
    split[missing].unlink()
    with pytest.raises(GGUFError, match=split[missing].name):
        GGUFFile(split[missing - 1])


def test_a_broken_part_is_named(split):
    split[2].write_bytes(split[2].read_bytes()[:50])
    with pytest.raises(GGUFError, match=split[2].name):
        GGUFFile(split[0])


def test_parts_of_a_model_must_be_named_as_parts(split):
    for name in ("renamed.gguf", "model-00001-of-00004.gguf", "model-00000-of-00003.gguf"):
        renamed = split[0].rename(split[0].with_name(name))
        with pytest.raises(GGUFError, match=f"{name}: part of a model in 3 files, but not named"):
            GGUFFile(renamed)
        renamed.rename(split[0])


def test_swapped_parts_are_refused(split):
    first, second = split[0].read_bytes(), split[1].read_bytes()
    split[0].write_bytes(second)
    split[1].write_bytes(first)
    with pytest.raises(GGUFError, match=r"00001-of-00003.gguf: 'split.no' and 'split.count' are \(1, 3\), but \(0, 3\)"):
        GGUFFile(split[2])


def test_a_part_of_another_model_is_refused(split):
    split[1].write_bytes(gguf_bytes([scalar("general.architecture", "string", "llama")]))
    with pytest.raises(GGUFError, match=r"00002-of-00003.gguf: 'split.no' and 'split.count' are \(-1, -1\)"):
        GGUFFile(split[0])


def part(i, n_parts, infos=(), data=b"", count_kind="uint16", **others):
    keys = [scalar("split.no", "uint16", i), scalar("split.count", count_kind, n_parts)]
    return gguf_bytes([*keys, *(scalar(key, "int32", value) for key, value in others.items())], infos, data)


def test_the_same_tensor_in_two_parts_is_refused(tmp_path):
    for i in range(2):
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(part(i, 2, [info("t", [4])], bytes(16)))
    with pytest.raises(GGUFError, match=r"m-00002-of-00002\.gguf: tensor 't' is also in m-00001-of-00002\.gguf"):
        GGUFFile(tmp_path / "m-00001-of-00002.gguf")


def test_a_wrong_number_of_tensors_is_refused(tmp_path):
    for i in range(2):
        content = part(i, 2, [info(f"t{i}", [4])], bytes(16), **{"split.tensors.count": 3})
        (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(content)
    with pytest.raises(GGUFError, match=r"2 tensors in 2 files; 'split\.tensors\.count' says 3"):
        GGUFFile(tmp_path / "m-00002-of-00002.gguf")


@pytest.mark.parametrize(("kind", "count"), [("uint64", 2**64 - 1), ("int32", -2), ("uint64", 100_000)])
def test_absurd_numbers_of_parts_are_refused(tmp_path, kind, count):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(part(0, count, count_kind=kind))
    with pytest.raises(GGUFError, match=f"part of a model in {count} files"):
        GGUFFile(path)


@pytest.mark.parametrize(("kind", "value"), [("string", "2"), ("float32", 2.0), ("bool", 1)])
def test_a_number_of_parts_of_another_type_is_refused(tmp_path, kind, value):
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([scalar("split.count", kind, value)]))
    with pytest.raises(GGUFError, match=r"key 'split.count' must be an integer"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_in_one_part_may_have_any_name(tmp_path, count):
    (tmp_path / "m.gguf").write_bytes(part(0, count))
    assert GGUFFile(tmp_path / "m.gguf").metadata["split.count"] == count
