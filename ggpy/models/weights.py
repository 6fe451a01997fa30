"""The weights of a model: found by name in its file, and checked."""

from typing import TYPE_CHECKING

from ..errors import GGUFError

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor


class Weights:
    """Finds the weights that a graph asks for.

    Parameters
    ----------
    file : GGUFFile
    graph : Graph
        Gets a node for each weight.
    """

    def __init__(self, file: "GGUFFile", graph: "Graph"):
        self._file, self._graph = file, graph

    def __call__(self, name: str, *shape: int) -> "Tensor":
        """The weight `name`, which must have this shape (numpy's order).

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
        return self._graph.weight(weight)

    def optional(self, name: str, *shape: int) -> "Tensor | None":
        """The same, or None if the file has no such tensor."""
        return self(name, *shape) if name in self._file.tensors else None

    def linear(self, name: str, n_rows: int, x: "Tensor") -> "Tensor":
        """`{name}.weight` (n_rows, …) times x, plus `{name}.bias` if the file has one: (n_tokens, n_rows), named `name`."""
        bias = self.optional(f"{name}.bias", n_rows)
        weight = self(f"{name}.weight", n_rows, x.n_values // x.shape[0])
        y = self._graph.op("MUL_MAT", weight, x, name=name if bias is None else f"{name}.product")
        return y if bias is None else self._graph.op("ADD_BIAS", y, bias, name=name)
