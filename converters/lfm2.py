"""LFM2, and its models with experts: short convolutions in most layers. Their rope is as in `converters.qwen`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
from gguf import ExpertGatingFuncType

from .checkpoint import Config, PickedRows, Rows
from .experts import expert_shapes, gather_experts, write_expert_hparams
from .family import Family, Shapes, attention_shapes, ffn_shapes, head_dim, model_shapes, write_decoder_hparams

# What training began with.
IGNORED = ("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")


def convolutions(config: Config) -> list[bool]:
    """Which layers are convolutions."""
    n_layer = config.integer("num_hidden_layers")
    is_all, attention = config.get("full_attn_idxs") is None, config.several("full_attn_idxs")
    default = ["full_attention" if is_all or i in attention else "conv" for i in range(n_layer)]
    return [kind == "conv" for kind in config.words("layer_types", ("conv", "full_attention"), n_layer, default)]


def feed_forward_length(config: Config) -> int:
    """Values inside a feed-forward part: as transformers' Lfm2MLP works them out."""
    n = config.integer("block_ff_dim", config.get("intermediate_size"))
    if not config.get("block_auto_adjust_ff_dim"):
        return n
    n, multiple = int(2 * n / 3), config.integer("block_multiple_of")
    if config.get("block_ffn_dim_multiplier") is not None:
        n = int(config.number("block_ffn_dim_multiplier") * n)
    return -(-n // multiple) * multiple


def usual(config: Config) -> dict[str, Any]:
    """Names settings as other families do; those of the first checkpoints say the same more than once."""
    for key in IGNORED:
        config.get(key)
    for key in ("block_dim", "conv_dim", "conv_dim_out"):
        config.only(key, config.get("hidden_size"))
    config.only("num_heads", config.get("num_attention_heads"))
    config.only("block_norm_eps", config.get("norm_eps"))
    config.only("block_use_swiglu", True)
    config.only("use_pos_enc", True)
    return {
        "intermediate_size": feed_forward_length(config),
        "rms_norm_eps": config.number("norm_eps", least=0),
        "rope_theta": config.get("rope_theta", config.get("theta", 1000000.0)),
        "tie_word_embeddings": config.get("tie_embedding", config.get("tie_word_embeddings")),
    }


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("conv_bias", False)
    n_kv = config.integer("num_key_value_heads")
    heads = [0 if is_convolution else n_kv for is_convolution in convolutions(config)]
    write_decoder_hparams(writer, config.replaced(layer_types=None), n_head_kv=heads)
    writer.add_shortconv_l_cache(config.integer("conv_L_cache", least=2))


def write_moe_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("norm_topk_prob", True)
    config.only("routed_scaling_factor", 1.0)
    write_hparams(writer, config)
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    writer.add_leading_dense_block_count(config.integer("num_dense_layers", least=0))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _mixers(config: Config) -> list[Shapes]:
    """What each layer has beside its feed-forward part."""
    n_embd, n = config.integer("hidden_size"), head_dim(config)
    attention = attention_shapes(config) | {"attn_q_norm.weight": (n,), "attn_k_norm.weight": (n,)}
    convolution: Shapes = {
        "attn_norm.weight": (n_embd,),
        "shortconv.conv.weight": (n_embd, config.integer("conv_L_cache", least=2)),
        "shortconv.in_proj.weight": (3 * n_embd, n_embd),
        "shortconv.out_proj.weight": (n_embd, n_embd),
        "ffn_norm.weight": (n_embd,),
    }
    return [convolution if is_convolution else attention for is_convolution in convolutions(config)]


def _model_shapes(config: Config, feed_forward: Callable[[int], Shapes]) -> Shapes:
    mixers = _mixers(config)
    shapes = model_shapes(config, lambda i: mixers[i] | feed_forward(i))
    return {name.replace("output_norm", "token_embd_norm"): shape for name, shape in shapes.items()}


def _dense(config: Config) -> Shapes:
    return ffn_shapes(config.integer("hidden_size"), config.integer("intermediate_size"))


def shapes(config: Config) -> Shapes:
    return _model_shapes(config, lambda i: _dense(config))


def moe_shapes(config: Config) -> Shapes:
    experts = expert_shapes(config, config.integer("moe_intermediate_size"))
    if config.get("use_expert_bias"):
        experts["exp_probs_b.bias"] = experts["ffn_gate_inp.weight"][:1]
    n_dense = config.integer("num_dense_layers", least=0)
    return _model_shapes(config, lambda i: _dense(config) if i < n_dense else experts)


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Stack the experts, and leave out the convolutions' middle dimension, which is 1."""
    gathered: dict[str, Rows] = {}
    for name, rows in gather_experts(tensors, config).items():
        if name.endswith(".conv.conv.weight") and len(rows.shape) == 3 and rows.shape[1] == 1:
            rows = PickedRows(rows, np.arange(rows.shape[0]), (rows.shape[0], rows.shape[2]))
        gathered[name.replace(".expert_bias", ".expert_bias.bias")] = rows
    return gathered


DEFAULTS: dict[str, dict[str, Any]] = {
    "Lfm2ForCausalLM": {
        "num_key_value_heads": 8,
        "norm_eps": 1e-5,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "tie_word_embeddings": True,
    },
    "Lfm2MoeForCausalLM": {
        "num_key_value_heads": 8,
        "norm_eps": 1e-5,
        "conv_L_cache": 3,
        "num_dense_layers": 2,
        "use_expert_bias": True,
        "tie_word_embeddings": True,
    },
}

FAMILIES = tuple(
    Family((checkpoint,), arch, write, shapes, gather, usual=usual, defaults=DEFAULTS)
    for checkpoint, arch, write, shapes in (
        ("Lfm2ForCausalLM", gguf.MODEL_ARCH.LFM2, write_hparams, shapes),
        ("Lfm2MoeForCausalLM", gguf.MODEL_ARCH.LFM2MOE, write_moe_hparams, moe_shapes),
    )
)
