"""Families in the tradition of GPT, with layer norms and mostly without gates, as rows of what differs (`Traits`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from ggpy.errors import UnsupportedError

from .checkpoint import Config, PickedRows, Rows, StackedRows, TransposedRows
from .decoder import ATTENTION, FFN, MODEL, PARTIAL, QKV, Traits, biases_if, biases_of_all, decoder, only
from .experts import expert_shapes, write_expert_hparams
from .family import Family, head_dim, refuse_unread, write_clip

_PLAIN: dict[str, Any] = {"norm_biases": True, "gated": False}


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


def _usual_dbrx(config: Config) -> dict[str, Any]:
    """Names settings as other families do; those of attention and of the experts stand in objects of their own."""
    attention, experts = (Config(config.part(key), config.path) for key in ("attn_config", "ffn_config"))
    experts.only("ffn_act_fn", {"name": "silu"})
    experts.only("moe_normalize_expert_weights", 1)
    for key in ("hidden_size", "moe_jitter_eps", "moe_loss_weight", "uniform_expert_assignment"):
        experts.get(key)
    config.get("emb_pdrop")
    names = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    names |= {"max_seq_len": "max_position_embeddings"}
    values: dict[str, Any] = {new: config.get(old) for old, new in names.items()}
    values |= {
        "num_key_value_heads": attention.integer("kv_n_heads", 1),
        "clip_qkv": attention.get("clip_qkv"),
        "intermediate_size": experts.integer("ffn_hidden_size", 3584),
        "num_experts": experts.integer("moe_num_experts", 4),
        "num_experts_per_tok": experts.integer("moe_top_k", 1),
        "layer_norm_eps": 1e-5,
    }
    if attention.get("rope_theta") is not None:  # of old; transformers 5 reads another one, and saves both
        values["rope_theta"] = attention.number("rope_theta")
        if config.part("rope_parameters").get("rope_theta", values["rope_theta"]) != values["rope_theta"]:
            raise UnsupportedError(f"{config.path}: attn_config and rope_parameters have different rope_theta")
    for part in (attention, experts):
        refuse_unread(part)
    return values


def _gather_dbrx(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """A layer's experts are one matrix, w2 transposed."""
    gathered: dict[str, Rows] = {}
    n, n_ff, n_embd = (config.integer(key) for key in ("num_experts", "intermediate_size", "hidden_size"))
    for name, rows in tensors.items():
        if ".experts.mlp." in name and rows.shape == (n * n_ff, n_embd):
            rows = PickedRows(rows, np.arange(n * n_ff), (n, n_ff, n_embd))
            name, rows = f"{name}.weight", TransposedRows(rows) if name.endswith("w2") else rows
        gathered[name] = rows
    return gathered


def _write_dbrx(writer: gguf.GGUFWriter, config: Config) -> None:
    write_clip(writer, config)
    write_expert_hparams(writer, config)


FAMILIES: tuple[Family, ...] = (
    decoder(
        ("DbrxForCausalLM",),
        MODEL.DBRX,
        Traits(
            eps="layer_norm_eps",
            norms=("attn_norm", "attn_output_norm"),
            fused=("qkv",),
            write=_write_dbrx,
            experts=lambda config, i: expert_shapes(config, config.integer("intermediate_size")),
        ),
        _gather_dbrx,
        _usual_dbrx,
    ),
    decoder(
        ("Jais2ForCausalLM",),
        MODEL.JAIS2,
        Traits(**_PLAIN, act="relu2", eps="layer_norm_eps", biases=biases_of_all),
        hidden_act="relu2",
        attention_bias=True,
        mlp_bias=True,
        layer_norm_eps=1e-5,
    ),
    decoder(
        ("NemotronForCausalLM",),
        MODEL.NEMOTRON,
        Traits(**_PLAIN, act="relu2", eps="norm_eps", norm_shift=1.0, rope=PARTIAL, biases=biases_of_all),
        hidden_act="relu2",
        norm_eps=1e-5,
        partial_rotary_factor=0.5,
    ),
    decoder(
        ("Starcoder2ForCausalLM",),
        MODEL.STARCODER2,
        Traits(
            **_PLAIN,
            act="gelu_pytorch_tanh",
            eps="norm_epsilon",
            windows="all",
            biases=biases_if("use_bias", *ATTENTION, "ffn_up", "ffn_down"),
            write=only(mlp_type="default", norm_type="layer_norm", use_bias=True),
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
            biases=biases_if("attention_bias", *QKV),
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
            biases=biases_if("attention_bias", *ATTENTION),
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
            biases=biases_if("use_qkv_bias", *QKV),
            rope=PARTIAL,
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
            biases=biases_if("bias", "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
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
            rope=PARTIAL,
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
            rope=PARTIAL,
            write=only(qk_layernorm=False),
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
