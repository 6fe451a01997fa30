"""Graphs as text, Mermaid and Graphviz: nodes with their operation, shape, type, and the bytes of their weights."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tensor import Graph, Tensor

_COLORS = {
    "MUL_MAT": "#cfe3ff",
    "MUL_MAT_HEADS": "#cfe3ff",
    "MUL_MAT_ID": "#ffd9b3",
    "ROUTE": "#ffb3b3",
    "COMBINE": "#ffd9b3",
    "ATTENTION": "#d5f0d0",
    "ATTENTION_LATENT": "#d5f0d0",
}


def of_layer(graph: "Graph", layer: int) -> "list[Tensor]":
    """The nodes of one layer."""
    return [t for t in graph if t.name.startswith(f"blk.{layer}.")]


def weight_bytes(t: "Tensor") -> int:
    """Bytes of the weights that a node reads for one token: of experts, the chosen ones; of the embedding, a row."""
    total = 0
    for i in t.inputs:
        if i.op == "WEIGHT":
            parts = {"MUL_MAT_ID": (t.shape[1], i.shape[0]), "GET_ROWS": (1, i.shape[0])}.get(t.op, (1, 1))
            total += i.attrs["weight"].n_bytes * parts[0] // parts[1]
    return total


def bytes_text(n: int) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000  # type: ignore[assignment]
    return f"{n:.3g} GB"


def _shape(t: "Tensor") -> str:
    return "×".join(map(str, t.shape))


def _label(t: "Tensor") -> list[str]:
    weights = [i for i in t.inputs if i.op == "WEIGHT"]
    lines = [t.name, f"{t.op} → {_shape(t)}"]
    lines += [f"{w.type} {_shape(w)}, {bytes_text(w.attrs['weight'].n_bytes)}" for w in weights]
    return lines


def _computed(nodes: "Iterable[Tensor]") -> "list[Tensor]":
    return [t for t in nodes if t.op not in ("WEIGHT", "CACHE", "STATE")]


def text(nodes: "Iterable[Tensor]") -> str:
    """One line a node: name, operation, shape, weights, the bytes of them that one token reads, what it takes."""
    rows = [("node", "operation", "shape", "weights", "reads", "takes")]
    for t in _computed(nodes):
        weights = ", ".join(f"{w.type} {_shape(w)}" for w in t.inputs if w.op == "WEIGHT")
        size = bytes_text(weight_bytes(t)) if weights else ""
        took = ", ".join(i.name for i in t.inputs if i.op != "WEIGHT")
        rows.append((t.name, t.op, _shape(t), weights, size, took))
    width = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for *cells, size, took in rows:
        left = "  ".join(cell.ljust(n) for cell, n in zip(cells, width, strict=False))
        lines.append(f"{left}  {size.rjust(width[4])}  {took}".rstrip())
    return "\n".join(lines)


def mermaid(nodes: "Iterable[Tensor]", name: str = "") -> str:
    """A Mermaid flowchart."""
    kept = _computed(nodes)
    number = {t: f"{name}n{i}" for i, t in enumerate(kept)}
    lines = ["flowchart TD"]
    for t in kept:
        label = "<br>".join(_label(t))
        lines.append(f'  {number[t]}["{label}"]')
        if t.op in _COLORS:
            lines.append(f"  style {number[t]} fill:{_COLORS[t.op]}")
    lines += [f"  {number[i]} --> {number[t]}" for t in kept for i in t.inputs if i in number]
    return "\n".join(lines)


def dot(nodes: "Iterable[Tensor]", name: str = "") -> str:
    """A Graphviz graph."""
    kept = _computed(nodes)
    number = {t: f"{name}n{i}" for i, t in enumerate(kept)}
    lines = ["digraph model {", '  node [shape=box, style=filled, fillcolor=white, fontname="sans-serif"];']
    for t in kept:
        label = "\\n".join(_label(t))
        lines.append(f'  {number[t]} [label="{label}", fillcolor="{_COLORS.get(t.op, "white")}"];')
    lines += [f"  {number[i]} -> {number[t]};" for t in kept for i in t.inputs if i in number]
    return "\n".join([*lines, "}"])


#: format -> the function that draws it
FORMATS: dict[str, Callable[..., str]] = {"text": text, "mermaid": mermaid, "dot": dot}


def side_by_side(a: "list[Tensor]", b: "list[Tensor]") -> list[tuple[str, str, str]]:
    """Two layers beside each other: rows (name, node of a, node of b), both in their order.

    Nodes of the same name stand in one row; where a layer has none of the other's name, its cell is empty.
    """
    left, right = ({_base(t): t for t in _computed(nodes)} for nodes in (a, b))
    names: list[str] = []
    of_right = iter(right)
    for name in left:
        if name in right and name not in names:
            # What stands before it in b comes before it here.
            for other in of_right:
                if other == name:
                    break
                if other not in left:
                    names.append(other)
        names.append(name)
    names += [name for name in right if name not in names]
    return [(name, _cell(left.get(name)), _cell(right.get(name))) for name in names]


def _cell(t: "Tensor | None") -> str:
    return "" if t is None else f"{t.op} {_shape(t)} {_weights(t)}".strip()


def _base(t: "Tensor") -> str:
    return t.name.split(".", 2)[2] if t.name.startswith("blk.") else t.name


def _weights(t: "Tensor") -> str:
    return " ".join(f"[{w.type} {_shape(w)}, {bytes_text(weight_bytes(t))}]" for w in t.inputs if w.op == "WEIGHT")
