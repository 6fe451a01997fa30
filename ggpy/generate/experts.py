"""Which experts a text uses: counts, balance, confidence of the router."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..graph import Graph, Hook
    from .model import Model


@dataclass(frozen=True)
class ExpertUse:
    """How a text was routed.

    Attributes
    ----------
    layers : tuple of int
        The layers that have experts.
    counts : int array (n_layers, n_expert)
        How often each expert was chosen.
    weights : float array (n_layers, n_expert)
        The sum of its weights where it was chosen.
    probabilities : float array (n_layers, n_expert)
        The mean of the router's softmax.
    trace : int array (n_tokens, n_layers, n_expert_used)
        The experts of each token, the best first.
    confidence : float array (n_layers,)
        The mean share of the best expert's weight among the chosen.
    """

    layers: tuple[int, ...]
    counts: np.ndarray
    weights: np.ndarray
    probabilities: np.ndarray
    trace: np.ndarray
    confidence: np.ndarray

    def table(self) -> list[dict[str, Any]]:
        """For each layer: coefficient of variation of the counts; entropy of the use, as a share of the greatest possible;
        the auxiliary loss n_expert * sum(f_i P_i) of Fedus et al. 2021 (1 if balanced), with f_i the share of choices and
        P_i the mean probability; the router's confidence; the most and least used expert."""
        rows = []
        for i, layer in enumerate(self.layers):
            share = self.counts[i] / self.counts[i].sum()
            used = share[share > 0]
            rows.append(
                {
                    "layer": layer,
                    "cv": float(self.counts[i].std() / self.counts[i].mean()),
                    "entropy": float(-(used * np.log(used)).sum() / np.log(len(share))),
                    "aux_loss": float(len(share) * (share * self.probabilities[i]).sum()),
                    "confidence": float(self.confidence[i]),
                    "most_used": int(share.argmax()),
                    "most_share": float(share.max()),
                    "least_used": int(share.argmin()),
                    "least_share": float(share.min()),
                    "unused": int((self.counts[i] == 0).sum()),
                }
            )
        return rows


def expert_use(model: "Model", ids: Sequence[int]) -> ExpertUse:
    """Runs the tokens, in pieces of the context's length, and records the router.

    Raises
    ------
    UnsupportedError
        The model has no experts.
    """
    graph = model.graph()
    routers = {int(t.name.split(".")[1]): t for t in graph if t.op == "ROUTE"}
    if not routers:
        raise UnsupportedError(f"{model.file.path}: the model has no experts")
    layers = tuple(routers)
    logits: dict[int, list[np.ndarray]] = {i: [] for i in layers}
    routes: dict[int, list[np.ndarray]] = {i: [] for i in layers}
    hooks = {t.inputs[0].name: _collector(logits[i]) for i, t in routers.items()}
    hooks |= {t.name: _collector(routes[i]) for i, t in routers.items()}
    with model.hooked(hooks):
        for first in range(0, len(ids), model.n_ctx):
            with model.new_sequence() as sequence:
                sequence.extend(ids[first : first + model.n_ctx])
    n_expert = routers[layers[0]].inputs[0].shape[1]
    counts = np.zeros((len(layers), n_expert), np.int64)
    weights, probabilities = np.zeros(counts.shape), np.zeros(counts.shape)
    trace, confidence = [], np.zeros(len(layers))
    for row, i in enumerate(layers):
        route = np.concatenate(routes[i])  # (n_tokens, n_used, 2)
        experts, weight = route[..., 0].astype(np.int64), route[..., 1]
        counts[row] = np.bincount(experts.ravel(), minlength=n_expert)
        weights[row] = np.bincount(experts.ravel(), weight.ravel(), minlength=n_expert)
        x = np.concatenate(logits[i]).astype(np.float64)
        p = np.exp(x - x.max(-1, keepdims=True))
        probabilities[row] = (p / p.sum(-1, keepdims=True)).mean(0)
        confidence[row] = (weight[:, 0] / weight.sum(-1)).mean()
        trace.append(experts)
    return ExpertUse(layers, counts, weights, probabilities, np.stack(trace, 1), confidence)


class ExpertWatch:
    """Counts the experts that a model's runs choose, whatever they are for; it changes nothing.

    Attributes
    ----------
    layers : tuple of int
        The layers that have experts.
    counts : int array (n_layers, n_expert)
        How often each was chosen since this was made.
    n_expert_used : int

    Raises
    ------
    UnsupportedError
        The model has no experts.
    """

    def __init__(self, graph: "Graph", name: str):
        routers = [t for t in graph if t.op == "ROUTE"]
        if not routers:
            raise UnsupportedError(f"{name}: the model has no experts")
        self._rows = {t.name: row for row, t in enumerate(routers)}
        self.layers = tuple(int(t.name.split(".")[1]) for t in routers)
        self.n_expert_used = routers[0].shape[1]
        self.counts = np.zeros((len(routers), routers[0].inputs[0].shape[1]), np.int64)

    def beside(self, hooks: "Mapping[str, Hook]") -> "dict[str, Hook]":
        """Hooks that count, and call the given ones first."""

        def on_route(name: str, route: np.ndarray) -> np.ndarray | None:
            new = hooks[name](name, route) if name in hooks else None
            experts = (route if new is None else new)[..., 0].astype(np.int64)
            self.counts[self._rows[name]] += np.bincount(experts.ravel(), minlength=self.counts.shape[1])
            return new

        return {**hooks, **dict.fromkeys(self._rows, on_route)}


def _collector(values: list[np.ndarray]) -> "Hook":
    return lambda name, value: values.append(value.copy())


def simulate_cache(trace: np.ndarray, n_slots: int, policy: str) -> float:
    """The share of expert reads that a cache of n_slots experts, over all layers, would answer.

    Parameters
    ----------
    trace : int array (n_tokens, n_layers, n_expert_used)
    n_slots : int
        Experts that fit.
    policy : {"lru", "lfu", "best"}
        Least recently used, least frequently used, or what is needed latest goes first (Belady 1966: no cache can do
        better).
    """
    keys = (np.arange(trace.shape[1])[None, :, None] * (1 << 20) + trace).reshape(-1).tolist()
    following: dict[int, int] = {}
    next_use = [0] * len(keys)
    for at in range(len(keys) - 1, -1, -1):
        next_use[at] = following.get(keys[at], len(keys) + at)
        following[keys[at]] = at
    worth: dict[int, tuple[float, int]] = {}  # of what is in the cache; the least goes
    uses: dict[int, int] = {}
    hits = 0
    for at, key in enumerate(keys):
        hits += key in worth
        uses[key] = uses.get(key, 0) + 1
        if key not in worth and len(worth) >= n_slots:
            del worth[min(worth, key=worth.__getitem__)]
        worth[key] = {"lru": (0.0, at), "lfu": (uses[key], at), "best": (-next_use[at], at)}[policy]
    return hits / len(keys)
