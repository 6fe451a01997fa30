"""Compute graphs: building, planning, running. See `tensor`, `ops`, `batch`, `pages`, `plan`, `program`, `reference`."""

from ..cpus import default_threads
from .batch import Batch, Span, pack, tokens_of
from .pages import Pages, pages_of
from .plan import Plan
from .pool import Pool
from .program import Hook, Program
from .reference import Reference
from .states import States, slot_bytes
from .tensor import Graph, Tensor
from .threads import Team

__all__ = [
    "Batch",
    "Graph",
    "Hook",
    "Pages",
    "Plan",
    "Pool",
    "Program",
    "Reference",
    "Span",
    "States",
    "Team",
    "Tensor",
    "default_threads",
    "pack",
    "pages_of",
    "slot_bytes",
    "tokens_of",
]
