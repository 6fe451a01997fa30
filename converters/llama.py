"""Llama, and Mistral, which differs in its sliding window alone."""

from __future__ import annotations

import gguf
import numpy as np

from ggpy.errors import ConversionError

from .checkpoint import Config, PickedRows, Rows
from .family import (
    Family,
    Shapes,
    attention_shapes,
    biases,
    ffn_shapes,
    head_dim,
    llama3_rope_factors,
    model_shapes,
    rope_parameters,
    write_decoder_hparams,
)


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    write_decoder_hparams(writer, config)
    writer.add_rope_dimension_count(head_dim(config))


def shapes(config: Config) -> Shapes:
    block = attention_shapes(config) | ffn_shapes(config.integer("hidden_size"), config.integer("intermediate_size"))
    if config.get("attention_bias"):
        block |= biases(block, "attn_q", "attn_k", "attn_v", "attn_output")
    if config.get("mlp_bias"):
        block |= biases(block, "ffn_gate", "ffn_up", "ffn_down")
    return model_shapes(config, lambda i: block)


def transform(name: str, rows: Rows, config: Config) -> Rows:
    """Reorder the rows of q and k: checkpoints rotate dimension i with i + head_dim / 2, GGUF's llama 2i with 2i + 1."""
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return rows
    n = head_dim(config)
    if n % 2:
        raise ConversionError(f"{config.path}: head_dim {n} is odd")
    n_rows = rows.shape[0]
    order = np.arange(n_rows).reshape(n_rows // n, 2, n // 2).swapaxes(1, 2).reshape(n_rows)
    return PickedRows(rows, order, rows.shape)


def computed(config: Config) -> dict[str, np.ndarray]:
    if rope_parameters(config).get("rope_type") != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_rope_factors(config)}


FAMILY = Family(
    checkpoints=("LlamaForCausalLM", "MistralForCausalLM"),
    arch=gguf.MODEL_ARCH.LLAMA,
    write_hparams=write_hparams,
    shapes=shapes,
    transform=transform,
    computed=computed,
    defaults={"MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096}},
)
