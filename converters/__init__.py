"""From Hugging Face checkpoints to GGUF files."""

from .conversion import FAMILIES, Plan, TensorPlan, convert
from .verify import Verification, verify

__all__ = ["FAMILIES", "Plan", "TensorPlan", "Verification", "convert", "verify"]
