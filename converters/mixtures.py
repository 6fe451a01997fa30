"""Families of mixtures of experts, as rows of what sets them apart from Llama (`Traits`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import gguf

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Config, Rows, StridedRows, TransposedRows, shown
from .decoder import (
    ATTENTION,
    BY_KIND,
    MODEL,
    PARTIAL,
    QKV,
    SANDWICH,
    Traits,
    biases_if,
    biases_of_all,
    decoder,
    without_further_layers,
)
from .decoders import usual_hunyuan, write_granite
from .experts import expert_shapes, gather_experts, leading_dense, n_experts, write_expert_hparams
from .family import Family, Shapes, ffn_shapes, head_dim, plain_base, require_rope
from .quantized import BlockRows


def _write_gpt_oss(writer: gguf.GGUFWriter, config: Config) -> None:
    require_rope(config)
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
    """Experts' gates and ups take turns. Official checkpoints have matrices in blocks, row by row; those that transformers
    saves are transposed."""
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


def _usual_granite_swa(config: Config) -> dict[str, Any]:
    """A rotary embedding for the layers that have one; windows in all but every fourth layer, from the first."""
    n_layer, rope = config.integer("num_hidden_layers"), config.part("rope_parameters")
    values: dict[str, Any] = {}
    if config.get("layer_types") is None:
        values["layer_types"] = ["sliding_attention" if i % 4 else "full_attention" for i in range(n_layer)]
    bases = [base for base in config.several("layer_rope_theta") if base]
    if any(base != bases[0] for base in bases):
        raise UnsupportedError(f"{config.path}: layer_rope_theta has several values but 0; known: one")
    return values | ({"rope_parameters": rope | {"rope_theta": bases[0]}} if bases else {})


def _write_granite_swa(writer: gguf.GGUFWriter, config: Config) -> None:
    write_granite(writer, config)
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
    write_granite(writer, config)
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
    kinds = ["sparse" if kind else "dense" for kind in config.several("is_moe_layer")]
    named = {} if config.get("is_moe_layer") is None else {"mlp_layer_types": kinds}
    return {"n_shared_experts": config.integer("num_shared_experts", 1, least=0), **named}


def _usual_bailing(config: Config) -> dict[str, Any]:
    n_ff, n_shared = config.integer("moe_intermediate_size"), config.integer("num_shared_experts", 0, least=0)
    for key, known in _BAILING.items():
        config.only(key, known)
    if config.get("rope_theta", config.part("rope_parameters").get("rope_theta")) is None:  # programs of it differ
        raise ConversionError(f"{config.path}: rope_theta missing: nothing says how positions are turned")
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
    kinds = config.several("attn_type_list")
    if any(kind != 1 for kind in kinds):
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


def _usual_hunyuan_moe(config: Config) -> dict[str, Any]:
    """Numbers that may be given for each layer."""
    values = usual_hunyuan(config)
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


def _write_afmoe(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("mup_enabled", True)
    config.get("global_attn_every_n_layers")  # what layer_types is made of
    kinds = config.get("layer_types", ["sliding_attention"])  # `write_windows` says which
    if not isinstance(kinds, list) or "sliding_attention" not in kinds:
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


def _usual_mellum(config: Config) -> dict[str, Any]:
    n_layer = config.integer("num_hidden_layers")
    return {} if config.get("layer_types") else {"layer_types": ["full_attention"] * n_layer}


def _write_mellum(writer: gguf.GGUFWriter, config: Config) -> None:
    require_rope(config)
    kinds = config.several("mlp_layer_types")
    if any(kind != "sparse" for kind in kinds):
        raise UnsupportedError(f"{config.path}: mlp_layer_types {shown(kinds)}; known: sparse in all layers")
    config.only("norm_topk_prob", True)
    config.only("use_sliding_window", True)
    for key in ("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"):
        config.get(key)
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    base = plain_base(config, "sliding_attention", 10000.0)
    if base is not None:
        writer.add_rope_freq_base_swa(base)


FAMILIES: tuple[Family, ...] = (
    decoder(
        ("AfmoeForCausalLM",),
        MODEL.AFMOE,
        Traits(
            norms=SANDWICH,
            qk_norm=lambda config: "head",
            biases=biases_if("attention_bias", *ATTENTION),
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
            biases=biases_if("attention_bias", *ATTENTION),
            windows="types 4",
            rope=BY_KIND,
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
            biases=biases_if("attention_bias", *ATTENTION),
            experts=_hunyuan_experts,
            write=_write_hunyuan_moe,
        ),
        usual=_usual_hunyuan_moe,
    ),
    decoder(
        ("GptOssForCausalLM",),
        MODEL.GPT_OSS,
        Traits(
            norms=("attn_norm", "post_attention_norm"),
            biases=biases_if("attention_bias", *ATTENTION),
            windows="types 2",
            experts=_gpt_oss_experts,
            write=_write_gpt_oss,
            whole_yarn=False,
        ),
        _gather_gpt_oss,
        attention_bias=True,
        head_dim=64,
        sliding_window=128,
        rope_theta=150000.0,
    ),
    decoder(
        ("GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM"),
        MODEL.MIMO2,
        Traits(
            interleaved=True,
            windows="types 4",
            biases=biases_of_all,
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
            biases=biases_if("attention_bias", *ATTENTION),
            experts=lambda config, i: expert_shapes(config, config.integer("intermediate_size")),
            write=_write_granite_moe,
        ),
        _gather_granite_moe,
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
            biases=biases_if("attention_bias", *ATTENTION),
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
            rope=PARTIAL,
            experts=mixture(),
            write=write_mixture("sigmoid"),
        ),
        _gather_bailing,
        _usual_bailing,
    ),
    decoder(
        ("MiniMaxM2ForCausalLM",),
        MODEL.MINIMAXM2,
        Traits(qk_norm=lambda config: "all", rope=PARTIAL, experts=mixture(), write=write_mixture("sigmoid")),
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
        ("Glm4MoeForCausalLM",),
        MODEL.GLM4_MOE,
        Traits(
            norms=("attn_norm", "post_attention_norm"),
            qk_norm=lambda config: "head" if config.get("use_qk_norm") else "",
            biases=biases_if("attention_bias", *QKV),
            rope=PARTIAL,
            experts=mixture(),
            write=write_mixture("sigmoid"),
        ),
        without_further_layers,
        first_k_dense_replace=1,
        n_shared_experts=1,
        head_dim=128,
        partial_rotary_factor=0.5,
    ),
)
