"""Perplexity of a text, and how far a model's predictions are from a better model's.

The method is llama-perplexity's: the text is cut into chunks of n_ctx tokens, whose first token becomes the
beginning-of-sequence token where the model wants one; the first half of a chunk is context, the tokens of the second half
count, each but the first of them being predicted from all before it in its chunk.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Error
from ..file import writing_aside
from .logits_file import LogitsFile, LogitsWriter, check_space, counted
from .statistics import mean, proportion, quantile, root_mean_square

if TYPE_CHECKING:
    from ..generate.model import Model

#: rows of logits that are looked at together: few enough for the processor's caches
_ROWS = 8
#: what the base finds less likely than e^-16 isn't counted for the divergence: its file knows no more of it
_LEAST = -16.0


@dataclass(frozen=True)
class Divergence:
    """How predictions differ from a base's, token by token.

    Attributes
    ----------
    nll, nll_base : float array (n,)
        Negative logarithm of the probability of the token that came, in the model and in the base.
    kl : float array (n,)
        Kullback-Leibler divergence of the model's distribution from the base's, in nats.
    same_top : bool array (n,)
        Whether both find the same token likeliest.
    """

    nll: np.ndarray
    nll_base: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray

    def summary(self) -> dict[str, tuple[float, float]]:
        """Each measure as (value, standard error); a maximum has no error, which is nan."""
        change = np.exp(-self.nll) - np.exp(-self.nll_base)
        base, ratio = _exp_mean(self.nll_base), _exp_mean(self.nll - self.nll_base)
        return {
            "base_perplexity": base,
            "perplexity_ratio": ratio,
            "kl_mean": mean(self.kl),
            "kl_median": quantile(self.kl, 0.5),
            "kl_99": quantile(self.kl, 0.99),
            "kl_max": (float(self.kl.max()), math.nan),
            "top1_agreement": proportion(self.same_top),
            "p_change_mean": mean(change),
            "p_change_rms": root_mean_square(change),
        }


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes
    ----------
    nll : float array (n,)
        Negative logarithm of the probability of each counted token.
    n_chunks, n_ctx : int
    divergence : Divergence or None
        From a base, if one was given.
    """

    nll: np.ndarray
    n_chunks: int
    n_ctx: int
    divergence: Divergence | None = None

    @property
    def value(self) -> float:
        """The perplexity: e to the mean of `nll`."""
        return _exp_mean(self.nll)[0]

    @property
    def error(self) -> float:
        """Its standard error."""
        return _exp_mean(self.nll)[1]

    def summary(self) -> dict[str, Any]:
        """All measures by name, as (value, standard error) where there is one."""
        facts: dict[str, Any] = {"n_ctx": self.n_ctx, "n_chunks": self.n_chunks, "n_tokens": len(self.nll)}
        facts["perplexity"] = (self.value, self.error)
        return facts if self.divergence is None else {**facts, **self.divergence.summary()}


def _exp_mean(values: np.ndarray) -> tuple[float, float]:
    middle, error = mean(values)
    with np.errstate(over="ignore"):
        value = float(np.exp(middle))
    return value, value * error


def chunks_of(ids: Sequence[int], n_ctx: int, n_chunks: int | None = None) -> np.ndarray:
    """The whole chunks of a text's tokens, int32 (n_chunks, n_ctx); at most n_chunks.

    Raises
    ------
    Error
        There is no whole chunk.
    """
    n = min(len(ids) // n_ctx, n_chunks or len(ids))
    if n == 0:
        raise Error(f"the text has {len(ids)} tokens, too few for one chunk of {n_ctx}")
    return np.array(ids[: n * n_ctx], np.int32).reshape(n, n_ctx)


def with_bos(model: "Model", chunk: np.ndarray) -> list[int]:
    """A chunk's tokens, the first replaced by the beginning-of-sequence token where the model wants one."""
    tokens = chunk.tolist()
    if model.tokenizer.add_bos and model.tokenizer.bos is not None:
        tokens[0] = model.tokenizer.bos
    return tokens


def measure_perplexity(
    model: "Model",
    chunks: np.ndarray,
    *,
    save: str | Path | None = None,
    base: LogitsFile | None = None,
    progress: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Runs chunks of a text and counts how well each token was foreseen.

    Memory for a few rows of logits is taken at a time, whatever the text's length.

    Parameters
    ----------
    model : Model
        Its context must hold a chunk.
    chunks : int array (n_chunks, n_ctx)
        From `chunks_of`, or the first of a base's tokens.
    save : str or Path, optional
        Where to write the log-probabilities, as a base for others; see `logits_file`.
    base : LogitsFile, optional
        Just opened, to compare with.
    progress : callable, optional
        Called after each chunk with what is measured so far.

    Raises
    ------
    Error
        The base has another vocabulary or text; no space for the file to save; logits that aren't finite.
    """
    n_chunks, n_ctx = chunks.shape
    n_vocab = model.architecture.n_vocab
    if n_ctx < 3:
        raise Error(f"chunks of {n_ctx} tokens; at least 3 are needed")
    if base is not None and base.n_vocab != n_vocab:
        raise Error(f"{base.path}: made with a vocabulary of {base.n_vocab} tokens, the model has {n_vocab}")
    if base is not None and not np.array_equal(base.tokens[:n_chunks], chunks):
        raise Error(f"{base.path}: made from another text, or with chunks of another length")
    n = counted(n_ctx)
    table = np.zeros((4, n_chunks * n))  # nll, nll_base, kl, same_top
    with ExitStack() as stack:
        sequence = stack.enter_context(model.new_sequence())
        writer = None
        if save is not None:
            check_space(Path(save), n_chunks, n_ctx, n_vocab)
            file = stack.enter_context(open(stack.enter_context(writing_aside(save)), "wb"))
            writer = LogitsWriter(file, chunks, n_vocab)
        for i, chunk in enumerate(chunks):
            tokens = with_bos(model, chunk)
            sequence.keep(0)
            sequence.extend(tokens[: n_ctx // 2])
            at = 0
            for piece in sequence.extend_all(tokens[n_ctx // 2 : -1]):
                for first in range(0, len(piece), _ROWS):
                    logits = piece[first : first + _ROWS]
                    rows = slice(i * n + at, i * n + at + len(logits))
                    targets = chunk[n_ctx // 2 + 1 + at :][: len(logits)]
                    at += len(logits)
                    log_sum = _log_sum(logits)
                    if not np.isfinite(log_sum).all():
                        raise Error(f"{model.file.path}: gives logits that aren't finite, in chunk {i} of the text")
                    table[0, rows] = log_sum - logits[np.arange(len(logits)), targets]
                    if writer is not None:
                        writer.write(logits, log_sum)
                    if base is not None:
                        table[1:, rows] = _against(base, logits, log_sum, targets)
            if progress is not None:
                progress(_result(table[:, : (i + 1) * n], i + 1, n_ctx, base is not None))
    return _result(table, n_chunks, n_ctx, base is not None)


def _result(table: np.ndarray, n_chunks: int, n_ctx: int, compared: bool) -> Perplexity:
    nll, nll_base, kl, same_top = table
    return Perplexity(nll, n_chunks, n_ctx, Divergence(nll, nll_base, kl, same_top > 0) if compared else None)


def _log_sum(logits: np.ndarray) -> np.ndarray:
    most = logits.max(1)
    return most + np.log(np.exp(logits - most[:, None]).sum(1, dtype=np.float64))


def _against(base: LogitsFile, logits: np.ndarray, log_sum: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """nll_base, kl and same_top of some rows, (3, n)."""
    expected, top = base.read(len(logits))
    difference = expected - logits
    difference += log_sum.astype(np.float32)[:, None]
    difference[expected <= _LEAST] = 0
    kl = np.einsum("ij,ij->i", np.exp(expected), difference, dtype=np.float64)
    return np.stack([-expected[np.arange(len(logits)), targets], kl, top == logits.argmax(1)])
