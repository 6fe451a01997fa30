"""Llama, and Mistral, which differs in nothing that GGUF records (llama.cpp leaves sliding windows unwritten too)."""

from __future__ import annotations

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Config, ReorderedRows, Rows
from .family import Family, head_dim, llama3_rope_factors, rope_parameters, write_decoder_hparams


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"{config.path}: hidden_act {config.get('hidden_act')!r}; known: silu")
    write_decoder_hparams(writer, config)
    writer.add_rope_dimension_count(head_dim(config))


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    n_embd, n_ff, n_vocab = (config.integer(key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    n_head = config.integer("num_attention_heads")
    n_q = n_head * head_dim(config)
    n_kv = config.integer("num_key_value_heads", n_head) * head_dim(config)

    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, n_embd)}
    for i in range(config.integer("num_hidden_layers")):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (n_embd,),
            "attn_q.weight": (n_q, n_embd),
            "attn_k.weight": (n_kv, n_embd),
            "attn_v.weight": (n_kv, n_embd),
            "attn_output.weight": (n_embd, n_q),
            "ffn_norm.weight": (n_embd,),
            "ffn_gate.weight": (n_ff, n_embd),
            "ffn_up.weight": (n_ff, n_embd),
            "ffn_down.weight": (n_embd, n_ff),
        }
        if config.get("attention_bias"):
            block |= {"attn_q.bias": (n_q,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,), "attn_output.bias": (n_embd,)}
        if config.get("mlp_bias"):
            block |= {"ffn_gate.bias": (n_ff,), "ffn_up.bias": (n_ff,), "ffn_down.bias": (n_embd,)}
        tensors |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    tensors["output_norm.weight"] = (n_embd,)
    if not config.get("tie_word_embeddings", False):
        tensors["output.weight"] = (n_vocab, n_embd)
    return tensors


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
    return ReorderedRows(rows, order)


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
)
