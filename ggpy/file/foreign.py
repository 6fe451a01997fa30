"""What a file is that isn't what its name says."""

from __future__ import annotations

import re

# The beginnings of files that people have under a model's name.
_SIGNS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), what)
    for pattern, what in (
        (rb"version https://git-lfs", "a Git LFS pointer: the file itself was never fetched ('git lfs pull' does that)"),
        (rb"\s*<(?:!doctype|html|\?xml|head)", "a web page: the download gave a page instead of the file"),
        (rb"\s*\{\s*\"(?:error|message)\"", "a server's error message instead of the file"),
        (rb".{3}\x00{5}\s*\{[\"\s]", "a safetensors file: name the checkpoint's folder, which has its config.json too"),
        (rb"PK\x03\x04", "a zip archive or PyTorch's weights: name the checkpoint's folder, or unpack it"),
        (rb"\x80[\x02-\x05]", "a Python pickle, probably PyTorch's weights: name the checkpoint's folder"),
        (
            rb"(?:lmgg|fmgg|tjgg|algg)",
            "a GGML file from before GGUF (August 2023): get a newer one",
        ),
        (rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed archive: unpack it"),
        (rb"GGUF", "a GGUF file"),
    )
)

#: bytes of a file's beginning that tell
N_BYTES = 64


def what_is(beginning: bytes) -> str | None:
    """What a file that begins so is, and what to do with it; None where that isn't known."""
    return next((what for pattern, what in _SIGNS if pattern.match(beginning)), None)
