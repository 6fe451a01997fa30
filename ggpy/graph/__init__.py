"""Compute graphs: building, planning, running. See `tensor`, `ops`, `plan`, `program`, `reference`."""

from ..cpus import default_threads
from .cache import Caches
from .program import Hook, Program
from .reference import Reference
from .tensor import Graph, Tensor
from .threads import Team

__all__ = ["Caches", "Graph", "Hook", "Program", "Reference", "Team", "Tensor", "default_threads"]
