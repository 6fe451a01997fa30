"""Families of decoders that differ from Llama in a few ways: each is a row of what differs (`Traits`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gguf
import numpy as np

from ggpy.errors import UnsupportedError

from .checkpoint import ChangedRows, Config, PickedRows, ReshapedRows, Rows, StackedRows, StridedRows, TransposedRows, shown
from .experts import expert_shapes, gather_experts, leading_dense, n_experts, write_expert_hparams
from .family import (
    ROPE_OF_SOME,
    Family,
    Shapes,
    attention_shapes,
    biases,
    ffn_shapes,
    head_dim,
    llama3_rope_factors,
    longrope_factors,
    model_shapes,
    rope_parameters,
    write_rope_hparams,
    write_sizes,
    write_windows,
)
from .llama import transform as interleave
from .pooling import with_projections
from .quantized import BlockRows

MODEL = gguf.MODEL_ARCH


def _nothing(writer: gguf.GGUFWriter, config: Config) -> None:
    pass


def _none(config: Config) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Traits:
    """What sets a family apart from Llama.

    Attributes
    ----------
    act : str
        The only activation that is understood, and `act_key`, the key of config.json that names it.
    eps : str
        The key of the norms' epsilon; RMS norms' if it begins with "rms".
    norms : tuple of str, or callable
        A layer's norms, by GGUF's names; a function of config.json may say.
    norm_biases : bool
        Whether norms have biases.
    norm_shift : float
        What is added to norms' weights.
    qk_norm : callable
        How queries' and keys' norms are shaped: one "head"'s, one of its own for each of the "heads", or "all" heads'
        together; "" for none.
    biases : callable
        The names of a layer's matrices that have biases.
    fused : tuple of str
        What is one matrix: "qkv", "gate_up".
    gated : bool
        Whether the feed-forward part has a gate.
    output_bias : bool
        Whether logits have a bias.
    positions : bool
        Whether positions are learned, instead of rotations.
    interleaved : bool
        Whether GGUF rotates neighbouring values where the checkpoint rotates halves.
    windows : {"", "all", "types"}
        Whether layers attend to windows: none, all if there is a `sliding_window`, or those that `layer_types` names.
    write : callable
        Adds further metadata.
    experts : callable
        What a layer has instead of the dense feed-forward part, by layer; None for that.
    rope : tuple of str
        Settings of the rotary embedding that are understood beside those of its kind.
    whole_yarn : bool
        See `write_rope_hparams`.
    """

    act: str = "silu"
    act_key: str = "hidden_act"
    eps: str = "rms_norm_eps"
    norms: tuple[str, ...] | Callable[[Config], tuple[str, ...]] = ("attn_norm", "ffn_norm")
    norm_biases: bool = False
    norm_shift: float = 0.0
    qk_norm: Callable[[Config], str] = lambda config: ""
    biases: Callable[[Config], tuple[str, ...]] = _none
    fused: tuple[str, ...] = ()
    gated: bool = True
    output_bias: bool = False
    positions: bool = False
    interleaved: bool = False
    windows: str = ""
    write: Callable[[gguf.GGUFWriter, Config], None] = _nothing
    experts: Callable[[Config, int], Shapes | None] = lambda config, i: None
    rope: tuple[str, ...] = ()
    whole_yarn: bool = True


def _block(traits: Traits, config: Config, i: int) -> Shapes:
    """The tensors of layer i."""
    n_embd, n = config.integer("hidden_size"), head_dim(config)
    block = {name: shape for name, shape in attention_shapes(config).items() if "norm" not in name}
    norms = traits.norms(config) if callable(traits.norms) else traits.norms
    block |= {f"{name}.weight": (n_embd,) for name in norms}
    if traits.norm_biases:
        block |= biases(block, *norms)
    kind = traits.qk_norm(config)
    for part in "qk":
        if kind:
            n_all = block[f"attn_{part}.weight"][0]
            block[f"attn_{part}_norm.weight"] = {"head": (n,), "heads": (n_all // n, n), "all": (n_all,)}[kind]
    ffn = traits.experts(config, i)
    if ffn is None:
        ffn = ffn_shapes(n_embd, config.integer("intermediate_size"))
        gate = ffn.pop("ffn_gate.weight") if not traits.gated or "gate_up" in traits.fused else None
        if gate is not None and traits.gated:
            ffn["ffn_up.weight"] = (2 * gate[0], n_embd)
    block |= ffn
    if "qkv" in traits.fused:
        parts = [block.pop(f"attn_{part}.weight") for part in "qkv"]
        block["attn_qkv.weight"] = (sum(shape[0] for shape in parts), n_embd)
    return block | biases(block, *(name for name in traits.biases(config) if f"{name}.weight" in block))


def decoder(
    checkpoints: tuple[str, ...],
    arch: gguf.MODEL_ARCH,
    traits: Traits,
    gather: Callable[[Mapping[str, Rows], Config], dict[str, Rows]] = gather_experts,
    usual: Callable[[Config], dict[str, Any]] = lambda config: {},
    arch_name: str = "",
    **defaults: Any,
) -> Family:
    """The family that has these traits; `arch_name`: see `Family`."""

    def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
        config.only(traits.act_key, traits.act)
        write_sizes(writer, config)
        eps = config.number(traits.eps, least=0)
        (writer.add_layer_norm_rms_eps if traits.eps.startswith("rms") else writer.add_layer_norm_eps)(eps)
        write_windows(writer, config, traits.windows)
        if traits.positions:
            return
        write_rope_hparams(writer, config, *traits.rope, whole_yarn=traits.whole_yarn)
        writer.add_rope_dimension_count(int(head_dim(config) * rotary_share(config, traits.rope)))
        traits.write(writer, config)

    def shapes(config: Config) -> Shapes:
        tensors = model_shapes(config, lambda i: _block(traits, config, i))
        if traits.norm_biases:
            tensors["output_norm.bias"] = tensors["output_norm.weight"]
        if traits.positions:
            tensors["position_embd.weight"] = (config.integer("max_position_embeddings"), config.integer("hidden_size"))
        if traits.output_bias:
            tensors["output.bias"] = (config.integer("vocab_size"),)
        return tensors

    def transform(name: str, rows: Rows, config: Config) -> Rows:
        if traits.norm_shift and name.endswith("norm.weight"):
            return ChangedRows(rows, lambda x: x + np.float32(traits.norm_shift))
        return interleave(name, rows, config) if traits.interleaved and name.endswith(("weight", "bias")) else rows

    values = {name: dict(defaults) for name in checkpoints} if defaults else {}
    functions = (write_hparams, shapes, gather, transform, rope_factors, usual)
    return Family(checkpoints, arch, *functions, values, arch_name)


def rotary_share(config: Config, also: tuple[str, ...]) -> float:
    """How much of a head is rotated; in three places of config.json, as transformers came along."""
    if "partial_rotary_factor" not in also:
        return 1.0
    rope = rope_parameters(config, *also)
    keys = ("partial_rotary_factor", "rotary_pct")
    found = [config.number(key) for key in keys if config.get(key) is not None]
    return rope.number("partial_rotary_factor", found[0] if found else 1.0)


def rope_factors(config: Config) -> dict[str, np.ndarray]:
    """Divisors of the rotary embedding's frequencies, which GGUF keeps as tensors."""
    if rope_parameters(config, *ROPE_OF_SOME).get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_rope_factors(config)}
    return longrope_factors(config)


# --- what several have ---

QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
_PARTIAL, _BY_KIND = ("partial_rotary_factor",), ("full_attention",)
_AFTER = ("post_attention_norm", "post_ffw_norm")
_SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_PLAIN: dict[str, Any] = {"norm_biases": True, "gated": False}


def _if(key: str, *names: str) -> Callable[[Config], tuple[str, ...]]:
    """Biases of these matrices, and of no others, if the key is true."""
    return lambda config: names if config.get(key) else ()


def _attention_and_ffn(config: Config) -> tuple[str, ...]:
    return (*(ATTENTION if config.get("attention_bias") else ()), *(FFN if config.get("mlp_bias") else ()))


def without_further_layers(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Drops the layers after the last, which predict further tokens (MTP), and stacks the experts."""
    prefixes = (*(f"model.layers.{config.integer('num_hidden_layers') + i}." for i in range(8)), "mtp.", "model.mtp_")
    renamed: dict[str, Rows] = {}
    for name, rows in tensors.items():
        if name.startswith(prefixes):
            continue
        if name.endswith("e_score_correction_bias"):
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            rows = ReshapedRows(rows, rows.shape[-1:]) if rows.shape[:-1] == (1,) else rows
        renamed[name] = rows
    return gather_experts(renamed, config)


# --- Gemma ---


def _write_gemma(writer: gguf.GGUFWriter, config: Config, bidirectional: bool = False) -> None:
    config.only("attention_bias", False)
    if bool(config.get("use_bidirectional_attention")) != bidirectional:
        config.only("use_bidirectional_attention", bidirectional)
    scale = config.number("query_pre_attn_scalar", 256.0, least=1e-30)
    if scale != head_dim(config):
        writer.add_attention_scale(1 / math.sqrt(scale))
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key):
            add(config.number(key, least=1e-30))


def _write_gemma3(writer: gguf.GGUFWriter, config: Config, bidirectional: bool = False) -> None:
    _write_gemma(writer, config, bidirectional)
    nested = Config(config.part("rope_parameters"), config.path).part("sliding_attention")
    if not nested:
        writer.add_rope_freq_base_swa(config.number("rope_local_base_freq", 10000.0))
    else:
        local = Config(nested, config.path)
        local.only("rope_type", "default")
        writer.add_rope_freq_base_swa(local.number("rope_theta", 10000.0))


GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "sliding_window": 4096,
}
CAPS: dict[str, Any] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA: dict[str, Any] = {
    "act": "gelu_pytorch_tanh",
    "act_key": "hidden_activation",
    "norms": _SANDWICH,
    "norm_shift": 1.0,
}
_GEMMA3: dict[str, Any] = _GEMMA | {"qk_norm": lambda config: "head", "windows": "types 6", "rope": _BY_KIND}

# --- gpt-oss: experts' gates and ups take turns, and their matrices are transposed ---


def _write_gpt_oss(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("swiglu_alpha", 1.702)
    config.only("swiglu_limit", 7.0)
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("intermediate_size"))


def _gpt_oss_experts(config: Config, i: int) -> Shapes:
    block = expert_shapes(config, config.integer("intermediate_size"))
    exps = {name.replace("weight", "bias"): shape[:2] for name, shape in block.items() if "exps" in name}
    sinks = {"attn_sinks.weight": (config.integer("num_attention_heads"),)}
    return block | exps | sinks | {"ffn_gate_inp.bias": (n_experts(config),)}


GPT_OSS_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up|down)_proj(|_bias|_blocks)")


def _gather_gpt_oss(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Official checkpoints have matrices in blocks, row by row; those that transformers saves are transposed."""
    gathered: dict[str, Rows] = {}
    for name, rows in tensors.items():
        match = GPT_OSS_EXPERTS.fullmatch(name)
        if name.endswith(".sinks"):
            gathered[f"{name}.weight"] = rows
        elif match:
            stem, matrix, kind = match.groups()
            halves = matrix.split("_")
            for first, part in enumerate(halves):
                values = rows
                if isinstance(rows, BlockRows):
                    values = rows.every(len(halves), first)
                elif len(halves) > 1:
                    values = StridedRows(rows, first, 2)
                if kind == "":
                    values = TransposedRows(values)
                gathered[f"{stem}.{part}_proj.{'bias' if kind == '_bias' else 'weight'}"] = values
        else:
            gathered[name] = rows
    return gathered


# --- Ministral 3 ---


def _write_ministral(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = rope_parameters(config, "llama_4_scaling_beta", "max_position_embeddings")
    if rope.get("llama_4_scaling_beta"):
        if rope.get("rope_type") != "yarn":
            raise UnsupportedError(f"{config.path}: llama_4_scaling_beta without YaRN's original context")
        writer.add_attn_temperature_scale(rope.number("llama_4_scaling_beta"))


# --- Granite ---


def _write_granite(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attention_scale(config.number("attention_multiplier", 1.0))
    writer.add_embedding_scale(config.number("embedding_multiplier", 1.0))
    writer.add_residual_scale(config.number("residual_multiplier", 1.0))
    writer.add_logit_scale(config.number("logits_scaling", 1.0, least=1e-30))


def _usual_granite_swa(config: Config) -> dict[str, Any]:
    """A rotary embedding for the layers that have one; windows in all but every fourth layer, from the first."""
    n_layer, rope = config.integer("num_hidden_layers"), config.part("rope_parameters")
    values: dict[str, Any] = {}
    if config.get("layer_types") is None:
        values["layer_types"] = ["sliding_attention" if i % 4 else "full_attention" for i in range(n_layer)]
    bases = {base for base in config.several("layer_rope_theta") if base}
    if len(bases) > 1:
        raise UnsupportedError(f"{config.path}: layer_rope_theta of {len(bases)} values but 0; known: one")
    return values | ({"rope_parameters": rope | {"rope_theta": bases.pop()}} if bases else {})


def _write_granite_swa(writer: gguf.GGUFWriter, config: Config) -> None:
    _write_granite(writer, config)
    if config.get("num_local_experts"):
        config.only("shared_intermediate_size", 0)
        write_expert_hparams(writer, config)
    bases = config.several("layer_rope_theta")
    if not all(bases):
        writer.add_array(f"{writer.arch}.attention.rope_pattern", [bool(base) for base in bases])


def _granite_swa_experts(config: Config, i: int) -> Shapes | None:
    sinks: Shapes = {"attn_sinks.weight": (config.integer("num_attention_heads"),)}
    n_embd, n_ff = config.integer("hidden_size"), config.integer("intermediate_size")
    return sinks | (expert_shapes(config, n_ff) if config.get("num_local_experts") else ffn_shapes(n_embd, n_ff))


def _gather_granite_swa(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    return _gather_granite_moe({f"{n}.weight" if n.endswith(".sinks") else n: r for n, r in tensors.items()}, config)


def _write_granite_moe(writer: gguf.GGUFWriter, config: Config) -> None:
    _write_granite(writer, config)
    write_expert_hparams(writer, config)


def _gather_granite_moe(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    names = {
        "router.layer.weight": "gate.weight",
        "router.weight": "gate.weight",
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
    }
    renamed = {}
    for name, rows in tensors.items():
        stem, _, part = name.partition(".block_sparse_moe.")
        renamed[f"{stem}.mlp.{names.get(part, part)}" if part else name] = rows
    return gather_experts(renamed, config)


# --- MiniCPM: Granite's factors by other names ---


def _write_minicpm(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_embedding_scale(config.number("scale_emb"))
    writer.add_residual_scale(config.number("scale_depth") / math.sqrt(config.integer("num_hidden_layers")))
    writer.add_logit_scale(config.integer("hidden_size") / config.number("dim_model_base", least=1e-30))
    config.get("mup_denominator")  # a number of training


# --- mixtures with shared experts ---


def write_mixture(gating: str, *also: str) -> Callable[[gguf.GGUFWriter, Config], None]:
    """Writes a mixture's metadata; `gating`: what makes scores of a router's outputs, by some called one of `also`."""

    def write(writer: gguf.GGUFWriter, config: Config) -> None:
        for key in ("scoring_func", "score_function"):
            config.choice(key, (gating, *also), gating)
        config.only("topk_method", "noaux_tc" if gating == "sigmoid" else "greedy")
        write_expert_hparams(writer, config)
        n_ff, n_shared = config.integer("moe_intermediate_size"), config.integer("n_shared_experts", 0, least=0)
        writer.add_expert_feed_forward_length(n_ff)
        if n_shared:
            writer.add_expert_shared_count(n_shared)
            writer.add_expert_shared_feed_forward_length(n_shared * n_ff)
        writer.add_leading_dense_block_count(leading_dense(config))
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[gating.upper()])
        writer.add_expert_weights_scale(config.number("routed_scaling_factor", 1.0))
        writer.add_expert_weights_norm(bool(config.get("norm_topk_prob", True)))
        writer.add_expert_group_count(config.integer("n_group", 1))
        writer.add_expert_group_used_count(config.integer("topk_group", 1))

    return write


def mixture(bias: bool = True) -> Callable[[Config, int], Shapes | None]:
    """A layer's mixture, unless it is one of the first, which are dense. `bias`: whether some is added to scores."""

    def shapes(config: Config, i: int) -> Shapes | None:
        if i < leading_dense(config) or (i + 1) % config.integer("moe_layer_interval", 1):
            return None
        n_embd, n_ff = config.integer("hidden_size"), config.integer("moe_intermediate_size")
        block, n_shared = expert_shapes(config, n_ff), config.integer("n_shared_experts", 0, least=0)
        if n_shared:
            block |= ffn_shapes(n_embd, n_shared * n_ff, "_shexp")
        return block | ({"exp_probs_b.bias": (n_experts(config),)} if bias else {})

    return shapes


def _write_deepseek(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("moe_layer_freq", 1)
    config.only("norm_topk_prob", False)  # files don't say it
    write_mixture("softmax")(writer, config)


def _write_ernie_moe(writer: gguf.GGUFWriter, config: Config) -> None:
    write_mixture("softmax")(writer, config)
    writer.add_interleave_moe_layer_step(config.integer("moe_layer_interval", 1))
    n_layer = config.integer("num_hidden_layers")
    if config.get("moe_layer_end_index", -1) not in (-1, n_layer - 1):
        config.only("moe_layer_end_index", n_layer - 1)
    config.only("moe_gate", "topk")
    config.only("use_bias", False)
    config.get("moe_capacity")  # bounds training


def _usual_ernie_moe(config: Config) -> dict[str, Any]:
    config.number("moe_norm_min", 1e-12, least=0)  # of sums that are never as small
    return {
        "num_experts": config.integer("moe_num_experts", 64),
        "num_experts_per_tok": config.integer("moe_k", 6),
        "n_shared_experts": config.integer("moe_num_shared_experts", 2, least=0),
        "first_k_dense_replace": config.integer("moe_layer_start_index", 1, least=0),
        "moe_intermediate_size": config.integer("moe_intermediate_size", 1536),
    }


def _usual_dots(config: Config) -> dict[str, Any]:
    """Windows begin with layer `max_window_layers`."""
    n_layer = config.integer("num_hidden_layers")
    return {"sliding_window": None} if config.integer("max_window_layers", n_layer, least=0) >= n_layer else {}


def _usual_exaone_moe(config: Config) -> dict[str, Any]:
    kinds = config.get("is_moe_layer")
    named = {} if kinds is None else {"mlp_layer_types": ["sparse" if kind else "dense" for kind in kinds]}
    return {"n_shared_experts": config.integer("num_shared_experts", 1, least=0), **named}


def _usual_bailing(config: Config) -> dict[str, Any]:
    n_ff, n_shared = config.integer("moe_intermediate_size"), config.integer("num_shared_experts", 0, least=0)
    for key, known in _BAILING.items():
        config.only(key, known)
    if n_shared:
        config.only("moe_shared_expert_intermediate_size", n_ff)
    return {"n_shared_experts": n_shared}


_BAILING: dict[str, Any] = {
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_head": False,
    "norm_softmax": False,
    "router_dtype": "fp32",
    "output_dropout": 0.0,
}


def _gather_bailing(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    end = ".expert_bias"
    named = {f"{name}.bias" if name.endswith(end) else name: rows for name, rows in tensors.items()}
    return without_further_layers(named, config)


def _usual_minimax(config: Config) -> dict[str, Any]:
    for key, known in _MINIMAX.items():
        config.only(key, known)
    values: dict[str, Any] = {"moe_intermediate_size": config.integer("intermediate_size")}
    kinds = config.get("attn_type_list")
    if kinds is not None and set(kinds) != {1}:
        raise UnsupportedError(f"{config.path}: attn_type_list {shown(kinds)}; known: all 1")
    if config.get("rotary_dim") is not None:
        values["partial_rotary_factor"] = config.integer("rotary_dim") / head_dim(config)
    return values


_MINIMAX: dict[str, Any] = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
}


# --- others ---


def _write_smollm3(writer: gguf.GGUFWriter, config: Config) -> None:
    n, every = (
        config.integer("num_hidden_layers"),
        [int((i + 1) % 4 != 0) for i in range(config.integer("num_hidden_layers"))],
    )
    config.only("no_rope_layer_interval", 4)
    kept = config.get("no_rope_layers", every)
    if not isinstance(kept, list) or kept[:n] != every:
        raise UnsupportedError(f"{config.path}: no_rope_layers {shown(kept)}; known: every fourth")


def _write_phi3(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("attention_bias", False)
    config.get("original_max_position_embeddings")  # says something for LongRoPE alone, which asks for it


def _write_cohere(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_logit_scale(config.number("logit_scale", 0.0625))


def _write_cohere2(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("use_qk_norm", False)
    _write_cohere(writer, config)


def _write_stablelm(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_parallel_residual(bool(config.get("use_parallel_residual")))


def _gather_stablelm(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """The norms of a layer's queries and keys, one for each head, are stacked."""
    gathered: dict[str, Rows] = {}
    for name, rows in tensors.items():
        stem, norms, _ = name.partition(".norms.")
        if not norms:
            gathered[name] = rows
        elif f"{stem}.weight" not in gathered:
            parts = [tensors.get(f"{stem}.norms.{i}.weight") for i in range(config.integer("num_attention_heads"))]
            gathered[f"{stem}.weight"] = StackedRows(tuple(part for part in parts if part is not None))
    return gathered


def _usual_gemma(config: Config) -> dict[str, Any]:
    """ "gelu" has always meant its approximation."""
    config.get("hidden_activation")
    return {"hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else {}


def _usual_internlm3(config: Config) -> dict[str, Any]:
    """Names settings as other families do."""
    names = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}
    return {new: config.get(old) for old, new in names.items() if config.get(old) is not None}


def _usual_exaone(config: Config) -> dict[str, Any]:
    """Names settings as other families do."""
    names = {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"}
    return {new: config.get(old) for old, new in names.items() if config.get(old) is not None}


def _gather_exaone(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Layers under the name that released checkpoints have; transformers saves them under another."""
    return {name.replace("model.layers.", "transformer.h."): rows for name, rows in tensors.items()}


# --- Hunyuan ---

# What models that see have, and what other keys say.
_HUNYUAN_NAMES = (
    "attention_head_dim cla_share_factor class_num dense_list im_start_id im_end_id im_newline_id text_start_id "
    "text_end_id mask_init_id pad_id org_vocab_size pool_type num_media_embeds capacity_factor moe_drop_tokens"
)
_ALPHA = {"alpha", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "type", "rope_type", "rope_theta"}


def _usual_hunyuan(config: Config) -> dict[str, Any]:
    """Dynamic scaling with an alpha is another base, once and for all."""
    for key in _HUNYUAN_NAMES.split():
        config.get(key)
    for key, value in (("norm_type", "rms"), ("use_rotary_pos_emb", True), ("use_cla", False)):
        config.only(key, value)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_dynamic = isinstance(rope, dict) and "dynamic" in (rope.get("type"), rope.get("rope_type"))
    if not is_dynamic or not rope.get("alpha") or not rope.keys() <= _ALPHA:
        return {}
    settings, n = Config(rope, config.path), head_dim(config)
    base = settings.number("rope_theta", config.number("rope_theta", 10000.0)) * settings.number("alpha") ** (n / (n - 2))
    return {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


def _usual_hunyuan_moe(config: Config) -> dict[str, Any]:
    """Numbers that may be given for each layer."""
    values = _usual_hunyuan(config)
    for key in ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert"):
        value = config.get(key)
        if isinstance(value, list):
            if not value or any(x != value[0] for x in value):
                raise UnsupportedError(f"{config.path}: {key} {shown(value)}; known: one for all layers")
            values[key] = value[0]
    values["num_experts_per_tok"] = values.get("moe_topk", config.get("moe_topk"))
    n_ff = config.integer("intermediate_size")
    if values.get("moe_intermediate_size", n_ff) != n_ff or values.get("num_shared_expert", 1) != 1:
        raise UnsupportedError(f"{config.path}: moe_intermediate_size, num_shared_expert; known: as transformers has them")
    return values


def _write_hunyuan_moe(writer: gguf.GGUFWriter, config: Config) -> None:
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("intermediate_size"))
    writer.add_expert_shared_feed_forward_length(config.integer("intermediate_size"))


def _hunyuan_experts(config: Config, i: int) -> Shapes:
    n_embd, n_ff = config.integer("hidden_size"), config.integer("intermediate_size")
    return expert_shapes(config, n_ff) | ffn_shapes(n_embd, n_ff, "_shexp")


# --- Arcee's Trinity ---


def _write_afmoe(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("mup_enabled", True)
    config.get("global_attn_every_n_layers")  # what layer_types is made of
    kinds = config.get("layer_types", ["sliding_attention"])
    if "sliding_attention" not in kinds:
        raise UnsupportedError(f"{config.path}: layer_types {shown(kinds)}; known: sliding_attention in some")
    for key, value in (("score_func", "sigmoid"), ("route_norm", True)):
        config.only(key, value)
    for key in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        config.only(key, 1)
    config.get("load_balance_coeff"), config.get("use_grouped_mm")
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    writer.add_expert_shared_count(config.integer("num_shared_experts"))
    writer.add_leading_dense_block_count(config.integer("num_dense_layers", least=0))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.number("route_scale", 1.0))
    writer.add_expert_weights_norm(True)


def _afmoe_experts(config: Config, i: int) -> Shapes:
    n_embd, n_ff = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    gate: Shapes = {"attn_gate.weight": (config.integer("num_attention_heads") * head_dim(config), n_embd)}
    if i < config.integer("num_dense_layers", least=0):
        return gate | ffn_shapes(n_embd, config.integer("intermediate_size"))
    shared = ffn_shapes(n_embd, config.integer("num_shared_experts") * n_ff, "_shexp")
    return {**gate, **expert_shapes(config, n_ff), **shared, "exp_probs_b.bias": (n_experts(config),)}


def _gather_afmoe(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    named = {f"{name}.bias" if name.endswith(".expert_bias") else name: rows for name, rows in tensors.items()}
    return gather_experts(named, config)


# --- Mellum ---


def _usual_mellum(config: Config) -> dict[str, Any]:
    n_layer = config.integer("num_hidden_layers")
    return {} if config.get("layer_types") else {"layer_types": ["full_attention"] * n_layer}


def _write_mellum(writer: gguf.GGUFWriter, config: Config) -> None:
    kinds = config.several("mlp_layer_types")
    if any(kind != "sparse" for kind in kinds):
        raise UnsupportedError(f"{config.path}: mlp_layer_types {shown(kinds)}; known: sparse in all layers")
    config.only("norm_topk_prob", True)
    config.only("use_sliding_window", True)
    for key in ("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"):
        config.get(key)
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    nested = Config(config.part("rope_parameters"), config.path).part("sliding_attention")
    if nested:
        local = Config(nested, config.path)
        local.only("rope_type", "default")
        writer.add_rope_freq_base_swa(local.number("rope_theta", 10000.0))


def _usual_falcon(config: Config) -> dict[str, Any]:
    """Names settings as other families do. Heads share keys as an architecture of old has it, or a newer."""
    n_head, is_new = config.integer("num_attention_heads"), bool(config.get("new_decoder_architecture"))
    config.only("alibi", False)
    if not is_new:
        config.only("parallel_attn", True)
    for key in ("parallel_attn", "multi_query", "num_kv_heads", "ff_factor"):
        config.get(key)
    n_kv = config.integer("num_kv_heads", n_head) if is_new else 1 if config.get("multi_query") else n_head
    n_ff = config.integer("ffn_hidden_size", 4 * config.integer("hidden_size"))
    return {"num_key_value_heads": n_kv, "intermediate_size": n_ff}


def _falcon_norms(config: Config) -> tuple[str, ...]:
    """Of the newer architecture's layers, attention and the feed-forward part may have one each."""
    n, is_new = config.get("num_ln_in_parallel_attn"), config.get("new_decoder_architecture")
    return ("attn_norm", "attn_norm_2") if is_new and n in (None, 2) else ("attn_norm",)


def _gather_falcon(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Rows of query_key_value stand by heads of keys: the queries that share one, it, and its values."""
    n, n_kv, gathered = head_dim(config), config.integer("num_key_value_heads"), {}
    for name, rows in tensors.items():
        if ".query_key_value." in name and rows.shape[0] % (n * n_kv) == 0:
            order = np.arange(rows.shape[0]).reshape(n_kv, -1, n)
            parts = (order[:, :-2], order[:, -2], order[:, -1])
            rows = PickedRows(rows, np.concatenate([part.reshape(-1) for part in parts]), rows.shape)
        gathered[name] = rows
    return gathered


def _only(**values: Any) -> Callable[[gguf.GGUFWriter, Config], None]:
    """Only these values of keys."""

    def write(writer: gguf.GGUFWriter, config: Config) -> None:
        for key, value in values.items():
            config.only(key, value)

    return write


def _write_neox(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("rotary_emb_base", 10000)
    writer.add_parallel_residual(bool(config.get("use_parallel_residual", True)))


def _gather_neox(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Rows of query_key_value stand head by head, each one's query, key and value."""
    n, gathered = head_dim(config), {}
    for name, rows in tensors.items():
        if name.endswith((".attention.bias", ".attention.masked_bias")):
            continue  # old checkpoints store the mask
        if ".query_key_value." in name:
            n_rows = rows.shape[0]
            order = np.arange(n_rows).reshape(-1, 3, n).swapaxes(0, 1).reshape(-1)
            rows = PickedRows(rows, order, rows.shape)
        gathered[name] = rows
    return gathered


def _usual_gpt2(config: Config) -> dict[str, Any]:
    for key in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.only(key, key == "scale_attn_weights")
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    names |= {"n_positions": "max_position_embeddings"}
    values: dict[str, Any] = {new: config.integer(old) for old, new in names.items()}
    for key in ("n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_proj_to_labels"):
        config.get(key)
    n_ff, n_head = config.integer("n_inner", 4 * values["hidden_size"]), values["num_attention_heads"]
    return values | {"intermediate_size": n_ff, "num_key_value_heads": n_head}


def _gather_gpt2(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Matrices are transposed."""
    gathered: dict[str, Rows] = {}
    for name, rows in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # old checkpoints store the mask
        if name.endswith(".weight") and ".c_" in name:
            rows = TransposedRows(rows)
        gathered[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = rows
    return gathered


FAMILIES: tuple[Family, ...] = (
    decoder(
        ("GemmaForCausalLM",),
        MODEL.GEMMA,
        Traits(
            act="gelu_pytorch_tanh",
            norm_shift=1.0,
            biases=_if("attention_bias", *ATTENTION),
            write=_only(use_bidirectional_attention=None),
        ),
        usual=_usual_gemma,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        head_dim=256,
    ),
    decoder(
        ("ExaoneForCausalLM",),
        MODEL.EXAONE,
        Traits(biases=_attention_and_ffn),
        _gather_exaone,
        _usual_exaone,
        num_key_value_heads=8,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    ),
    decoder(
        ("AfmoeForCausalLM",),
        MODEL.AFMOE,
        Traits(
            norms=_SANDWICH,
            qk_norm=lambda config: "head",
            biases=_if("attention_bias", *ATTENTION),
            windows="types 4",
            experts=_afmoe_experts,
            write=_write_afmoe,
        ),
        _gather_afmoe,
        mup_enabled=False,
        head_dim=128,
        num_dense_layers=1,
        num_shared_experts=2,
        sliding_window=1024,
        rms_norm_eps=1e-5,
    ),
    decoder(
        ("MellumForCausalLM",),
        MODEL.QWEN3MOE,
        Traits(
            qk_norm=lambda config: "head",
            biases=_if("attention_bias", *ATTENTION),
            windows="types 4",
            rope=_BY_KIND,
            experts=lambda config, i: expert_shapes(config, config.integer("moe_intermediate_size")),
            write=_write_mellum,
        ),
        without_further_layers,
        _usual_mellum,
        "mellum",
        head_dim=128,
        sliding_window=1024,
    ),
    decoder(
        ("HunYuanMoEV1ForCausalLM",),
        MODEL.HUNYUAN_MOE,
        Traits(
            qk_norm=lambda config: "head",
            biases=_if("attention_bias", *ATTENTION),
            experts=_hunyuan_experts,
            write=_write_hunyuan_moe,
        ),
        usual=_usual_hunyuan_moe,
    ),
    decoder(("Gemma2ForCausalLM",), MODEL.GEMMA2, Traits(**_GEMMA, windows="types 2", write=_write_gemma), **GEMMA, **CAPS),
    decoder(
        ("Gemma3ForCausalLM",),
        MODEL.GEMMA3,
        Traits(**_GEMMA3, write=_write_gemma3),
        **GEMMA,
    ),
    replace(
        decoder(
            ("Gemma3TextModel",),
            MODEL.GEMMA_EMBEDDING,
            Traits(**_GEMMA3, write=partial(_write_gemma3, bidirectional=True)),
            **GEMMA,
        ),
        special=with_projections,
    ),
    decoder(
        ("GptOssForCausalLM",),
        MODEL.GPT_OSS,
        Traits(
            norms=("attn_norm", "post_attention_norm"),
            biases=_if("attention_bias", *ATTENTION),
            windows="types 2",
            experts=_gpt_oss_experts,
            write=_write_gpt_oss,
            whole_yarn=False,
        ),
        _gather_gpt_oss,
        attention_bias=True,
        head_dim=64,
        sliding_window=128,
    ),
    decoder(
        ("Ministral3ForCausalLM",),
        MODEL.MISTRAL3,
        Traits(
            interleaved=True,
            windows="all",
            rope=("llama_4_scaling_beta", "max_position_embeddings"),
            write=_write_ministral,
        ),
        head_dim=128,
    ),
    decoder(
        ("Phi3ForCausalLM",),
        MODEL.PHI3,
        Traits(fused=("qkv", "gate_up"), windows="all", rope=(*_PARTIAL, "longrope"), write=_write_phi3),
    ),
    decoder(
        ("GraniteForCausalLM",),
        MODEL.GRANITE,
        Traits(interleaved=True, biases=_attention_and_ffn, write=_write_granite),
    ),
    decoder(
        ("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM"),
        MODEL.MIMO2,
        Traits(
            interleaved=True,
            windows="types 4",
            biases=_attention_and_ffn,
            experts=_granite_swa_experts,
            write=_write_granite_swa,
        ),
        _gather_granite_swa,
        _usual_granite_swa,
        "granite_swa",
        sliding_window=128,
    ),
    decoder(
        ("GraniteMoeForCausalLM",),
        MODEL.GRANITE_MOE,
        Traits(
            interleaved=True,
            biases=_if("attention_bias", *ATTENTION),
            experts=lambda config, i: expert_shapes(config, config.integer("intermediate_size")),
            write=_write_granite_moe,
        ),
        _gather_granite_moe,
    ),
    decoder(
        ("MiniCPMForCausalLM",),
        MODEL.MINICPM,
        Traits(interleaved=True, biases=_if("attention_bias", *ATTENTION), rope=("longrope",), write=_write_minicpm),
        tie_word_embeddings=True,
    ),
    decoder(
        ("SmolLM3ForCausalLM",),
        MODEL.SMOLLM3,
        Traits(interleaved=True, biases=_attention_and_ffn, write=_write_smollm3),
        tie_word_embeddings=True,
        use_sliding_window=False,
    ),
    decoder(
        ("Olmo2ForCausalLM",),
        MODEL.OLMO2,
        Traits(norms=_AFTER, qk_norm=lambda config: "all", write=_only(attention_bias=False)),
    ),
    decoder(
        ("Olmo3ForCausalLM",),
        MODEL.OLMO2,
        Traits(
            norms=_AFTER, qk_norm=lambda config: "all", windows="types 4", rope=_BY_KIND, write=_only(attention_bias=False)
        ),
        sliding_window=4096,
    ),
    decoder(
        ("Exaone4ForCausalLM",),
        MODEL.EXAONE4,
        Traits(norms=_AFTER, qk_norm=lambda config: "head", windows="types 4"),
    ),
    decoder(
        ("HunYuanDenseV1ForCausalLM",),
        MODEL.HUNYUAN_DENSE,
        Traits(qk_norm=lambda config: "head", biases=_if("attention_bias", *ATTENTION)),
        usual=_usual_hunyuan,
    ),
    decoder(
        ("Ernie4_5ForCausalLM",),
        MODEL.ERNIE4_5,
        Traits(biases=_if("use_bias", *ATTENTION, *FFN)),
        tie_word_embeddings=True,
        head_dim=128,
    ),
    decoder(
        ("Ernie4_5_MoeForCausalLM",),
        MODEL.ERNIE4_5_MOE,
        Traits(experts=mixture(), write=_write_ernie_moe),
        without_further_layers,
        _usual_ernie_moe,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    decoder(
        ("Dots1ForCausalLM",),
        MODEL.DOTS1,
        Traits(
            qk_norm=lambda config: "head",
            biases=_if("attention_bias", *ATTENTION),
            experts=mixture(),
            write=write_mixture("sigmoid", "noaux_tc"),
        ),
        without_further_layers,
        _usual_dots,
        norm_topk_prob=False,
        sliding_window=4096,
        max_window_layers=62,
    ),
    decoder(
        ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
        MODEL.EXAONE_MOE,
        Traits(qk_norm=lambda config: "head", windows="types 4", experts=mixture(), write=write_mixture("sigmoid")),
        without_further_layers,
        _usual_exaone_moe,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        routed_scaling_factor=2.5,
        sliding_window=4096,
    ),
    decoder(
        ("BailingMoeV2ForCausalLM",),
        MODEL.BAILINGMOE2,
        Traits(
            qk_norm=lambda config: "head",
            fused=("qkv",),
            rope=_PARTIAL,
            experts=mixture(),
            write=write_mixture("sigmoid"),
        ),
        _gather_bailing,
        _usual_bailing,
    ),
    decoder(
        ("MiniMaxM2ForCausalLM",),
        MODEL.MINIMAXM2,
        Traits(qk_norm=lambda config: "all", rope=_PARTIAL, experts=mixture(), write=write_mixture("sigmoid")),
        without_further_layers,
        _usual_minimax,
        head_dim=128,
        rope_theta=5000000.0,
    ),
    decoder(
        ("DeepseekForCausalLM",),
        MODEL.DEEPSEEK,
        Traits(
            interleaved=True,
            experts=mixture(bias=False),
            write=_write_deepseek,
        ),
        norm_topk_prob=False,
    ),
    decoder(
        ("Glm4ForCausalLM",),
        MODEL.GLM4,
        Traits(norms=_SANDWICH, fused=("gate_up",), biases=_if("attention_bias", *QKV), rope=_PARTIAL),
        without_further_layers,
        attention_bias=True,
        head_dim=128,
    ),
    decoder(
        ("Glm4MoeForCausalLM",),
        MODEL.GLM4_MOE,
        Traits(
            norms=("attn_norm", "post_attention_norm"),
            qk_norm=lambda config: "head" if config.get("use_qk_norm") else "",
            biases=_if("attention_bias", *QKV),
            rope=_PARTIAL,
            experts=mixture(),
            write=write_mixture("sigmoid"),
        ),
        without_further_layers,
        first_k_dense_replace=1,
        n_shared_experts=1,
        head_dim=128,
    ),
    decoder(
        ("SeedOssForCausalLM",),
        MODEL.SEED_OSS,
        Traits(
            norms=("attn_norm", "post_attention_norm"),
            biases=lambda config: (
                *(QKV if config.get("attention_bias") else ()),
                *(("attn_output",) if config.get("attention_out_bias") else ()),
                *(FFN if config.get("mlp_bias") else ()),
            ),
        ),
        attention_bias=True,
        head_dim=128,
    ),
    decoder(
        ("ArceeForCausalLM",),
        MODEL.ARCEE,
        Traits(act="relu2", gated=False, interleaved=True, biases=_attention_and_ffn),
        hidden_act="relu2",
    ),
    decoder(
        ("InternLM3ForCausalLM",),
        MODEL.LLAMA,
        Traits(interleaved=True, biases=_attention_and_ffn),
        usual=_usual_internlm3,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        head_dim=128,
    ),
    decoder(
        ("Jais2ForCausalLM",),
        MODEL.JAIS2,
        Traits(**_PLAIN, act="relu2", eps="layer_norm_eps", biases=_attention_and_ffn),
        hidden_act="relu2",
        attention_bias=True,
        mlp_bias=True,
        layer_norm_eps=1e-5,
    ),
    decoder(
        ("NemotronForCausalLM",),
        MODEL.NEMOTRON,
        Traits(**_PLAIN, act="relu2", eps="norm_eps", norm_shift=1.0, rope=_PARTIAL, biases=_attention_and_ffn),
        hidden_act="relu2",
        norm_eps=1e-5,
    ),
    decoder(
        ("Starcoder2ForCausalLM",),
        MODEL.STARCODER2,
        Traits(
            **_PLAIN,
            act="gelu_pytorch_tanh",
            eps="norm_epsilon",
            windows="all",
            biases=_if("use_bias", *ATTENTION, "ffn_up", "ffn_down"),
            write=_only(mlp_type="default", norm_type="layer_norm", use_bias=True),
        ),
        use_bias=True,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-5,
        num_key_value_heads=2,
    ),
    decoder(
        ("CohereForCausalLM",),
        MODEL.COMMAND_R,
        Traits(
            norms=("attn_norm",),
            qk_norm=lambda config: "heads" if config.get("use_qk_norm") else "",
            eps="layer_norm_eps",
            biases=_if("attention_bias", *QKV),
            write=_write_cohere,
        ),
        tie_word_embeddings=True,
        rope_theta=500000.0,
        layer_norm_eps=1e-5,
    ),
    decoder(
        ("Cohere2ForCausalLM",),
        MODEL.COHERE2,
        Traits(
            norms=("attn_norm",),
            eps="layer_norm_eps",
            biases=_if("attention_bias", *ATTENTION),
            windows="types 4",
            write=_write_cohere2,
        ),
        tie_word_embeddings=True,
        sliding_window=4096,
        head_dim=128,
        layer_norm_eps=1e-5,
    ),
    decoder(
        ("StableLmForCausalLM",),
        MODEL.STABLELM,
        Traits(
            norms=lambda config: ("attn_norm",) if config.get("use_parallel_residual") else ("attn_norm", "ffn_norm"),
            norm_biases=True,
            qk_norm=lambda config: "heads" if config.get("qk_layernorm") else "",
            eps="layer_norm_eps",
            biases=_if("use_qkv_bias", *QKV),
            rope=_PARTIAL,
            write=_write_stablelm,
        ),
        _gather_stablelm,
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.25,
    ),
    decoder(
        ("FalconForCausalLM",),
        MODEL.FALCON,
        Traits(
            **_PLAIN,
            act="gelu",
            act_key="activation",
            norms=_falcon_norms,
            eps="layer_norm_epsilon",
            fused=("qkv",),
            biases=_if("bias", "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            write=lambda writer, config: writer.add_tensor_data_layout("jploski"),
        ),
        _gather_falcon,
        _usual_falcon,
        activation="gelu",
        multi_query=True,
        parallel_attn=True,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    decoder(
        ("GPTNeoXForCausalLM",),
        MODEL.GPTNEOX,
        Traits(
            **_PLAIN,
            act="gelu",
            eps="layer_norm_eps",
            fused=("qkv",),
            biases=lambda config: (*(("attn_qkv", "attn_output") if config.get("attention_bias") else ()), *FFN),
            rope=_PARTIAL,
            write=_write_neox,
        ),
        _gather_neox,
        hidden_act="gelu",
        attention_bias=True,
        layer_norm_eps=1e-5,
        rotary_pct=0.25,
    ),
    decoder(
        ("PhiForCausalLM",),
        MODEL.PHI2,
        Traits(
            **_PLAIN,
            act="gelu_new",
            norms=("attn_norm",),
            eps="layer_norm_eps",
            biases=lambda config: (*ATTENTION, *FFN),
            output_bias=True,
            rope=_PARTIAL,
            write=_only(qk_layernorm=False),
        ),
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.5,
    ),
    decoder(
        ("GPT2LMHeadModel",),
        MODEL.GPT2,
        Traits(
            **_PLAIN,
            act="gelu_new",
            act_key="activation_function",
            eps="layer_norm_epsilon",
            fused=("qkv",),
            biases=lambda config: ("attn_qkv", "attn_output", *FFN),
            positions=True,
        ),
        _gather_gpt2,
        _usual_gpt2,
        tie_word_embeddings=True,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        n_positions=1024,
    ),
)
