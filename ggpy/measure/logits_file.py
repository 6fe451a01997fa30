"""Files of log-probabilities: what one model says of a text, for others to be compared with.

The format is that of llama-perplexity's --kl-divergence-base, so that either program reads the other's files: the magic
bytes, int32 n_ctx, n_vocab, n_chunks, the int32 tokens of all chunks; then, for each counted token of each chunk, a row of
8 + 2 n_vocab bytes: float32 step and least log-probability, and for each token of the vocabulary how many steps it is
above the least, as uint16 (one more of them where n_vocab is odd). What is e^16 times less likely than the likeliest
counts as that.
"""

import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import Error
from ..file.writer import megabytes

_MAGIC = b"_logits_"
_RANGE = 16.0


def _row_bytes(n_vocab: int) -> int:
    return 8 + 2 * (n_vocab + n_vocab % 2)


def _row_type(n_vocab: int) -> np.dtype:
    return np.dtype([("step", "<f4"), ("least", "<f4"), ("level", "<u2", (n_vocab + n_vocab % 2,))])


def counted(n_ctx: int) -> int:
    """How many tokens of a chunk are counted: those of the second half that have a successor in the chunk."""
    return n_ctx - 1 - n_ctx // 2


def file_bytes(n_chunks: int, n_ctx: int, n_vocab: int) -> int:
    """The size of such a file."""
    return 20 + n_chunks * (4 * n_ctx + counted(n_ctx) * _row_bytes(n_vocab))


def check_space(path: Path, n_chunks: int, n_ctx: int, n_vocab: int) -> None:
    """Raises Error where the disk has no space for such a file at `path`."""
    needed, free = file_bytes(n_chunks, n_ctx, n_vocab), shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise Error(f"{path}: needs {megabytes(needed)}, the disk has {megabytes(free)} left")


class LogitsWriter:
    """Writes such a file, row by row.

    Parameters
    ----------
    file : binary file
        Open for writing.
    tokens : int array (n_chunks, n_ctx)
        The text, as it was before a beginning-of-sequence token replaced the first of each chunk.
    n_vocab : int
    """

    def __init__(self, file: BinaryIO, tokens: np.ndarray, n_vocab: int):
        self._file, self._n_vocab, self._row = file, n_vocab, _row_type(n_vocab)
        n_chunks, n_ctx = tokens.shape
        file.write(_MAGIC + np.array([n_ctx, n_vocab, n_chunks], "<i4").tobytes() + tokens.astype("<i4").tobytes())

    def write(self, logits: np.ndarray, log_sum: np.ndarray) -> None:
        """Adds rows.

        Parameters
        ----------
        logits : float32 array (n, n_vocab)
        log_sum : float array (n,)
            The logarithm of each row's sum of exponentials.
        """
        most = logits.max(1)
        least = np.maximum(logits.min(1), most - _RANGE)
        rows = np.zeros(len(logits), self._row)
        rows["step"] = (most - least) / 65535
        rows["least"] = least - log_sum
        step = np.where(rows["step"] > 0, rows["step"], 1)
        levels = np.rint(np.maximum(logits - least[:, None], 0) / step[:, None])
        rows["level"][:, : self._n_vocab] = np.minimum(levels, 65535)
        self._file.write(rows.tobytes())


class LogitsFile:
    """Such a file, open for reading; its rows are read as they are asked for, in order.

    Attributes
    ----------
    tokens : int array (n_chunks, n_ctx)
    n_vocab : int

    Raises
    ------
    Error
        Not such a file, or one that ends too early.
    """

    def __init__(self, path: str | Path):
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise Error(f"{path}: not a regular file")
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            self._read_head()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise Error(f"{self.path}: not a file of log-probabilities (it doesn't begin with {_MAGIC.decode()})")
        head = self._file.read(12)
        n_ctx, n_vocab, n_chunks = np.frombuffer(head, "<i4").tolist() if len(head) == 12 else (0, 0, 0)
        self.n_vocab: int = n_vocab
        expected = file_bytes(n_chunks, n_ctx, max(n_vocab, 0))
        if n_ctx < 3 or n_vocab < 1 or n_chunks < 1 or size != expected:
            parts = f"{n_chunks} chunks of {n_ctx} tokens"
            raise Error(f"{self.path}: damaged or cut off: {size} bytes, {expected} expected for {parts}")
        self._row = _row_type(n_vocab)
        self.tokens = np.frombuffer(self._file.read(4 * n_chunks * n_ctx), "<i4").reshape(n_chunks, n_ctx)

    def __enter__(self) -> "LogitsFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def read(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n rows.

        Returns
        -------
        log_probabilities : float32 array (n, n_vocab)
        top : int array (n,)
            The likeliest token of each.

        Raises
        ------
        Error
            The file ends too early, or these are no log-probabilities.
        """
        data = self._file.read(n * self._row.itemsize)
        if len(data) != n * self._row.itemsize:
            raise Error(f"{self.path}: ends too early")
        rows = np.frombuffer(data, self._row)
        levels, step, least = rows["level"][:, : self.n_vocab], rows["step"], rows["least"]
        top = levels.argmax(1)
        with np.errstate(invalid="ignore", over="ignore"):
            most = levels[np.arange(n), top] * step + least
            sound = (step >= 0) & np.isfinite(least) & (most < 1e-2)  # no probability is above 1
        if not sound.all():
            raise Error(f"{self.path}: damaged: there are log-probabilities of NaN, infinity or more than 0")
        return levels * step[:, None] + least[:, None], top
