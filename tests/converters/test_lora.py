"""LoRA adapters merged at conversion, against PEFT."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from converters import convert
from converters.checkpoint import Config
from converters.lora import _of_pattern
from ggpy.errors import ConversionError, Error, UnsupportedError

from .conftest import save_llama, save_tokenizer
from .test_conversion import expected_tensors, written_floats

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: PEFT's settings
ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "all matrices": {"target_modules": LINEAR, "lora_alpha": 4, "r": 5},
    "the head too": {"target_modules": "all-linear"},
    "rank-stabilized": {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 3},
    "ranks and alphas of their own": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 2, r".*\.0\..*down_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 32, "up_proj": 1},
    },
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1]},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "an embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "fan_in_fan_out where it means nothing": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
}


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Heads wider than the embedding's share, so that no matrix is square."""
    return save_llama(tmp_path_factory.mktemp("base"), tie_word_embeddings=False, head_dim=24)


def adapted(base, folder, seed=0, **settings):
    """Saves a random adapter; the model in PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.requires_grad and "original_module" not in name:
                weights.add_(torch.randn_like(weights) * (0.1 * weights.std().nan_to_num(1).clamp(min=1)))
    model.save_pretrained(folder)
    return model


def assert_holds(path, folder, atol=2e-6):
    written, expected = written_floats(path), expected_tensors(folder)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(written[name], values, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weights_are_pefts(name, base, tmp_path):
    model = adapted(base, tmp_path / "adapter", **ADAPTERS[name])
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plan = convert(base, tmp_path / "model.gguf", "f32", lora=[tmp_path / "adapter"])
    assert_holds(tmp_path / "model.gguf", tmp_path / "merged")
    plain = expected_tensors(base)
    changed = [k for k, v in written_floats(tmp_path / "model.gguf").items() if np.abs(v - plain[k]).max() > 0.01]
    assert len(changed) >= 2
    assert any("merged, times 1" in note for note in plan.notes)


def test_several_adapters_are_added_with_their_scales(base, tmp_path):
    for i in range(2):
        adapted(base, tmp_path / str(i), seed=i, target_modules=LINEAR[i:])
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "0", "0"
    )
    model.load_adapter(tmp_path / "1", "1")
    model.add_weighted_adapter(["0", "1"], [1.0, -0.5], "sum", "cat")
    model.set_adapter("sum")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(base, tmp_path / "model.gguf", "f32", lora=[tmp_path / "0", f"{tmp_path / '1'}:-0.5"])
    assert_holds(tmp_path / "model.gguf", tmp_path / "merged", atol=2e-5)


def test_transposed_matrices_of_gpt2(tmp_path):
    config = transformers.GPT2Config(vocab_size=512, n_embd=48, n_layer=1, n_head=4, n_positions=64, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    model = adapted(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    state = model.merge_and_unload().state_dict()
    convert(tmp_path / "base", tmp_path / "model.gguf", "f32", lora=[tmp_path / "adapter"])
    written = written_floats(tmp_path / "model.gguf")
    for ours, theirs in (("attn_qkv", "attn.c_attn"), ("attn_output", "attn.c_proj"), ("ffn_down", "mlp.c_proj")):
        values = state[f"transformer.h.0.{theirs}.weight"].T
        np.testing.assert_allclose(written[f"blk.0.{ours}.weight"], values, rtol=0, atol=2e-6)


def test_pytorch_files_of_adapters_are_read(base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    convert(base, tmp_path / "a.gguf", "f32", lora=[tmp_path / "adapter"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter/adapter_model.bin")
    path.unlink()
    convert(base, tmp_path / "b.gguf", "f32", lora=[tmp_path / "adapter"])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


REFUSED = {
    "another kind": ({"peft_type": "LOHA"}, "peft_type 'LOHA'; known: 'LORA'"),
    "changed weights": ({"init_lora_weights": "pissa"}, "changes the model's own weights"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "another rank": ({"r": 4}, "has rank 8, adapter_config.json says 4"),
    "no magnitudes": ({"use_dora": True}, "use_dora and the tensors don't agree"),
    "a pattern that takes for ever": ({"alpha_pattern": {"(.*a)*(.*b)*c": 1}}, "is too complex"),
    "no alpha": ({"lora_alpha": 0}, "lora_alpha must be a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_says_and_we_dont_understand_is_refused(case, base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    change(tmp_path / "adapter", **REFUSED[case][0])
    with pytest.raises(Error, match=REFUSED[case][1]):
        convert(base, tmp_path / "model.gguf", "f32", dry_run=True, lora=[tmp_path / "adapter"])


def edited(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "only one of lora_A and lora_B"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(96)}), "lora_B.bias of type F32 isn't understood"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(8, 65)}), r"q_proj is \(96, 65\), the model's \(96, 64\)"),
        (lambda t: t.update({"base_model.model.score.weight": torch.zeros(8)}), "has no tensor score.weight"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_adapters_that_dont_fit_are_refused(edit, message, base, tmp_path):
    adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    edited(tmp_path / "adapter", edit)
    with pytest.raises(Error, match=message):
        convert(base, tmp_path / "model.gguf", "f32", dry_run=True, lora=[tmp_path / "adapter"])


def test_an_adapted_embedding_that_logits_share_is_refused(llama_folder, tmp_path):
    adapted(llama_folder, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedError, match="logits are made of the same matrix"):
        convert(llama_folder, tmp_path / "model.gguf", "f32", dry_run=True, lora=[tmp_path / "adapter"])


def test_a_folder_without_adapter_is_refused(base, tmp_path):
    with pytest.raises(ConversionError, match="not an adapter's folder"):
        convert(base, tmp_path / "model.gguf", "f32", lora=[base])


def test_patterns_match_as_in_peft():
    for patterns in ({"q_proj": 2.0}, {"layers.1.q_proj": 3.0, "q_proj": 4.0}, {"proj": 5.0}, {r"layers\.0": 6.0}):
        for module in ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.aq_proj"):
            theirs = patterns.get(get_pattern_key(patterns, module), 1.0)
            config = Config({"patterns": patterns, "key": 1.0}, None)
            assert _of_pattern(config, "patterns", "key", 1.0, module) == theirs
