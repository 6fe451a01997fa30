"""Reading GGUF files through one memory map, and writing files that are whole or not there."""

from .aside import writing_aside
from .gguf import GGUFFile
from .metadata import Metadata, StringArray
from .tensors import GGUFTensor

__all__ = ["GGUFFile", "GGUFTensor", "Metadata", "StringArray", "writing_aside"]
