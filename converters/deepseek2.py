"""DeepSeek V2, V3 and V3.2, GLM-4.7-Flash: attention over compressed keys and values (MLA), shared experts.

GGUF has the form of attention in which keys and values stay compressed: one head of kv_lora_rank + qk_rope_head_dim
values that all query heads share. The matrix ``kv_b_proj`` that expands them is kept as two, ``attn_k_b`` (transposed:
it is applied to the queries) and ``attn_v_b``. Checkpoint and GGUF rotate the same dimensions, 2i with 2i + 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import ExpertGatingFuncType

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Config, PickedRows, Rows, TransposedRows
from .experts import expert_shapes, gather_experts, leading_dense, write_expert_hparams
from .family import (
    Family,
    Shapes,
    ffn_shapes,
    magnitude,
    model_shapes,
    rope_parameters,
    write_decoder_hparams,
    yarn_factor,
    yarn_magnitude,
)

LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Routing:
    """What config.json leaves unsaid about the router.

    Attributes
    ----------
    gating : str
        What makes scores of its outputs.
    choice : str
        How experts are chosen by them.
    """

    gating: str
    choice: str


ROUTINGS = {
    "DeepseekV2ForCausalLM": Routing("softmax", "greedy"),
    "DeepseekV3ForCausalLM": Routing("sigmoid", "noaux_tc"),
    "DeepseekV32ForCausalLM": Routing("sigmoid", "noaux_tc"),
    "Glm4MoeLiteForCausalLM": Routing("sigmoid", "noaux_tc"),
}
GATINGS = {"softmax": ExpertGatingFuncType.SOFTMAX, "sigmoid": ExpertGatingFuncType.SIGMOID}
CHOICES = ("greedy", "group_limited_greedy", "noaux_tc")


def routing(config: Config) -> Routing:
    default = ROUTINGS[config.get("architectures")[0]]
    gating = config.choice("scoring_func", GATINGS, default.gating)
    return Routing(gating, config.choice("topk_method", CHOICES, default.choice))


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("moe_layer_freq", 1)
    config.only("rope_interleave", True)
    rank, n_rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    n_value = config.integer("v_head_dim")
    config.only("qk_head_dim", config.integer("qk_nope_head_dim") + n_rope)
    rope = rope_parameters(config)
    write_decoder_hparams(writer, _without_mscale(config, rope).replaced(num_key_value_heads=1, head_dim=None))
    writer.add_rope_dimension_count(n_rope)
    writer.add_leading_dense_block_count(leading_dense(config))
    # llama.cpp's converter leaves it out for none, but its reader wants it of all but models of 26 and 27 layers.
    writer.add_q_lora_rank(config.integer("q_lora_rank", 0, least=0))
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + n_rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.integer("qk_nope_head_dim") + n_rope)
    writer.add_value_length_mla(n_value)
    write_router_hparams(writer, config)

    if rope.get("rope_type") == "yarn":
        # A tenth of config.json's value, as in llama.cpp's files.
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope.number("mscale_all_dim", 0.0))


def _without_mscale(config: Config, rope: Config) -> Config:
    """The same without YaRN's `mscale` and `mscale_all_dim`, but so that their magnitudes' quotient is written as 1.

    Readers of a file with `yarn_log_multiplier` leave YaRN's own magnitude out of the cosines and sines, and multiply the
    logits by the square of that for `mscale_all_dim`. Another quotient than 1 has no place there.

    Raises
    ------
    UnsupportedError
        Cosines and sines have another magnitude than 1.
    """
    if rope.get("rope_type") != "yarn":
        return config
    whole = yarn_magnitude(config, rope)
    if whole != 1 or not rope.number("mscale_all_dim", 0.0):
        raise UnsupportedError(
            f"{config.path}: rope's magnitude is {whole:g}; known: 1, of an mscale that is its mscale_all_dim"
        )
    changed = {"mscale": None, "mscale_all_dim": None, "attention_factor": magnitude(yarn_factor(config, rope))}
    return config.replaced(rope_scaling=None, rope_parameters=rope.values | changed)


def write_router_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    write_expert_hparams(writer, config)
    writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    writer.add_expert_shared_count(config.integer("n_shared_experts"))
    if config.get("routed_scaling_factor") is not None:
        writer.add_expert_weights_scale(config.number("routed_scaling_factor"))
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    found = routing(config)
    writer.add_expert_gating_func(GATINGS[found.gating])
    if config.get("n_group") is None:
        return
    n_group, n_used = config.integer("n_group"), config.integer("topk_group")
    if found.choice == "greedy" or n_used == n_group:
        n_group = n_used = 1  # groups that choose nothing
    writer.add_expert_group_count(n_group)
    writer.add_expert_group_used_count(n_used)


def shapes(config: Config) -> Shapes:
    n_embd, n_head = config.integer("hidden_size"), config.integer("num_attention_heads")
    rank, n_rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    n_nope, n_value = config.integer("qk_nope_head_dim"), config.integer("v_head_dim")
    n_q = n_head * (n_nope + n_rope)
    if config.get("q_lora_rank") is not None:
        q_rank = config.integer("q_lora_rank")
        queries: Shapes = {
            "attn_q_a.weight": (q_rank, n_embd),
            "attn_q_a_norm.weight": (q_rank,),
            "attn_q_b.weight": (n_q, q_rank),
        }
    else:
        queries = {"attn_q.weight": (n_q, n_embd)}
    attention: Shapes = {
        "attn_norm.weight": (n_embd,),
        **queries,
        "attn_kv_a_mqa.weight": (rank + n_rope, n_embd),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (n_head, rank, n_nope),
        "attn_v_b.weight": (n_head, n_value, rank),
        "attn_output.weight": (n_embd, n_head * n_value),
        "ffn_norm.weight": (n_embd,),
    }
    n_ff = config.integer("moe_intermediate_size")
    experts = expert_shapes(config, n_ff) | ffn_shapes(n_embd, n_ff * config.integer("n_shared_experts"), "_shexp")
    if routing(config).choice == "noaux_tc":
        experts["exp_probs_b.bias"] = experts["ffn_gate_inp.weight"][:1]
    dense = ffn_shapes(n_embd, config.integer("intermediate_size"))
    n_dense = leading_dense(config)
    return model_shapes(config, lambda i: attention | (dense if i < n_dense else experts))


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Stack the experts, split kv_b_proj, and drop the layers after the last, which predict further tokens (MTP)."""
    n_layer = config.integer("num_hidden_layers")
    kept = {name: rows for name, rows in tensors.items() if (match := LAYER.match(name)) is None or int(match[1]) < n_layer}
    gathered: dict[str, Rows] = {}
    for name, rows in gather_experts(kept, config).items():
        if name.endswith(".self_attn.kv_b_proj.weight"):
            keys, values = split_kv_b(name, rows, config)
            gathered |= {name.replace("kv_b_proj", "k_b_proj"): keys, name.replace("kv_b_proj", "v_b_proj"): values}
        else:
            gathered[name.replace("e_score_correction_bias", "e_score_correction.bias")] = rows
    return gathered


def split_kv_b(name: str, rows: Rows, config: Config) -> tuple[Rows, Rows]:
    """The parts of kv_b_proj: its rows are, for each head, those of its keys and then those of its values.

    Returns
    -------
    keys : Rows
        (n_head, kv_lora_rank, qk_nope_head_dim)
    values : Rows
        (n_head, v_head_dim, kv_lora_rank)
    """
    n_head, rank = config.integer("num_attention_heads"), config.integer("kv_lora_rank")
    n_nope, n_value = config.integer("qk_nope_head_dim"), config.integer("v_head_dim")
    expected = (n_head * (n_nope + n_value), rank)
    if rows.shape != expected:
        raise ConversionError(f"{config.path.parent}: tensor {name} is {rows.shape}, config.json asks for {expected}")
    order = np.arange(expected[0]).reshape(n_head, n_nope + n_value)
    keys = PickedRows(rows, order[:, :n_nope].reshape(-1), (n_head, n_nope, rank))
    values = PickedRows(rows, order[:, n_nope:].reshape(-1), (n_head, n_value, rank))
    return TransposedRows(keys), values


def write_indexed_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    """With an indexer, which chooses the keys that a token attends to."""
    write_hparams(writer, config)
    writer.add_indexer_head_count(config.integer("index_n_heads"))
    writer.add_indexer_key_length(config.integer("index_head_dim"))
    writer.add_indexer_top_k(config.integer("index_topk"))


def indexed_shapes(config: Config) -> Shapes:
    n_embd, q_rank = config.integer("hidden_size"), config.integer("q_lora_rank")
    n_head, n = config.integer("index_n_heads"), config.integer("index_head_dim")
    indexer: Shapes = {
        "indexer.attn_q_b.weight": (n_head * n, q_rank),
        "indexer.attn_k.weight": (n, n_embd),
        "indexer.k_norm.weight": (n,),
        "indexer.k_norm.bias": (n,),
        "indexer.proj.weight": (n_head, n_embd),
    }
    layers = range(config.integer("num_hidden_layers"))
    return shapes(config) | {f"blk.{i}.{name}": shape for i in layers for name, shape in indexer.items()}


def _usual_indexed(config: Config) -> dict[str, Any]:
    kinds = config.several("layer_types")
    return {"layer_types": None} if kinds and kinds == ["indexed_attention"] * len(kinds) else {}


_V3 = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}
INDEXED = Family(
    checkpoints=("DeepseekV32ForCausalLM",),
    defaults={"DeepseekV32ForCausalLM": {**_V3, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}},
    arch=gguf.MODEL_ARCH.GLM_DSA,
    arch_name="deepseek32",
    write_hparams=write_indexed_hparams,
    shapes=indexed_shapes,
    gather=gather,
    usual=_usual_indexed,
)
FAMILY = Family(
    checkpoints=tuple(name for name in ROUTINGS if name not in INDEXED.checkpoints),
    defaults={
        "DeepseekV2ForCausalLM": {"n_shared_experts": 2, "q_lora_rank": 1536, "routed_scaling_factor": 1.0},
        "DeepseekV3ForCausalLM": _V3,
        "Glm4MoeLiteForCausalLM": {
            "first_k_dense_replace": 1,
            "n_group": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "q_lora_rank": 768,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 1.8,
            "topk_group": 1,
        },
    },
    arch=gguf.MODEL_ARCH.DEEPSEEK2,
    write_hparams=write_hparams,
    shapes=shapes,
    gather=gather,
)
