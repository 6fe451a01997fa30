"""Qwen 2 and 3, and their models with experts. Checkpoint and GGUF rotate the same dimensions: i with i + head_dim / 2."""

from __future__ import annotations

from typing import Any

import gguf

from .checkpoint import Config
from .experts import expert_shapes, gather_experts, write_expert_hparams
from .family import (
    Family,
    Shapes,
    as_they_are,
    attention_shapes,
    biases,
    ffn_shapes,
    head_dim,
    model_shapes,
    write_decoder_hparams,
)
from .ranking import as_reranker


def qwen2_attention(config: Config) -> Shapes:
    block = attention_shapes(config)
    return block | biases(block, "attn_q", "attn_k", "attn_v") if config.get("qkv_bias", True) else block


def qwen3_attention(config: Config) -> Shapes:
    n = head_dim(config)
    return attention_shapes(config) | {"attn_q_norm.weight": (n,), "attn_k_norm.weight": (n,)}


def dense_ffn(config: Config) -> Shapes:
    return ffn_shapes(config.integer("hidden_size"), config.integer("intermediate_size"))


def qwen2_shapes(config: Config) -> Shapes:
    block = qwen2_attention(config) | dense_ffn(config)
    return model_shapes(config, lambda i: block)


def qwen3_shapes(config: Config) -> Shapes:
    block = qwen3_attention(config) | dense_ffn(config)
    return model_shapes(config, lambda i: block)


def qwen2moe_shapes(config: Config) -> Shapes:
    n_embd = config.integer("hidden_size")
    block = qwen2_attention(config) | expert_shapes(config, config.integer("moe_intermediate_size"))
    block |= {"ffn_gate_inp_shexp.weight": (1, n_embd)}
    block |= ffn_shapes(n_embd, config.integer("shared_expert_intermediate_size"), "_shexp")
    return model_shapes(config, lambda i: block)


def qwen3moe_shapes(config: Config) -> Shapes:
    block = qwen3_attention(config) | expert_shapes(config, config.integer("moe_intermediate_size"))
    return model_shapes(config, lambda i: block)


def write_moe_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("decoder_sparse_step", 1)
    config.only("mlp_only_layers", [])
    write_decoder_hparams(writer, config)
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))


def write_qwen2moe_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("norm_topk_prob", False)
    write_moe_hparams(writer, config)
    writer.add_expert_shared_feed_forward_length(config.integer("shared_expert_intermediate_size"))


def write_qwen3moe_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("norm_topk_prob", True)
    write_moe_hparams(writer, config)


# What config.json leaves out, by transformers' classes.
QWEN2 = {"num_key_value_heads": 32, "use_sliding_window": False, "max_window_layers": 28}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN2 | {"head_dim": 128},
    "Qwen2MoeForCausalLM": QWEN2 | {"num_key_value_heads": 16},
    "Qwen3MoeForCausalLM": QWEN2 | {"num_key_value_heads": 4, "norm_topk_prob": False},
}

FAMILIES = tuple(
    Family((checkpoint,), arch, write, shapes, gather, special=as_reranker, defaults=DEFAULTS)
    for checkpoint, arch, write, shapes, gather in (
        ("Qwen2ForCausalLM", gguf.MODEL_ARCH.QWEN2, write_decoder_hparams, qwen2_shapes, as_they_are),
        ("Qwen3ForCausalLM", gguf.MODEL_ARCH.QWEN3, write_decoder_hparams, qwen3_shapes, as_they_are),
        ("Qwen2MoeForCausalLM", gguf.MODEL_ARCH.QWEN2MOE, write_qwen2moe_hparams, qwen2moe_shapes, gather_experts),
        ("Qwen3MoeForCausalLM", gguf.MODEL_ARCH.QWEN3MOE, write_qwen3moe_hparams, qwen3moe_shapes, gather_experts),
    )
)
