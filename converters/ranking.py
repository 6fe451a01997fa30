"""Heads that score or tell classes apart, as GGUF has them: `cls` and `cls.output`, and pooling of type "rank"."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Checkpoint, Config, PickedRows, Rows, shown
from .family import Family, Shapes

#: decoders that may be rerankers, by `Checkpoint.architecture`
RERANKERS = ("Qwen3ForCausalLM",)
# What Qwen3-Reranker was trained to read.
_QWEN3_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_QWEN3_TITLE = re.compile(r"^# *qwen3-reranker", re.IGNORECASE | re.MULTILINE)


def classes(config: Config) -> list[str]:
    """The names of a classifier's classes; transformers has two where config.json doesn't say."""
    names = config.get("id2label")
    if names is None:
        return [f"LABEL_{i}" for i in range(config.integer("num_labels", 2))]
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ConversionError(f"{config.path}: id2label must be an object of names, not {shown(names)}")
    return list(names.values())


def write_classes(writer: gguf.GGUFWriter, config: Config) -> None:
    """Add the metadata of a classifier."""
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(classes(config))


def as_reranker(checkpoint: Checkpoint, family: Family) -> Family:
    """The family, but of a Qwen3-Reranker: a decoder whose answer, yes or no, is its score. Its head is made of the rows of
    these two tokens.

    Raises
    ------
    ConversionError
        Its tokenizer has no such tokens.
    UnsupportedError
        A reranker that answers with other tokens.
    """
    logit_score = _logit_score(checkpoint)
    is_known = checkpoint.architecture in RERANKERS
    title = checkpoint.text("README.md") if is_known else None
    if logit_score is None and not (title and _QWEN3_TITLE.search(title)):
        return family
    vocab = (checkpoint.json("tokenizer.json", optional=True).get("model") or {}).get("vocab") or {}
    answers = [vocab.get("yes"), vocab.get("no")]
    if None in answers:
        raise ConversionError(f"{checkpoint.folder / 'tokenizer.json'}: a Qwen3-Reranker without tokens yes and no")
    if not is_known or (logit_score is not None and logit_score != answers):
        raise UnsupportedError(
            f"{checkpoint.folder / 'modules.json'}: LogitScore of {checkpoint.architecture}, tokens {logit_score}; known: "
            f"Qwen3-Reranker's, {answers}"
        )
    checkpoint.notes.append(f"{checkpoint.folder}: taken for a Qwen3-Reranker, with its text for a query and a document")

    def write(writer: gguf.GGUFWriter, config: Config) -> None:
        family.write_hparams(writer, config)
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_string("tokenizer.chat_template.rerank", _QWEN3_PROMPT)

    def shapes(config: Config) -> Shapes:
        return family.shapes(config) | {"cls.output.weight": (2, config.integer("hidden_size"))}

    def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
        found = family.gather(tensors, config)
        head = found.get("lm_head.weight") or found.get("model.embed_tokens.weight")
        if head is not None:
            found["cls.output.weight"] = PickedRows(head, np.array(answers), (2, head.shape[-1]))
        return found

    return replace(family, write_hparams=write, shapes=shapes, gather=gather)


def _logit_score(checkpoint: Checkpoint) -> list[int | None] | None:
    """The tokens whose logits a folder of sentence-transformers compares; None if it doesn't."""
    try:
        modules = json.loads(checkpoint.text("modules.json") or "[]")
        path = next(m["path"] for m in modules if m["type"].endswith(".LogitScore"))
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError, StopIteration):
        return None  # what is broken, `write_pooling` says
    settings = checkpoint.json(f"{path}/config.json")
    return [settings.get("true_token_id"), settings.get("false_token_id")]
