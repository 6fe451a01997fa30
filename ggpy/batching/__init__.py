"""Many prompts from a file: each answered once, on one machine or several."""

from .job import Summary, batch

__all__ = ["Summary", "batch"]
