"""Quantizing models: encoders, the mixes of types, importance matrices, and whole files."""

from .encode import encode

__all__ = ["encode"]
