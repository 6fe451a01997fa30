"""Encoders: BERT, DistilBERT, RoBERTa and XLM-RoBERTa. What predicts masked words is left out, and what pools by itself
unless a head that tells classes apart, or scores, reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gguf
import numpy as np

from ggpy.errors import ConversionError

from .checkpoint import Config, PickedRows, Rows
from .family import Family, Gather, Shapes, biases
from .ranking import classes, write_classes

# Of the parts that are left out, and where the checkpoint's program keeps its kind.
_OTHERS = (
    *("tie_word_embeddings", "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type"),
)
_LEFT_OUT = ("pooler.", "cls.predictions.", "cls.seq_relationship.", "lm_head.", "vocab_")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def _positions(config: Config, offset: bool) -> tuple[int, int]:
    """The first row of a checkpoint's position embeddings that a text uses, and how many there are from there on: RoBERTa
    counts from behind the padding token's id."""
    first = config.integer("pad_token_id", least=0) + 1 if offset else 0
    n = config.integer("max_position_embeddings") - first
    if n < 1:
        raise ConversionError(f"{config.path}: max_position_embeddings leaves no position behind {first}")
    return first, n


def write_hparams(writer: gguf.GGUFWriter, config: Config, offset: bool = False, act: str = "gelu") -> None:
    config.only("hidden_act", act)
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    for key in _OTHERS:
        config.get(key)
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_context_length(_positions(config, offset)[1])
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    writer.add_head_count(config.integer("num_attention_heads"))
    writer.add_layer_norm_eps(config.number("layer_norm_eps", 1e-12, least=0))
    writer.add_causal_attention(False)
    writer.add_vocab_size(config.integer("vocab_size"))
    writer.add_token_type_count(config.integer("type_vocab_size", 2, least=0) or 1)


def shapes_of(config: Config, blocks: Callable[[int], Shapes], positions: int) -> Shapes:
    """The tensors of an encoder whose norms come after sums; ``blocks(i)`` gives those of its layer i, without the prefix
    and the norms."""
    n_embd = config.integer("hidden_size")
    tensors: Shapes = {"token_embd.weight": (config.integer("vocab_size"), n_embd)}
    if positions:
        tensors["position_embd.weight"] = (positions, n_embd)
    if config.get("type_vocab_size", 2):
        tensors["token_types.weight"] = (config.integer("type_vocab_size", 2), n_embd)
    norms = {
        f"{name}.{part}": (n_embd,) for name in ("attn_output_norm", "layer_output_norm") for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        tensors[f"token_embd_norm.{part}"] = (n_embd,)
    for i in range(config.integer("num_hidden_layers")):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in (blocks(i) | norms).items()}
    return tensors


def shapes(config: Config, offset: bool = False) -> Shapes:
    n_embd, n_ff = config.integer("hidden_size"), config.integer("intermediate_size")
    block: Shapes = {f"attn_{part}.weight": (n_embd, n_embd) for part in ("q", "k", "v", "output")}
    block |= {"ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)}
    block |= biases(block, *(name.removesuffix(".weight") for name in block))
    return shapes_of(config, lambda i: block, _positions(config, offset)[1])


def _usual_distilbert(config: Config) -> dict[str, Any]:
    """DistilBERT's settings under BERT's names; tokens have no types."""
    config.only("sinusoidal_pos_embds", False)
    for key in ("qa_dropout", "seq_classif_dropout", "tie_weights_"):
        config.get(key)
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    names |= {"hidden_dim": "intermediate_size", "activation": "hidden_act"}
    return {"type_vocab_size": 0} | {name: config.get(theirs) for theirs, name in names.items()}


def gather(tensors: Mapping[str, Rows], config: Config, offset: bool = False, head: bool = False) -> dict[str, Rows]:
    """Names without the prefix that models with a head have, and as they are since layer norms have weights and biases.

    `head`: whether a classifier is kept; BERT's reads what the pooler makes of the first token.
    """
    found: dict[str, Rows] = {}
    for name, rows in tensors.items():
        for prefix in ("bert.", "roberta.", "nomic_bert.", "distilbert."):
            name = name.removeprefix(prefix)
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if head:
            for old, new in (("pooler.dense.", "classifier.dense."), ("classifier.", "classifier.out_proj.")):
                if name.removeprefix(old) in ("weight", "bias"):
                    name = name.replace(old, new)
                    break
        if name.startswith(_LEFT_OUT) or name in _BUFFERS:
            continue
        if name == "embeddings.position_embeddings.weight" and offset:
            first, _ = _positions(config, offset)
            n = rows.shape[0]
            rows = PickedRows(rows, np.arange(first, n), (n - first, rows.shape[-1]))
        found[name] = rows
    return found


def _with_head(family: Family, with_head: Gather) -> Family:
    """The same for checkpoints whose classifier is kept: a matrix, tanh, a matrix."""

    def write(writer: gguf.GGUFWriter, config: Config) -> None:
        family.write_hparams(writer, config)
        write_classes(writer, config)

    def head_shapes(config: Config) -> Shapes:
        n_embd, n_classes = config.integer("hidden_size"), len(classes(config))
        head: Shapes = {"cls.weight": (n_embd, n_embd), "cls.output.weight": (n_classes, n_embd)}
        return family.shapes(config) | head | biases(head, "cls", "cls.output")

    names = tuple(name.replace("Model", "ForSequenceClassification") for name in family.checkpoints if "Model" in name)
    return Family(names, family.arch, write, head_shapes, with_head)


_BERT = ("BertModel", "BertForMaskedLM", "BertForPreTraining")
_ROBERTA = ("RobertaModel", "RobertaForMaskedLM", "XLMRobertaModel", "XLMRobertaForMaskedLM")

_FAMILY = Family(_BERT, gguf.MODEL_ARCH.BERT, write_hparams, shapes, gather)
_ROBERTA_FAMILY = Family(
    _ROBERTA,
    gguf.MODEL_ARCH.BERT,
    partial(write_hparams, offset=True),
    partial(shapes, offset=True),
    partial(gather, offset=True),
)
FAMILIES = (
    _FAMILY,
    _with_head(_FAMILY, partial(gather, head=True)),
    _ROBERTA_FAMILY,
    Family(
        ("DistilBertModel", "DistilBertForMaskedLM"),
        gguf.MODEL_ARCH.BERT,
        write_hparams,
        shapes,
        gather,
        usual=_usual_distilbert,
    ),
    _with_head(_ROBERTA_FAMILY, partial(gather, offset=True, head=True)),
)
