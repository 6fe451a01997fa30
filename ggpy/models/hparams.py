"""A model's hyperparameters: the `{architecture}.*` keys of its file, checked as they are read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError

if TYPE_CHECKING:
    from ..file import GGUFFile

_MOST = 1 << 31


@dataclass(frozen=True)
class Options:
    """What is asked of a model beside its file.

    Attributes
    ----------
    n_expert_used : int, optional
        Experts for each token, instead of the file's number.
    mla : {"absorbed", "naive"}
        The form of latent attention; see `deepseek2`.
    n_ctx : int
        The context that it is loaded for; 0 if unknown.
    """

    n_expert_used: int | None = None
    mla: str = "absorbed"
    n_ctx: int = 0


class Hparams:
    """Reads keys by their names without the architecture. All methods raise GGUFError where a value makes no sense.

    Attributes
    ----------
    file : GGUFFile
    arch : str
        `general.architecture`.
    whole : bool
        Whether the layers at the end that predict further tokens count as layers.
    """

    def __init__(self, file: "GGUFFile", whole: bool = False):
        self.file, self.arch, self.whole = file, file.get("general.architecture", str), whole

    def error(self, message: str) -> GGUFError:
        """An error that names the file."""
        return GGUFError(f"{self.file.path}: {message}")

    def size(self, key: str, default: int | None = None) -> int:
        """A number greater than 0; without a default the key must be there."""
        options = {} if default is None else {"default": default}
        value = self.file.get(f"{self.arch}.{key}", int, **options)
        if not 0 < value < _MOST:
            raise self.error(f"key {self.arch}.{key}: {value} makes no sense")
        return value

    def count(self, key: str, default: int = 0) -> int:
        """A number that may be 0."""
        value = self.file.get(f"{self.arch}.{key}", int, default=default)
        if not 0 <= value <= 2 * _MOST:
            raise self.error(f"key {self.arch}.{key}: {value} makes no sense")
        return value

    def sizes(self, key: str, n: int, default: int | None = None, least: int = 1) -> tuple[int, ...]:
        """A number of at least `least` for each of n layers: one greater than 0 for all, or an array."""
        values = self.file.metadata.get(f"{self.arch}.{key}")
        if not isinstance(values, np.ndarray):
            return (self.size(key, default),) * n
        if values.dtype.kind not in "iu" or len(values) < n or not ((values[:n] >= least) & (values[:n] < _MOST)).all():
            raise self.error(f"key {self.arch}.{key}: {values.tolist()[:8]} make no sense for {n} layers")
        return tuple(values[:n].tolist())

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float; without a default the key must be there."""
        options = {} if default is None else {"default": default}
        return self.file.get(f"{self.arch}.{key}", float, **options)

    def positive(self, key: str, default: float | None = None) -> float:
        """A float above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(f"key {self.arch}.{key}: {value} isn't above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Yes or no."""
        return self.file.get(f"{self.arch}.{key}", bool, default=default)

    def text(self, key: str, default: str) -> str:
        """A string."""
        return self.file.get(f"{self.arch}.{key}", str, default=default)

    def n_layer(self) -> int:
        """Layers that tokens go through: without those at the end that predict further tokens, unless `whole`."""
        n_all = self.size("block_count")
        n = n_all - self.count("nextn_predict_layers")
        if n > 0 and self.whole:
            n = n_all
        if n <= 0:
            raise self.error(f"key {self.arch}.nextn_predict_layers: no layer is left")
        if n > len(self.file.tensors):  # so that tables of layers are no larger than the file
            raise self.error(f"key {self.arch}.block_count: {n} layers of {len(self.file.tensors)} tensors")
        return n

    def n_vocab(self) -> int:
        """Rows of the embedding."""
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2 or not embedding.shape[0]:
            raise self.error("tensor token_embd.weight is missing, empty or no matrix")
        return embedding.shape[0]
