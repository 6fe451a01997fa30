"""The memory of a sequence: keys and values of its tokens, in float16 or float32.

Keys are laid out (n_head_kv, n_ctx / 16, head_dim, 16) and values (n_head_kv, n_ctx, head_dim), as the attention kernels
read them. Memory is touched, and so taken, only as tokens come.
"""

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
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def arrays(self, cache: "Tensor") -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a CACHE node."""
        if cache.name not in self._arrays:
            n_head_kv, head_dim = cache.shape
            keys = np.zeros((n_head_kv, self.n_ctx // 16, head_dim, 16), self._dtype)
            self._arrays[cache.name] = (keys, np.zeros((n_head_kv, self.n_ctx, head_dim), self._dtype))
        return self._arrays[cache.name]

    @property
    def n_bytes(self) -> int:
        """Bytes of all caches when full."""
        return sum(k.nbytes + v.nbytes for k, v in self._arrays.values())

    def view(self, cache: "Tensor") -> "CacheView":
        """The cache in numpy's terms, for the reference executor."""
        return CacheView(*self.arrays(cache))


class CacheView:
    """One cache, written and read in the order of positions."""

    def __init__(self, keys: np.ndarray, values: np.ndarray):
        self._keys, self._values = keys, values

    def append(self, k: np.ndarray, v: np.ndarray, n_past: int) -> tuple[np.ndarray, np.ndarray]:
        """Stores (n_tokens, n_head_kv, head_dim) after `n_past` tokens; all keys and values so far, as float32."""
        n = n_past + len(k)
        for i, position in enumerate(range(n_past, n)):
            self._keys[:, position // 16, :, position % 16] = k[i]
        self._values[:, n_past:n] = v.transpose(1, 0, 2)
        keys = self._keys.transpose(1, 3, 0, 2).reshape(-1, *k.shape[1:])  # (n_ctx, n_head_kv, head_dim)
        return keys[:n].astype(np.float32), self._values.transpose(1, 0, 2)[:n].astype(np.float32)
