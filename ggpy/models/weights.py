"""The weights of a model: found by name in its file, and checked."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GGUFError, UnsupportedError
from ..quant import block_type
from .adapters import A, B, ThinPair

if TYPE_CHECKING:
    from ..file import GGUFFile, GGUFTensor
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


#: activations of feed-forward parts: how many products they take, the operation, its parameters
ACTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "swiglu": (2, "SWIGLU", {}),
    "swiglu_clamped": (2, "SWIGLU_CLAMPED", {"alpha": 1.702, "limit": 7.0}),
    "geglu": (2, "GEGLU", {"kind": "tanh"}),
    "geglu_erf": (2, "GEGLU", {"kind": "erf"}),
    "gelu": (1, "GELU", {"kind": "tanh"}),
    "gelu_erf": (1, "GELU", {"kind": "erf"}),
    "relu_squared": (1, "RELU_SQUARED", {}),
}


def _widened(stored: "GGUFTensor") -> DerivedWeight:
    """A weight of one axis in float32."""
    values = np.ascontiguousarray(stored.dequantize())
    return DerivedWeight(stored.name, "F32", stored.shape, values.view(np.uint8))


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; -1 for none."""
    prefix, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if prefix == "blk" and number.isdecimal() else -1


class Weights:
    """Finds the weights that a graph asks for.

    Parameters
    ----------
    file : GGUFFile
    graph : Graph
        Gets a node for each weight.
    derived : dict of str to DerivedWeight
        Those made so far; gets those that are made.
    adapters : mapping of str to ThinPair
        What is added to matrices, by their names.
    """

    def __init__(
        self, file: "GGUFFile", graph: "Graph", derived: dict[str, DerivedWeight], adapters: Mapping[str, ThinPair]
    ):
        self._file, self._graph, self._derived, self._adapters = file, graph, derived, adapters
        self._asked: set[str] = set()
        self._adapted: set[str] = set()

    def check(self, name: str, *shape: int) -> None:
        """Sees to it that the file has this tensor in this shape (numpy's order).

        Raises
        ------
        GGUFError
            It isn't there, or has another shape.
        UnsupportedError
            It is of a type that can only be listed.
        """
        self._asked.add(name)
        weight = self._file.tensors.get(name)
        if weight is None:
            raise GGUFError(f"{self._file.path}: tensor {name} is missing")
        if weight.shape != shape:
            raise GGUFError(f"{self._file.path}: tensor {name} has shape {weight.shape}, expected {shape}")
        if block_type(weight.type).decode is None:
            raise UnsupportedError(
                f"{self._file.path}: tensor {name} is {weight.type}, which ggpy only lists; get a file of another type"
            )

    def stored_shape(self, name: str) -> "tuple[int, ...] | None":
        """The shape of a tensor of the file, None if there is no such tensor."""
        stored = self._file.tensors.get(name)
        return None if stored is None else stored.shape

    def __call__(self, name: str, *shape: int) -> "Tensor":
        """The weight `name`, which must have this shape; see `check`."""
        self.check(name, *shape)
        stored = self._file.tensors[name]
        if len(shape) == 1 and stored.type != "F32":  # some files have norms and biases in fewer bits
            return self.derived(name, lambda: _widened(stored))
        return self._graph.weight(stored)

    def derived(self, name: str, make: Callable[[], DerivedWeight]) -> "Tensor":
        """A weight that isn't in the file as it is; made once."""
        if name not in self._derived:
            self._derived[name] = make()
        return self._graph.weight(self._derived[name])

    def stored(self, name: str, *shape: int) -> "GGUFTensor":
        """A tensor of the file, which must have this shape; see `check`."""
        self.check(name, *shape)
        return self._file.tensors[name]

    def values(self, name: str, n: int) -> "Tensor":
        """The n values of the weight `name`, whatever its shape, as one row."""
        shape = self.stored_shape(name) or (n,)
        stored = self.stored(name, *(shape if math.prod(shape) == n else (n,)))
        return self._graph.weight(DerivedWeight(name, stored.type, (n,), stored.data.reshape(-1)))

    def by_columns(self, name: str, n_rows: int, n_cols: int) -> "Tensor":
        """The weight `name`, which must have this shape, as float32 (n_cols, n_rows)."""
        stored = self.stored(name, n_rows, n_cols)

        def transposed() -> DerivedWeight:
            values = np.ascontiguousarray(stored.dequantize().T)
            return DerivedWeight(f"{name}.transposed", "F32", (n_cols, n_rows), values.view(np.uint8))

        return self.derived(f"{name}.transposed", transposed)

    def optional(self, name: str, *shape: int) -> "Tensor | None":
        """The same, or None if the file has no such tensor."""
        return self(name, *shape) if name in self._file.tensors else None

    def table(self, n: int, **rows: float) -> "Tensor | None":
        """Weights of n values as the rows of one, float32 (len(rows), n): their names, and what stands for those that the
        file lacks. None if it lacks all."""
        if not any(map(self.has, rows)):
            return None
        found = {name: self.stored(name, n) for name in rows if self.has(name)}
        names = " ".join(rows)

        def stacked() -> DerivedWeight:
            values = [found[name].dequantize() if name in found else np.full(n, default) for name, default in rows.items()]
            data = np.stack(values).astype(np.float32)
            return DerivedWeight(names, "F32", data.shape, data.view(np.uint8))

        return self.derived(names, stacked)

    def rows(self, name: str, first: int, n: int, *shape: int) -> "Tensor":
        """n rows, from `first` on, of the weight `name`, which must have this shape, or of each of its matrices: a view,
        named `name[first:…]`."""
        self.check(name, *shape)
        stored = self._file.tensors[name]
        name = f"{name}[{first}:{first + n}]"
        if len(shape) == 1:  # values, as rows of one
            n_bytes = stored.data.shape[-1] // shape[0]
            return self._graph.weight(
                DerivedWeight(name, stored.type, (n,), stored.data[n_bytes * first : n_bytes * (first + n)])
            )
        part = slice(first, first + n)
        if len(shape) == 3:
            return self._graph.weight(DerivedWeight(name, stored.type, (shape[0], n, shape[2]), stored.data[:, part]))
        return self._graph.weight(DerivedWeight(name, stored.type, (n, *shape[1:]), stored.data[part]))

    def number(self, name: str) -> float | None:
        """The value of a tensor of one, None if the file has no such tensor."""
        if not self.has(name):
            return None
        self.check(name, 1)
        return float(self._file.tensors[name].dequantize()[0])

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self._file.tensors

    def linear(
        self, name: str, n_rows: int, x: "Tensor", of: "tuple[str, int, int] | None" = None, node: str = ""
    ) -> "Tensor":
        """`{name}.weight` (n_rows, …) times x, plus `{name}.bias` if the file has one: (n_tokens, n_rows).

        The node is named `node`, by default as the weight. `of` says that the matrix is part of another: (its name, the
        first of its rows, how many it has).
        """
        node = node or name
        n_cols = x.n_values // x.shape[0]
        stored, first, n_stored = of or (name, 0, n_rows)

        def part(kind: str, *shape: int) -> "Tensor":
            if of is None:
                return self(f"{stored}.{kind}", *shape)
            return self.rows(f"{stored}.{kind}", first, n_rows, *shape)

        has_bias = self.has(f"{stored}.bias")
        rows = slice(first, first + n_rows)
        y = self._product(
            f"{stored}.weight", part("weight", n_stored, n_cols), x, f"{node}.product" if has_bias else node, rows
        )
        return self._graph.op("ADD_BIAS", y, part("bias", n_stored), name=node) if has_bias else y

    def _product(self, name: str, weight: "Tensor", x: "Tensor", node: str, rows: slice = slice(None)) -> "Tensor":
        """`weight`, which is `rows` of the matrix `name`, times x, and what an adapter adds: two thin products, which keep
        the rule of the same bits, and leave the matrix as it is in the file."""
        pair = self._adapters.get(name)
        if pair is None:
            return self._graph.op("MUL_MAT", weight, x, name=node)
        self._adapted.add(name)
        y = self._graph.op("MUL_MAT", weight, x, name=f"{node}.own")
        low = self._graph.op("MUL_MAT", self._thin(f"{name}{A}", pair.a), x, name=f"{node}{A}")
        added = self._graph.op("MUL_MAT", self._thin(f"{weight.name}{B}", pair.b[rows]), low, name=f"{node}{B}")
        return self._graph.op("ADD", y, added, name=node)

    def _thin(self, name: str, values: np.ndarray) -> "Tensor":
        return self.derived(name, lambda: DerivedWeight(name, "F32", values.shape, values.view(np.uint8)))

    def refuse_others(self) -> None:
        """Refuses tensors that nobody asked for, of layers of which others were: they would be ignored.

        Raises
        ------
        GGUFError
            Names the first.
        """
        layers = {_layer(name) for name in self._asked if name.startswith("blk.")}
        for name in self._file.tensors:
            if _layer(name) in layers and name not in self._asked:
                arch = self._file.get("general.architecture", str)
                raise GGUFError(f"{self._file.path}: tensor {name} has no place in architecture {arch}")

    def refuse_ignored_adapters(self, layers: range, logits: bool) -> None:
        """Refuses adapters of matrices of these layers, or of logits, that aren't multiplied as they are.

        Raises
        ------
        UnsupportedError
            Names the first.
        """
        for name, pair in self._adapters.items():
            there = _layer(name) in layers or (logits and name == "output.weight")
            if there and name not in self._adapted:
                raise UnsupportedError(
                    f"{pair.path}: {name} can't be adapted while running; merge it at conversion (--lora)"
                )

    def leave_aside(self, prefix: str) -> None:
        """Says that nobody will ask for the tensors whose names begin so."""
        self._asked.update(name for name in self._file.tensors if name.startswith(prefix))

    def optional_row(self, name: str, n: int) -> "Tensor | None":
        """A weight of n values, as a matrix of one row; None if the file has no such tensor."""
        if name not in self._file.tensors:
            return None
        stored = self._file.tensors[name]
        self._asked.add(name)
        if stored.shape not in ((n,), (1, n)):
            raise GGUFError(f"{self._file.path}: tensor {name} has shape {stored.shape}, expected {(n,)}")
        return self._graph.weight(DerivedWeight(name, stored.type, (1, n), stored.data.reshape(1, -1)))

    # What nearly all architectures have. Tensors are named as their weights, (n_tokens, …).

    def norm(self, name: str, x: "Tensor", eps: float, n: int | None = None) -> "Tensor":
        """RMS norm of the rows of x, or of their first n values, by `{name}.weight`, or `name` (in Falcon-H1's files)."""
        n = n or x.shape[-1]
        if self.has(name):
            stored = self.stored(name, n)
            weight = self.derived(f"{name}.weight", lambda: replace(_widened(stored), name=f"{name}.weight"))
        else:
            weight = self(f"{name}.weight", n)
        return self._graph.op("RMS_NORM", x, weight, eps=eps, name=name)

    def layer_norm(self, name: str, x: "Tensor", eps: float) -> "Tensor":
        """Layer norm of the rows of x by `{name}.weight` and, if the file has it, `{name}.bias`."""
        n = x.shape[-1]
        bias = self.optional(f"{name}.bias", n)
        weights = [self(f"{name}.weight", n)] + ([] if bias is None else [bias])
        return self._graph.op("LAYER_NORM", x, *weights, eps=eps, name=name)

    def plain_layer_norm(self, name: str, x: "Tensor", eps: float) -> "Tensor":
        """Layer norm of the rows of x, without weights."""
        return self._graph.op("LAYER_NORM", x, eps=eps, name=name)

    def feed_forward(self, p: str, n_ff: int, x: "Tensor", act: str = "swiglu", kind: str = "") -> "Tensor":
        """The feed-forward part: down(act(gate(x)) * up(x)) (Shazeer 2020), or down(act(up(x))).

        Gates may stand in front of the rows of `ffn_up`. `act` is a key of ACTS, `kind` GGUF's suffix, such as "_shexp".
        """
        n_inputs, op, attrs = ACTS[act]
        name = f"{p}.ffn_up{kind}"
        if n_inputs == 1:
            parts = [self.linear(name, n_ff, x)]
        elif self.has(f"{p}.ffn_gate{kind}.weight"):
            parts = [self.linear(f"{p}.ffn_gate{kind}", n_ff, x), self.linear(name, n_ff, x)]
        else:
            parts = [self.linear(f"{p}.ffn_gate{kind}", n_ff, x, (name, 0, 2 * n_ff))]
            parts.append(self.linear(name, n_ff, x, (name, n_ff, 2 * n_ff)))
        y = self._graph.op(op, *parts, name=f"{p}.ffn_act{kind}", **attrs)
        return self.linear(f"{p}.ffn_down{kind}", x.shape[1], y)

    def logits(self, x: "Tensor", n_vocab: int, name: str = "logits") -> "Tensor":
        """Logits (n_tokens, n_vocab), a node of this name. Without `output.weight` the embedding serves."""
        matrix = "output.weight" if self.has("output.weight") else "token_embd.weight"
        bias = self.optional("output.bias", n_vocab)
        y = self._product(matrix, self(matrix, n_vocab, x.shape[1]), x, name if bias is None else f"{name}.product")
        return y if bias is None else self._graph.op("ADD_BIAS", y, bias, name=name)
