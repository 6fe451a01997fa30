"""Weights that are quantized already, against what others make of the same tensors."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import ggpy
from converters import convert
from ggpy.errors import ConversionError
from tests.models.checkpoints import ids, random_model, transformers_logits

from .conftest import N_VOCAB, save_tokenizer
from .test_conversion import edit_config, written_floats, written_tensors

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
