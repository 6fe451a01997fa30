"""Quantizing models: encoders, the mixes of types, importance matrices, and whole files."""

from .encode import encode
from .imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from .mixes import FILE_TYPES, Override, tensor_types
from .model import Plan, Step, quantize_model

__all__ = [
    "FILE_TYPES",
    "ImportanceMatrix",
    "Override",
    "Plan",
    "Step",
    "encode",
    "quantize_model",
    "read_imatrix",
    "tensor_types",
    "write_imatrix",
]
