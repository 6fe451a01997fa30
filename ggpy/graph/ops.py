"""The operations: for each, the shape it gives, what it computes (in numpy), and the kernels that compute it.

`shape(*inputs, **attrs)` checks and infers; it raises GraphError without naming the node, which the caller does.
`reference(run, *arrays, **attrs)` is the truth that the kernels are tested against; `run` knows the batch.
`lower(plan, node)` emits kernel calls through `plan.step`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import GraphError
from ..kernels.table import (
    FLOAT,
    GEGLUS,
    GELUS,
    HEADS_PER_ITEM,
    KEYS_PER_PART,
    MOST_EXPERTS,
    NO_LIMIT,
    QUANTIZED,
    STATE_COLUMNS,
    attention_scratch,
    padded,
    split_spans,
)

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


def _columns(w: "Tensor") -> None:
    _need(w.type in QUANTIZED or w.type in FLOAT, f"no kernel for {w.type}")


def _mul_mat_shape(w: "Tensor", x: "Tensor") -> Shape:
    _need(len(w.shape) == 2 and x.type == "F32", "takes a weight matrix and float32 activations")
    _need(len(x.shape) == 2 and w.shape[1] == x.shape[1], f"{w.shape[1]} columns against rows of {_row(x)} values")
    _columns(w)
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
    source, stride = p.activations(x, w.type, w.shape[1])
    sizes: dict[str, Any] = {"x_stride": stride, "out_stride": 4 * w.shape[0], "x_slot_stride": 0, "out_slot_stride": 0}
    added = 0 if residual is None else residual
    p.product(w, out, x.shape[0] == 1, x=source, out=out, residual=added, n_slots=1, **sizes)
    if out is not node:
        p.mark_computed(out)


OPS["MUL_MAT"] = Op(_mul_mat_shape, lambda run, w, x: x @ w.T, _mul_mat_lower)


# --- element by element -----------------------------------------------------------------------------------------------


def _pair_shape(x: "Tensor", y: "Tensor") -> Shape:
    _need(x.shape == y.shape and x.type == y.type == "F32", "takes two equal shapes")
    return x.shape


def _pair_lower(p: "Plan", node: "Tensor") -> None:
    x, y = node.inputs
    p.step(node.op.lower(), node, x=x, y=y, out=node, n_cols=_row(node))


def _each_lower(p: "Plan", node: "Tensor") -> None:
    attrs: dict[str, Any] = {key: float(value) for key, value in node.attrs.items()}
    p.step(node.op.lower(), node, x=node.inputs[0], out=node, n_cols=_row(node), **attrs)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.maximum(x, -88.0)))


def _gelu(x: np.ndarray, kind: str) -> np.ndarray:
    """By the error function, or one of its two approximations (Hendrycks & Gimpel 2016)."""
    if kind == "erf":
        return (0.5 * x * (1 + np.vectorize(math.erf, [float])(x / math.sqrt(2)))).astype(np.float32)
    if kind == "quick":
        return x / (1 + np.exp(-np.maximum(np.float32(1.702) * x, -88.0)))
    x = x.astype(np.float64)  # in float32 the sum cancels
    return (0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))).astype(np.float32)


def _gelu_shape(x: "Tensor", kind: str) -> Shape:
    _need(kind in GELUS, f"unknown kind {kind}")
    return x.shape


def _gelu_lower(p: "Plan", node: "Tensor") -> None:
    p.step(f"gelu_{node.attrs['kind']}", node, x=node.inputs[0], out=node, n_cols=_row(node))


def _geglu_shape(x: "Tensor", y: "Tensor", kind: str) -> Shape:
    _need(kind in GEGLUS, f"unknown kind {kind}")
    return _pair_shape(x, y)


def _geglu_lower(p: "Plan", node: "Tensor") -> None:
    x, y = node.inputs
    p.step(f"geglu_{node.attrs['kind']}", node, x=x, y=y, out=node, n_cols=_row(node))


def _swiglu_lower(p: "Plan", node: "Tensor") -> None:
    fmt = p.quantized_format(node)
    if fmt is None:
        _pair_lower(p, node)
    else:
        p.make_quantized(node, fmt, x=node.inputs[0], y=node.inputs[1])


OPS["ADD"] = Op(_pair_shape, lambda run, x, y: x + y, _pair_lower)
OPS["MUL"] = Op(_pair_shape, lambda run, x, y: x * y, _pair_lower)
OPS["SWIGLU"] = Op(_pair_shape, lambda run, x, y: _silu(x) * y, _swiglu_lower)  # Shazeer 2020
OPS["GELU"] = Op(_gelu_shape, lambda run, x, kind: _gelu(x, kind), _gelu_lower)
OPS["GEGLU"] = Op(_geglu_shape, lambda run, x, y, kind: _gelu(x, kind) * y, _geglu_lower)
OPS["RELU_SQUARED"] = Op(lambda x: x.shape, lambda run, x: np.maximum(x, 0) ** 2, _each_lower)


def _clamped_shape(x: "Tensor", y: "Tensor", alpha: float, limit: float) -> Shape:
    _need(limit > 0, f"a limit of {limit}")
    return _pair_shape(x, y)


def _clamped_reference(run: "Reference", x: np.ndarray, y: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    gate, up = np.minimum(x, limit) + (x - x), np.clip(y, -limit, limit) + (y - y)  # NaN where they aren't finite
    return (gate / (1 + np.exp(-np.maximum(alpha * gate, -88.0))) * (up + 1)).astype(np.float32)


def _clamped_lower(p: "Plan", node: "Tensor") -> None:
    x, y = node.inputs
    attrs: dict[str, Any] = {key: float(value) for key, value in node.attrs.items()}
    p.step("swiglu_clamped", node, x=x, y=y, out=node, n_cols=_row(node), **attrs)


# gpt-oss's: x / (1 + e^(-alpha x)) * (y + 1), of x and y no further than `limit` from 0; bounds hide no damage.
OPS["SWIGLU_CLAMPED"] = Op(_clamped_shape, _clamped_reference, _clamped_lower)


def _bias_shape(x: "Tensor", y: "Tensor") -> Shape:
    _need(y.type == "F32" and y.shape == x.shape[1:], "takes one float32 row for all tokens")
    return x.shape


OPS["ADD_BIAS"] = Op(_bias_shape, lambda run, x, y: x + y, _pair_lower)
OPS["MUL_ROW"] = Op(_bias_shape, lambda run, x, y: x * y, _pair_lower)


OPS["SCALE"] = Op(lambda x, factor: x.shape, lambda run, x, factor: x * np.float32(factor), _each_lower)


def _clamp_shape(x: "Tensor", limit: float) -> Shape:
    _need(limit > 0, f"a limit of {limit}")
    return x.shape


def _clamp_reference(run: "Reference", x: np.ndarray, limit: float) -> np.ndarray:
    return np.where(np.isfinite(x), np.clip(x, np.float32(-limit), np.float32(limit)), np.float32(np.nan))


# x, no further than `limit` from 0; what isn't finite is NaN, so that the bound hides no damage
OPS["CLAMP"] = Op(_clamp_shape, _clamp_reference, _each_lower)
# cap * tanh(x / cap)
OPS["SOFT_CAP"] = Op(
    lambda x, cap: x.shape, lambda run, x, cap: np.tanh(x / np.float32(cap)) * np.float32(cap), _each_lower
)


# --- rows -------------------------------------------------------------------------------------------------------------


def _rms_norm_shape(x: "Tensor", w: "Tensor | None" = None, *, eps: float) -> Shape:
    if w is None:
        return x.shape
    n = w.shape[-1]
    _need(w.type == "F32" and len(w.shape) == 1 and n <= x.shape[-1], "takes float32 weights, no more than a row's values")
    return (*x.shape[:-1], n)


def _rms_norm_reference(run: "Reference", x: np.ndarray, w: np.ndarray | None = None, *, eps: float) -> np.ndarray:
    x = x if w is None else x[..., : len(w)]
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps))
    return y if w is None else y * w


def _rms_norm_lower(p: "Plan", node: "Tensor") -> None:
    x, *weights = node.inputs
    w = weights[0] if weights else 0
    n = node.shape[-1]
    fmt = p.quantized_format(node)
    if fmt is not None and len(x.shape) == 2:
        p.make_quantized(node, fmt, x=x, w=w, eps=float(node.attrs["eps"]), x_stride=4 * x.shape[-1])
        return
    rows: dict[str, Any] = {"n_cols": n, "n_rows_per_token": _row(node) // n, "out_stride": 4 * n}
    p.step("rms_norm", node, x=x, w=w, out=node, eps=float(node.attrs["eps"]), x_stride=4 * x.shape[-1], **rows)


# With weights or without. Of rows longer than the weights, the beginning is taken.
OPS["RMS_NORM"] = Op(_rms_norm_shape, _rms_norm_reference, _rms_norm_lower)


def _layer_norm_shape(x: "Tensor", *weights: "Tensor", eps: float) -> Shape:
    _need(len(weights) <= 2, "takes weights and a bias at most")
    _need(all(t.type == "F32" and t.shape == x.shape[-1:] for t in weights), "takes float32 weights as long as a row")
    return x.shape


def _layer_norm_reference(run: "Reference", x: np.ndarray, *weights: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps))
    for how, t in zip((np.multiply, np.add), weights, strict=False):
        x = how(x, t)
    return x


def _layer_norm_lower(p: "Plan", node: "Tensor") -> None:
    x, *weights = node.inputs
    w, bias = (*weights, 0, 0)[:2]
    n = node.shape[-1]
    rows: dict[str, Any] = {"n_cols": n, "n_rows_per_token": _row(node) // n, "eps": float(node.attrs["eps"])}
    p.step("layer_norm", node, x=x, w=w, bias=bias, out=node, **rows)


# With weights and a bias, with weights alone, or without.
OPS["LAYER_NORM"] = Op(_layer_norm_shape, _layer_norm_reference, _layer_norm_lower)


def _soft_max_shape(x: "Tensor") -> Shape:
    _vectors(_row(x))
    return x.shape


def _soft_max_reference(run: "Reference", x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _soft_max_lower(p: "Plan", node: "Tensor") -> None:
    p.step("soft_max", node, x=node.inputs[0], out=node, n_cols=_row(node))


OPS["SOFT_MAX"] = Op(_soft_max_shape, _soft_max_reference, _soft_max_lower)


def _rows_shape(x: "Tensor", rows: "Tensor") -> Shape:
    _need(rows.type == "I32" and len(rows.shape) == 1, "takes numbers of rows")
    return (rows.shape[0], *x.shape[1:])


def _rows_lower(p: "Plan", node: "Tensor") -> None:
    x, rows = node.inputs
    p.step("rows", node, x=x, rows=rows, out=node, n_cols=_row(node))


# Some tokens' rows: those whose results are wanted.
OPS["ROWS"] = Op(_rows_shape, lambda run, x, rows: x[rows], _rows_lower)


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


def _rope_shape(x: "Tensor", table: "Tensor", kind: str, first: int = 0) -> Shape:
    _need(kind in ("norm", "neox"), f"unknown kind {kind}")
    _need(len(x.shape) == 3 and len(table.shape) == 2, "takes (n_tokens, n_head, head_dim) and a table (n_tokens, n_rot)")
    n, n_rot = x.shape[2] - first, table.shape[1]
    _need(0 < n_rot <= n and n_rot % 2 == 0, f"can't rotate {n_rot} of {n} values")
    return (*x.shape[:2], n)


def _rope_reference(run: "Reference", x: np.ndarray, table: np.ndarray, kind: str, first: int = 0) -> np.ndarray:
    n, x = table.shape[1], x[..., first:]
    cos, sin = table[:, None, : n // 2], table[:, None, n // 2 :]
    a, b = (slice(0, n, 2), slice(1, n, 2)) if kind == "norm" else (slice(0, n // 2), slice(n // 2, n))
    out = x.copy()
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


def _rope_lower(p: "Plan", node: "Tensor") -> None:
    x, table = node.inputs
    _, n_head, width = x.shape
    sizes: dict[str, Any] = {"n_head": n_head, "head_dim": node.shape[2], "n_rot": table.shape[1]}
    sizes |= {"x_stride": 4 * n_head * width, "x_head_stride": 4 * width}
    source = p.at(x, 4 * node.attrs.get("first", 0))
    p.step(f"rope_{node.attrs['kind']}", node, x=source, table=table, out=node, **sizes)


# Values of a head before `first` are left out.
OPS["ROPE"] = Op(_rope_shape, _rope_reference, _rope_lower)


# --- ATTENTION: grouped heads, over the cache and the tokens of this run ----------------------------------------------


def _attention_shape(
    q: "Tensor",
    k: "Tensor",
    v: "Tensor",
    cache: "Tensor",
    sinks: "Tensor | None" = None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    causal: bool = True,
) -> Shape:
    _need(all(len(t.shape) == 3 for t in (q, k, v)), "takes (n_tokens, n_head, head_dim)")
    _need(
        k.shape[:2] == v.shape[:2] and (*k.shape[1:], v.shape[2]) == cache.shape, "keys, values and cache differ in shape"
    )
    _need(
        q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2], "n_head is no multiple of n_head_kv, or head_dim differs"
    )
    _need(sinks is None or (sinks.type == "F32" and sinks.shape == (q.shape[1],)), "takes one float32 sink a head")
    _need(window >= 0 and cap >= 0, f"a window of {window}, a cap of {cap}")
    return (*q.shape[:2], v.shape[2])


def _reach(window: int, causal: bool) -> tuple[int, int]:
    """How many keys before and behind its own a token sees."""
    if causal:
        return (window - 1 if window else NO_LIMIT), 0
    return (window // 2, window // 2) if window else (NO_LIMIT, NO_LIMIT)


def _attend(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    n_past: int,
    scale: float,
    sinks: np.ndarray | None = None,
    reach: tuple[int, int] = (NO_LIMIT, 0),
    cap: float = 0.0,
) -> np.ndarray:
    """(n, n_head, …) queries, the first at position n_past, over keys and values (n_kv, n_head, …)."""
    scores = np.einsum("qhd,khd->hqk", q, keys, optimize=True) * np.float32(scale)
    if cap:
        scores = np.tanh(scores / np.float32(cap)) * np.float32(cap)
    ahead = np.arange(len(keys))[None, :] - (n_past + np.arange(len(q))[:, None])
    scores = np.where((-ahead <= reach[0]) & (ahead <= reach[1]), scores, -np.inf)
    if sinks is not None:  # one more key without a value
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], -1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[..., : len(keys)]
    return np.einsum("hqk,khd->qhd", p, values, optimize=True)


def _attention_reference(
    run: "Reference",
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: Any,
    sinks: np.ndarray | None = None,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    causal: bool = True,
) -> np.ndarray:
    out, group = [], q.shape[1] // k.shape[1]
    for span, n_past, pages in run.batch.each():
        n = n_past + span.stop - span.start
        keys, values = cache.append(k[span], v[span], run.batch.places[span], pages, n)
        keys, values = np.repeat(keys, group, 1), np.repeat(values, group, 1)
        out.append(_attend(q[span], keys, values, n_past, scale, sinks, _reach(window, causal), cap))
    return np.concatenate(out)


def _attention_lower(p: "Plan", node: "Tensor") -> None:
    q, k, v, cache, *sinks = node.inputs
    keys, values = p.cache(cache)
    n_head_kv, head_dim, head_dim_v = cache.shape
    p.step(f"store_k_{p.kv_type}", node, writes=("cache",), x=k, cache=keys, n_head_kv=n_head_kv, head_dim=head_dim)
    p.step(f"store_v_{p.kv_type}", node, writes=("cache",), x=v, cache=values, n_head_kv=n_head_kv, head_dim=head_dim_v)
    _attend_to_cache(p, node, q, cache, sinks[0] if sinks else 0)


def _attend_to_cache(p: "Plan", node: "Tensor", q: "Tensor", cache: "Tensor", sinks: "Tensor | int") -> None:
    keys, values = p.cache(cache)
    n_head_kv, head_dim, head_dim_v = cache.shape
    n_before, n_after = _reach(node.attrs.get("window", 0), node.attrs.get("causal", True))
    sizes: dict[str, Any] = {"n_head": q.shape[1], "n_head_kv": n_head_kv, "head_dim": head_dim, "head_dim_v": head_dim_v}
    sizes |= {"scale": float(node.attrs["scale"]), "cap": float(node.attrs.get("cap", 0.0))}
    sizes |= {"sinks": sinks, "n_before": n_before, "n_after": n_after}
    _attention_steps(p, node, "attention", (n_head_kv, head_dim), n_before, q=q, k_cache=keys, v_cache=values, **sizes)


def _attention_steps(p: "Plan", node: "Tensor", kernel: str, keys: Shape, n_before: int, /, **params: Any) -> None:
    """Attention and the merging of its parts, over keys of the shape (n_head_kv, head_dim), n_before of them at most before
    a token."""
    n_tokens, n_head, head_dim_v = node.shape
    n_head_kv, width = keys
    p.scratch(attention_scratch(width, head_dim_v))
    per_token = n_head_kv * -(-n_head // n_head_kv // HEADS_PER_ITEM)
    n_parts = min(p.n_ctx, n_before + KEYS_PER_PART) // KEYS_PER_PART + 1
    n_parts *= split_spans(n_tokens, per_token, p.n_threads)
    partial = p.buffer(4 * n_parts * n_head * (padded(head_dim_v) + 16))
    p.step(f"{kernel}_{p.kv_type}", node, writes=("out", "partial"), out=node, partial=partial, **params)
    sizes: dict[str, Any] = {"n_head": n_head, "head_dim": head_dim_v, "items_per_token": per_token, "n_before": n_before}
    sinks = params.get("sinks", 0)
    p.step("attention_merge", node, writes=("out", "partial"), partial=partial, sinks=sinks, out=node, **sizes)


# Values may be longer or shorter than queries and keys. `window`: a token sees that many keys, its own the last; of
# symmetric attention (not `causal`, within the tokens of a run and those before them) window // 2 on both sides. `cap`:
# scores become cap * tanh(score / cap). `sinks`: for each head a logit that takes its part of the weight. 0 is none.
OPS["ATTENTION"] = Op(_attention_shape, _attention_reference, _attention_lower)


def _again_shape(
    q: "Tensor", cache: "Tensor", *, scale: float, window: int = 0, cap: float = 0.0, causal: bool = True
) -> Shape:
    _need(cache.op == "CACHE" and len(cache.shape) == 3, "takes the keys and values of another attention")
    n_head_kv, head_dim, head_dim_v = cache.shape
    _need(len(q.shape) == 3 and q.shape[1] % n_head_kv == 0 and q.shape[2] == head_dim, "queries and cache differ in shape")
    return (*q.shape[:2], head_dim_v)


def _again_reference(run: "Reference", q: np.ndarray, cache: Any, **how: Any) -> np.ndarray:
    n_head_kv, head_dim, head_dim_v = cache.shape
    k, v = np.empty((len(q), n_head_kv, head_dim), np.float32), np.empty((len(q), n_head_kv, head_dim_v), np.float32)
    return _attention_reference(run, q, k, v, cache.as_it_is(), **how)


def _again_lower(p: "Plan", node: "Tensor") -> None:
    q, cache = node.inputs
    _attend_to_cache(p, node, q, cache, 0)


# Over the keys and values that another ATTENTION of this run has stored.
OPS["ATTENTION_AGAIN"] = Op(_again_shape, _again_reference, _again_lower)


# --- HEAD: one part of each token's values ----------------------------------------------------------------------------


def _head_shape(x: "Tensor", index: int) -> Shape:
    _need(len(x.shape) == 3 and 0 <= index < x.shape[1], f"no head {index}")
    return (x.shape[0], x.shape[2])


def _head_lower(p: "Plan", node: "Tensor") -> None:
    (x,) = node.inputs
    _, n_head, n = x.shape
    sizes: dict[str, Any] = {"n_head": 1, "n_x": n, "n_y": 0, "x_head_stride": 4 * n_head * n}
    p.step("join_heads", node, x=p.at(x, 4 * n * node.attrs["index"]), y=x, out=node, y_stride=0, y_head_stride=0, **sizes)


OPS["HEAD"] = Op(_head_shape, lambda run, x, index: x[:, index], _head_lower)


# --- JOIN_HEADS: heads of two parts -----------------------------------------------------------------------------------


def _join_shape(x: "Tensor", y: "Tensor", n: int) -> Shape:
    _need(len(x.shape) == len(y.shape) == 3, "takes (n_tokens, n_head, …)")
    _need(y.shape[1] in (1, x.shape[1]) and 0 < n <= x.shape[2], f"can't join {n} values of each head with the others")
    return (*x.shape[:2], n + y.shape[2])


def _join_reference(run: "Reference", x: np.ndarray, y: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([x[..., :n], np.broadcast_to(y, (*x.shape[:2], y.shape[2]))], -1)


def _join_lower(p: "Plan", node: "Tensor") -> None:
    x, y = node.inputs
    sizes: dict[str, Any] = {"n_head": x.shape[1], "n_x": node.attrs["n"], "n_y": y.shape[2]}
    sizes |= {"x_head_stride": 4 * x.shape[2], "y_stride": 4 * _row(y), "y_head_stride": 4 * y.shape[2] * (y.shape[1] > 1)}
    p.step("join_heads", node, x=x, y=y, out=node, **sizes)


# The first n values of each head of x, then all of y's, which may have one head for all.
OPS["JOIN_HEADS"] = Op(_join_shape, _join_reference, _join_lower)


# --- MUL_MAT_HEADS: each head's activations × its own matrix ---------------------------------------------------------


def _heads_shape(w: "Tensor", x: "Tensor") -> Shape:
    _need(len(w.shape) == 3 and len(x.shape) == 3, "takes weights (n_head, n_rows, n_cols) and (n_tokens, n_head, …)")
    _need(x.shape[1] in (1, w.shape[0]) and w.shape[2] <= x.shape[2], "heads or columns differ")
    _columns(w)
    return (x.shape[0], *w.shape[:2])


def _heads_lower(p: "Plan", node: "Tensor") -> None:
    w, x = node.inputs
    n_head, n_rows, n_cols = w.shape
    source, stride = p.activations(x, w.type, n_cols)
    shared = x.shape[1] == 1
    sizes: dict[str, Any] = {"x_stride": x.shape[1] * stride, "x_slot_stride": 0 if shared else stride, "n_slots": n_head}
    sizes |= {"out_stride": 4 * n_head * n_rows, "out_slot_stride": 4 * n_rows}
    p.product(w, node, x.shape[0] == 1, x=source, out=node, **sizes)


def _heads_reference(run: "Reference", w: np.ndarray, x: np.ndarray) -> np.ndarray:
    x = np.broadcast_to(x[..., : w.shape[2]], (len(x), len(w), w.shape[2]))
    return np.einsum("hrc,thc->thr", w, x, optimize=True)


# Of heads longer than the matrices' rows, the beginning is taken; one head may be there for all matrices.
OPS["MUL_MAT_HEADS"] = Op(_heads_shape, _heads_reference, _heads_lower)


# --- ROUTE: which experts, and how much of each ----------------------------------------------------------------------


def _route_shape(logits: "Tensor", *bias: "Tensor", n_used: int, gating: str, **how: Any) -> Shape:
    n_expert = logits.shape[1]
    _need(len(logits.shape) == 2 and n_expert <= MOST_EXPERTS, f"takes logits (n_tokens, n_expert ≤ {MOST_EXPERTS})")
    _need(0 < n_used <= n_expert, f"{n_used} of {n_expert} experts")
    _need(gating in ("softmax", "sigmoid"), f"unknown gating {gating}")
    n_group, n_group_used = how.get("n_group", 1), how.get("n_group_used", 1)
    _need(n_group > 0 and n_expert % n_group == 0, f"{n_expert} experts in {n_group} groups")
    _need(n_used <= n_expert // n_group * n_group_used, "too few in the groups")
    _need(not bias or bias[0].shape == (2, n_expert), "takes a bias and a factor for each expert")
    return (logits.shape[0], n_used, 2)


def _route_reference(
    run: "Reference",
    logits: np.ndarray,
    *bias: np.ndarray,
    n_used: int,
    gating: str,
    normalize: bool = False,
    scale: float = 1.0,
    n_group: int = 1,
    n_group_used: int = 1,
) -> np.ndarray:
    n = len(logits)
    if gating == "sigmoid":
        probs = 1 / (1 + np.exp(-logits))
    else:
        probs = _soft_max_reference(run, logits)
    added, factors = bias[0] if bias else (np.float32(0), np.ones(logits.shape[1], np.float32))
    scores = probs + added
    if n_group > 1:
        groups = np.sort(scores.reshape(n, n_group, -1), -1)
        worth = groups[..., -2:].sum(-1) if gating == "sigmoid" else groups[..., -1]
        out = np.argsort(-worth, -1, kind="stable")[:, n_group_used:]
        for t in range(n):
            scores.reshape(n, n_group, -1)[t, out[t]] = -np.inf
    chosen = np.argsort(-scores, -1, kind="stable")[:, :n_used]
    weights = np.take_along_axis(probs, chosen, -1)
    wrong = ~((logits < np.inf) & (probs + added < np.inf)).all(-1)
    weights[wrong] = np.nan  # as it is after a softmax: a damaged router isn't passed over
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + np.float32(1e-20))
    return np.stack([chosen, weights * np.float32(scale) * factors[chosen]], -1).astype(np.float32)


def _route_lower(p: "Plan", node: "Tensor") -> None:
    logits, *bias = node.inputs
    a = node.attrs
    how: dict[str, Any] = {"sigmoid": a["gating"] == "sigmoid", "normalize": a.get("normalize", False)}
    how |= {"factor": float(a.get("scale", 1.0)), "n_group": a.get("n_group", 1)}
    how["n_group_used"] = min(a.get("n_group_used", 1), how["n_group"])
    sizes: dict[str, Any] = {"n_expert": logits.shape[1], "n_used": a["n_used"]}
    p.step("route", node, logits=logits, bias=bias[0] if bias else 0, out=node, **sizes, **how)


# The result is (n_tokens, n_used, 2): pairs of an expert's number and its weight, the best first. With groups of experts,
# only those of the best groups count: a group's worth is its best expert (softmax, DeepSeek-V2) or its best two (sigmoid,
# DeepSeek-V3). A second input (2, n_expert) has what is added to scores for the choice, and factors of the weights.
OPS["ROUTE"] = Op(_route_shape, _route_reference, _route_lower)


# --- MUL_MAT_ID: each token's activations × the matrices of its experts ----------------------------------------------


def _id_shape(w: "Tensor", x: "Tensor", route: "Tensor") -> Shape:
    n_used = route.shape[1]
    _need(len(w.shape) == 3 and x.shape[-1] == w.shape[2], f"weights {w.shape} against rows of {x.shape[-1]} values")
    _need(len(x.shape) == 2 or x.shape[1:-1] == (n_used,), "takes one row a token, or one for each of its experts")
    _columns(w)
    return (x.shape[0], n_used, w.shape[1])


def _id_reference(run: "Reference", w: np.ndarray, x: np.ndarray, route: np.ndarray) -> np.ndarray:
    n, n_used = route.shape[:2]
    rows = x if x.ndim == 3 else np.repeat(x[:, None], n_used, 1)
    out = np.empty((n, n_used, w.shape[1]), np.float32)
    experts = route[..., 0].astype(int)
    for e in np.unique(experts):
        out[experts == e] = rows[experts == e] @ w[e].T
    return out


def _id_lower(p: "Plan", node: "Tensor") -> None:
    w, x, route = node.inputs
    n_expert, n_rows, n_cols = w.shape
    n_used = route.shape[1]
    source, stride = p.activations(x, w.type, n_cols)
    shared = len(x.shape) == 2  # all experts of a token take the same row
    sizes: dict[str, Any] = {"out_stride": 4 * n_rows, "x_stride": stride}
    if x.shape[0] == 1:
        slots: dict[str, Any] = {"n_slots": n_used, "x_slot_stride": 0 if shared else stride, "out_slot_stride": 4 * n_rows}
        p.product(w, node, True, x=source, out=node, ids=route, **slots, **sizes)
        return
    # Each expert's rows are brought together, so that its matrix is unpacked once for all of them.
    n_sorted = p.padded(x) * n_used
    given = p.place_of(route)

    def group(out: Any) -> None:
        p.step("group_by_expert", route, route=given, out=out, n_expert=n_expert, n_used=n_used)

    groups = p.once(("groups", given), 16 * (n_expert + 1) + 4 * n_sorted, group)

    def gather(out: Any) -> None:
        per_row = n_used if shared else 1
        p.step("gather_rows", x, x=source, groups=groups, out=out, n_expert=n_expert, per_row=per_row, row_bytes=stride)

    rows = p.once(("gathered", source, given), stride * (n_sorted + 16), gather)  # tiles read surplus rows
    slots = {"n_slots": n_expert, "x_slot_stride": 0, "out_slot_stride": 0}
    p.product(w, node, False, n_sorted, x=rows, out=node, groups=groups, **slots, **sizes)


OPS["MUL_MAT_ID"] = Op(_id_shape, _id_reference, _id_lower)


# --- ADD_EXPERT_BIAS: to each of a token's rows what its expert has ---------------------------------------------------


def _expert_bias_shape(x: "Tensor", bias: "Tensor", route: "Tensor") -> Shape:
    _need(len(x.shape) == 3 and x.shape[:2] == route.shape[:2], "takes (n_tokens, n_used, …) and their route")
    _need(bias.type == "F32" and bias.shape[1:] == x.shape[2:], "takes one float32 row an expert")
    return x.shape


def _expert_bias_lower(p: "Plan", node: "Tensor") -> None:
    x, bias, route = node.inputs
    sizes: dict[str, Any] = {"n_expert": bias.shape[0], "n_used": x.shape[1], "n_cols": x.shape[2]}
    p.step("add_expert_bias", node, x=x, bias=bias, route=route, out=node, **sizes)


OPS["ADD_EXPERT_BIAS"] = Op(
    _expert_bias_shape, lambda run, x, bias, route: x + bias[route[..., 0].astype(int)], _expert_bias_lower
)


# --- COMBINE, SIGMOID_GATE: what the experts say, by weight ------------------------------------------------------------


def _combine_shape(x: "Tensor", route: "Tensor") -> Shape:
    _need(len(x.shape) == 3 and x.shape[:2] == route.shape[:2], "takes (n_tokens, n_used, …) and their route")
    return (x.shape[0], x.shape[2])


def _combine_lower(p: "Plan", node: "Tensor") -> None:
    x, route = node.inputs
    p.step("combine", node, x=x, route=route, out=node, n_used=x.shape[1], n_cols=x.shape[2])


OPS["COMBINE"] = Op(_combine_shape, lambda run, x, route: (x * route[..., 1:]).sum(1), _combine_lower)


def _gate_shape(x: "Tensor", gate: "Tensor") -> Shape:
    _need(gate.shape == (x.shape[0], 1) and len(x.shape) == 2, "takes one gate a token")
    return x.shape


def _gate_lower(p: "Plan", node: "Tensor") -> None:
    x, gate = node.inputs
    p.step("sigmoid_gate", node, x=x, gate=gate, out=node, n_cols=x.shape[1])


OPS["SIGMOID_GATE"] = Op(_gate_shape, lambda run, x, gate: x / (1 + np.exp(-gate)), _gate_lower)


# --- ATTENTION_LATENT: causal, all heads over the same latent keys and values ------------------------------------------


def _latent_shape(q: "Tensor", q_rot: "Tensor", latent: "Tensor", k_rot: "Tensor", cache: "Tensor", scale: float) -> Shape:
    _need(len(q.shape) == 3 and q.shape[:2] == q_rot.shape[:2], "takes queries (n_tokens, n_head, …)")
    _need(latent.shape[1:] == q.shape[2:] and k_rot.shape[2:] == q_rot.shape[2:], "queries and keys differ in length")
    _need(cache.shape == (q.shape[2] + q_rot.shape[2],), "the cache holds other rows")
    _vectors(q.shape[2])
    _vectors(q_rot.shape[2])
    return q.shape


def _latent_reference(
    run: "Reference",
    q: np.ndarray,
    q_rot: np.ndarray,
    latent: np.ndarray,
    k_rot: np.ndarray,
    cache: Any,
    scale: float,
) -> np.ndarray:
    n, n_latent = latent.shape
    q, new, out = np.concatenate([q, q_rot], -1), np.concatenate([latent, k_rot.reshape(n, -1)], 1), []
    for span, n_past, pages in run.batch.each():
        rows = cache.append(new[span], run.batch.places[span], pages, n_past + span.stop - span.start)
        keys = np.broadcast_to(rows[:, None], (len(rows), q.shape[1], rows.shape[1]))
        out.append(_attend(q[span], keys, keys[..., :n_latent], n_past, scale))
    return np.concatenate(out)


def _latent_lower(p: "Plan", node: "Tensor") -> None:
    q, q_rot, latent, k_rot, cache = node.inputs
    _, n_head, n_latent = q.shape
    n_rot = q_rot.shape[2]
    (rows,) = p.cache(cache)
    store: dict[str, Any] = {"latent": latent, "k_rot": k_rot, "n_latent": n_latent, "n_rot": n_rot}
    p.step(f"store_latent_{p.kv_type}", node, writes=("cache",), cache=rows, **store)
    sizes: dict[str, Any] = {"n_head": n_head, "n_latent": n_latent, "n_rot": n_rot, "scale": float(node.attrs["scale"])}
    _attention_steps(
        p, node, "latent_attention", (1, n_latent + n_rot), NO_LIMIT, q_latent=q, q_rot=q_rot, cache=rows, **sizes
    )


OPS["ATTENTION_LATENT"] = Op(_latent_shape, _latent_reference, _latent_lower)


# --- GATED, L2_NORM: what layers with states have beside them -----------------------------------------------------------


def _gated_shape(x: "Tensor", gate: "Tensor", first: int = 0) -> Shape:
    n = x.shape[-1]
    _need(x.shape[:-1] == gate.shape[:-1] and first + n <= gate.shape[-1], "takes a gate for each value")
    _vectors(n)
    return x.shape


def _gated_reference(run: "Reference", x: np.ndarray, gate: np.ndarray, first: int = 0) -> np.ndarray:
    return x * _sigmoid(gate[..., first : first + x.shape[-1]])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.maximum(x, -88.0)))


def _gated_lower(p: "Plan", node: "Tensor") -> None:
    x, gate = node.inputs
    n = x.shape[-1]
    rows: dict[str, Any] = {"n_cols": n, "n_rows_per_token": _row(x) // n, "gate_stride": 4 * gate.shape[-1]}
    p.step("gated", node, x=x, gate=p.at(gate, 4 * node.attrs.get("first", 0)), out=node, **rows)


# Values times the sigmoid of others; of the gate's rows, values before `first` are left out.
OPS["GATED"] = Op(_gated_shape, _gated_reference, _gated_lower)


def _l2_norm_shape(x: "Tensor", n_head: int, head_dim: int, eps: float) -> Shape:
    _need(len(x.shape) == 2 and n_head * head_dim <= x.shape[1], f"{n_head} heads of {head_dim} values")
    _vectors(head_dim)
    return (x.shape[0], n_head, head_dim)


def _l2_norm_reference(run: "Reference", x: np.ndarray, n_head: int, head_dim: int, eps: float) -> np.ndarray:
    x = x[:, : n_head * head_dim].reshape(len(x), n_head, head_dim)
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + np.float32(eps))


def _l2_norm_lower(p: "Plan", node: "Tensor") -> None:
    (x,) = node.inputs
    _, n_head, head_dim = node.shape
    rows: dict[str, Any] = {"n_cols": head_dim, "n_rows_per_token": n_head, "x_stride": 4 * x.shape[1]}
    p.step("l2_norm", node, x=x, out=node, eps=float(node.attrs["eps"]), **rows)


# The first values of each row, seen as heads, each divided by its length.
OPS["L2_NORM"] = Op(_l2_norm_shape, _l2_norm_reference, _l2_norm_lower)


# --- SHORT_CONV: each column with its values in the tokens before -------------------------------------------------------


def _short_conv_shape(x: "Tensor", w: "Tensor", tail: "Tensor", *bias: "Tensor", silu: bool = False) -> Shape:
    _need(len(x.shape) == 2 and w.type == "F32" and w.shape[1:] == x.shape[1:], "takes float32 rows for its tokens")
    _need(tail.op == "STATE" and tail.shape == (w.shape[0] - 1, w.shape[1]), "the state holds other rows")
    _need(all(b.type == "F32" and b.shape == x.shape[1:] for b in bias), "takes a float32 row as bias")
    return x.shape


def _short_conv_reference(
    run: "Reference", x: np.ndarray, w: np.ndarray, tails: np.ndarray, *bias: np.ndarray, silu: bool = False
) -> np.ndarray:
    out, before = np.empty_like(x), len(w) - 1
    for (span, n_past, _), slot in zip(run.batch.each(), run.batch.spans[:, 4], strict=True):
        rows = np.concatenate([tails[slot] * (n_past > 0), x[span]])
        out[span] = sum(w[k] * rows[k : len(rows) - before + k] for k in range(len(w))) + sum(bias)
        tails[slot] = rows[len(rows) - before :]
    return _silu(out) if silu else out


def _short_conv_lower(p: "Plan", node: "Tensor") -> None:
    x, w, tail, *bias = node.inputs
    given: dict[str, Any] = {"x": x, "w": w, "bias": bias[0] if bias else 0, "tails": p.state(tail)}
    sizes: dict[str, Any] = {"n_cols": x.shape[1], "width": w.shape[0], "slot_stride": 4 * tail.n_values}
    silu = node.attrs.get("silu", False)
    p.step("short_conv", node, writes=("out", "tails"), out=node, silu_after=silu, **given, **sizes)


# The last row of w is the token's own; before a sequence's first token there are zeros.
OPS["SHORT_CONV"] = Op(_short_conv_shape, _short_conv_reference, _short_conv_lower)


# --- DELTA_GATES, DELTA_RULE, STATE_SCAN: a matrix for each head that learns which value belongs to which key ------------


def _delta_gates_shape(decay: "Tensor", a: "Tensor", dt: "Tensor", *beta: "Tensor") -> Shape:
    _need(len(decay.shape) == 2 and all(b.shape == decay.shape for b in beta), "takes a value or two of each head")
    n = decay.shape[1]
    _need(
        a.shape == (n,) and dt.shape == (n + (not beta),) and a.type == dt.type == "F32", "takes float32 weights of heads"
    )
    return (*decay.shape, 2)


def _delta_gates_reference(
    run: "Reference", decay: np.ndarray, a: np.ndarray, dt: np.ndarray, *beta: np.ndarray
) -> np.ndarray:
    n = decay.shape[1]
    step = decay + dt[:n]
    if not beta:
        step = np.maximum(step, dt[n])
    step = np.logaddexp(step, 0)
    return np.stack([np.exp(a * step), _sigmoid(beta[0]) if beta else step], -1).astype(np.float32)


def _delta_gates_lower(p: "Plan", node: "Tensor") -> None:
    decay, a, dt, *beta = node.inputs
    given: dict[str, Any] = {"decay": decay, "a": a, "dt": dt, "beta": beta[0] if beta else 0}
    p.step("delta_gates", node, out=node, n_head=node.shape[1], **given)


# How much of its state each head keeps, exp(a step) with step = softplus(decay + dt), and how much of a new value it takes:
# sigmoid(beta), or step. Without beta, dt's last value is the least that decay + dt may be, which is how steps are limited.
OPS["DELTA_GATES"] = Op(_delta_gates_shape, _delta_gates_reference, _delta_gates_lower)


def _delta_rule_shape(
    keys: "Tensor", values: "Tensor", gates: "Tensor", memory: "Tensor", first: int, tiled: bool, scale: float
) -> Shape:
    n_head, head_dim_k, head_dim = memory.shape
    _need(memory.op == "STATE" and keys.shape[2:] == (head_dim_k,), "keys and state differ")
    _need(gates.shape[1:] == (n_head, 2), "takes two gates for each head")
    _need(keys.shape[1] % 2 == 0 and n_head % (keys.shape[1] // 2) == 0, f"{n_head} heads, {keys.shape[1] / 2} keys")
    _need(len(values.shape) == 2 and first + n_head * head_dim <= values.shape[1], "takes a value for each head")
    return (keys.shape[0], n_head, head_dim)


def _state_columns(memory: np.ndarray) -> list[tuple[slice, np.ndarray]]:
    """Views of a slot's state (n_head, head_dim_k, head_dim): some columns, and (n_head, head_dim_k, …) values."""
    n_head, n, head_dim = memory.shape
    flat, views = memory.reshape(n_head, n * head_dim), []
    for first in range(0, head_dim, STATE_COLUMNS):
        columns = slice(first, min(first + STATE_COLUMNS, head_dim))
        views.append((columns, flat[:, n * first : n * columns.stop].reshape(n_head, n, -1)))
    return views


def _through_states(
    run: "Reference",
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gates: np.ndarray,
    memory: np.ndarray,
    learns: bool,
) -> np.ndarray:
    """q S (n_tokens, n_head, head_dim) of queries, keys and values of each head; see `kernels.states`."""
    out = np.empty_like(v)
    for (span, n_past, _), slot in zip(run.batch.each(), run.batch.spans[:, 4], strict=True):
        s = np.zeros(memory.shape[1:], np.float32)
        for columns, stored in _state_columns(memory[slot]):
            s[..., columns] = stored * (n_past > 0)
        for t in range(span.start, span.stop):
            s *= gates[t, :, 0, None, None]
            change = gates[t, :, 1, None] * (v[t] - np.einsum("hi,hij->hj", k[t], s) * learns)
            s += k[t][:, :, None] * change[:, None]
            out[t] = np.einsum("hi,hij->hj", q[t], s)
        for columns, stored in _state_columns(memory[slot]):
            stored[...] = s[..., columns]
    return out


def _delta_rule_reference(
    run: "Reference",
    keys: np.ndarray,
    values: np.ndarray,
    gates: np.ndarray,
    memory: np.ndarray,
    first: int,
    tiled: bool,
    scale: float,
) -> np.ndarray:
    _, n_head, _, head_dim = memory.shape
    n_head_k = keys.shape[1] // 2
    of_head = np.arange(n_head) % n_head_k if tiled else np.arange(n_head) // (n_head // n_head_k)
    q, k = keys[:, :n_head_k][:, of_head], keys[:, n_head_k:][:, of_head]
    v = values[:, first : first + n_head * head_dim].reshape(len(values), n_head, head_dim)
    return np.float32(scale) * _through_states(run, q, k, v, gates, memory, True)


def _state_step(p: "Plan", node: "Tensor", kernel: str, memory: "Tensor", **params: Any) -> None:
    n_head, head_dim_k, head_dim = memory.shape
    sizes: dict[str, Any] = {"n_head": n_head, "head_dim_k": head_dim_k, "head_dim": head_dim}
    sizes["slot_stride"] = 4 * memory.n_values
    p.step(kernel, node, writes=("out", "memory"), memory=p.state(memory), out=node, **sizes, **params)


def _delta_rule_lower(p: "Plan", node: "Tensor") -> None:
    keys, values, gates, memory = node.inputs
    a, n = node.attrs, keys.n_values // keys.shape[0]
    given: dict[str, Any] = {
        "queries": keys,
        "keys": p.at(keys, 2 * n),
        "values": p.at(values, 4 * a["first"]),
        "gates": gates,
    }
    how: dict[str, Any] = {"n_head_k": keys.shape[1] // 2, "tiled": a["tiled"], "scale": float(a["scale"]), "skip": 0}
    _state_step(p, node, "delta_rule", memory, key_stride=4 * n, value_stride=4 * values.shape[1], **given, **how)


# `keys` are queries and then keys, each shared by several heads: consecutive ones, or, tiled, every n-th. Of the rows with
# values, the first `first` are left out.
OPS["DELTA_RULE"] = Op(_delta_rule_shape, _delta_rule_reference, _delta_rule_lower)


def _state_scan_shape(x: "Tensor", gates: "Tensor", memory: "Tensor", skip: "Tensor", n_head_k: int) -> Shape:
    n_head, head_dim_k, head_dim = memory.shape
    width = n_head * head_dim + 2 * n_head_k * head_dim_k
    _need(memory.op == "STATE" and x.shape[1:] == (width,), f"takes rows of {width} values, and a state")
    _need(gates.shape[1:] == (n_head, 2) and n_head % n_head_k == 0, "takes two gates for each head")
    _need(skip.type == "F32" and skip.shape == (n_head,), "takes a float32 weight of each head")
    return (x.shape[0], n_head, head_dim)


def _state_scan_reference(
    run: "Reference", x: np.ndarray, gates: np.ndarray, memory: np.ndarray, skip: np.ndarray, n_head_k: int
) -> np.ndarray:
    _, n_head, n, head_dim = memory.shape
    v, k, q = np.split(x, np.cumsum([n_head * head_dim, n_head_k * n]), axis=1)
    q, k = (np.repeat(part.reshape(len(x), n_head_k, n), n_head // n_head_k, 1) for part in (q, k))
    v = np.ascontiguousarray(v).reshape(len(x), n_head, head_dim)
    return _through_states(run, q, k, v, gates, memory, False) + v * skip[:, None]


def _state_scan_lower(p: "Plan", node: "Tensor") -> None:
    x, gates, memory, skip = node.inputs
    n_head_k, n_values = node.attrs["n_head_k"], _row(node)
    keys, row = 4 * n_values, 4 * x.shape[1]
    queries = keys + 4 * n_head_k * memory.shape[1]
    given: dict[str, Any] = {"queries": p.at(x, queries), "keys": p.at(x, keys), "values": x, "gates": gates, "skip": skip}
    how: dict[str, Any] = {"n_head_k": n_head_k, "tiled": False, "scale": 1.0, "key_stride": row, "value_stride": row}
    _state_step(p, node, "state_scan", memory, **given, **how)


# Mamba-2 (Dao & Gu 2024): rows are values, keys (B) and queries (C); consecutive heads share keys. `skip` says how much of
# each head's values is added to the result (D).
OPS["STATE_SCAN"] = Op(_state_scan_shape, _state_scan_reference, _state_scan_lower)
