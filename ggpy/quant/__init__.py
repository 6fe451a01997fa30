"""ggml's types: block sizes and layouts, and decoders and encoders in plain numpy.

These are the truth that the compiled kernels are tested against.
"""

from ..errors import UnsupportedError
from . import codebooks, floats, i_quants, k_quants, opaque, plain, ternary
from .blocks import BlockType

__all__ = ["BLOCK_TYPES", "BlockType", "block_type", "foreign_type"]

_FAMILIES = (floats, plain, k_quants, codebooks, i_quants, ternary, opaque)

#: name -> type, in the order of ggml's numbers
BLOCK_TYPES: dict[str, BlockType] = {
    known.name: known for known in sorted((kind for family in _FAMILIES for kind in family.TYPES), key=lambda kind: kind.id)
}

_BY_NAME_OR_ID: dict[str | int, BlockType] = {
    key: known for known in BLOCK_TYPES.values() for key in (known.name, known.id)
}


def foreign_type(id: int) -> str | None:
    """What is known of a type by its number that isn't among BLOCK_TYPES, and what to do; None for nothing."""
    return next((what for ids, what in opaque.FOREIGN if id in ids), None)


def block_type(name_or_id: str | int) -> BlockType:
    """Looks up a type by ggml's name, such as "Q4_K", or by its number.

    Raises
    ------
    UnsupportedError
        There is no such type; the message lists those that there are.
    """
    try:
        return _BY_NAME_OR_ID[name_or_id]
    except KeyError:
        raise UnsupportedError(f"unknown type {name_or_id!r}; known are {', '.join(BLOCK_TYPES)}") from None
