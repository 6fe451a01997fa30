"""A conversion beside transformers: the same tokens through both."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ggpy.errors import ConversionError
from ggpy.kernels.build import Progress

from .checkpoint import Checkpoint
from .conversion import find_source
from .vocabulary import CHECK_TEXTS

N_TOKENS = 64

# The mean divergence of the next token's probabilities, in nats, beyond which a file is wrong rather than rounded: of files
# whose blocks have 8 bits a value or more, and of others.
LARGEST = {"fine": 0.02, "coarse": 1.0}
FINE = ("F32", "F16", "BF16", "Q8_0")


@dataclass(frozen=True)
class Verification:
    """How far a file is from its checkpoint.

    Attributes
    ----------
    n_tokens : int
        Tokens of the text that was read.
    n_same : int
        After how many of them both find the same token the most probable.
    kl : float
        Mean Kullback-Leibler divergence of the next token's probabilities, in nats.
    """

    n_tokens: int
    n_same: int
    kl: float


def verify(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    n_threads: int | None = None,
    kernel_progress: Progress | None = None,
) -> Verification:
    """Run a few tokens through a checkpoint in transformers and through its conversion.

    Takes memory for all weights in float32. The packages transformers and torch must be installed.

    Parameters
    ----------
    source : str or path-like
        As for `convert`.
    path : str or path-like
        The file that `convert` wrote.
    n_threads : int, optional
        Default: the physical cores.
    kernel_progress : callable, optional
        Told of kernels that must be compiled first.

    Raises
    ------
    ConversionError
        The file says something else than the checkpoint; or transformers isn't installed or can't read the checkpoint.
    """
    from ggpy.generate.model import Model

    folder, _ = find_source(source)
    with Model(Path(path), n_ctx=2 * N_TOKENS, kv_type="f32", n_threads=n_threads, progress=kernel_progress) as model:
        ids = model.tokenize("".join(CHECK_TEXTS[:4]), bos=True if model.tokenizer.bos is not None else None)[:N_TOKENS]
        ours = model.logits(ids)
        kinds = {tensor.type for tensor in model.file.tensors.values()}
    theirs = _transformers_logits(Checkpoint(folder), ids)
    if ours.shape != theirs.shape:
        raise ConversionError(f"{path}: gives logits {ours.shape}, transformers {theirs.shape}")
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (theirs, ours))
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    same = int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    found = Verification(len(ids), same, kl)
    if not kl <= LARGEST["fine" if kinds <= set(FINE) else "coarse"]:
        raise ConversionError(
            f"{path}: computes something else than transformers does: mean KL divergence {kl:.4f}, the same best token "
            f"{same} of {len(ids)} times"
        )
    return found


def _transformers_logits(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    """float32 (n_tokens, n_vocab)."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConversionError(f"verifying needs the packages transformers and torch: {error}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
    except Exception as error:  # of all kinds
        reason = " ".join(str(error).split())
        raise ConversionError(f"{checkpoint.folder}: transformers can't run it: {reason:.300}") from error
    return logits.float().numpy()


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
