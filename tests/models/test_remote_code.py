"""Mixtures whose code isn't in transformers, put together from parts of it; DeepSeek-V3.2 as far as it goes."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

import ggpy
from converters import convert
from tests.converters.conftest import save_tokenizer
from tests.converters.test_families import llama_cpp_logprobs

from .checkpoints import converted, random_model, transformers_logits
from .test_architectures import GLM, N_CTX, N_TOKENS, N_VOCAB, SIZES, tokens_of


def ling():
    """Ling 2 is GLM 4.5 under other names: the model, its configuration, its tensors."""
    sizes = {**SIZES, **GLM, "head_dim": 10, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5}
    rope = {"rope_type": "default", "rope_theta": 600000.0, "partial_rotary_factor": 0.4}
    config = transformers.Glm4MoeConfig(**sizes, use_qk_norm=True, rope_parameters=rope, first_k_dense_replace=1)
    model = random_model(transformers.Glm4MoeForCausalLM, config)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)
    kept = ("max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "vocab_size", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    kept += ("routed_scaling_factor", "head_dim", "rms_norm_eps", "bos_token_id", "eos_token_id")
    values = {key: getattr(config, key) for key in kept} | {"architectures": ["BailingMoeV2ForCausalLM"]}
    values |= {"num_experts": 6, "num_shared_experts": 1, "rope_theta": 600000.0, "partial_rotary_factor": 0.4}
    values |= {"first_k_dense_replace": 1, "use_qk_norm": True, "score_function": "sigmoid", "norm_topk_prob": True}
    values |= {"moe_router_enable_expert_bias": True, "tie_word_embeddings": False, "use_rmsnorm": True}

    def renamed(tensors):
        parts = ("model.embed_tokens", "model.word_embeddings"), ("e_score_correction_bias", "expert_bias")
        parts += (".self_attn.o_proj", ".attention.dense"), (".self_attn.q_norm", ".attention.query_layernorm")
        parts += ((".self_attn.k_norm", ".attention.key_layernorm"),)
        out = {}
        for name, x in tensors.items():
            for old, new in parts:
                name = name.replace(old, new)
            if name.endswith("self_attn.q_proj.weight"):
                qkv = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                out[name.replace("self_attn.q_proj", "attention.query_key_value")] = np.concatenate(qkv)
            elif "self_attn" not in name:
                out[name] = x
        return out

    return model, values, renamed


def deepseek():
    """DeepSeek's first mixture is Llama with the feed-forward parts of DeepSeek V2."""
    sizes = {**SIZES, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    parts = {**GLM, "n_shared_experts": 2, "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    config = transformers.DeepseekV2Config(**{**sizes, **parts, "num_key_value_heads": 6, "n_group": 1, "topk_group": 1})
    config._experts_implementation = "eager"
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5)
    values = {**model.config.to_dict(), **parts, "architectures": ["DeepseekForCausalLM"], "first_k_dense_replace": 1}
    del values["topk_method"], values["mlp_bias"], values["head_dim"]
    return model, values | {"moe_layer_freq": 1, "scoring_func": "softmax"}, dict


@pytest.mark.parametrize("make", [ling, deepseek])
def test_logits_equal_transformers_and_llama_cpp(tmp_path, make):
    model, values, renamed = make()
    checkpoint, path, tokens = tmp_path / "checkpoint", tmp_path / "model.gguf", tokens_of(N_TOKENS, 0)
    model.save_pretrained(checkpoint)
    save_file(renamed(load_file(checkpoint / "model.safetensors")), checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(values))
    save_tokenizer(checkpoint)
    convert(checkpoint, path, "f32")
    expected = transformers_logits(model, tokens)
    assert np.ptp(expected) > 1
    with ggpy.load(path, n_ctx=N_CTX, kv_type="f32", n_threads=2) as ours:
        at_once = ours.logits(tokens)
        assert np.abs(at_once - expected).max() <= 2e-3
        with ours.new_sequence() as sequence:
            for token, row in zip(tokens, at_once, strict=True):
                np.testing.assert_array_equal(sequence.extend([token]), row)
    theirs = llama_cpp_logprobs(path, checkpoint, [tokens[:5], tokens], 256, N_VOCAB)
    truth = torch.log_softmax(torch.tensor(expected[[4, N_TOKENS - 1]]), -1).numpy()
    assert (np.exp(truth) * (truth - theirs)).sum(-1).max() <= 1e-3


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A DeepSeek-V3.2 that chooses 64 tokens: its file, and transformers' logits for 100."""
    folder = tmp_path_factory.mktemp("v32")
    latent = {"num_key_value_heads": 6, "kv_lora_rank": 48, "q_lora_rank": 44, "qk_nope_head_dim": 20}
    latent |= {"qk_rope_head_dim": 16, "v_head_dim": 28, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2}
    index = {"index_topk": 64, "index_n_heads": 2, "index_head_dim": 64}
    config = transformers.DeepseekV32Config(**{**SIZES, **GLM, **latent, **index})
    config._attn_implementation = "eager"
    model = random_model(transformers.DeepseekV32ForCausalLM, config)
    return converted(folder, model), transformers_logits(model, tokens_of(100, 0))


def test_an_indexer_chooses_all_tokens_of_a_short_context(indexed):
    path, expected = indexed
    with ggpy.load(path, n_ctx=64, kv_type="f32", n_threads=2) as model:
        assert np.abs(model.logits(tokens_of(100, 0)[:64]) - expected[:64]).max() <= 2e-3
    # llama.cpp asks the indexer.
    prompts = [tokens_of(100, 0)[:n] for n in (5, 64)]
    theirs = llama_cpp_logprobs(path, path.parent / "checkpoint", prompts, 256, N_VOCAB)
    truth = torch.log_softmax(torch.tensor(expected[[4, 63]]), -1).numpy()
    assert (np.exp(truth) * (truth - theirs)).sum(-1).max() <= 1e-3


def test_a_context_that_an_indexer_would_choose_from_is_refused(indexed):
    path, _ = indexed
    for n_ctx in (65, None):
        with pytest.raises(ggpy.UnsupportedError, match=r"beyond 64 tokens .* n_ctx=64 is the most"):
            ggpy.load(path, n_ctx=n_ctx)
