"""The operations: for each, the shape it gives, what it computes (in numpy), and the kernels that compute it.

`shape(*inputs, **attrs)` checks and infers; it raises GraphError without naming the node, which the caller does.
`reference(run, *arrays, **attrs)` is the truth that the kernels are tested against; `run` knows positions and caches.
`lower(plan, node)` emits kernel calls through `plan.step`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import GraphError
from ..kernels.table import FLOAT, KEYS_PER_ITEM, QUANTIZED

if TYPE_CHECKING:
    from .plan import Plan
    from .reference import Reference
    from .tensor import Tensor

Shape = tuple[int, ...]


class Op(NamedTuple):
    """One operation; see the module."""

    shape: Callable[..., Shape]
    reference: Callable[..., np.ndarray]
    lower: Callable[["Plan", "Tensor"], None]


OPS: dict[str, Op] = {}


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def _vectors(n: int) -> None:
    _need(n % 16 == 0, f"rows of {n} values; the kernels take multiples of 16")


def _row(t: "Tensor") -> int:
    """Values of one token."""
    return t.n_values // t.shape[0]


# --- GET_ROWS: the embedding ------------------------------------------------------------------------------------------


def _get_rows_shape(w: "Tensor", ids: "Tensor") -> Shape:
    _need(len(w.shape) == 2 and ids.type == "I32" and len(ids.shape) == 1, "takes a matrix and token ids")
    _need(w.type in QUANTIZED or w.type in FLOAT, f"no kernel for {w.type}")
    return (ids.shape[0], w.shape[1])


def _get_rows_lower(p: "Plan", node: "Tensor") -> None:
    w, ids = node.inputs
    p.step(f"get_rows_{w.type}", node, w=w, ids=ids, out=node, n_rows=w.shape[0], n_cols=w.shape[1])


OPS["GET_ROWS"] = Op(_get_rows_shape, lambda run, w, ids: w[ids], _get_rows_lower)


# --- MUL_MAT: weights × activations -----------------------------------------------------------------------------------


def _mul_mat_shape(w: "Tensor", x: "Tensor") -> Shape:
    _need(len(w.shape) == 2 and x.type == "F32", "takes a weight matrix and float32 activations")
    _need(w.type in QUANTIZED or w.type in FLOAT, f"no kernel for {w.type}")
    _need(w.shape[1] == _row(x), f"{w.shape[1]} columns against rows of {_row(x)} values")
    _need(w.shape[1] % 32 == 0, f"{w.shape[1]} columns; the kernels take multiples of 32")
    return (x.shape[0], w.shape[0])


def _mul_mat_lower(p: "Plan", node: "Tensor") -> None:
    w, x = node.inputs
    # The sum with a residual that follows costs nothing here: no pass over memory, no barrier.
    total = p.only_user(node)
    residual = None
    if total is not None and total.op == "ADD":
        other = total.inputs[0] if total.inputs[1] is node else total.inputs[1]
        if other is not node and p.is_computed(other):
            residual = other
    out = node if residual is None or total is None else total
    p.mul_mat(w, x, out, residual)
    if out is not node:
        p.mark_computed(out)


OPS["MUL_MAT"] = Op(
    _mul_mat_shape, lambda run, w, x: x.reshape(len(x), -1).astype(np.float32) @ w.T.astype(np.float32), _mul_mat_lower
)


# --- element by element -----------------------------------------------------------------------------------------------


def _pair_shape(x: "Tensor", y: "Tensor") -> Shape:
    _need(x.shape == y.shape and x.type == y.type == "F32", "takes two equal shapes")
    _vectors(_row(x))
    return x.shape


def _pair_lower(p: "Plan", node: "Tensor") -> None:
    x, y = node.inputs
    p.step(node.op.lower(), node, x=x, y=y, out=node, n_cols=_row(node))


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.maximum(x, -88.0)))


def _gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


OPS["ADD"] = Op(_pair_shape, lambda run, x, y: x + y, _pair_lower)
OPS["MUL"] = Op(_pair_shape, lambda run, x, y: x * y, _pair_lower)
OPS["SWIGLU"] = Op(_pair_shape, lambda run, x, y: _silu(x) * y, _pair_lower)  # Shazeer 2020
OPS["GEGLU"] = Op(_pair_shape, lambda run, x, y: _gelu(x) * y, _pair_lower)


def _bias_shape(x: "Tensor", y: "Tensor") -> Shape:
    _need(y.type == "F32" and y.shape == x.shape[1:], "takes one float32 row to add to every token's")
    _vectors(_row(x))
    return x.shape


OPS["ADD_BIAS"] = Op(_bias_shape, lambda run, x, y: x + y, _pair_lower)


def _scale_shape(x: "Tensor", factor: float) -> Shape:
    _vectors(_row(x))
    return x.shape


def _scale_lower(p: "Plan", node: "Tensor") -> None:
    p.step("scale", node, x=node.inputs[0], out=node, n_cols=_row(node), factor=float(node.attrs["factor"]))


OPS["SCALE"] = Op(_scale_shape, lambda run, x, factor: x * np.float32(factor), _scale_lower)


# --- rows -------------------------------------------------------------------------------------------------------------


def _rms_norm_shape(x: "Tensor", w: "Tensor", eps: float) -> Shape:
    _need(w.type == "F32" and w.shape == x.shape[-1:], "takes float32 weights as long as a row")
    _vectors(x.shape[-1])
    return x.shape


def _rms_norm_reference(run: "Reference", x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * w


def _rms_norm_lower(p: "Plan", node: "Tensor") -> None:
    x, w = node.inputs
    n = node.shape[-1]
    rows: dict[str, Any] = {"n_cols": n, "n_rows_per_token": _row(node) // n, "x_stride": 4 * n, "out_stride": 4 * n}
    p.step("rms_norm", node, x=x, w=w, out=node, eps=float(node.attrs["eps"]), **rows)


OPS["RMS_NORM"] = Op(_rms_norm_shape, _rms_norm_reference, _rms_norm_lower)


def _soft_max_shape(x: "Tensor") -> Shape:
    _vectors(_row(x))
    return x.shape


def _soft_max_reference(run: "Reference", x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _soft_max_lower(p: "Plan", node: "Tensor") -> None:
    p.step("soft_max", node, x=node.inputs[0], out=node, n_cols=_row(node))


OPS["SOFT_MAX"] = Op(_soft_max_shape, _soft_max_reference, _soft_max_lower)


def _last_row_shape(x: "Tensor") -> Shape:
    _vectors(_row(x))
    return (1, *x.shape[1:])


def _last_row_lower(p: "Plan", node: "Tensor") -> None:
    x = node.inputs[0]
    p.step("last_row", x, x=x, out=node, n_cols=_row(node))


OPS["LAST_ROW"] = Op(_last_row_shape, lambda run, x: x[-1:], _last_row_lower)


# --- RESHAPE: the same values, seen as heads --------------------------------------------------------------------------


def _reshape_shape(x: "Tensor", shape: Shape) -> Shape:
    n = 1
    for d in shape:
        n *= d
    _need(n == _row(x), f"{_row(x)} values of a token can't be {shape}")
    return (x.shape[0], *shape)


def _reshape_lower(p: "Plan", node: "Tensor") -> None:
    p.alias(node, node.inputs[0])


OPS["RESHAPE"] = Op(_reshape_shape, lambda run, x, shape: x.reshape(len(x), *shape), _reshape_lower)


# --- ROPE -------------------------------------------------------------------------------------------------------------


def _rope_shape(x: "Tensor", table: "Tensor", kind: str) -> Shape:
    _need(kind in ("norm", "neox"), f"unknown kind {kind}")
    _need(len(x.shape) == 3 and len(table.shape) == 2, "takes (n_tokens, n_head, head_dim) and a table (n_tokens, n_rot)")
    _need(table.shape[1] <= x.shape[2] and table.shape[1] % 2 == 0, f"can't rotate {table.shape[1]} of {x.shape[2]} values")
    return x.shape


def _rope_reference(run: "Reference", x: np.ndarray, table: np.ndarray, kind: str) -> np.ndarray:
    n = table.shape[1]
    cos, sin = table[:, None, : n // 2], table[:, None, n // 2 :]
    first, second = (slice(0, n, 2), slice(1, n, 2)) if kind == "norm" else (slice(0, n // 2), slice(n // 2, n))
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def _rope_lower(p: "Plan", node: "Tensor") -> None:
    x, table = node.inputs
    sizes: dict[str, Any] = {"n_head": x.shape[1], "head_dim": x.shape[2], "n_rot": table.shape[1]}
    p.step(f"rope_{node.attrs['kind']}", node, x=x, table=table, out=node, **sizes)


OPS["ROPE"] = Op(_rope_shape, _rope_reference, _rope_lower)


# --- ATTENTION: causal, grouped heads, over the cache and the tokens of this run --------------------------------------


def _attention_shape(q: "Tensor", k: "Tensor", v: "Tensor", cache: "Tensor", scale: float) -> Shape:
    _need(all(len(t.shape) == 3 for t in (q, k, v)), "takes (n_tokens, n_head, head_dim)")
    _need(k.shape == v.shape and k.shape[1:] == cache.shape, "keys, values and cache differ in shape")
    _need(
        q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2], "n_head is no multiple of n_head_kv, or head_dim differs"
    )
    _vectors(q.shape[2])
    return q.shape


def _attention_reference(
    run: "Reference", q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: Any, scale: float
) -> np.ndarray:
    keys, values = cache.append(k, v, run.n_past)  # (n_kv, n_head_kv, head_dim)
    n, n_head, _ = q.shape
    group = n_head // k.shape[1]
    keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
    scores = np.einsum("qhd,khd->hqk", q, keys) * np.float32(scale)
    seen = np.arange(len(keys))[None, :] <= run.n_past + np.arange(n)[:, None]
    scores = np.where(seen[None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), values)


def _attention_lower(p: "Plan", node: "Tensor") -> None:
    q, k, v, cache = node.inputs
    n_head, head_dim = q.shape[1:]
    n_head_kv = k.shape[1]
    store: dict[str, Any] = {"n_head_kv": n_head_kv, "head_dim": head_dim, "n_ctx": p.n_ctx}
    keys, values = p.cache(cache)
    kind = p.kv_type
    p.step(f"store_k_{kind}", node, writes=("cache",), k=k, cache=keys, **store)
    p.step(f"store_v_{kind}", node, writes=("cache",), v=v, cache=values, **store)
    take: dict[str, Any] = {
        "q": q,
        "k_cache": keys,
        "v_cache": values,
        "out": node,
        "n_head": n_head,
        "scale": float(node.attrs["scale"]),
    }
    if node.shape[0] == 1:
        partial = p.buffer(4 * (p.n_ctx // KEYS_PER_ITEM + 1) * n_head * (head_dim + 16))
        p.step(f"attention_one_{kind}", node, writes=("partial",), partial=partial, **take, **store)
        p.step("attention_merge", node, partial=partial, out=node, n_head=n_head, head_dim=head_dim)
    else:
        p.step(f"attention_many_{kind}", node, **take, **store)


OPS["ATTENTION"] = Op(_attention_shape, _attention_reference, _attention_lower)
