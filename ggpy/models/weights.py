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
