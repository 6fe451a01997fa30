"""NomicBERT, as transformers has it and as its folders on the hub have it, and with experts (nomic-embed-text-v2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from ggpy.errors import ConversionError

from .bert import gather, shapes_of, write_hparams
from .checkpoint import Checkpoint, Config, PickedRows, Rows, TransposedRows
from .family import Family, Shapes, biases, ffn_shapes, write_rope_hparams

# What its own program calls otherwise, and what it takes where a key is missing.
_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "layer_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}
# What its program could do otherwise.
_ALWAYS: dict[str, Any] = {
    "causal": False,
    "prenorm": False,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "use_rms_norm": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "expert_choice_router": False,
    "moe_normalize_expert_weights": False,
    "num_shared_experts": 0,
    "ffn_div": 1,
}
# How it is computed, or of what is left out.
_OTHERS = (
    *("attn_pdrop", "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "pad_vocab_size_multiple", "moe_impl"),
    *("reorder_and_upcast_attn", "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("use_xentropy", "add_pooling_layer", "moe_resid_pdrop"),
    "rotary_scaling_factor",  # beyond the positions that it was trained with
)
_TRAINED = 2048


def _usual(config: Config) -> dict[str, Any]:
    """The values of a folder on the hub, under transformers' names."""
    if config.get("n_embd") is None:
        return {}
    for key, value in _ALWAYS.items():
        config.only(key, value)
    for key in _OTHERS:
        config.get(key)
    with_experts = bool(config.get("moe_every_n_layers"))
    for key in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"):
        config.only(key, with_experts)
    config.only("activation_function", "gelu" if with_experts else "swiglu")
    # With experts it was trained with texts of a quarter as many tokens as it has positions.
    n_ctx = config.integer("max_trained_positions", _TRAINED) // (4 if with_experts else 1)
    found = {name: config.get(theirs) for name, theirs in _NAMES.items()}
    found["intermediate_size"] = config.get("n_inner") or 4 * config.integer("n_embd")
    found["max_position_embeddings"] = min(n_ctx, config.integer("n_positions"))
    return found | {"hidden_act": "gelu" if with_experts else "silu", "rope_parameters": None, "rope_scaling": None}


def _write(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    every = config.get("moe_every_n_layers")
    write_hparams(writer, config, act="gelu" if every else "silu")
    write_rope_hparams(writer, config)
    if every:
        writer.add_moe_every_n_layers(config.integer("moe_every_n_layers", least=2))
        writer.add_expert_count(config.integer("num_experts"))
        writer.add_expert_used_count(config.integer("moe_top_k"))


def _shapes(config: Config) -> Shapes:
    n_embd, n_ff = config.integer("hidden_size"), config.integer("intermediate_size")
    attention: Shapes = {"attn_qkv.weight": (3 * n_embd, n_embd), "attn_output.weight": (n_embd, n_embd)}
    if not config.get("moe_every_n_layers"):
        block = attention | ffn_shapes(n_embd, n_ff)
        return shapes_of(config, lambda i: block, 0)
    every, n_expert = config.integer("moe_every_n_layers", least=2), config.integer("num_experts")
    attention |= biases(attention, "attn_qkv", "attn_output")
    dense: Shapes = {"ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)}
    dense |= biases(dense, "ffn_up", "ffn_down")
    experts: Shapes = {
        "ffn_gate_inp.weight": (n_expert, n_embd),
        "ffn_up_exps.weight": (n_expert, n_ff, n_embd),
        "ffn_down_exps.weight": (n_expert, n_embd, n_ff),
    }
    return shapes_of(config, lambda i: attention | (experts if i % every == 1 else dense), 0)


def _gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Experts' matrices lie one after the other, the second ones as the first."""
    found = gather(tensors, config)
    for name in list(found):
        kind = name.rpartition("mlp.experts.")[2]
        if kind in ("mlp.w1", "mlp.w2"):
            shape = (config.integer("num_experts"), config.integer("intermediate_size"), config.integer("hidden_size"))
            rows = found.pop(name)
            if rows.shape != (shape[0] * shape[1], shape[2]):
                raise ConversionError(
                    f"{config.path.parent}: tensor {name} is {rows.shape}, not {shape[0] * shape[1], shape[2]}"
                )
            parts = PickedRows(rows, np.arange(shape[0] * shape[1]), shape)
            found[f"{name}.weight"] = parts if kind == "mlp.w1" else TransposedRows(parts)
        elif kind == "bias":
            del found[name]
    return found


def _special(checkpoint: Checkpoint, family: Family) -> Family:
    """The family of a checkpoint with experts."""
    if not checkpoint.config.get("moe_every_n_layers"):
        return family
    for name, rows in checkpoint.tensors.items():
        if name.endswith("mlp.experts.bias") and np.any(rows.read(0, 1)):
            checkpoint.notes.append(f"{checkpoint.folder}: {name} isn't zero and is left aside: GGUF has no place for it")
    return replace(family, arch=gguf.MODEL_ARCH.NOMIC_BERT_MOE)


FAMILY = Family(
    ("NomicBertModel", "NomicBertForMaskedLM"),
    gguf.MODEL_ARCH.NOMIC_BERT,
    _write,
    _shapes,
    _gather,
    usual=_usual,
    defaults={name: {"rope_theta": 1000.0} for name in ("NomicBertModel", "NomicBertForMaskedLM")},
    special=_special,
)
