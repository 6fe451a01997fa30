"""Reading GGUF files through one memory map, and writing files that are whole or not there."""

from .aside import folder_of, writing_aside
from .gguf import GGUFFile
from .metadata import Metadata, StringArray
from .tensors import GGUFTensor
from .text import read_input, read_text
from .writer import NewFile, write_files

__all__ = [
    "GGUFFile",
    "GGUFTensor",
    "Metadata",
    "NewFile",
    "StringArray",
    "folder_of",
    "read_input",
    "read_text",
    "write_files",
    "writing_aside",
]
