"""From Hugging Face checkpoints to GGUF files."""

from .conversion import FAMILIES, Plan, TensorPlan, convert

__all__ = ["FAMILIES", "Plan", "TensorPlan", "convert"]
