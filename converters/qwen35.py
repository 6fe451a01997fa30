"""Qwen 3.5 and Qwen3-Next: gated delta rules in most layers, attention with gated results in the others.

GGUF has values ready for use: norms' weights are 1 more than the checkpoint's, and decays are -e^A_log. In Qwen 3.5's files
the heads of the delta rule stand in tiles: those that share the first head of keys are the first of each tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import ChangedRows, Checkpoint, Config, PickedRows, Rows
from .experts import expert_shapes, gather_experts, write_expert_hparams
from .family import (
    Family,
    Shapes,
    attention_shapes,
    ffn_shapes,
    head_dim,
    model_shapes,
    rope_parameters,
    text_part,
    write_decoder_hparams,
)

# Settings of rope beyond those of other families: the part of a head that is rotated, and positions of images.
ROPE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
# How states are kept in memory, and how many layers predict further tokens (MTP), of which the tensors tell: checkpoints
# that were trained further often lack them.
IGNORED = ("mamba_ssm_dtype", "mtp_num_hidden_layers")
# The parts of such a layer that others don't have: GGUF's names for them.
NEXTN = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}
MTP_LAYER = "mtp.layers."


def recurrent(config: Config) -> list[bool]:
    """Which layers have delta rules."""
    n_layer = config.integer("num_hidden_layers")
    every = config.integer("full_attention_interval", 4)
    if config.get("layer_types") is None:
        return [(i + 1) % every != 0 for i in range(n_layer)]
    kinds = config.words("layer_types", ("linear_attention", "full_attention"), n_layer)
    return [kind == "linear_attention" for kind in kinds]


def interval(config: Config) -> int:
    """Every how many layers there is attention, which is all that GGUF can say."""
    kinds = recurrent(config)
    every = kinds.index(False) + 1 if False in kinds else len(kinds) + 1
    if kinds != [(i + 1) % every != 0 for i in range(len(kinds))]:
        raise UnsupportedError(f"{config.path}: layer_types; known: attention at the end of every so many layers")
    return every


def heads(config: Config) -> tuple[int, int, int, int]:
    """Heads of keys, heads of values, and their values."""
    n_k, n_v = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    if n_v % n_k:
        raise ConversionError(f"{config.path}: {n_v} heads of values can't share {n_k} heads of keys")
    dims = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
    if dims[0] != dims[1]:
        raise UnsupportedError(f"{config.path}: linear_value_head_dim {dims[1]}; known: {dims[0]}, as of keys")
    return n_k, n_v, *dims


def usual(config: Config) -> dict[str, Any]:
    """The text part, without what rope's settings have beyond those of other families."""
    part = text_part(config)
    config = config.replaced(**part)
    for key in IGNORED:
        config.get(key)
    rope = rope_parameters(config, *ROPE)
    given = {key: config.get(key, rope.get(key)) for key in ROPE}
    scaling = {key: value for key, value in rope.values.items() if key not in ROPE}
    return part | {"rope_parameters": scaling, "rope_scaling": None} | given


def with_nextn(checkpoint: Checkpoint, family: Family) -> Family:
    """The family of checkpoints that have layers which predict further tokens; transformers leaves these aside."""
    names = [name.removeprefix(MTP_LAYER) for name in checkpoint.tensors if name.startswith(MTP_LAYER)]
    n = len({name.split(".")[0] for name in names})
    return replace(family, usual=lambda config: usual(config) | {"nextn_layers": n}) if n else family


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("attention_bias", False)
    config.only("attn_output_gate", True)
    n_layer, n_nextn = config.integer("num_hidden_layers"), config.integer("nextn_layers", 0, least=0)
    write_decoder_hparams(writer, config.replaced(layer_types=None, num_hidden_layers=n_layer + n_nextn))
    if n_nextn:
        config.only("nextn_layers", 1)
        config.only("mtp_use_dedicated_embeddings", False)
        writer.add_nextn_predict_layers(n_nextn)
    n_k, n_v, dim_k, dim_v = heads(config)
    writer.add_rope_dimension_count(int(head_dim(config) * config.number("partial_rotary_factor", 0.25)))
    writer.add_ssm_conv_kernel(config.integer("linear_conv_kernel_dim", least=2))
    writer.add_ssm_state_size(dim_k)
    writer.add_ssm_group_count(n_k)
    writer.add_ssm_time_step_rank(n_v)
    writer.add_ssm_inner_size(n_v * dim_v)
    writer.add_full_attention_interval(interval(config))


def write_qwen35_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("mrope_interleaved", True)
    write_hparams(writer, config)
    # Text has the same position in all sections, so that which they are is of no consequence.
    writer.add_rope_dimension_sections([*config.get("mrope_section", [11, 11, 10]), 0])


def _moe(write: Callable[[gguf.GGUFWriter, Config], None]) -> Callable[[gguf.GGUFWriter, Config], None]:
    def write_moe_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
        config.only("decoder_sparse_step", 1)
        config.only("mlp_only_layers", [])
        config.only("norm_topk_prob", True)
        n_ff = config.integer("intermediate_size", config.integer("moe_intermediate_size"))
        write(writer, config.replaced(intermediate_size=n_ff))
        write_expert_hparams(writer, config)
        writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
        writer.add_expert_shared_feed_forward_length(config.integer("shared_expert_intermediate_size"))

    return write_moe_hparams


def _shapes(config: Config, feed_forward: Shapes, alpha_beta: Callable[[int, int], Shapes]) -> Shapes:
    n_embd, n = config.integer("hidden_size"), head_dim(config)
    n_k, n_v, dim_k, dim_v = heads(config)
    attention = attention_shapes(config) | {"attn_q_norm.weight": (n,), "attn_k_norm.weight": (n,)}
    attention["attn_q.weight"] = (2 * attention["attn_q.weight"][0], n_embd)
    norms: Shapes = {"attn_norm.weight": (n_embd,), "post_attention_norm.weight": (n_embd,)}
    del attention["ffn_norm.weight"]
    n_conv = 2 * n_k * dim_k + n_v * dim_v
    rule: Shapes = {
        "attn_qkv.weight": (n_conv, n_embd),
        "attn_gate.weight": (n_v * dim_v, n_embd),
        "ssm_conv1d.weight": (n_conv, config.integer("linear_conv_kernel_dim", least=2)),
        "ssm_dt.bias": (n_v,),
        "ssm_a": (n_v,),
        **alpha_beta(n_v, n_embd),
        "ssm_norm.weight": (dim_v,),
        "ssm_out.weight": (n_embd, n_v * dim_v),
    }
    kinds = recurrent(config)
    shapes = model_shapes(config, lambda i: norms | (rule if kinds[i] else attention) | feed_forward)
    if config.integer("nextn_layers", 0, least=0):
        own: Shapes = {f"nextn.{name}.weight": (n_embd,) for name in NEXTN.values()}
        own["nextn.eh_proj.weight"] = (n_embd, 2 * n_embd)
        shapes |= {f"blk.{len(kinds)}.{name}": shape for name, shape in (norms | attention | feed_forward | own).items()}
    return shapes


def _two(n: int, n_embd: int) -> Shapes:
    return {"ssm_alpha.weight": (n, n_embd), "ssm_beta.weight": (n, n_embd)}


def _one(n: int, n_embd: int) -> Shapes:
    return {"ssm_ba.weight": (2 * n, n_embd)}


def _dense(config: Config) -> Shapes:
    return ffn_shapes(config.integer("hidden_size"), config.integer("intermediate_size"))


def _experts(config: Config) -> Shapes:
    n_embd = config.integer("hidden_size")
    block = expert_shapes(config, config.integer("moe_intermediate_size"))
    block |= ffn_shapes(n_embd, config.integer("shared_expert_intermediate_size"), "_shexp")
    return block | {"ffn_gate_inp_shexp.weight": (1, n_embd)}


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Stack the experts, split what Qwen3-Next has joined, drop what sees, and put the layer that predicts further tokens
    behind the others."""
    behind = config.integer("num_hidden_layers")
    kept = {
        _placed(name.replace("model.language_model.", "model."), behind): rows
        for name, rows in tensors.items()
        if not name.startswith("model.visual.")
    }
    gathered: dict[str, Rows] = {}
    for name, rows in gather_experts(kept, config).items():
        if name.endswith(".conv1d.weight") and len(rows.shape) == 3 and rows.shape[1] == 1:
            rows = PickedRows(rows, np.arange(rows.shape[0]), (rows.shape[0], rows.shape[2]))
        if name.endswith(".in_proj_qkvz.weight"):
            for part, order in zip(("qkv", "z"), _qkv_and_z(name, rows, config), strict=True):
                picked = PickedRows(rows, order, (len(order), rows.shape[1]))
                gathered[name.replace("in_proj_qkvz", f"in_proj_{part}")] = picked
        else:
            gathered[name.replace(".dt_bias", ".dt_proj.bias")] = rows
    return gathered


def _placed(name: str, behind: int) -> str:
    """The name of an MTP layer's tensor as that of a layer behind others; any other name as it is."""
    if name.startswith(MTP_LAYER):
        number, _, rest = name.removeprefix(MTP_LAYER).partition(".")
        return f"model.layers.{behind + int(number)}.{rest}" if number.isdecimal() else name
    part = name.removeprefix("mtp.").removesuffix(".weight")
    return f"blk.{behind}.nextn.{NEXTN[part]}.weight" if name.startswith("mtp.") and part in NEXTN else name


def _qkv_and_z(name: str, rows: Rows, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The rows of queries, keys and values, and those of gates: they stand head of keys by head of keys."""
    n_k, n_v, dim_k, dim_v = heads(config)
    n = n_v // n_k * dim_v
    if rows.shape[0] != n_k * (2 * dim_k + 2 * n):
        raise ConversionError(f"{config.path.parent}: tensor {name} is {rows.shape}, which config.json doesn't ask for")
    order = np.arange(rows.shape[0]).reshape(n_k, -1)
    parts = np.split(order, np.cumsum([dim_k, dim_k, n]), axis=1)
    return np.concatenate([part.reshape(-1) for part in parts[:3]]), parts[3].reshape(-1)


def transform(name: str, rows: Rows, config: Config) -> Rows:
    """Weights of norms and decays as they are used."""
    if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
        return ChangedRows(rows, lambda x: x + 1)
    return ChangedRows(rows, lambda x: -np.exp(x)) if name.endswith("ssm_a") else rows


def transform_tiled(name: str, rows: Rows, config: Config) -> Rows:
    """The same, and the heads of the delta rule in tiles."""
    rows = transform(name, rows, config)
    n_k, n_v, dim_k, dim_v = heads(config)
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if n_k == n_v or not (part.startswith("ssm_") or part in ("attn_qkv", "attn_gate")) or part == "ssm_norm":
        return rows
    by_head = np.arange(n_v).reshape(n_k, -1).T.reshape(-1)
    by_value = (by_head[:, None] * dim_v + np.arange(dim_v)).reshape(-1)
    if part == "ssm_out":
        return ChangedRows(rows, lambda x: x[:, by_value])
    n_keys = 2 * n_k * dim_k
    if part in ("attn_qkv", "ssm_conv1d"):
        order = np.concatenate([np.arange(n_keys), n_keys + by_value])
    else:
        order = by_value if part == "attn_gate" else by_head
    if len(rows.shape) == 1:
        return ChangedRows(rows, lambda x: x[:, order])
    return PickedRows(rows, order, rows.shape)


LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "head_dim": 256,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen3_5ForCausalLM": LINEAR | {"num_key_value_heads": 4},
    "Qwen3_5ForConditionalGeneration": LINEAR | {"num_key_value_heads": 4},
    "Qwen3_5MoeForCausalLM": LINEAR | {"num_key_value_heads": 2},
    "Qwen3_5MoeForConditionalGeneration": LINEAR | {"num_key_value_heads": 2},
    "Qwen3NextForCausalLM": LINEAR | {"num_key_value_heads": 2},
}

FAMILIES = (
    Family(
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        gguf.MODEL_ARCH.QWEN35,
        write_qwen35_hparams,
        lambda config: _shapes(config, _dense(config), _two),
        gather,
        transform_tiled,
        usual=usual,
        special=with_nextn,
        defaults=DEFAULTS,
    ),
    Family(
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        gguf.MODEL_ARCH.QWEN35MOE,
        _moe(write_qwen35_hparams),
        lambda config: _shapes(config, _experts(config), _two),
        gather,
        transform_tiled,
        usual=usual,
        special=with_nextn,
        defaults=DEFAULTS,
    ),
    Family(
        ("Qwen3NextForCausalLM",),
        gguf.MODEL_ARCH.QWEN3NEXT,
        _moe(write_hparams),
        lambda config: _shapes(config, _experts(config), _one),
        gather,
        transform,
        usual=usual,
        special=with_nextn,
        defaults=DEFAULTS,
    ),
)
