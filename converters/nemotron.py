"""Nemotron-H: layers that are Mamba-2's, attention, or a feed-forward part, and nothing beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from ggpy.errors import UnsupportedError

from .checkpoint import Config, Rows, shown
from .family import Family, Shapes, attention_shapes, model_shapes, write_decoder_hparams
from .mamba2 import Scan, decays

KINDS = {"M": "scan", "*": "attention", "-": "mlp"}
NAMES = {"mamba": "scan", "linear_attention": "scan", "attention": "attention", "full_attention": "attention", "mlp": "mlp"}

# What training or a program did, how states are kept, and models with experts, which say so by their layers.
_IGNORED_NAMES = (
    "chunk_size expand mamba_ssm_cache_dtype num_logits_to_keep rescale_prenorm_residual residual_in_fp32 time_step_floor "
    "time_step_max time_step_min use_mamba_kernels moe_intermediate_size moe_latent_size moe_shared_expert_overlap "
    "moe_shared_expert_intermediate_size mtp_layers_block_type mtp_hybrid_override_pattern n_group n_routed_experts "
    "n_shared_experts norm_topk_prob num_experts_per_tok routed_scaling_factor topk_group num_hidden_layers"
)
IGNORED = _IGNORED_NAMES.split()


def kinds(config: Config) -> list[str]:
    """What each layer is."""
    pattern, names = config.get("hybrid_override_pattern"), config.get("layers_block_type", config.get("layer_types"))
    table: dict[str, str] = KINDS if isinstance(pattern, str) else NAMES
    layers = pattern if isinstance(pattern, str) else names
    if not isinstance(layers, str | list) or not layers or not all(layer in table for layer in layers):
        raise UnsupportedError(f"{config.path}: kinds of layers {shown(layers)}; known: {', '.join(table)}")
    return [table[layer] for layer in layers]


def scan(config: Config) -> Scan:
    return Scan(
        n_head=config.integer("mamba_num_heads"),
        n=config.integer("mamba_num_heads") * config.integer("mamba_head_dim"),
        n_group=config.integer("n_groups"),
        n_state=config.integer("ssm_state_size"),
        width=config.integer("conv_kernel", least=2),
        has_bias=bool(config.get("use_conv_bias", True)),
    )


def usual(config: Config) -> dict[str, Any]:
    """Names settings as other families do."""
    for key in IGNORED:
        config.get(key)
    for key, value in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        config.only(key, value)
    for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        config.only(key, False)
    return {
        "num_hidden_layers": len(kinds(config)),
        "layer_types": None,
        "rms_norm_eps": config.number("layer_norm_epsilon", config.number("rms_norm_eps", 1e-5), least=0),
    }


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    layers, n_kv = kinds(config), config.integer("num_key_value_heads")
    n_head_kv = [n_kv if kind == "attention" else 0 for kind in layers]
    n_ff = [config.integer("intermediate_size") if kind == "mlp" else 0 for kind in layers]
    write_decoder_hparams(writer, config, n_head_kv=n_head_kv, n_ff=n_ff)
    writer.add_layer_norm_eps(config.number("rms_norm_eps"))  # llama.cpp's reader wants both
    scan(config).write_hparams(writer, config)
    writer.add_rope_dimension_count(config.integer("head_dim"))
    writer.add_rope_scaling_finetuned(False)


def shapes(config: Config) -> Shapes:
    n_embd, n_ff = config.integer("hidden_size"), config.integer("intermediate_size")
    attention = attention_shapes(config)
    del attention["ffn_norm.weight"]
    blocks: dict[str, Shapes] = {
        "scan": scan(config).shapes(n_embd),
        "attention": attention,
        "mlp": {"attn_norm.weight": (n_embd,), "ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)},
    }
    layers = kinds(config)
    return model_shapes(config, lambda i: blocks[layers[i]])


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """The scans' tensors in GGUF's shapes; without layers that predict further tokens (MTP)."""
    layer = scan(config)
    return dict(layer.gathered(name, rows) for name, rows in tensors.items() if not name.startswith("mtp."))


DEFAULTS: dict[str, dict[str, Any]] = {
    "NemotronHForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
    }
}

FAMILY = Family(
    ("NemotronHForCausalLM",),
    gguf.MODEL_ARCH.NEMOTRON_H,
    write_hparams,
    shapes,
    gather,
    lambda name, rows, config: decays(name, rows),
    usual=usual,
    defaults=DEFAULTS,
)
