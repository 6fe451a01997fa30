"""Weights that are quantized already, against what others make of the same tensors."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ggpy
from converters import convert
from converters.checkpoint import read_safetensors
from converters.quantized import dequantized
from ggpy.errors import ConversionError, Error, UnsupportedError
from tests.models.checkpoints import ids, random_model, transformers_logits

from .conftest import N_VOCAB, save_tokenizer
from .test_conversion import edit_config, edit_tensors, written_floats, written_tensors
from .test_families import llama_cpp_logprobs

N_EXPERT, N_EMBD, N_FF = 5, 256, 96


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A tiny checkpoint in the form of the official ones: experts in MXFP4, all else in bfloat16."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    config = transformers.GptOssConfig(
        vocab_size=N_VOCAB,
        hidden_size=N_EMBD,
        intermediate_size=N_FF,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        num_local_experts=N_EXPERT,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=2,
        pad_token_id=None,
    )
    random_model(transformers.GptOssForCausalLM, config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    for i in range(2):
        for matrix, n_rows, n_columns in (("gate_up_proj", 2 * N_FF, N_EMBD), ("down_proj", N_EMBD, N_FF)):
            name, n_blocks = f"model.layers.{i}.mlp.experts.{matrix}", n_columns // 32
            del tensors[name]
            shape = (N_EXPERT, n_rows, n_blocks)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
            tensors[f"{name}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8, generator=random)
    # The smallest and the largest scale, in a row that is multiplied by nothing but zeros.
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, 0, :2] = torch.tensor([0, 1], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def experts(folder):
    """Experts' matrices by GGUF's names, dequantized by transformers."""
    tensors, found = load_file(folder / "model.safetensors"), {}
    for i in range(2):
        stem = f"model.layers.{i}.mlp.experts"
        values = {
            part: convert_moe_packed_tensors(
                tensors[f"{stem}.{part}_blocks"], tensors[f"{stem}.{part}_scales"], dtype=torch.float32
            ).transpose(1, 2)
            for part in ("gate_up_proj", "down_proj")
        }
        found[f"blk.{i}.ffn_gate_exps.weight"] = values["gate_up_proj"][:, ::2].numpy()
        found[f"blk.{i}.ffn_up_exps.weight"] = values["gate_up_proj"][:, 1::2].numpy()
        found[f"blk.{i}.ffn_down_exps.weight"] = values["down_proj"].numpy()
    return found


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", "mxfp4_moe", "q4_0"])
def test_mxfp4_experts_keep_every_value(type_, gpt_oss, tmp_path):
    """In GGUF's own blocks, but for F32."""
    plan = convert(gpt_oss, tmp_path / "model.gguf", type_)
    tensors, written = written_tensors(tmp_path / "model.gguf"), written_floats(tmp_path / "model.gguf")
    for name, values in experts(gpt_oss).items():
        assert tensors[name].tensor_type.name == ("F32" if type_ == "f32" else "MXFP4")
        np.testing.assert_array_equal(written[name], values, err_msg=name)
    assert any("4 matrices of MXFP4" in note for note in plan.notes)


def test_mxfp4_experts_are_encoded_anew_only_if_that_is_smaller(gpt_oss, tmp_path):
    convert(gpt_oss, tmp_path / "model.gguf", "q3_k_s")
    tensors, written = written_tensors(tmp_path / "model.gguf"), written_floats(tmp_path / "model.gguf")
    for name, values in experts(gpt_oss).items():  # rows of down are too short for Q3_K; what llama.cpp has for them isn't
        assert tensors[name].tensor_type.name == ("MXFP4" if "down" in name else "Q3_K")
        assert np.abs(written[name] - values).std() <= (0 if "down" in name else 0.2 * values.std())


def test_official_gpt_oss_gives_transformers_logits(gpt_oss, tmp_path):
    """As transformers dequantizes and runs it."""
    model = AutoModelForCausalLM.from_pretrained(
        gpt_oss, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
    ).float()
    tokens = ids(40)
    expected = transformers_logits(model, tokens)
    convert(gpt_oss, tmp_path / "model.gguf", "f32")
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32", n_threads=2) as ours:
        assert np.abs(ours.logits(tokens) - expected).max() <= 2e-3
    assert np.ptp(expected) > 1


def test_mxfp4_without_its_scale_is_refused(gpt_oss, tmp_path):
    folder = shutil.copytree(gpt_oss, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][1, 2, 0] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="down_proj_scales: a scale is NaN"):
        convert(folder, tmp_path / "model.gguf", "q8_0")


FILES = sorted((Path(__file__).parent / "quantized").glob("*.safetensors"))


def golden(path):
    """A module that another package has quantized (make_quantized.py): tensors, settings, the weights it makes of them."""
    tensors = read_safetensors(path)
    expected = tensors.pop("expected")
    with safe_open(path, "np") as file:
        settings = json.loads(file.metadata()["settings"])
    return tensors, settings, expected.read(0, expected.shape[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_quantized_weights_are_what_their_own_package_makes_of_them(path):
    tensors, settings, expected = golden(path)
    result, found = dequantized(tensors, settings, path)
    assert sum(found.values()) == 1
    assert result.keys() == {"m.weight"}
    rows = result["m.weight"]
    assert rows.shape == expected.shape
    # Others multiply in bfloat16 or divide by 127 in another order; single products don't differ by more.
    tolerance = {"ct-nvfp4": 2**-8, "bnb-int8": 2**-22}.get(path.stem, 2**-23) * np.abs(expected).max()
    np.testing.assert_allclose(rows.read(0, rows.shape[0]), expected, rtol=0, atol=tolerance)
    for start, stop in ((0, 1), (3, 17), (13, rows.shape[0])):
        np.testing.assert_array_equal(rows.read(start, stop), rows.read(0, rows.shape[0])[start:stop])


@pytest.mark.parametrize("name", ["ct-int-8", "ct-float-8", "ct-nvfp4"])
def test_scales_of_activations_and_caches_are_left_aside(name):
    path = FILES[0].with_name(f"{name}.safetensors")
    tensors, settings, expected = golden(path)
    scale = next(rows for rows in tensors.values() if rows.dtype == "F32")
    also = {f"m.{part}": scale for part in ("input_scale", "output_scale")} | {"attn.k_scale": scale, "m.v_scale": scale}
    result, _ = dequantized(also | tensors, settings, path)
    assert result.keys() == {"m.weight"}
    assert result["m.weight"].shape == expected.shape


def test_zero_points_of_gptq_are_one_less_unless_it_is_version_2(tmp_path):
    """The first version stores words of zero points less 0x11111111: a zero point of 0 borrows from the next one."""
    tensors, settings, _ = golden(FILES[0].with_name("gptq-4.safetensors"))
    path = FILES[0].with_name("gptq-4.safetensors")
    words = tensors["m.qzeros"].raw(0, 3).astype(np.int64)
    words[0, 0], words[1, 1] = 0x80, 0x12345670
    results = []
    for version, stored in (("gptq", words - 0x11111111), ("gptq_v2", words)):
        values = load_file(path)
        values["m.qzeros"] = torch.from_numpy((stored & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
        save_file(values, tmp_path / version)
        parts = {name: rows for name, rows in read_safetensors(tmp_path / version).items() if name != "expected"}
        rows = dequantized(parts, settings | {"checkpoint_format": version}, path)[0]["m.weight"]
        results.append(rows.read(0, 32))
    np.testing.assert_array_equal(*results)
    # The second row's zero point in the first group is 8 and the first's 0.
    scales = tensors["m.scales"].read(0, 1)[0]
    quants = np.arange(16)
    assert np.isin(np.round(results[0][0, :32] / scales[0]), quants).all()
    assert np.isin(np.round(results[0][1, :32] / scales[1]), quants - 8).all()
    assert results[0][1, :32].min() < 0


REFUSED = {
    "bits that the words don't have": ("gptq-4", {"bits": 8}, "isn't of 8 bits"),
    "GPTQ's other forms": ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; known: gptq, gptq_v2"),
    "AWQ's other forms": ("awq", {"version": "gemv"}, "AWQ in the form 'gemv'; known: gemm"),
    "AWQ without zero points": ("awq", {"zero_point": False}, "zero_point false"),
    "bits that nobody says": ("ct-packed-4", {"config_groups": {}}, "doesn't say how many bits"),
    "groups that don't fit": ("awq", {"group_size": 16}, "96 columns don't fall into 3 groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_settings_and_tensors_say_differently_is_refused(case):
    name, changes, message = REFUSED[case]
    path = FILES[0].with_name(f"{name}.safetensors")
    tensors, settings, _ = golden(path)
    with pytest.raises(Error, match=message):
        dequantized(tensors, settings | changes, path)


@pytest.mark.parametrize(
    "missing", ["ct-packed-4: m.weight_shape", "awq: m.scales", "bnb-nf4-twice: m.weight.nested_absmax"]
)
def test_missing_parts_are_named(missing):
    name, part = missing.split(": ")
    path = FILES[0].with_name(f"{name}.safetensors")
    tensors, settings, _ = golden(path)
    del tensors[part]
    with pytest.raises(ConversionError, match=f"no tensor {part}"):
        dequantized(tensors, settings, path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parts_of_any_shape_are_read_or_refused(path):
    tensors, settings, _ = golden(path)
    for name, rows in tensors.items():
        n = math.prod(rows.shape)
        shapes = {(), (0,), (1,), (n,), (n, 1), (1, n), rows.shape[::-1], (0, *rows.shape[1:]), (1, *rows.shape)}
        for shape in shapes - {rows.shape}:
            try:
                result, _ = dequantized(tensors | {name: replace(rows, shape=shape)}, settings, path)
            except Error:
                continue
            for found in result.values():
                if "m.weight" in found.sources or len(found.sources) > 1:
                    n_rows = math.prod(found.shape[:-1])
                    assert found.read(0, n_rows).shape == (n_rows, found.shape[-1])


def test_a_checkpoint_of_8_bit_integers_is_written_with_its_scales(damaged_folder, tmp_path):
    def quantize(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            scale = np.abs(tensors[name]).max(axis=1, keepdims=True) / np.float32(127)
            tensors[name] = np.round(tensors[name] / scale).astype(np.int8)
            tensors[f"{name}_scale"] = scale
            expected[name] = tensors[name] * scale

    expected = {}
    edit_tensors(damaged_folder, quantize)
    edit_config(damaged_folder, quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"})
    plan = convert(damaged_folder, tmp_path / "model.gguf", "f32")
    written = written_floats(tmp_path / "model.gguf")
    np.testing.assert_array_equal(written["blk.1.ffn_down.weight"], expected["model.layers.1.mlp.down_proj.weight"])
    assert any("14 matrices of 8-bit integers): they are dequantized and encoded as F32" in note for note in plan.notes)


def test_a_method_without_code_is_refused(damaged_folder):
    def quantize(tensors):
        tensors["model.layers.0.mlp.down_proj.W_q"] = tensors.pop("model.layers.0.mlp.down_proj.weight").astype(np.uint8)

    edit_tensors(damaged_folder, quantize)
    edit_config(damaged_folder, quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedError, match=r"down_proj.W_q is U8: the weights are quantized already \(hqq\)"):
        convert(damaged_folder, damaged_folder / "model.gguf", "f16")


def test_llama_cpp_runs_the_kept_blocks_alike(gpt_oss, tmp_path):
    tokens, path = ids(40), tmp_path / "model.gguf"
    convert(gpt_oss, path, "bf16")
    theirs = llama_cpp_logprobs(path, gpt_oss, [tokens[:5], tokens[:14]], n_ctx=256)
    with ggpy.load(path, kv_type="f32", n_threads=2) as ours:
        logits = torch.tensor(ours.logits(tokens)[[4, 13]])
    difference = torch.log_softmax(logits, -1).numpy() - theirs
    assert (np.exp(theirs) * -difference).sum(-1).max() <= 5e-3
    assert theirs.std() > 0.5
