"""The memory of a sequence: keys and values of its tokens, in float16 or float32.

Keys are laid out (n_head_kv, n_ctx / 16, head_dim, 16) and values (n_head_kv, n_ctx, head_dim_v), as the attention kernels
read them; latent caches, whose keys serve as values too, are (n_ctx, n_values). Memory is touched, and so taken, only as
tokens come.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedError
from ..kernels.table import KV_BLOCK, KV_TYPES

if TYPE_CHECKING:
    from .tensor import Tensor


class Caches:
    """The caches of one sequence, made as graphs ask for them and shared by all graphs that name them alike.

    Parameters
    ----------
    n_ctx : int
        Tokens that fit; rounded up to what the kernels take.
    type : {"F16", "F32"}
        Of the keys and values.

    Raises
    ------
    UnsupportedError
        Another type.
    """

    def __init__(self, n_ctx: int, type: str = "F16"):
        if type not in KV_TYPES:
            raise UnsupportedError(f"KV cache of type {type!r}; there are {', '.join(KV_TYPES)}")
        self.n_ctx = -(-n_ctx // KV_BLOCK) * KV_BLOCK
        self.type = type
        self._dtype = {"F16": np.float16, "F32": np.float32}[type]
        self._arrays: dict[str, tuple[np.ndarray, ...]] = {}

    def arrays(self, cache: "Tensor") -> tuple[np.ndarray, ...]:
        """Keys and values of a CACHE node, or the rows of a latent one."""
        if cache.name not in self._arrays:
            self._arrays[cache.name] = tuple(np.zeros(shape, self._dtype) for shape in self._shapes(cache))
        return self._arrays[cache.name]

    def _shapes(self, cache: "Tensor") -> list[tuple[int, ...]]:
        if len(cache.shape) == 1:
            return [(self.n_ctx, *cache.shape)]
        n_head_kv, head_dim, head_dim_v = cache.shape
        return [(n_head_kv, self.n_ctx // 16, head_dim, 16), (n_head_kv, self.n_ctx, head_dim_v)]

    def size(self, cache: "Tensor") -> int:
        """Bytes of a CACHE node's arrays when full."""
        return sum(math.prod(shape) for shape in self._shapes(cache)) * np.dtype(self._dtype).itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes of all caches when full."""
        return sum(a.nbytes for arrays in self._arrays.values() for a in arrays)

    def view(self, cache: "Tensor") -> "CacheView | LatentView":
        """The cache in numpy's terms, for the reference executor."""
        return (LatentView if len(cache.shape) == 1 else CacheView)(*self.arrays(cache))


class CacheView:
    """One cache, written and read in the order of positions."""

    def __init__(self, keys: np.ndarray, values: np.ndarray):
        self._keys, self._values = keys, values

    def append(self, k: np.ndarray, v: np.ndarray, n_past: int) -> tuple[np.ndarray, np.ndarray]:
        """Stores (n_tokens, n_head_kv, head_dim) and (n_tokens, n_head_kv, head_dim_v) after `n_past` tokens; all keys and
        values so far, as float32."""
        n = n_past + len(k)
        for i, position in enumerate(range(n_past, n)):
            self._keys[:, position // 16, :, position % 16] = k[i]
        self._values[:, n_past:n] = v.transpose(1, 0, 2)
        keys = self._keys.transpose(1, 3, 0, 2).reshape(-1, *k.shape[1:])  # (n_ctx, n_head_kv, head_dim)
        return keys[:n].astype(np.float32), self._values.transpose(1, 0, 2)[:n].astype(np.float32)


class LatentView:
    """A latent cache, likewise."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows

    def append(self, rows: np.ndarray, n_past: int) -> np.ndarray:
        """Stores (n_tokens, n_values) after `n_past` tokens; all rows so far, as float32."""
        n = n_past + len(rows)
        self._rows[n_past:n] = rows
        return self._rows[:n].astype(np.float32)
