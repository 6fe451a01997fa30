"""GGUF files taken apart, changed and put together again, by the specification alone."""

import struct
from dataclasses import dataclass, field

import numpy as np

from .make import ALIGNMENT, array, gguf, info, scalar

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass
class Stored:
    """A tensor: dimensions in GGUF's order, ggml's number of its type, its bytes; an offset that isn't theirs."""

    dims: list
    type_id: int
    data: bytes
    offset: int | None = None


@dataclass
class Edited:
    """A file's parts; `keys` holds each key-value as it is in the file."""

    keys: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)

    @classmethod
    def read(cls, content):
        """Takes a sound file apart."""
        at, model = 24, cls()
        n_tensors, n_keys = struct.unpack_from("<QQ", content, 8)

        def text():
            nonlocal at
            (n,) = struct.unpack_from("<Q", content, at)
            at += 8 + n
            return content[at - n : at].decode()

        def value(kind, n=1):
            nonlocal at
            for _ in range(n if kind == 8 else 0):
                text()
            at += _SIZES.get(kind, 0) * n

        for _ in range(n_keys):
            start = at
            key = text()
            (kind,) = struct.unpack_from("<I", content, at)
            at += 4
            if kind == 9:
                kind, n = struct.unpack_from("<IQ", content, at)
                at += 12
                value(kind, n)
            else:
                value(kind)
            model.keys[key] = content[start:at]
        infos = []
        for _ in range(n_tensors):
            name = text()
            (n_dims,) = struct.unpack_from("<I", content, at)
            dims = list(struct.unpack_from(f"<{n_dims}Q", content, at + 4))
            at += 4 + 8 * n_dims
            infos.append((name, dims, *struct.unpack_from("<IQ", content, at)))
            at += 12
        start = -(-at // ALIGNMENT) * ALIGNMENT
        ends = sorted({offset for *_, offset in infos} | {len(content) - start})
        for name, dims, kind, offset in infos:
            end = next(e for e in ends if e > offset or e == ends[-1])
            model.tensors[name] = Stored(dims, kind, content[start + offset : start + end])
        return model

    def set(self, key, kind, value):
        """Gives a key a value of a type of `make`; a list makes an array."""
        self.keys[key] = (array if isinstance(value, list) else scalar)(key, kind, value)

    def fill(self, name, value, at=slice(None)):
        """Overwrites values of a float32 tensor."""
        values = np.frombuffer(self.tensors[name].data, np.float32).copy()
        values[at] = value
        self.tensors[name].data = values.tobytes()

    def bytes(self):
        """The file."""
        infos, data = [], b""
        for name, t in self.tensors.items():
            data += bytes(-len(data) % ALIGNMENT)
            infos.append(info(name, t.dims, t.type_id, len(data) if t.offset is None else t.offset))
            data += t.data
        return gguf(list(self.keys.values()), infos, data)
