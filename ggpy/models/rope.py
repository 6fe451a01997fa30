"""Rotary position embedding: the frequencies, from metadata, and the table of a run."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError, UnsupportedError

if TYPE_CHECKING:
    from ..file import GGUFFile

_NEIGHBOURS = 256  # positions whose cosines and sines are worked out together
_MOST_BLOCKS = 512  # of them that are kept: 64 KB each where 64 values are rotated


@dataclass(frozen=True)
class Rope:
    """What turns positions into angles.

    Attributes
    ----------
    n_rot : int
        Values of a head that are rotated.
    frequencies : float32 array (n_rot / 2,)
        Angle per position.
    magnitude : float
        Factor of all cosines and sines; 1 but for YaRN.
    """

    n_rot: int
    frequencies: np.ndarray
    magnitude: float = 1.0
    _tables: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def table(self, positions: np.ndarray) -> np.ndarray:
        """Cosines and then sines of positions (n,): float32 (n, n_rot).

        They are worked out for _NEIGHBOURS positions at once, wherever they are needed, so that they don't depend on how
        many are asked for: numpy's vectors may round otherwise than its scalars.
        """
        blocks = positions // _NEIGHBOURS
        first, last = int(blocks[0]), int(blocks[-1])
        if len(positions) == 1 or (first == last and (blocks == first).all()):
            return self._block(first)[positions - first * _NEIGHBOURS]
        out = np.empty((len(positions), self.n_rot), np.float32)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            out[here] = self._block(block)[positions[here] - block * _NEIGHBOURS]
        return out

    def _block(self, block: int) -> np.ndarray:
        """Those of positions block * _NEIGHBOURS and so on."""
        table = self._tables.get(block)
        if table is None:
            first = block * _NEIGHBOURS
            positions = np.arange(first, first + _NEIGHBOURS, dtype=np.float32)
            angles = positions[:, None] * self.frequencies
            table = np.empty((_NEIGHBOURS, self.n_rot), np.float32)
            np.cos(angles, out=table[:, : self.n_rot // 2])
            np.sin(angles, out=table[:, self.n_rot // 2 :])
            if self.magnitude != 1.0:
                table *= np.float32(self.magnitude)
            if len(self._tables) >= _MOST_BLOCKS:
                self._tables.pop(next(iter(self._tables)), None)
            self._tables[block] = table
        return table


def yarn_magnitude(factor: float) -> float:
    """YaRN's factor of the attention's logits, as its square root on queries and keys (Peng et al. 2023, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _yarn(
    base: np.ndarray, n_rot: int, freq_base: float, factor: float, n_ctx: int, fast: float, slow: float
) -> np.ndarray:
    """Frequencies by parts (Peng et al. 2023, section 3.2): slow rotations are interpolated, fast ones kept."""

    def dimension(rotations: float) -> float:
        return n_rot * math.log(n_ctx / (rotations * 2 * math.pi)) / (2 * math.log(freq_base))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), n_rot - 1)
    ramp = np.clip((np.arange(n_rot // 2) - low) / max(high - low, 0.001), 0, 1)
    return base / factor * ramp + base * (1 - ramp)


def read_rope(file: "GGUFFile", arch: str, n_rot: int) -> Rope:
    """The rotary embedding of a file.

    Raises
    ------
    UnsupportedError
        A kind of scaling that isn't known.
    GGUFError
        A key of the wrong type, a number out of its range.
    """

    def positive(key: str, default: float) -> float:
        value = file.get(f"{arch}.rope.{key}", float, default=default)
        if value <= 0:
            raise GGUFError(f"{file.path}: key {arch}.rope.{key}: {value} isn't above 0")
        return value

    freq_base = positive("freq_base", 10000.0)
    if freq_base == 1:
        raise GGUFError(f"{file.path}: key {arch}.rope.freq_base: 1 turns nothing")
    base = freq_base ** -(np.arange(0, n_rot, 2) / n_rot)
    kind = file.get(f"{arch}.rope.scaling.type", str, default="none")
    # Files from before `rope.scaling.*` say only how positions are divided.
    linear = positive("scale_linear", 1.0)
    factor = positive("scaling.factor", linear)
    magnitude = 1.0
    if kind == "linear" or (kind == "none" and linear != 1.0):
        base = base / factor
    elif kind == "yarn":
        n_ctx = file.get(f"{arch}.rope.scaling.original_context_length", int)
        if n_ctx < 1:
            raise GGUFError(f"{file.path}: key {arch}.rope.scaling.original_context_length: {n_ctx} isn't above 0")
        fast, slow = positive("scaling.yarn_beta_fast", 32.0), positive("scaling.yarn_beta_slow", 1.0)
        base = _yarn(base, n_rot, freq_base, factor, n_ctx, fast, slow)
        magnitude = yarn_magnitude(factor) * file.get(f"{arch}.rope.scaling.attn_factor", float, default=1.0)
    elif kind not in ("none", "linear"):
        raise UnsupportedError(f"{file.path}: rope scaling {kind!r}; there are none, linear, yarn")
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:  # Llama 3's scaling, as divisors worked out by the converter
        values = factors.dequantize()
        if values.shape != base.shape:
            raise UnsupportedError(f"{file.path}: rope_freqs.weight has shape {values.shape}, expected {base.shape}")
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise GGUFError(f"{file.path}: rope_freqs.weight has values that aren't above 0")
        base = base / values
    return Rope(n_rot, base.astype(np.float32), magnitude)
