"""Runs a graph in numpy, node by node: the truth for the kernels, and a way to look at any value."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .ops import OPS

if TYPE_CHECKING:
    from .batch import Batch
    from .pages import Pages
    from .tensor import Graph, Tensor


class Reference:
    """Runs a graph op by op with float32 weights, dequantized as they are needed.

    Parameters
    ----------
    graph : Graph
    pages : Pages
        Read and extended by each run.
    """

    batch: "Batch"  # of the run

    def __init__(self, graph: "Graph", pages: "Pages"):
        self.graph, self.pages = graph, pages

    def run(self, inputs: Mapping[str, np.ndarray], batch: "Batch") -> dict[str, np.ndarray]:
        """The value of every computed node by its name, and of every output by the output's.

        Parameters
        ----------
        inputs : mapping of str to array
            For each INPUT node, (n_tokens, …) or (n_outputs, …).
        batch : Batch
            Whose tokens they are.
        """
        self.batch = batch
        values: dict[Tensor, Any] = {}
        found: dict[str, np.ndarray] = {}
        for node in self.graph:
            if node.op == "INPUT":
                values[node] = inputs[node.name]
            elif node.op == "CACHE":
                values[node] = self.pages.view(node)
            elif node.op == "STATE":
                values[node] = self.pages.states.array(node)
            elif node.op in OPS:
                arrays = [i.attrs["weight"].dequantize() if i.op == "WEIGHT" else values[i] for i in node.inputs]
                values[node] = found[node.name] = OPS[node.op].reference(self, *arrays, **node.attrs)
        return found | {name: values[t] for name, t in self.graph.outputs.items()}
