"""From Hugging Face checkpoints to GGUF files."""

from .conversion import FAMILIES, TYPES, FileType, Plan, TensorPlan, convert

__all__ = ["FAMILIES", "TYPES", "FileType", "Plan", "TensorPlan", "convert"]
