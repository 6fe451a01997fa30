"""A model's layers in several processes, each with some of them, so that none need hold all."""

from .links import Lost, Processes
from .stages import Known, RemotePages, Stages, split_layers

__all__ = ["Known", "Lost", "Processes", "RemotePages", "Stages", "split_layers"]
