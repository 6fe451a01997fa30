"""ModernBERT: encoders most of whose layers see a window. What predicts masked words is left out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import gguf

from .checkpoint import Config, Rows
from .family import Family, Shapes, plain_base
from .ranking import classes, write_classes

# How it was trained or is computed, and of what is left out.
_OTHERS = (
    *("initializer_cutoff_factor", "mlp_dropout", "decoder_bias", "deterministic_flash_attn", "sparse_prediction"),
    *("sparse_pred_ignore_index", "tie_word_embeddings", "reference_compile", "repad_logits_with_grad", "layer_norm_eps"),
    *("classifier_pooling", "classifier_activation", "classifier_bias"),
)
_POOLINGS = {"cls": gguf.PoolingType.CLS, "mean": gguf.PoolingType.MEAN}


def _write(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("position_embedding_type", "absolute")
    config.only("rope_scaling", None)
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        config.only(key, False)
    for key in _OTHERS:
        config.get(key)
    n_layer, every = config.integer("num_hidden_layers"), config.integer("global_attn_every_n_layers", 3)
    default = ["sliding_attention" if i % every else "full_attention" for i in range(n_layer)]
    kinds = config.words("layer_types", ("full_attention", "sliding_attention"), n_layer, default)
    writer.add_block_count(n_layer)
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    writer.add_head_count(config.integer("num_attention_heads"))
    writer.add_layer_norm_eps(config.number("norm_eps", 1e-5, least=0))
    writer.add_causal_attention(False)
    writer.add_vocab_size(config.integer("vocab_size"))
    writer.add_string("modern-bert.hidden_activation", config.choice("hidden_activation", ("gelu", "silu"), "gelu"))
    writer.add_sliding_window(config.integer("local_attention", 128))
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_freq_base(_theta(config, "full_attention", "global_rope_theta", 160000.0))
    writer.add_rope_freq_base_swa(_theta(config, "sliding_attention", "local_rope_theta", 10000.0))


def _theta(config: Config, kind: str, old: str, default: float) -> float:
    if base := plain_base(config, kind, config.number(old, default)):
        return base
    if config.part("rope_parameters"):
        config.only("rope_parameters", None)
    return config.number(old, default, least=1e-30)


def _shapes(config: Config) -> Shapes:
    n_embd, n_ff, n_vocab = (config.integer(key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    tensors: Shapes = {"token_embd.weight": (n_vocab, n_embd), "token_embd_norm.weight": (n_embd,)}
    block: Shapes = {
        "attn_norm.weight": (n_embd,),
        "attn_qkv.weight": (3 * n_embd, n_embd),
        "attn_output.weight": (n_embd, n_embd),
        "ffn_norm.weight": (n_embd,),
        "ffn_up.weight": (2 * n_ff, n_embd),
        "ffn_down.weight": (n_embd, n_ff),
    }
    for i in range(config.integer("num_hidden_layers")):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in block.items() if i or name != "attn_norm.weight"}
    return tensors | {"output_norm.weight": (n_embd,)}


def _gather(tensors: Mapping[str, Rows], config: Config, head: bool = False) -> dict[str, Rows]:
    found = {name.removeprefix("model."): rows for name, rows in tensors.items()}
    for name in list(found):
        if head:
            found[name.replace("classifier.", "classifier.out_proj.")] = found.pop(name)
        elif name.startswith(("decoder.", "head.")):
            del found[name]
    return found


def _write_with_head(writer: gguf.GGUFWriter, config: Config) -> None:
    _write(writer, config)
    config.only("classifier_activation", "gelu")
    write_classes(writer, config)
    kind = config.choice("classifier_pooling", _POOLINGS, "cls")
    writer.add_uint32("modern-bert.classifier.pooling_type", _POOLINGS[kind])


def _shapes_with_head(config: Config) -> Shapes:
    n_embd, n_classes = config.integer("hidden_size"), len(classes(config))
    head: Shapes = {"cls.weight": (n_embd, n_embd), "cls.norm.weight": (n_embd,), "cls.output.weight": (n_classes, n_embd)}
    head["cls.output.bias"] = (n_classes,)
    if config.get("classifier_bias"):
        head["cls.bias"] = (n_embd,)
    return _shapes(config) | head


_ARCH = gguf.MODEL_ARCH.MODERN_BERT
FAMILIES = (
    Family(("ModernBertModel", "ModernBertForMaskedLM"), _ARCH, _write, _shapes, _gather),
    Family(
        ("ModernBertForSequenceClassification",), _ARCH, _write_with_head, _shapes_with_head, partial(_gather, head=True)
    ),
)
