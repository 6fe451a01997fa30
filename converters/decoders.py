"""Families of dense decoders that differ from Llama in a few ways: each is a row of what differs (`Traits`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf

from ggpy.errors import UnsupportedError

from .checkpoint import Config, Rows, shown
from .decoder import (
    ATTENTION,
    BY_KIND,
    FFN,
    MODEL,
    PARTIAL,
    QKV,
    SANDWICH,
    Traits,
    biases_if,
    biases_of_all,
    decoder,
    only,
    without_further_layers,
)
from .family import Family, head_dim, plain_base, require_rope, rope_parameters, write_clip

_AFTER = ("post_attention_norm", "post_ffw_norm")


def _write_ministral(writer: gguf.GGUFWriter, config: Config) -> None:
    require_rope(config)
    rope = rope_parameters(config, "llama_4_scaling_beta", "max_position_embeddings")
    if rope.get("llama_4_scaling_beta"):
        if rope.get("rope_type") != "yarn":
            raise UnsupportedError(f"{config.path}: llama_4_scaling_beta without YaRN's original context")
        writer.add_attn_temperature_scale(rope.number("llama_4_scaling_beta"))


def write_granite(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attention_scale(config.number("attention_multiplier", 1.0))
    writer.add_embedding_scale(config.number("embedding_multiplier", 1.0))
    writer.add_residual_scale(config.number("residual_multiplier", 1.0))
    writer.add_logit_scale(config.number("logits_scaling", 1.0, least=1e-30))


def _write_minicpm(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_embedding_scale(config.number("scale_emb"))
    writer.add_residual_scale(config.number("scale_depth") / math.sqrt(config.integer("num_hidden_layers")))
    writer.add_logit_scale(config.integer("hidden_size") / config.number("dim_model_base", least=1e-30))
    config.get("mup_denominator")  # a number of training


def _write_smollm3(writer: gguf.GGUFWriter, config: Config) -> None:
    n, every = (
        config.integer("num_hidden_layers"),
        [int((i + 1) % 4 != 0) for i in range(config.integer("num_hidden_layers"))],
    )
    config.only("no_rope_layer_interval", 4)
    kept = config.get("no_rope_layers", every)
    if not isinstance(kept, list) or kept[:n] != every:
        raise UnsupportedError(f"{config.path}: no_rope_layers {shown(kept)}; known: every fourth")


def _write_olmo3(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("attention_bias", False)
    base = rope_parameters(config, *BY_KIND).number("rope_theta")
    local = plain_base(config, "sliding_attention", base)
    if local not in (None, base):
        writer.add_rope_freq_base_swa(local)


def _write_phi3(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("attention_bias", False)
    config.get("original_max_position_embeddings")  # says something for LongRoPE alone, which asks for it


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


# What models that see have, and what other keys say.
_HUNYUAN_NAMES = (
    "attention_head_dim cla_share_factor class_num dense_list im_start_id im_end_id im_newline_id text_start_id "
    "text_end_id mask_init_id pad_id org_vocab_size pool_type num_media_embeds capacity_factor moe_drop_tokens"
)
_ALPHA = {"alpha", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "type", "rope_type", "rope_theta"}


def usual_hunyuan(config: Config) -> dict[str, Any]:
    """Dynamic scaling with an alpha is another base, once and for all."""
    for key in _HUNYUAN_NAMES.split():
        config.get(key)
    for key, value in (("norm_type", "rms"), ("use_rotary_pos_emb", True), ("use_cla", False)):
        config.only(key, value)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    is_dynamic = isinstance(rope, dict) and "dynamic" in (rope.get("type"), rope.get("rope_type"))
    n = head_dim(config)
    if not is_dynamic or not rope.get("alpha") or not rope.keys() <= _ALPHA or n <= 2:
        return {}
    settings = Config(rope, config.path)
    factor = settings.number("alpha", least=1e-30) ** (n / (n - 2))
    base = settings.number("rope_theta", config.number("rope_theta", 10000.0)) * factor
    return {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


FAMILIES: tuple[Family, ...] = (
    decoder(
        ("ExaoneForCausalLM",),
        MODEL.EXAONE,
        Traits(biases=biases_of_all),
        _gather_exaone,
        _usual_exaone,
        num_key_value_heads=8,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
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
        Traits(fused=("qkv", "gate_up"), windows="all", rope=(*PARTIAL, "longrope"), write=_write_phi3),
    ),
    decoder(
        ("GraniteForCausalLM",),
        MODEL.GRANITE,
        Traits(interleaved=True, biases=biases_of_all, write=write_granite),
    ),
    decoder(
        ("MiniCPMForCausalLM",),
        MODEL.MINICPM,
        Traits(interleaved=True, biases=biases_if("attention_bias", *ATTENTION), rope=("longrope",), write=_write_minicpm),
        tie_word_embeddings=True,
    ),
    decoder(
        ("SmolLM3ForCausalLM",),
        MODEL.SMOLLM3,
        Traits(interleaved=True, biases=biases_of_all, write=_write_smollm3),
        tie_word_embeddings=True,
        use_sliding_window=False,
        rope_theta=2000000.0,
    ),
    decoder(
        ("OlmoForCausalLM",),
        MODEL.OLMO,
        Traits(
            eps="layer_norm_eps",
            norms=(),
            interleaved=True,
            biases=biases_if("attention_bias", *ATTENTION),
            write=write_clip,
        ),
        usual=lambda config: {"layer_norm_eps": 1e-5},
    ),
    decoder(
        ("Olmo2ForCausalLM",),
        MODEL.OLMO2,
        Traits(norms=_AFTER, qk_norm=lambda config: "all", write=only(attention_bias=False)),
    ),
    decoder(
        ("Olmo3ForCausalLM",),
        MODEL.OLMO2,
        Traits(norms=_AFTER, qk_norm=lambda config: "all", windows="types 4", rope=BY_KIND, write=_write_olmo3),
        sliding_window=4096,
        rope_theta=500000.0,
    ),
    decoder(
        ("Exaone4ForCausalLM",),
        MODEL.EXAONE4,
        Traits(norms=_AFTER, qk_norm=lambda config: "head", windows="types 4"),
    ),
    decoder(
        ("HunYuanDenseV1ForCausalLM",),
        MODEL.HUNYUAN_DENSE,
        Traits(qk_norm=lambda config: "head", biases=biases_if("attention_bias", *ATTENTION)),
        usual=usual_hunyuan,
    ),
    decoder(
        ("Ernie4_5ForCausalLM",),
        MODEL.ERNIE4_5,
        Traits(biases=biases_if("use_bias", *ATTENTION, *FFN)),
        tie_word_embeddings=True,
        head_dim=128,
        rope_theta=500000.0,
    ),
    decoder(
        ("Glm4ForCausalLM",),
        MODEL.GLM4,
        Traits(norms=SANDWICH, fused=("gate_up",), biases=biases_if("attention_bias", *QKV), rope=PARTIAL),
        without_further_layers,
        attention_bias=True,
        head_dim=128,
        partial_rotary_factor=0.5,
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
        Traits(act="relu2", gated=False, interleaved=True, biases=biases_of_all),
        hidden_act="relu2",
    ),
    decoder(
        ("InternLM3ForCausalLM",),
        MODEL.LLAMA,
        Traits(interleaved=True, biases=biases_of_all),
        usual=_usual_internlm3,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        head_dim=128,
    ),
)
