"""Rerankers: how well documents answer a query, by a head that reads one vector of both."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError, UnsupportedError
from ..file import StringArray
from .embedding import embed

if TYPE_CHECKING:
    from ..file import GGUFFile
    from .runner import Runner
    from .scheduler import Scheduler
    from .tokenizer import Tokenizer

_MEAN, _CLS = 1, 2  # `{arch}.classifier.pooling_type`


class Ranker:
    """The head of a reranker, `cls` and `cls.output`, of which one may be missing.

    Attributes
    ----------
    pooling : {"cls", "mean", "last"}
        Which vector it reads.

    Raises
    ------
    UnsupportedError
        The file has no such head, or one that tells several classes apart.
    GGUFError
        A tensor has another shape.
    """

    def __init__(self, file: "GGUFFile", n_embd: int, is_encoder: bool):
        self._file = file
        arch = file.get("general.architecture", str)
        is_modern = arch == "modern-bert"
        self._act = _gelu if is_modern else np.tanh
        kind = file.get(f"{arch}.classifier.pooling_type", int, default=_MEAN if is_modern else _CLS)
        self.pooling = "last" if not is_encoder else "mean" if kind == _MEAN else "cls"
        self._eps = file.get(f"{arch}.attention.layer_norm_epsilon", float, default=0.0)
        labels = file.get(f"{arch}.classifier.output_labels", (StringArray,), default=())
        # Of yes and no the first one's probability counts.
        self._yes_or_no = list(labels) == ["yes", "no"]
        n_outputs = 2 if self._yes_or_no else 1
        has_out = "cls.output.weight" in file.tensors
        self._dense = self._weights("cls", n_embd if has_out else n_outputs, n_embd)
        self._norm = self._weights("cls.norm", n_embd)
        self._out = self._weights("cls.output", n_outputs, n_embd)
        if not (self._dense or self._out):
            raise UnsupportedError(f"{file.path}: not a reranker: it has neither cls.weight nor cls.output.weight")

    def _weights(self, name: str, *shape: int) -> tuple[np.ndarray, np.ndarray] | None:
        """A weight and its bias in float64, None if the file doesn't have them."""
        weight, bias = (self._file.tensors.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None:
            return None
        if name == "cls.output" and weight.shape[1:] == shape[1:] and weight.shape != shape:
            raise UnsupportedError(f"{self._file.path}: not a reranker: it tells {weight.shape[0]} classes apart")
        for tensor, expected in ((weight, shape), (bias, shape[:1])):
            if tensor is not None and tensor.shape != expected:
                raise GGUFError(f"{self._file.path}: tensor {tensor.name} has shape {tensor.shape}, expected {expected}")
        values = np.zeros(shape[0]) if bias is None else bias.dequantize().astype(np.float64)
        return weight.dequantize().astype(np.float64), values

    def score(self, vector: np.ndarray) -> float:
        """What the head makes of a vector (n_embd,)."""
        x = vector.astype(np.float64)
        if self._dense is not None:
            x = self._act(self._dense[0] @ x + self._dense[1])
        if self._norm is not None:
            x = (x - x.mean()) / np.sqrt(x.var() + self._eps) * self._norm[0] + self._norm[1]
        if self._out is not None:
            x = self._out[0] @ x + self._out[1]
        return float(1 / (1 + np.exp(x[1] - x[0])) if self._yes_or_no else x[0])


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.array([math.erf(value) for value in x / math.sqrt(2)]))


def pair_of(file: "GGUFFile", runner: "Runner", tokenizer: "Tokenizer", query: str, document: str) -> list[int]:
    """Token ids of a query and a document, as the file's head was trained to read them: filled into the file's text for
    that, or, in encoders, one after the other, those of the document of the second type (see `run_inputs`).

    Raises
    ------
    UnsupportedError
        A decoder without a text for pairs.
    """
    template = file.get("tokenizer.chat_template.rerank", str, default="")
    if template:
        return _filled(tokenizer, template, {"{query}": query, "{document}": document})
    if not runner.is_encoder:
        raise UnsupportedError(f"{file.path}: no tokenizer.chat_template.rerank says how it reads a query and a document")
    first, second = tokenizer.encode_pair(query, document)
    typed = runner.arch.n_vocab if file.get("tokenizer.ggml.token_type_count", int, default=1) > 1 else 0
    return first + [i + typed for i in second]


def _filled(tokenizer: "Tokenizer", template: str, values: dict[str, str]) -> list[int]:
    """Control tokens are those of the template alone."""
    marks = {tokenizer.token_bytes(i).decode(): i for i in tokenizer.encode(template, bos=False) if tokenizer.is_hidden(i)}
    ids: list[int] = []
    for part in re.split("|".join([f"({re.escape(mark)})" for mark in marks]), template) if marks else [template]:
        if part in marks:
            ids.append(marks[part])
        elif part:
            text = re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], part)
            ids += tokenizer.encode(text, special=False, bos=False)
    return ids


def rerank(runner: "Runner", scheduler: "Scheduler", ranker: Ranker, pairs: Sequence[list[int]]) -> np.ndarray:
    """See `Model.rerank`; `pairs`: token ids of query and document."""
    scores = np.empty(len(pairs), np.float32)
    for i, vector in embed(runner, scheduler, pairs, ranker.pooling, normalize=False, what="documents"):
        scores[i] = ranker.score(vector[0])
    runner.check_finite(scores)
    return scores
