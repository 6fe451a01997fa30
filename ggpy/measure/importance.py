"""Which columns of the weights matter: how large the activations are that they are multiplied with."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import Error
from ..quantization.imatrix import ImportanceMatrix
from .perplexity import with_bos

if TYPE_CHECKING:
    from ..generate.model import Model
    from ..graph import Graph


class _Use(NamedTuple):
    """One kind of activations: node `source`, for experts with their `route`, multiplied with `weights`."""

    source: str
    route: str | None
    n_matrices: int
    n_cols: int


def measure_importance(
    model: "Model", chunks: np.ndarray, dataset: str = "", progress: Callable[[int, int], None] | None = None
) -> ImportanceMatrix:
    """Runs chunks of a text and sums, for each matrix of the layers, the squares of what it is multiplied with.

    The embedding and the output are left out, as llama-imatrix leaves them out.

    Parameters
    ----------
    model : Model
    chunks : int array (n_chunks, n_ctx)
        See `perplexity.chunks_of`.
    dataset : str
        The text's name.
    progress : callable, optional
        Called as progress(done, n_chunks).

    Raises
    ------
    Error
        Activations that aren't finite.
    """
    collector = _Collector(model.graph(), frozenset(model.file.tensors))
    with model.hooked(dict.fromkeys(collector.nodes, collector.see)):
        for i, chunk in enumerate(chunks):
            with model.new_sequence() as sequence:
                sequence.extend(with_bos(model, chunk))
            if progress is not None:
                progress(i + 1, len(chunks))
    sums, counts = collector.result()
    return ImportanceMatrix(sums, counts, [dataset], *chunks.shape)


class _Collector:
    """Sums up values as hooks see them.

    Attributes
    ----------
    nodes : list of str
        Where hooks are needed.
    """

    def __init__(self, graph: "Graph", stored: frozenset[str]):
        self._weights = _uses(graph, stored)
        self._sums = {u: np.zeros((u.n_matrices, u.n_cols)) for u in self._weights.values()}
        self._counts = {u: np.zeros(u.n_matrices) for u in self._sums}
        self.nodes = list(dict.fromkeys(name for u in self._sums for name in (u.source, u.route) if name is not None))
        # A use is summed up once both its activations and its route are there; until then they are kept.
        order = {t.name: i for i, t in enumerate(graph)}
        self._due: dict[str, list[_Use]] = {}
        self._last_due: dict[str, str] = {}  # by source
        for use in sorted(self._sums, key=lambda u: max(order[u.source], order[u.route or u.source])):
            due = max((use.source, use.route or use.source), key=order.__getitem__)
            self._due.setdefault(due, []).append(use)
            self._last_due[use.source] = due
        self._squares: dict[str, np.ndarray] = {}
        self._experts: dict[str, np.ndarray] = {}
        self._routes = {u.route for u in self._sums}
        self._sources = {u.source for u in self._sums}

    def see(self, name: str, value: np.ndarray) -> None:
        """A hook."""
        if name in self._sources:
            self._squares[name] = np.square(value)
        if name in self._routes:
            self._experts[name] = value[..., 0].astype(np.intp)
        due = self._due.get(name, ())
        for use in due:
            self._add(use, self._squares[use.source])
        for source in {u.source for u in due if self._last_due[u.source] == name}:
            del self._squares[source]

    def _add(self, use: _Use, squares: np.ndarray) -> None:
        sums, counts = self._sums[use], self._counts[use]
        if use.route is None:
            rows = squares.reshape(len(squares), use.n_matrices, -1)[..., : use.n_cols]
            sums += rows.sum(0, dtype=np.float64)
            counts += len(squares)
            return
        experts = self._experts[use.route]  # (n_tokens, n_used)
        rows = np.broadcast_to(squares.reshape(len(squares), -1, use.n_cols), (*experts.shape, use.n_cols))
        for expert in np.unique(experts):
            chosen = rows[experts == expert]
            sums[expert] += chosen.sum(0, dtype=np.float64)
            counts[expert] += len(chosen)

    def result(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Sums and counts by tensor name, as float32."""
        for name, use in self._weights.items():
            if not np.isfinite(self._sums[use]).all():
                raise Error(f"{name}: its activations aren't finite")
        sums = {name: self._sums[use].astype(np.float32) for name, use in self._weights.items()}
        return sums, {name: self._counts[use].astype(np.float32) for name, use in self._weights.items()}


def _uses(graph: "Graph", stored: frozenset[str]) -> dict[str, _Use]:
    """By the name of each matrix of the layers, what it is multiplied with."""
    uses: dict[str, _Use] = {}
    for t in graph:
        weight = t.inputs[0].name.partition("[")[0] if t.inputs else ""  # of parts of a matrix, the whole
        shape = t.inputs[0].shape if t.inputs else ()
        if t.op == "MUL_MAT":
            use = _Use(t.inputs[1].name, None, 1, shape[1])
        elif t.op == "MUL_MAT_HEADS":
            use = _Use(t.inputs[1].name, None, shape[0], shape[2])
        elif t.op == "MUL_MAT_ID":
            use = _Use(t.inputs[1].name, t.inputs[2].name, shape[0], shape[2])
        elif t.op == "ATTENTION_LATENT":
            # Older files have attn_k_b and attn_v_b as one matrix, whose input is the latent vector.
            latent = t.inputs[2]
            weight, use = t.name.removesuffix("attn") + "attn_kv_b.weight", _Use(latent.name, None, 1, latent.shape[1])
        else:
            continue
        if weight.startswith("blk.") and weight in stored:
            uses[weight] = use
    return uses
