"""Compute graphs: building, planning, running. See `tensor`, `ops`, `plan`, `program`, `reference`."""

from .cache import Caches
from .program import Hook, Program
from .reference import Reference
from .tensor import Graph, Tensor
from .threads import Team, default_threads

__all__ = ["Caches", "Graph", "Hook", "Program", "Reference", "Team", "Tensor", "default_threads"]
