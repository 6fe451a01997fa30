"""Mixtures of experts against transformers, prompt at once and token by token."""

import numpy as np
import pytest
import transformers

import ggpy
from ggpy.graph import Pages, Reference
from ggpy.models import run_inputs
from tests.graph.runs import of_ids

from .checkpoints import N_TOKENS, converted, ids, random_model, transformers_logits

COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MODELS = {
    "V2-Lite": ("DeepseekV2", LATENT),
    "V2-Lite, yarn": ("DeepseekV2", {**LATENT, "rope_parameters": YARN, "max_position_embeddings": 2560}),
    "V2": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": 48 + 16,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "V3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 64,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "mixtral": ("Mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2moe": ("Qwen2Moe", {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}),
    "qwen3moe": ("Qwen3Moe", {**COMMON, **EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {**COMMON, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "qwen2": ("Qwen2", COMMON),
    "qwen3": ("Qwen3", {**COMMON, "head_dim": 32}),
}


def made(name, **changes):
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = random_model(getattr(transformers, f"{kind}ForCausalLM"), config)
    for key, buffer in model.named_buffers():
        if "e_score_correction_bias" in key:
            buffer.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path, name):
    model, tokens = made(name), ids()
    expected = transformers_logits(model, tokens)
    with ggpy.load(converted(tmp_path, model), n_ctx=N_TOKENS, kv_type="f32", n_threads=2) as ours:
        assert np.abs(ours.logits(tokens) - expected).max() <= 2e-3
        with ours.new_sequence() as sequence:
            one_by_one = np.stack([sequence.extend([t]) for t in tokens])
    assert np.abs(one_by_one - expected).max() <= 2e-3
    assert np.ptp(expected) > 1


def test_reference_executor_equals_kernels(tmp_path):
    tokens = ids(30)
    with ggpy.load(converted(tmp_path, made("V3")), n_ctx=64, n_threads=2) as model:
        batch = of_ids(tokens)
        reference = Reference(model.graph(30), Pages(1)).run(run_inputs(model.architecture, batch), batch)["logits"]
        np.testing.assert_allclose(model.logits(tokens), reference, atol=1e-3)


def test_yarn_far_into_the_context_equals_transformers(tmp_path):
    """Engines that got DeepSeek's YaRN wrong drift with the position."""
    model, tokens = made("V2-Lite, yarn"), ids(1500)
    expected = transformers_logits(model, tokens)
    with ggpy.load(converted(tmp_path, model), n_ctx=1536, kv_type="f32") as ours:
        got = ours.logits(tokens)
    assert np.abs(got - expected)[:200].max() <= 2e-3
    assert np.abs(got - expected)[-200:].max() <= 5e-3


def test_fewer_experts_can_be_used(tmp_path):
    path, tokens = converted(tmp_path, made("mixtral")), ids(20)
    expected = transformers_logits(made("mixtral", num_experts_per_tok=1), tokens)
    with ggpy.load(path, n_expert_used=1, kv_type="f32") as model:
        assert np.abs(model.logits(tokens) - expected).max() <= 2e-3
    with pytest.raises(ggpy.GGUFError, match="9 of 4 experts"):
        ggpy.load(path, n_expert_used=9)
