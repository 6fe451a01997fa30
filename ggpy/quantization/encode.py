"""Encoding values with the compiled kernels."""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from ..errors import Error, UnsupportedError
from ..kernels.build import KERNEL_TYPE, load
from ..kernels.table import ENCODED
from ..quant import block_type

#: what a float16 can hold
_LARGEST_F16 = 65504.0


def encode(
    values: np.ndarray, type: str, importance: np.ndarray | None = None, n_threads: int = 1, first_row: int = 0
) -> np.ndarray:
    """Encodes rows of values.

    Parameters
    ----------
    values : numpy.ndarray
        float32 (n_rows, n_cols), n_cols a multiple of the type's block size.
    type : str
        One of `ggpy.kernels.table.ENCODED`, F32, F16 or BF16.
    importance : numpy.ndarray, optional
        float32 (n_cols,), ≥ 0: the mean squares of the activations that the columns are multiplied with. Types with
        a plain rule alone (Q8_0, MXFP4, TQ1_0, TQ2_0) make no use of it.
    n_threads : int
    first_row : int
        Number of the first row in error messages.

    Returns
    -------
    numpy.ndarray
        uint8 (n_rows, row_bytes)

    Raises
    ------
    UnsupportedError
        There is no encoder for the type.
    Error
        Values are NaN, infinite or too large for the type.
    ValueError
        Shapes or dtypes don't fit.
    """
    kind = block_type(type)
    check(values, type, first_row)
    if type in ("F32", "F16", "BF16"):
        return kind.quantize(values)
    if type not in ENCODED:
        raise UnsupportedError(f"there is no encoder for {type}; there are for F32, F16, BF16, {', '.join(ENCODED)}")
    if values.ndim != 2:
        raise ValueError(f"values must be (n_rows, n_cols), not {values.shape}")
    n_rows, n_cols = values.shape
    out = np.empty((n_rows, kind.row_bytes(n_cols)), np.uint8)
    values = np.ascontiguousarray(values)
    if importance is not None:
        if importance.shape != (n_cols,):
            raise ValueError(f"the importance of {n_cols} columns has the shape {importance.shape}")
        importance = np.ascontiguousarray(importance, np.float32)
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise ValueError("importance must be finite and not negative")
    counter = np.zeros(1, np.int64)
    places = (values.ctypes.data, 0 if importance is None else importance.ctypes.data, out.ctypes.data)
    params = np.array([*places, counter.ctypes.data, n_rows, n_cols], np.int64)
    run = KERNEL_TYPE(load([f"encode_{type}"])[f"encode_{type}"])

    def work(ith: int) -> None:
        spare = (ctypes.c_int64 * 2)()
        at = ctypes.addressof(spare)
        run(at, at + 8, ith, n_threads, params.ctypes.data)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, n_threads)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    return out


def check(values: np.ndarray, type: str, first_row: int = 0) -> None:
    """Refuses values that the type can't hold: NaN, infinities, and what overflows its float16 scale.

    Raises
    ------
    Error
    ValueError
        `values` isn't float32.
    """
    if values.dtype != np.float32:
        raise ValueError(f"values must be float32, not {values.dtype}")
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        row, col = np.argwhere(~np.isfinite(values.reshape(-1, values.shape[-1])))[0]
        raise Error(f"value [{first_row + row}, {col}] is {values.reshape(-1, values.shape[-1])[row, col]}")
    if type not in ("F32", "BF16", "MXFP4") and max(-low, high) > _LARGEST_F16:
        raise Error(f"values up to {max(-low, high):.3g} don't fit {type}: float16 ends at {_LARGEST_F16:.0f}")
