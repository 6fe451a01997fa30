"""Gemma 4: heads of two lengths, keys and values that layers share, embeddings for each layer, experts beside the
feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from ggpy.errors import ConversionError

from .checkpoint import Config, Rows
from .family import Family, Shapes, ffn_shapes, plain_base, refuse_unread, rope_of_kind, rope_parameters, write_windows
from .gemma import GEMMA


def _is_full(config: Config) -> list[bool]:
    """Which layers attend to all positions."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != config.integer("num_hidden_layers"):
        raise ConversionError(f"{config.path}: layer_types must name each layer's kind")
    return [kind == "full_attention" for kind in kinds]


def _heads(config: Config) -> list[tuple[int, int]]:
    """Each layer's heads of keys and values, and their length."""
    n, n_kv = config.integer("head_dim"), config.integer("num_key_value_heads")
    n_full = config.integer("global_head_dim", n)
    n_kv_full = config.integer("num_global_key_value_heads", n_kv)
    by_layer = Config(config.part("per_layer_config"), config.path)
    found = []
    for i, full in enumerate(_is_full(config)):
        entry = Config(by_layer.part(str(i)) or by_layer.part(f"{i:02}"), config.path)
        default = (n_kv_full, n_full) if full else (n_kv, n)
        found.append((entry.integer("num_key_value_heads", default[0]), entry.integer("head_dim", default[1])))
        refuse_unread(entry)
    refuse_unread(by_layer)
    if len({n for (_, n), full in zip(found, _is_full(config), strict=True) if full}) > 1:
        raise ConversionError(f"{config.path}: heads of full attention of several lengths")
    return found


def _n_ff(config: Config) -> list[int]:
    n, n_layer = config.integer("intermediate_size"), config.integer("num_hidden_layers")
    n_own = n_layer - config.integer("num_kv_shared_layers", 0, least=0)
    wide = 2 if config.get("use_double_wide_mlp") else 1
    return [n if i < n_own else wide * n for i in range(n_layer)]


def _rope(config: Config) -> Config:
    """Settings of the rotary embedding of full attention."""
    rope_parameters(config, "full_attention", "proportional", "partial_rotary_factor").only("rope_type", "proportional")
    return rope_of_kind(config, "full_attention")


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    for key, known in (("attention_bias", False), ("use_bidirectional_attention", None)):
        if config.get(key) != "vision":  # which concerns images alone
            config.only(key, known)
    config.only("hidden_activation", "gelu_pytorch_tanh")
    full, heads = _is_full(config), _heads(config)
    n_layer, length = len(full), {kind: n for (_, n), kind in zip(heads, full, strict=True)}
    writer.add_block_count(n_layer)
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(_n_ff(config))
    writer.add_head_count(config.integer("num_attention_heads"))
    writer.add_head_count_kv([n_kv for n_kv, _ in heads])
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6, least=0))
    n, short = length.get(True, config.integer("head_dim")), length.get(False, config.integer("head_dim"))
    writer.add_key_length(n)
    writer.add_value_length(n)
    writer.add_key_length_swa(short)
    writer.add_value_length_swa(short)
    if config.get("enable_moe_block"):
        writer.add_expert_count(config.integer("num_experts"))
        writer.add_expert_used_count(config.integer("top_k_experts"))
        writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    writer.add_vocab_size(config.integer("vocab_size"))
    write_windows(writer, config, "types 6")
    writer.add_shared_kv_layers(config.integer("num_kv_shared_layers", 0, least=0))
    writer.add_embedding_length_per_layer_input(config.integer("hidden_size_per_layer_input", 0, least=0))
    config.only("vocab_size_per_layer_input", config.integer("vocab_size"))
    # Also where there is none: llama.cpp takes 30 for a missing one.
    writer.add_final_logit_softcapping(config.number("final_logit_softcapping", 0.0, least=0))
    base = plain_base(config, "sliding_attention", 10000.0)
    if base is None:
        raise ConversionError(f"{config.path}: rope_parameters has nothing for sliding_attention")
    writer.add_rope_freq_base(_rope(config).number("rope_theta", 1000000.0))
    writer.add_rope_freq_base_swa(base)
    writer.add_rope_dimension_count(n)
    writer.add_rope_dimension_count_swa(short)


def shapes(config: Config) -> Shapes:
    n_embd, n_vocab = config.integer("hidden_size"), config.integer("vocab_size")
    n_head, n_own = config.integer("num_attention_heads"), config.integer("hidden_size_per_layer_input", 0, least=0)
    full, sizes, n_ff = _is_full(config), _heads(config), _n_ff(config)
    n_kept = len(full) - config.integer("num_kv_shared_layers", 0, least=0)
    found: Shapes = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": (n_embd,)}
    if not config.get("tie_word_embeddings"):
        found["output.weight"] = (n_vocab, n_embd)
    if n_own:
        found["per_layer_token_embd.weight"] = (n_vocab, len(full) * n_own)
        found["per_layer_model_proj.weight"] = (len(full) * n_own, n_embd)
        found["per_layer_proj_norm.weight"] = (n_own,)
    for i, (n_kv, n) in enumerate(sizes):
        block: Shapes = {f"{name}.weight": (n_embd,) for name in ("attn_norm", "post_attention_norm", "ffn_norm")}
        block |= {"post_ffw_norm.weight": (n_embd,), "layer_output_scale.weight": (1,)} | ffn_shapes(n_embd, n_ff[i])
        block |= {"attn_q.weight": (n_head * n, n_embd), "attn_q_norm.weight": (n,)}
        block["attn_output.weight"] = (n_embd, n_head * n)
        if i < n_kept:
            block |= {"attn_k.weight": (n_kv * n, n_embd), "attn_k_norm.weight": (n,)}
            if not (config.get("attention_k_eq_v") and full[i]):
                block["attn_v.weight"] = (n_kv * n, n_embd)
        if config.get("enable_moe_block"):
            block |= _experts(config)
        if n_own:
            block |= {"inp_gate.weight": (n_own, n_embd), "proj.weight": (n_embd, n_own), "post_norm.weight": (n_embd,)}
        found |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    return found


def _experts(config: Config) -> Shapes:
    """The experts of a layer, their router, and the norms around both parts."""
    n_embd, n, n_ff = (config.integer(key) for key in ("hidden_size", "num_experts", "moe_intermediate_size"))
    norms: Shapes = {f"{name}.weight": (n_embd,) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")}
    return norms | {
        "ffn_gate_inp.weight": (n, n_embd),
        "ffn_gate_inp.scale": (n_embd,),
        "ffn_gate_up_exps.weight": (n, 2 * n_ff, n_embd),
        "ffn_down_exps.weight": (n, n_embd, n_ff),
        "ffn_down_exps.scale": (n,),
    }


#: endings of names, and those that gguf's table knows
_ENDINGS = {
    ".layer_scalar": ".layer_scalar.weight",
    ".router.scale": ".router.proj.scale",
    ".router.per_expert_scale": ".experts.down_proj.scale",
    ".experts.gate_up_proj": ".experts.gate_up_proj.weight",
    ".experts.down_proj": ".experts.down_proj.weight",
}


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Gives the tensors names that gguf's table knows."""
    gathered = {}
    for name, rows in tensors.items():
        old = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
        gathered[name.removesuffix(old) + _ENDINGS.get(old, "")] = rows
    return gathered


def computed(config: Config) -> dict[str, np.ndarray]:
    """Of heads of full attention, the first part of the frequencies turns and the rest doesn't: divisors of 1 and 1e30."""
    n = next((n for (_, n), full in zip(_heads(config), _is_full(config), strict=True) if full), 0)
    if not n:
        return {}
    share = _rope(config).number("partial_rotary_factor", 1.0, least=0)
    values = np.full(n // 2, 1e30, np.float32)
    values[: int(n * share / 2)] = 1
    return {"rope_freqs.weight": values}


DEFAULTS: dict[str, Any] = {**GEMMA, "sliding_window": 512}
FAMILY = Family(
    checkpoints=("Gemma4ForCausalLM",),
    arch=gguf.MODEL_ARCH.GEMMA4,
    write_hparams=write_hparams,
    shapes=shapes,
    gather=gather,
    computed=computed,
    defaults={"Gemma4ForCausalLM": DEFAULTS},
)
