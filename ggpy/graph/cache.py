"""The memory of a sequence: keys and values of its tokens, in float16, Q8_0 or float32.

Both lie in slabs of SLAB positions, as the attention kernels read them (`kernels.kv_formats`): keys (head_dim, SLAB) and
values (SLAB, head_dim_v) for each KV head; latent caches, whose keys serve as values too, (SLAB, n_values). Slabs of Q8_0
end with their scales. Memory is touched, and so taken, only as tokens come.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedError
from ..kernels.table import KV_TYPES, SLAB
from .threads import aligned

if TYPE_CHECKING:
    from .tensor import Tensor

_BLOCK = 32  # values with one scale
_DTYPES = {"F16": np.float16, "Q8_0": np.int8, "F32": np.float32}


def _slab(type: str, n: int, by_rows: bool) -> np.dtype:
    """A slab of n values of SLAB positions, (n, SLAB) or by rows, as numpy reads it."""
    fields = [("values", _DTYPES[type], (SLAB, n) if by_rows else (n, SLAB))]
    if type == "Q8_0":
        fields.append(("scales", np.float16, (-(-n // _BLOCK), SLAB)))
    return np.dtype(fields)


class Caches:
    """The caches of one sequence, made as graphs ask for them and shared by all graphs that name them alike.

    Parameters
    ----------
    n_ctx : int
        Tokens that fit; rounded up to what the kernels take.
    type : {"F16", "Q8_0", "F32"}
        Of the keys and values. Q8_0 has int8 values and a float16 scale for every 32 of them, 8.5 bits a value.

    Raises
    ------
    UnsupportedError
        Another type.
    """

    def __init__(self, n_ctx: int, type: str = "F16"):
        if type not in KV_TYPES:
            raise UnsupportedError(f"KV cache of type {type!r}; there are {', '.join(KV_TYPES)}")
        self.n_ctx = -(-n_ctx // SLAB) * SLAB
        self.type = type
        self._arrays: dict[str, tuple[np.ndarray, ...]] = {}

    def arrays(self, cache: "Tensor") -> tuple[np.ndarray, ...]:
        """Keys and values of a CACHE node, (n_head_kv, n_ctx / SLAB) slabs, or the (n_ctx / SLAB,) of a latent one."""
        if cache.name not in self._arrays:
            self._arrays[cache.name] = tuple(
                aligned(math.prod(shape) * slab.itemsize).view(slab).reshape(shape) for shape, slab in self._layout(cache)
            )
        return self._arrays[cache.name]

    def _layout(self, cache: "Tensor") -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and slab of each array."""
        n_slabs = self.n_ctx // SLAB
        if len(cache.shape) == 1:
            return [((n_slabs,), _slab(self.type, cache.shape[0], by_rows=True))]
        n_head_kv, head_dim, head_dim_v = cache.shape
        keys, values = _slab(self.type, head_dim, by_rows=False), _slab(self.type, head_dim_v, by_rows=True)
        return [((n_head_kv, n_slabs), keys), ((n_head_kv, n_slabs), values)]

    def size(self, cache: "Tensor") -> int:
        """Bytes of a CACHE node's arrays when full."""
        return sum(math.prod(shape) * slab.itemsize for shape, slab in self._layout(cache))

    @property
    def n_bytes(self) -> int:
        """Bytes of all caches when full."""
        return sum(a.nbytes for arrays in self._arrays.values() for a in arrays)

    def view(self, cache: "Tensor") -> "CacheView | LatentView":
        """The cache in numpy's terms, for the reference executor."""
        return (LatentView if len(cache.shape) == 1 else CacheView)(*self.arrays(cache))


def _quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q8_0 of the last dimension: (…, n) float32 to int8 values and (…, ceil(n / 32)) float16 scales."""
    n = x.shape[-1]
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % _BLOCK)]).reshape(*x.shape[:-1], -1, _BLOCK)
    scales = (np.abs(blocks).max(-1) / np.float32(127)).astype(np.float16)
    steps = scales.astype(np.float32)
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
    values = np.rint(blocks * inverse[..., None]).clip(-127, 127).astype(np.int8)
    return values.reshape(*x.shape[:-1], -1)[..., :n], scales


def _has_scales(slabs: np.ndarray) -> bool:
    return "scales" in (slabs.dtype.names or ())


def _put(slabs: np.ndarray, position: int, x: np.ndarray, by_rows: bool) -> None:
    """Stores one position's values, (n,) or (n_head_kv, n), in slabs (n_ctx / SLAB,) or (n_head_kv, n_ctx / SLAB)."""
    here = slabs[..., position // SLAB]
    if _has_scales(slabs):
        x, here["scales"][..., position % SLAB] = _quantize(x)
    values = here["values"]
    (values if by_rows else values.swapaxes(-1, -2))[..., position % SLAB, :] = x


def _rows(slabs: np.ndarray, by_rows: bool) -> np.ndarray:
    """All positions' values as float32, (n_ctx, n) or (n_head_kv, n_ctx, n)."""
    values = slabs["values"].astype(np.float32)
    values = values if by_rows else values.swapaxes(-1, -2)  # (…, n_ctx / SLAB, SLAB, n)
    if _has_scales(slabs):
        scales = slabs["scales"].astype(np.float32).swapaxes(-1, -2)
        values = values * np.repeat(scales, _BLOCK, -1)[..., : values.shape[-1]]
    return values.reshape(*values.shape[:-3], -1, values.shape[-1])


class CacheView:
    """One cache, written and read in the order of positions."""

    def __init__(self, keys: np.ndarray, values: np.ndarray):
        self._keys, self._values = keys, values

    def append(self, k: np.ndarray, v: np.ndarray, n_past: int) -> tuple[np.ndarray, np.ndarray]:
        """Stores (n_tokens, n_head_kv, head_dim) and (n_tokens, n_head_kv, head_dim_v) after `n_past` tokens; all keys and
        values so far, as float32."""
        for i in range(len(k)):
            _put(self._keys, n_past + i, k[i], by_rows=False)
            _put(self._values, n_past + i, v[i], by_rows=True)
        keys, values = _rows(self._keys, by_rows=False), _rows(self._values, by_rows=True)
        n = n_past + len(k)
        return keys[:, :n].swapaxes(0, 1), values[:, :n].swapaxes(0, 1)


class LatentView:
    """A latent cache, likewise."""

    def __init__(self, rows: np.ndarray):
        self._slabs = rows

    def append(self, rows: np.ndarray, n_past: int) -> np.ndarray:
        """Stores (n_tokens, n_values) after `n_past` tokens; all rows so far, as float32."""
        for i, row in enumerate(rows):
            _put(self._slabs, n_past + i, row, by_rows=True)
        return _rows(self._slabs, by_rows=True)[: n_past + len(rows)]
