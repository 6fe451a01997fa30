"""Nemotron-H: layers that are Mamba-2's, attention, or a feed-forward part, also of experts, and nothing beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from ggpy.errors import UnsupportedError

from .checkpoint import Config, Rows, shown
from .experts import gather_experts, n_experts, write_expert_hparams
from .family import Family, Shapes, attention_shapes, model_shapes, write_decoder_hparams
from .mamba2 import Scan, decays

KINDS = {"M": "scan", "*": "attention", "-": "mlp", "E": "experts"}
NAMES = {"mamba": "scan", "linear_attention": "scan", "attention": "attention", "full_attention": "attention", "mlp": "mlp"}
NAMES |= {"moe": "experts"}

# What training or a program did, how states are kept, and what only says something of layers with experts. transformers
# takes time_step_min, which is for the weights' initialization, as a limit of steps: the code that models were published
# with does not (transformers' pull request 48989), and they are worse with it.
_IGNORED_NAMES = (
    "chunk_size expand mamba_ssm_cache_dtype num_logits_to_keep rescale_prenorm_residual residual_in_fp32 time_step_floor "
    "time_step_max time_step_min use_mamba_kernels moe_intermediate_size moe_latent_size moe_shared_expert_overlap "
    "moe_shared_expert_intermediate_size mtp_layers_block_type mtp_hybrid_override_pattern n_group n_routed_experts "
    "n_shared_experts norm_topk_prob num_experts_per_tok routed_scaling_factor topk_group num_hidden_layers "
    "intermediate_size"
)
IGNORED = _IGNORED_NAMES.split()


def kinds(config: Config) -> list[str]:
    """What each layer is."""
    pattern, names = config.get("hybrid_override_pattern"), config.get("layers_block_type", config.get("layer_types"))
    table: dict[str, str] = KINDS if isinstance(pattern, str) else NAMES
    layers = pattern if isinstance(pattern, str) else names
    if not isinstance(layers, str | list) or not layers or not all(layer in tuple(table) for layer in layers):
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
    eps = config.number("layer_norm_epsilon", config.number("rms_norm_eps", 1e-5), least=0)
    config.only("norm_eps", eps)
    config.only("attention_head_dim", config.integer("head_dim"))
    return {"num_hidden_layers": len(kinds(config)), "layer_types": None, "rms_norm_eps": eps}


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    layers, n_kv = kinds(config), config.integer("num_key_value_heads")
    n_head_kv = [n_kv if kind == "attention" else 0 for kind in layers]
    length = {"mlp": "intermediate_size", "experts": "moe_intermediate_size"}
    n_ff = [config.integer(length[kind]) if kind in length else 0 for kind in layers]
    write_decoder_hparams(writer, config, n_head_kv=n_head_kv, n_ff=n_ff)
    writer.add_layer_norm_eps(config.number("rms_norm_eps"))  # llama.cpp's reader wants both
    scan(config).write_hparams(writer, config)
    writer.add_rope_dimension_count(config.integer("head_dim"))
    writer.add_rope_scaling_finetuned(False)
    if "experts" in layers:
        write_experts(writer, config)


def write_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(config.integer("moe_shared_expert_intermediate_size"))
    writer.add_expert_shared_count(config.integer("n_shared_experts"))
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob", True)))
    writer.add_expert_weights_scale(config.number("routed_scaling_factor", 1.0))
    writer.add_expert_group_count(config.integer("n_group", 1))
    writer.add_expert_group_used_count(config.integer("topk_group", 1))
    if config.get("moe_latent_size") is not None:
        writer.add_moe_latent_size(config.integer("moe_latent_size"))


def _mlp(config: Config) -> Shapes:
    n_embd, n_ff = config.integer("hidden_size"), config.integer("intermediate_size")
    return {"ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)}


def _experts(config: Config) -> Shapes:
    n, n_embd, n_ff = n_experts(config), config.integer("hidden_size"), config.integer("moe_intermediate_size")
    n_latent, n_shared = config.integer("moe_latent_size", n_embd), config.integer("moe_shared_expert_intermediate_size")
    shapes: Shapes = {
        "ffn_gate_inp.weight": (n, n_embd),
        "exp_probs_b.bias": (n,),
        "ffn_up_exps.weight": (n, n_ff, n_latent),
        "ffn_down_exps.weight": (n, n_latent, n_ff),
        "ffn_up_shexp.weight": (n_shared, n_embd),
        "ffn_down_shexp.weight": (n_embd, n_shared),
    }
    if config.get("moe_latent_size") is not None:
        shapes |= {"ffn_latent_down.weight": (n_latent, n_embd), "ffn_latent_up.weight": (n_embd, n_latent)}
    return shapes


def shapes(config: Config) -> Shapes:
    n_embd = config.integer("hidden_size")
    norm: Shapes = {"attn_norm.weight": (n_embd,)}
    attention = attention_shapes(config)
    del attention["ffn_norm.weight"]
    blocks: dict[str, Callable[[], Shapes]] = {
        "scan": lambda: scan(config).shapes(n_embd),
        "attention": lambda: attention,
        "mlp": lambda: norm | _mlp(config),
        "experts": lambda: norm | _experts(config),
    }
    layers = kinds(config)
    return model_shapes(config, lambda i: blocks[layers[i]]())


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """The scans' tensors in GGUF's shapes, experts stacked; without layers that predict further tokens (MTP)."""
    layer, kept = scan(config), dict[str, Rows]()
    for name, rows in tensors.items():
        if name.startswith("mtp."):
            continue
        name, rows = layer.gathered(name, rows)
        name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        if ".mixer.experts." in name:  # under the name that gguf's table has for stacks
            name = name.replace("backbone.layers.", "model.layers.").replace(".mixer.", ".mlp.")
            name = f"{name}.weight" if name.endswith(".experts.up_proj") else name
        kept[name] = rows
    return gather_experts(kept, config)


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
    arch_of=lambda config: gguf.MODEL_ARCH.NEMOTRON_H_MOE if "experts" in kinds(config) else gguf.MODEL_ARCH.NEMOTRON_H,
)
