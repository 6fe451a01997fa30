"""The weights of a model: found by name in its file, and checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError
from ..quant import block_type

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor


@dataclass(frozen=True, eq=False)
class DerivedWeight:
    """A weight that isn't in the file as it is needed: a part of one, or one made at loading.

    Attributes
    ----------
    name, type, shape
        As a stored tensor's.
    data : uint8 array (*shape[:-1], row_bytes)
        Rows are contiguous; matrices needn't be.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        return self.data.nbytes

    def dequantize(self) -> np.ndarray:
        """The values, float32."""
        return block_type(self.type).dequantize(np.ascontiguousarray(self.data))


class Weights:
    """Finds the weights that a graph asks for.

    Parameters
    ----------
    file : GGUFFile
    graph : Graph
        Gets a node for each weight.
    derived : dict of str to DerivedWeight
        Those made so far; gets those that are made.
    """

    def __init__(self, file: "GGUFFile", graph: "Graph", derived: dict[str, DerivedWeight]):
        self._file, self._graph, self._derived = file, graph, derived

    def check(self, name: str, *shape: int) -> None:
        """Sees to it that the file has this tensor in this shape (numpy's order).

        Raises
        ------
        GGUFError
            It isn't there, or has another shape.
        """
        weight = self._file.tensors.get(name)
        if weight is None:
            raise GGUFError(f"{self._file.path}: tensor {name} is missing")
        if weight.shape != shape:
            raise GGUFError(f"{self._file.path}: tensor {name} has shape {weight.shape}, expected {shape}")

    def stored_shape(self, name: str) -> "tuple[int, ...] | None":
        """The shape of a tensor of the file, None if there is no such tensor."""
        stored = self._file.tensors.get(name)
        return None if stored is None else stored.shape

    def __call__(self, name: str, *shape: int) -> "Tensor":
        """The weight `name`, which must have this shape; see `check`."""
        self.check(name, *shape)
        return self._graph.weight(self._file.tensors[name])

    def derived(self, name: str, make: Callable[[], DerivedWeight]) -> "Tensor":
        """A weight that isn't in the file as it is; made once."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._graph.weight(self._derived[name])

    def optional(self, name: str, *shape: int) -> "Tensor | None":
        """The same, or None if the file has no such tensor."""
        return self(name, *shape) if name in self._file.tensors else None

    def linear(self, name: str, n_rows: int, x: "Tensor") -> "Tensor":
        """`{name}.weight` (n_rows, …) times x, plus `{name}.bias` if the file has one: (n_tokens, n_rows), named `name`."""
        bias = self.optional(f"{name}.bias", n_rows)
        weight = self(f"{name}.weight", n_rows, x.n_values // x.shape[0])
        y = self._graph.op("MUL_MAT", weight, x, name=name if bias is None else f"{name}.product")
        return y if bias is None else self._graph.op("ADD_BIAS", y, bias, name=name)

    def optional_row(self, name: str, n: int) -> "Tensor | None":
        """A weight of n values, as a matrix of one row; None if the file has no such tensor."""
        if name not in self._file.tensors:
            return None
        stored = self._file.tensors[name]
        if stored.shape not in ((n,), (1, n)):
            raise GGUFError(f"{self._file.path}: tensor {name} has shape {stored.shape}, expected {(n,)}")
        return self._graph.weight(DerivedWeight(name, stored.type, (1, n), stored.data.reshape(1, -1)))

    # What nearly all architectures have. Tensors are named as their weights, (n_tokens, …).

    def norm(self, name: str, x: "Tensor", eps: float, n: int | None = None) -> "Tensor":
        """RMS norm of the rows of x, or of their first n values, by `{name}.weight`."""
        return self._graph.op("RMS_NORM", x, self(f"{name}.weight", n or x.shape[-1]), eps=eps, name=name)

    def swiglu(self, p: str, n_ff: int, x: "Tensor") -> "Tensor":
        """The feed-forward part of Llama: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""
        gate, up = self.linear(f"{p}.ffn_gate", n_ff, x), self.linear(f"{p}.ffn_up", n_ff, x)
        act = self._graph.op("SWIGLU", gate, up, name=f"{p}.ffn_act")
        return self.linear(f"{p}.ffn_down", x.shape[1], act)

    def logits(self, x: "Tensor", n_vocab: int) -> "Tensor":
        """Logits (n_tokens, n_vocab). Without `output.weight` the embedding serves."""
        name = "output.weight" if "output.weight" in self._file.tensors else "token_embd.weight"
        return self._graph.op("MUL_MAT", self(name, n_vocab, x.shape[1]), x, name="logits")
