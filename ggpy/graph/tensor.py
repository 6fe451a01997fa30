"""A compute graph: tensors made by named operations, whose shapes are checked as it is built.

A graph is built for at most `n_tokens` tokens, of one sequence or of many, and for the results of at most `n_outputs` of
them; a run may have fewer. Everything computed has the tokens in front, or, behind ROWS, the outputs: shape (n_tokens, …)
or (n_outputs, …), float32. What each operation computes stands in `ops`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import GraphError
from .ops import OPS

Shape = tuple[int, ...]


class Weight(Protocol):
    """What a graph needs of a stored tensor; `ggpy.file.GGUFTensor` has it."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def data(self) -> np.ndarray: ...
    def dequantize(self) -> np.ndarray: ...


@dataclass(eq=False)
class Tensor:
    """A node of the graph.

    Attributes
    ----------
    op : str
        The operation that makes it (a key of `ops.OPS`), or WEIGHT, INPUT, CACHE, STATE for what is given.
    inputs : tuple of Tensor
    shape : tuple of int
        In numpy's order.
    type : str
        "F32" or "I32" for activations, the block type for weights.
    attrs : dict
        The operation's parameters.
    name : str
        Unique in its graph.
    per : {"token", "output", ""}
        What the first dimension counts; nothing for weights, caches and states.
    """

    op: str
    inputs: tuple["Tensor", ...]
    shape: Shape
    type: str
    name: str
    attrs: dict[str, Any] = field(default_factory=dict)
    per: str = ""

    @property
    def n_values(self) -> int:
        """How many values it holds."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    def __repr__(self) -> str:
        return f"{self.name}: {self.op} {self.type} {self.shape}"


class Graph:
    """A graph under construction, or finished; iterating gives its nodes in the order of computation.

    Parameters
    ----------
    n_tokens : int
        The most tokens that a run may have.
    n_outputs : int, optional
        Of the most of them results may be wanted; by default of all.
    """

    def __init__(self, n_tokens: int, n_outputs: int | None = None):
        self.n_tokens = n_tokens
        self.n_outputs = n_tokens if n_outputs is None else n_outputs
        if not 1 <= self.n_outputs <= n_tokens:
            raise GraphError(f"a graph needs at least one token and one output, not {n_tokens} and {n_outputs}")
        self.nodes: list[Tensor] = []
        self.outputs: dict[str, Tensor] = {}
        self._by_name: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def _add(self, tensor: Tensor) -> Tensor:
        if tensor.name in self._by_name:
            raise GraphError(f"two nodes are named {tensor.name}")
        self._by_name[tensor.name] = tensor
        self.nodes.append(tensor)
        return tensor

    # What is given

    def weight(self, weight: Weight) -> Tensor:
        """A stored tensor, in its own block type. Asking again for the same gives the same node."""
        found = self._by_name.get(weight.name)
        if found is not None:
            return found
        return self._add(Tensor("WEIGHT", (), tuple(weight.shape), weight.type, weight.name, {"weight": weight}))

    def input(self, name: str, shape: Shape = (), type: str = "F32", per: str = "token") -> Tensor:
        """Values that each run is given: (n_tokens, *shape), or (n_outputs, *shape)."""
        found = self._by_name.get(name)
        if found is not None:
            return found
        n = self.n_tokens if per == "token" else self.n_outputs
        return self._add(Tensor("INPUT", (), (n, *shape), type, name, per=per))

    def cache(self, name: str, *shape: int) -> Tensor:
        """What a run knows of the tokens before it, and adds its own to: for ATTENTION (n_head_kv, head_dim, head_dim_v),
        keys and values of a token; for ATTENTION_LATENT (n_latent + n_rot,). Asking again gives the same node: layers may
        share one if no run needs what another has left there."""
        return self._by_name.get(name) or self._add(Tensor("CACHE", (), shape, "F16", name))

    def state(self, name: str, *shape: int) -> Tensor:
        """What a run knows of the tokens before it where that has a fixed size: float32 values of each sequence, which a
        run brings up to date."""
        return self._add(Tensor("STATE", (), shape, "F32", name))

    # What is computed

    def op(self, op: str, *inputs: Tensor, name: str = "", **attrs: Any) -> Tensor:
        """Adds the node that `op` makes of `inputs`.

        Raises
        ------
        GraphError
            The operation doesn't exist or can't take these shapes, types or parameters.
        """
        if op not in OPS:
            raise GraphError(f"no operation {op}; there are {', '.join(OPS)}")
        name = name or f"{op.lower()}_{len(self.nodes)}"
        try:
            shape = OPS[op].shape(*inputs, **attrs)
        except GraphError as error:
            took = ", ".join(f"{t.name} {t.type} {t.shape}" for t in inputs)
            raise GraphError(f"{name}: {op} of {took}: {error}") from None
        except TypeError as error:  # a missing input or parameter
            raise GraphError(f"{name}: {op}: {error}") from None
        per = {t.per for t in inputs if t.per}
        if len(per) > 1 and op != "ROWS":
            raise GraphError(f"{name}: {op} of rows of tokens and rows of outputs")
        return self._add(Tensor(op, inputs, shape, "F32", name, attrs, "output" if op == "ROWS" else per.pop()))

    def output(self, tensor: Tensor, name: str) -> None:
        """Makes a tensor a result of the run."""
        self.outputs[name] = tensor

    # For people

    def text(self) -> str:
        """The graph as a table: one line a node, with its operation, type, shape and inputs."""
        lines = []
        for t in self.nodes:
            took = ", ".join(i.name for i in t.inputs)
            lines.append(f"{t.name:<32} {t.op:<10} {t.type:<5} {t.shape!s:<22} {took}".rstrip())
        return "\n".join(lines)
