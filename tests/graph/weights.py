"""Random weights of any type, made and dequantized by `gguf.quants`: an oracle that isn't ours."""

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

#: where the float16 scales of a block stand
_HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
    "IQ1_M": (),
}


@dataclass
class FakeWeight:
    """What a graph needs of a stored tensor."""

    name: str
    type: str
    shape: tuple
    data: np.ndarray

    @property
    def n_bytes(self):
        return self.data.nbytes

    def dequantize(self):
        kind = GGMLQuantizationType[self.type]
        if self.type in ("F32", "F16"):
            dtype = {"F32": np.float32, "F16": np.float16}[self.type]
            return self.data.reshape(-1).view(dtype).reshape(self.shape).astype(np.float32)
        return quants.dequantize(self.data, kind).reshape(self.shape)


def random_weight(name, kind, shape, rng):
    """A weight of any type, of values whose products are moderate."""
    *_, n_cols = shape
    if kind in ("F32", "F16", "BF16"):
        values = rng.standard_normal(shape).astype(np.float32) / np.sqrt(n_cols).astype(np.float32)
        if kind == "BF16":
            data = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            data = values.astype({"F32": np.float32, "F16": np.float16}[kind])
        return FakeWeight(name, kind, tuple(shape), data.view(np.uint8).reshape(*shape[:-1], -1))
    return FakeWeight(name, kind, tuple(shape), random_rows(kind, shape, rng))


def random_rows(kind, shape, rng):
    """uint8 (*shape[:-1], row_bytes): any bytes make valid blocks, if the scales are finite."""
    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, n_bytes), dtype=np.uint8)
    for at in _HALVES.get(kind, (0,)):
        scales = (rng.standard_normal(blocks.shape[:-1]) / 64).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(116, 124, blocks.shape[:-1])  # a power of two
    if kind == "IQ1_M":
        blocks[..., 55] = blocks[..., 55] & 0x8F | 0x20  # the float16's first four bits stand here
    return blocks.reshape(*shape[:-1], -1)
