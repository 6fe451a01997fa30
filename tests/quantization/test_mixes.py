"""Types of tensors against llama.cpp's quantizer."""

import json

import pytest

from ggpy.errors import Error, UnsupportedError
from ggpy.file import GGUFFile
from ggpy.quant import block_type
from ggpy.quantization import FILE_TYPES, Override, tensor_types

from .llama_cpp_types import EXPECTED, cases, digest, llama_cpp_types
from .shapes import SHAPES, write_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shape -> open file, made when asked for."""
    folder, opened = tmp_path_factory.mktemp("shapes"), {}

    def get(shape):
        if shape not in opened:
            opened[shape] = GGUFFile(write_gguf(folder / f"{shape}.gguf", *SHAPES[shape]))
        return opened[shape]

    yield get
    for file in opened.values():
        file.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_types_are_those_that_llama_cpp_was_seen_to_choose(shape, files):
    """The digests of expected_types.json, which names its source, were written by llama_cpp_types.py."""
    expected = json.loads(EXPECTED.read_text())
    for _, type, importance in (case for case in cases() if case[0] == shape):
        key = f"{shape} {type}" + " importance" * importance
        assert digest(tensor_types(files(shape), type, importance)) == expected[key], key


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("type", ["Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS", "MXFP4_MOE", "TQ1_0", "Q4_0"])
@pytest.mark.parametrize("shape", ["llama", "qwen2", "deepseek2"])
def test_types_are_those_that_llama_cpp_chooses_here(shape, type, importance, files):
    pytest.importorskip("llama_cpp")
    theirs = llama_cpp_types(files(shape).path, FILE_TYPES[type].id, importance)
    assert tensor_types(files(shape), type, importance) == theirs


@pytest.mark.parametrize("type", FILE_TYPES)
def test_file_types_have_ggufs_numbers_and_only_types_that_can_be_encoded(type, files):
    from gguf import LlamaFileType

    from ggpy.kernels.table import ENCODED

    name = ("ALL_" if type == "F32" else "MOSTLY_") + type
    assert FILE_TYPES[type].id == LlamaFileType[name].value
    for shape in SHAPES:
        assert set(tensor_types(files(shape), type).values()) <= {"F32", "F16", "BF16", *ENCODED}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_can_be_cut_into_their_types_blocks(shape, files):
    for type in FILE_TYPES:
        for name, found in tensor_types(files(shape), type).items():
            assert files(shape).tensors[name].shape[-1] % block_type(found).block_size == 0


def test_copy_changes_nothing_but_what_overrides_name(files):
    types = tensor_types(files("qwen2"), "copy", overrides=[Override.parse(r"\.1\.ffn_.*=q4_0")])
    assert {name for name, type in types.items() if type != "F32"} == {
        f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")
    }


def test_the_first_matching_override_wins_and_norms_stay(files):
    overrides = [Override.parse(text) for text in ("ffn_down=Q8_0", "ffn_=f16", "norm=q4_0")]
    types = tensor_types(files("llama"), "Q4_K_M", overrides=overrides)
    assert types["blk.3.ffn_down.weight"] == "Q8_0"
    assert types["blk.3.ffn_up.weight"] == "F16"
    assert types["blk.3.ffn_norm.weight"] == "F32"
    assert types["blk.0.attn_v.weight"] == "Q6_K"


def test_overrides_choose_as_llama_cpps_do(files):
    """What an override takes doesn't count for the rules either."""
    overrides = [Override.parse(r"blk\.[0-4]\.attn_v=q4_0"), Override.parse("ffn_down=iq4_xs")]
    types = tensor_types(files("llama"), "Q3_K_M", overrides=overrides)
    attn_v = [types[f"blk.{i}.attn_v.weight"] for i in range(30)]
    assert attn_v == ["Q4_0"] * 5 + ["Q5_K"] * 2 + ["Q4_K"] * 23
    assert types["blk.9.ffn_down.weight"] == "IQ4_XS"


def test_unknown_names_are_refused_with_the_known(files):
    with pytest.raises(UnsupportedError, match=r"'q9_k'.*Q4_K_M.*COPY"):
        tensor_types(files("llama"), "q9_k")
    with pytest.raises(UnsupportedError, match=r"'Q9'.*Q4_K"):
        Override.parse("ffn=q9")
    for text in ("ffn_down", "=q4_0"):
        with pytest.raises(Error, match="PATTERN=TYPE"):
            Override.parse(text)
    with pytest.raises(Error, match="regular expression"):
        Override.parse("(=q4_0")


def test_a_layer_beyond_the_models_is_refused(tmp_path):
    keys, tensors = SHAPES["mixtral"]
    tensors = tensors | {"blk.32.ffn_down_exps.weight": (8, 256, 256)}
    with GGUFFile(write_gguf(tmp_path / "m.gguf", keys, tensors)) as file, pytest.raises(Error, match=r"layer 32.*has 32"):
        tensor_types(file, "Q4_K_M")
