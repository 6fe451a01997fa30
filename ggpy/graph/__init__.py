"""Compute graphs: building, planning, running. See `tensor`, `ops`, `batch`, `pages`, `plan`, `program`, `reference`."""

from .batch import Batch, Span, pack
from .pages import Pages, pages_of
from .program import Hook, Program
from .reference import Reference
from .tensor import Graph, Tensor
from .threads import Team, default_threads

__all__ = [
    "Batch",
    "Graph",
    "Hook",
    "Pages",
    "Program",
    "Reference",
    "Span",
    "Team",
    "Tensor",
    "default_threads",
    "pack",
    "pages_of",
]
