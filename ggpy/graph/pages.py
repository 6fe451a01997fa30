"""The memory of sequences: keys and values of their tokens, in float16, Q8_0 or float32.

They lie in *pages* of SLAB positions of one sequence, in slabs as the attention kernels read them (`kernels.kv_formats`):
for each page keys (head_dim, SLAB) and values (SLAB, head_dim_v) of each KV head, padded to multiples of 16; of latent
caches, whose keys serve as values too, (SLAB, n_values). Slabs of Q8_0 end with their scales. A page is page p of every
cache, one piece of each. Memory is touched, and so taken, only as tokens come.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedError
from ..kernels.table import KV_TYPES, SLAB, padded
from .pool import Pool
from .states import States
from .threads import aligned

if TYPE_CHECKING:
    from .tensor import Tensor

_BLOCK = 32  # values with one scale
_DTYPES = {"F16": np.float16, "Q8_0": np.int8, "F32": np.float32}


def pages_of(n_tokens: int) -> int:
    """How many pages hold n_tokens positions."""
    return -(-n_tokens // SLAB)


def _slab(type: str, n: int, by_rows: bool) -> np.dtype:
    """A slab of n values of SLAB positions, (n, SLAB) or by rows, as numpy reads it."""
    fields = [("values", _DTYPES[type], (SLAB, n) if by_rows else (n, SLAB))]
    if type == "Q8_0":
        fields.append(("scales", np.float16, (-(-n // _BLOCK), SLAB)))
    return np.dtype(fields)


class Pages(Pool):
    """The pages of all sequences of a model. Sequences hold them by number, and may share those that are full.

    Parameters
    ----------
    n_pages : int
        How many there are.
    type : {"F16", "Q8_0", "F32"}
        Of the keys and values. Q8_0 has int8 values and a float16 scale for every 32 of them, 8.5 bits a value.
    n_ctx : int, optional
        The most positions of one sequence; by default all pages'.
    n_slots : int
        Slots beside them for layers with states (`states`).

    Attributes
    ----------
    states : States

    Raises
    ------
    UnsupportedError
        Another type.
    """

    def __init__(self, n_pages: int, type: str = "F16", n_ctx: int | None = None, n_slots: int = 0):
        if type not in KV_TYPES:
            raise UnsupportedError(f"KV cache of type {type!r}; there are {', '.join(KV_TYPES)}")
        super().__init__(n_pages, "pages of keys and values")
        self.n_pages, self.type = n_pages, type
        self.n_ctx = n_ctx or n_pages * SLAB
        self.states = States(n_slots)

    def arrays(self, cache: "Tensor") -> tuple[np.ndarray, ...]:
        """Keys and values of a CACHE node, (n_pages, n_head_kv) slabs, or the (n_pages,) of a latent one. Made as graphs
        ask for them, and shared by all graphs that name them alike."""
        if cache.name not in self._arrays:
            self._arrays[cache.name] = tuple(
                aligned(self.n_pages * math.prod(shape) * slab.itemsize).view(slab).reshape(self.n_pages, *shape)
                for shape, slab in self._layout(cache)
            )
        return self._arrays[cache.name]

    def _layout(self, cache: "Tensor") -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and slab of a page of each array."""
        if len(cache.shape) == 1:
            return [((), _slab(self.type, cache.shape[0], by_rows=True))]
        n_head_kv, head_dim, head_dim_v = cache.shape
        keys = _slab(self.type, padded(head_dim), by_rows=False)
        values = _slab(self.type, padded(head_dim_v), by_rows=True)
        return [((n_head_kv,), keys), ((n_head_kv,), values)]

    def page_bytes(self, graph: "Iterable[Tensor]") -> int:
        """Bytes of a page in all caches of a graph."""
        layouts = (self._layout(t) for t in graph if t.op == "CACHE")
        return sum(math.prod(shape) * slab.itemsize for layout in layouts for shape, slab in layout)

    def view(self, cache: "Tensor") -> "CacheView | LatentView":
        """The cache in numpy's terms, for the reference executor."""
        first, *values = self.arrays(cache)
        return CacheView(first, values[0], cache.shape) if values else LatentView(first)


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


def _put(slabs: np.ndarray, place: int, x: np.ndarray, by_rows: bool) -> None:
    """Stores one position's values, (n,) or (n_head_kv, n), in slabs (n_pages,) or (n_pages, n_head_kv)."""
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded(x.shape[-1]) - x.shape[-1])])
    page, position = divmod(int(place), SLAB)
    here = slabs[page]
    if _has_scales(slabs):
        x, here["scales"][..., position] = _quantize(x)
    values = here["values"]
    (values if by_rows else values.swapaxes(-1, -2))[..., position, :] = x


def _rows(slabs: np.ndarray, pages: np.ndarray, n: int, by_rows: bool) -> np.ndarray:
    """The first n positions' values of some pages as float32, (n, n_values) or (n, n_head_kv, n_values)."""
    slabs = slabs[pages[: pages_of(n)]]
    values = slabs["values"].astype(np.float32)
    values = values if by_rows else values.swapaxes(-1, -2)  # (n_pages, …, SLAB, n_values)
    if _has_scales(slabs):
        scales = slabs["scales"].astype(np.float32).swapaxes(-1, -2)
        values = values * np.repeat(scales, _BLOCK, -1)[..., : values.shape[-1]]
    values = np.moveaxis(values, -2, 1)
    return values.reshape(-1, *values.shape[2:])[:n]


class CacheView:
    """One cache, written and read in the order of positions."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, shape: tuple[int, ...]):
        self._keys, self._values, self.shape, self._writes = keys, values, shape, True

    def as_it_is(self) -> "CacheView":
        """The same, to which nothing is appended."""
        view = CacheView(self._keys, self._values, self.shape)
        view._writes = False
        return view

    def append(
        self, k: np.ndarray, v: np.ndarray, places: np.ndarray, pages: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stores (n_tokens, n_head_kv, head_dim) and (n_tokens, n_head_kv, head_dim_v) at their places; the keys and
        values of the first n positions of a sequence with these pages, as float32."""
        for i, place in enumerate(places if self._writes else ()):
            _put(self._keys, place, k[i], by_rows=False)
            _put(self._values, place, v[i], by_rows=True)
        keys, values = _rows(self._keys, pages, n, by_rows=False), _rows(self._values, pages, n, by_rows=True)
        return keys[..., : k.shape[-1]], values[..., : v.shape[-1]]


class LatentView:
    """A latent cache, likewise."""

    def __init__(self, rows: np.ndarray):
        self._slabs = rows

    def append(self, rows: np.ndarray, places: np.ndarray, pages: np.ndarray, n: int) -> np.ndarray:
        """Stores (n_tokens, n_values) at their places; the rows of the first n positions, as float32."""
        for row, place in zip(rows, places, strict=True):
            _put(self._slabs, place, row, by_rows=True)
        return _rows(self._slabs, pages, n, by_rows=True)
