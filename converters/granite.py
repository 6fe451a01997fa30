"""Granite 4: Mamba-2 in most layers and attention in the others, or in all; a feed-forward part, also of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from . import llama
from .checkpoint import Config, PickedRows, Rows
from .experts import expert_shapes, gather_experts, write_expert_hparams
from .family import Family, Shapes, attention_shapes, ffn_shapes, model_shapes, write_decoder_hparams
from .mamba2 import Scan, decays

KINDS = {"mamba": True, "linear_attention": True, "attention": False, "full_attention": False}


def scans(config: Config) -> list[bool]:
    """Which layers are Mamba-2's."""
    return [KINDS[kind] for kind in config.words("layer_types", KINDS, config.integer("num_hidden_layers"))]


def arch_of(config: Config) -> gguf.MODEL_ARCH:
    """Without Mamba-2 it is Granite 3."""
    if any(scans(config)):
        return gguf.MODEL_ARCH.GRANITE_HYBRID
    return gguf.MODEL_ARCH.GRANITE_MOE if _n_experts(config) else gguf.MODEL_ARCH.GRANITE


def scan(config: Config) -> Scan:
    return Scan.of_hybrid(config, config.integer("mamba_expand") * config.integer("hidden_size"))


def _n_experts(config: Config) -> int:
    return config.integer("num_local_experts", 0, least=0)


def usual(config: Config) -> dict[str, Any]:
    """Without experts the shared part is all there is."""
    for key in ("mamba_chunk_size", "time_step_limit", "init_method"):
        config.get(key)
    config.only("normalization_function", "rmsnorm")
    if _n_experts(config):
        return {}
    config.get("intermediate_size"), config.get("num_experts_per_tok")
    return {"intermediate_size": config.integer("shared_intermediate_size")}


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("mamba_proj_bias", False)
    config.only("attention_bias", False)
    kinds, n_kv = scans(config), config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    n_head_kv = [0 if is_scan else n_kv for is_scan in kinds]
    write_decoder_hparams(writer, config.replaced(layer_types=None), n_head_kv=n_head_kv if any(kinds) else None)
    for key, add in (
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        add(config.number(key, 1.0))
    if _n_experts(config):
        write_expert_hparams(writer, config)
        writer.add_expert_shared_feed_forward_length(config.integer("shared_intermediate_size"))
    if any(kinds):
        scan(config).write_hparams(writer, config)
    writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")


def shapes(config: Config) -> Shapes:
    n_embd = config.integer("hidden_size")
    attention = attention_shapes(config)
    layer = scan(config).shapes(n_embd) | {"ffn_norm.weight": (n_embd,)}
    if _n_experts(config):
        feed_forward = expert_shapes(config, config.integer("intermediate_size"))
        feed_forward |= ffn_shapes(n_embd, config.integer("shared_intermediate_size"), "_shexp")
    else:
        feed_forward = ffn_shapes(n_embd, config.integer("intermediate_size"))
    kinds = scans(config)
    return model_shapes(config, lambda i: (layer if kinds[i] else attention) | feed_forward)


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Stack the experts, split gates from what they gate, and give the scans' tensors GGUF's shapes."""
    shared = ".mlp.shared_expert." if _n_experts(config) else ".mlp."
    layer, named = scan(config), dict[str, Rows]()
    for name, rows in tensors.items():
        if name.endswith(".shared_mlp.input_linear.weight") and rows.shape[0] % 2 == 0:
            n = rows.shape[0] // 2
            for k, part in enumerate(("gate_proj", "up_proj")):
                picked = PickedRows(rows, np.arange(k * n, k * n + n), (n, rows.shape[1]))
                named[name.replace(".shared_mlp.input_linear", f"{shared}{part}")] = picked
            continue
        name, rows = layer.gathered(name, rows)
        for old, new in (
            (".shared_mlp.output_linear.", f"{shared}down_proj."),
            (".block_sparse_moe.input_linear.weight", ".mlp.experts.gate_up_proj"),
            (".block_sparse_moe.output_linear.weight", ".mlp.experts.down_proj"),
            (".block_sparse_moe.router.layer.", ".mlp.gate."),
        ):
            name = name.replace(old, new)
        named[name] = rows
    return gather_experts(named, config)


def transform(name: str, rows: Rows, config: Config) -> Rows:
    """Decays as they are used; queries and keys as Llama's."""
    return decays(name, llama.transform(name, rows, config))


DEFAULTS: dict[str, dict[str, Any]] = {
    "GraniteMoeHybridForCausalLM": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_head": "auto",
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    }
}

FAMILY = Family(
    ("GraniteMoeHybridForCausalLM",),
    gguf.MODEL_ARCH.GRANITE_HYBRID,
    write_hparams,
    shapes,
    gather,
    transform,
    usual=usual,
    defaults=DEFAULTS,
    arch_of=arch_of,
)
