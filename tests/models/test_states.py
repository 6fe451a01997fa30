"""Models with states, against transformers, whatever way tokens come."""

import json

import gguf
import numpy as np
import pytest
import transformers

import ggpy
from converters import convert
from tests.converters.conftest import SIZES
from tests.converters.test_families import llama_cpp_logprobs

from .checkpoints import N_TOKENS, converted, ids, random_model, transformers_logits

COMMON = {**SIZES, "num_hidden_layers": 4, "max_position_embeddings": 1024}
LFM2 = {**COMMON, "layer_types": ["conv", "conv", "full_attention", "conv"]}
RULE = {
    **COMMON,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 64}
SCAN = {
    **COMMON,
    "layer_types": ["mamba", "mamba", "attention", "mamba"],
    "shared_intermediate_size": 96,
    "num_local_experts": 0,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
SINGLE = {
    **{k: v for k, v in COMMON.items() if k != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
    "head_dim": 32,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "time_step_min": 1e-12,  # which transformers alone takes as a limit of steps
}
MIXED = {
    **SINGLE,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
    "mamba_head_dim": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 28,
    "moe_shared_expert_intermediate_size": 44,
    "routed_scaling_factor": 1.5,
    "tie_word_embeddings": True,
}
LATENT = {**MIXED, "layers_block_type": ["moe", "linear_attention", "full_attention", "moe"], "moe_latent_size": 36}
PARALLEL = {
    **COMMON,
    "head_dim": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 60,
    "mamba_n_heads": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_norm_before_gate": False,
    "lm_head_multiplier": 0.6,
    "embedding_multiplier": 3.0,
    "mlp_multipliers": [0.7, 1.4],
    "key_multiplier": 1.2,
    "attention_out_multiplier": 0.9,
    "attention_in_multiplier": 1.3,
    "ssm_multipliers": [0.9, 1.2, 0.7, 1.3, 0.6],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.8,
}
ALONE = {
    "vocab_size": COMMON["vocab_size"],
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_heads": 6,
    "head_dim": 20,
    "state_size": 12,
    "n_groups": 2,
    **{key: COMMON[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in COMMON},
}
MODELS = {
    "mamba2": ("Mamba2", ALONE),
    "mamba2, limited": ("Mamba2", {**ALONE, "time_step_limit": [0.5, float("inf")]}),
    "mamba2, tied": ("Mamba2", {**ALONE, "tie_word_embeddings": True, "use_conv_bias": False, "n_groups": 1}),
    "falcon-h1": ("FalconH1", {**PARALLEL, "mamba_rms_norm": True}),
    "falcon-h1, tied": ("FalconH1", {**PARALLEL, "tie_word_embeddings": True}),
    "lfm2": ("Lfm2", {**LFM2, "block_multiple_of": 32}),
    "lfm2moe": ("Lfm2Moe", {**LFM2, **EXPERTS, "num_dense_layers": 1}),
    "qwen35": ("Qwen3_5Text", RULE),
    "qwen35, as many keys as values": ("Qwen3_5Text", {**RULE, "linear_num_key_heads": 6, "tie_word_embeddings": True}),
    "qwen35moe": ("Qwen3_5MoeText", {**RULE, **SHARED}),
    "nemotron_h": ("NemotronH", SINGLE),
    "nemotron_h_moe": ("NemotronH", {**MIXED, "n_group": 1, "num_attention_heads": 6}),
    "nemotron_h_moe, groups, latent": ("NemotronH", LATENT),
    "granitehybrid": ("GraniteMoeHybrid", SCAN),
    "granitehybrid, rotated, groups": (
        "GraniteMoeHybrid",
        {**SCAN, "position_embedding_type": "rope", "mamba_n_groups": 2},
    ),
    "granitehybrid, experts": ("GraniteMoeHybrid", {**SCAN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite without scans, not rotated": ("GraniteMoeHybrid", {**SCAN, "layer_types": ["attention"] * 4}),
    "granite without scans, experts": (
        "GraniteMoeHybrid",
        {
            **SCAN,
            "layer_types": ["attention"] * 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "position_embedding_type": "rope",
        },
    ),
    "qwen3next": ("Qwen3Next", {**RULE, **SHARED}),
}


def made(name, **changes):
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = random_model(getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM"), config)
    for key, buffer in model.named_buffers():
        if key.endswith(("expert_bias", "e_score_correction_bias")):
            buffer.normal_(0, 0.1)
    return model


def converted_logits(path, tokens):
    with ggpy.load(path, n_ctx=N_TOKENS, kv_type="f32", n_threads=2) as ours:
        return ours.logits(tokens)


#: keys that released checkpoints have beyond those of a forward pass
RELEASED = {
    "nemotron_h_moe": {
        "time_step_min": 0.001,
        "attention_head_dim": 32,
        "norm_eps": 1e-5,
        "rope_theta": 10000,
        "use_mamba_kernels": True,
    },
    "falcon-h1": {"attn_layer_indices": None, "mamba_use_mlp": True, "rope_scaling": None, "num_logits_to_keep": 1},
    "granite without scans, not rotated": {"init_method": "mup", "normalization_function": "rmsnorm"},
    "mamba2": {
        "intermediate_size": 120,
        "norm_before_gate": True,
        "rms_norm": True,
        "time_step_scale": 1.0,
        "time_step_init_scheme": "random",
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_keys_that_released_checkpoints_have_are_taken(tmp_path, name):
    converted(tmp_path, made(name))
    path = tmp_path / "checkpoint" / "config.json"
    before = convert(path.parent, tmp_path / "model.gguf", "f32", dry_run=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | RELEASED[name]))
    assert convert(path.parent, tmp_path / "model.gguf", "f32", dry_run=True) == before


def test_the_text_part_of_a_model_that_sees(tmp_path):
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=RULE, vision_config=vision)
    model = random_model(transformers.Qwen3_5ForConditionalGeneration, config)
    tokens = ids(40)
    path = converted(tmp_path, model)
    assert np.abs(converted_logits(path, tokens) - transformers_logits(model, tokens)).max() <= 2e-3


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path, name):
    model, tokens = made(name), ids()
    expected = transformers_logits(model, tokens)
    with ggpy.load(converted(tmp_path, model), n_ctx=N_TOKENS, kv_type="f32", n_threads=2) as ours:
        at_once = ours.logits(tokens)
        assert np.abs(at_once - expected).max() <= 2e-3
        with ours.new_sequence() as sequence:
            np.testing.assert_array_equal(np.stack([sequence.extend([t]) for t in tokens]), at_once)
    assert np.ptp(expected) > 1


@pytest.mark.parametrize("name", ["mamba2", "falcon-h1", "nemotron_h_moe"])
def test_several_sequences_at_once_give_the_same_as_alone(tmp_path, name):
    prompts = [ids(50), ids(7), ids(33, seed=1)]
    with ggpy.load(converted(tmp_path, made(name)), n_ctx=N_TOKENS, kv_type="f32", n_threads=2) as ours:
        alone = [ours.generate(prompt, max_tokens=5, temperature=0).run().ids for prompt in prompts]
        together = ours.generate_batch(prompts, max_tokens=5, temperature=0)
        assert sorted(result.ids for result in together) == sorted(alone)


#: what llama.cpp can't run: limits of steps, convolutions without biases, layers with and without experts
NOT_IN_LLAMA_CPP = ("mamba2, limited", "mamba2, tied", "nemotron_h_moe")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_IN_LLAMA_CPP])
def test_the_same_file_gives_the_same_in_llama_cpp(tmp_path, name):
    path, tokens = converted(tmp_path, made(name)), ids(60)
    lengths = [5, 33, 60]
    theirs = llama_cpp_logprobs(path, tmp_path / "checkpoint", [tokens[:n] for n in lengths], n_ctx=128)
    logits = converted_logits(path, tokens)[[n - 1 for n in lengths]].astype(np.float64)
    ours = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).max() <= 1e-3


def rewritten(path, out, changes, extra):
    """A file with other metadata and more tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", *changes):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for key, value in changes.items():
        writer.add_uint32(key, value)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data)
    for name, data in extra(reader).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_layers_that_predict_further_tokens_are_left_aside(tmp_path):
    path, tokens = converted(tmp_path, made("qwen35")), ids(20)

    def extra(reader):
        like = {t.name.replace("blk.3.", "blk.4."): t.data for t in reader.tensors if t.name.startswith("blk.3.")}
        return like | {"blk.4.nextn.eh_proj.weight": np.ones((64, 128), np.float32)}

    changes = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    other = rewritten(path, tmp_path / "mtp.gguf", changes, extra)
    np.testing.assert_array_equal(converted_logits(other, tokens), converted_logits(path, tokens))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("block_count", 2**31 - 1, "2147483647 layers of 56 tensors"),
        ("ssm.time_step_rank", 5, "can't be shared by 5 heads"),
        ("ssm.group_count", 4, "these can't share 4 keys"),
        ("ssm.conv_kernel", 3, r"blk\.0\.ssm_conv1d\.weight has shape"),
        ("ssm.state_size", 2**31 - 1, r"blk\.0\.attn_qkv\.weight has shape"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(tmp_path, key, value, message):
    path = converted(tmp_path, made("qwen35"))
    with pytest.raises(ggpy.GGUFError, match=message):
        ggpy.load(rewritten(path, tmp_path / "changed.gguf", {f"qwen35.{key}": value}, lambda reader: {}))


@pytest.mark.parametrize("kinds", [["full_attention"] * 4, ["linear_attention", "full_attention", "linear_attention"] * 2])
def test_layers_in_another_order_than_files_can_say(tmp_path, kinds):
    model = made("qwen35", layer_types=kinds, num_hidden_layers=len(kinds))
    if "linear_attention" not in kinds:
        assert (
            np.abs(converted_logits(converted(tmp_path, model), ids(9)) - transformers_logits(model, ids(9))).max() < 2e-3
        )
    else:
        with pytest.raises(ggpy.UnsupportedError, match="layer_types"):
            converted(tmp_path, model)
