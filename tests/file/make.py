"""Builds GGUF files byte by byte, sound and broken ones alike."""

import struct

ALIGNMENT = 32

#: name of a value type -> its number and `struct` format
NUMBERS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "B"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
STRING, ARRAY = 8, 9


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def string(text, length=None):
    """A string; `length` may lie about its length."""
    text = text.encode() if isinstance(text, str) else text
    return u64(len(text) if length is None else length) + text


def scalar(key, kind, value):
    """A key-value of type `kind`: a key of NUMBERS, or "string"."""
    if kind == "string":
        return string(key) + u32(STRING) + string(value)
    number, code = NUMBERS[kind]
    return string(key) + u32(number) + struct.pack(f"<{code}", value)


def array(key, kind, values, count=None):
    """A key-value that is an array; `count` may lie about the number of values."""
    count = len(values) if count is None else count
    if kind == "string":
        return string(key) + u32(ARRAY) + u32(STRING) + u64(count) + b"".join(map(string, values))
    number, code = NUMBERS[kind]
    return string(key) + u32(ARRAY) + u32(number) + u64(count) + struct.pack(f"<{len(values)}{code}", *values)


def info(name, dims, type_id=0, offset=0, n_dims=None):
    """A tensor's description; `dims` in GGUF's order, `n_dims` may lie about their number."""
    n_dims = len(dims) if n_dims is None else n_dims
    return string(name) + u32(n_dims) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf(
    key_values=(), infos=(), data=b"", *, magic=b"GGUF", version=3, n_tensors=None, n_key_values=None, alignment=ALIGNMENT
):
    """A file's bytes; the counts may lie."""
    n_tensors = len(infos) if n_tensors is None else n_tensors
    n_key_values = len(key_values) if n_key_values is None else n_key_values
    head = magic + u32(version) + u64(n_tensors) + u64(n_key_values) + b"".join(key_values) + b"".join(infos)
    if infos:
        head += bytes(-len(head) % alignment)
    return head + data


def small():
    """A sound file with a value of every kind and three tensors, and the offsets where one of its parts ends."""
    key_values = [
        scalar("general.architecture", "string", "llama"),
        *(scalar(f"a.{kind}", kind, 1) for kind in NUMBERS),
        *(array(f"b.{kind}", kind, [1, 0, 1]) for kind in NUMBERS),
        array("b.string", "string", ["", "token", "näive ☃"]),
        array("b.empty", "int32", []),
        array("b.no_strings", "string", []),
    ]
    infos = [info("f32", [4, 2], 0, 0), info("q4_0", [32, 3], 2, 32), info("nvfp4", [64], 40, 96)]
    content = gguf(key_values, infos, bytes(range(132)))
    ends = [4, 8, 16, 24]
    for piece in (*key_values, *infos):
        ends.append(ends[-1] + len(piece))
    ends.append(len(content) - 132)
    return content, ends
