"""Reading GGUF files through one memory map, and writing files that are whole or not there."""

from .aside import folder_of, writing_aside
from .gguf import GGUFFile
from .metadata import Metadata, StringArray
from .tensors import GGUFTensor
from .text import read_text

__all__ = ["GGUFFile", "GGUFTensor", "Metadata", "StringArray", "folder_of", "read_text", "writing_aside"]
