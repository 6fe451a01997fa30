"""Rotary position embedding: the frequencies, from metadata, and the table of a run."""

import math
from dataclasses import dataclass, field

import numpy as np

from ..errors import UnsupportedError
from .hparams import Hparams

_MOST_ROTATED = 1 << 14  # a file's number makes tables
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
        Factor of all cosines and sines; 1 but for YaRN and LongRoPE.
    temperature : tuple of float and int
        (f, n): at position p cosines and sines are also multiplied by 1 + f ln(1 + floor(p / n)). Queries that are rotated
        whole get the temperature of Llama 4's and Ministral 3's attention by this.
    """

    n_rot: int
    frequencies: np.ndarray
    magnitude: float = 1.0
    temperature: tuple[float, int] = (0.0, 1)
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
            factor, n = self.temperature
            if factor:
                table *= (1 + factor * np.log1p(positions // n))[:, None].astype(np.float32)
            if len(self._tables) >= _MOST_BLOCKS:
                self._tables.pop(next(iter(self._tables)), None)
            self._tables[block] = table
        return table


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of the attention's logits, as its square root on queries and keys (Peng et al. 2023, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _yarn(
    base: np.ndarray, n_rot: int, freq_base: float, factor: float, n_ctx: float, fast: float, slow: float, whole: bool
) -> np.ndarray:
    """Frequencies by parts (Peng et al. 2023, section 3.2): slow rotations are interpolated, fast ones kept. The parts
    begin and end at whole dimensions if `whole`."""

    def dimension(rotations: float) -> float:
        return n_rot * math.log(n_ctx / (rotations * 2 * math.pi)) / (2 * math.log(freq_base))

    low, high = dimension(fast), dimension(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rot - 1)
    ramp = np.clip((np.arange(n_rot // 2) - low) / max(high - low, 0.001), 0, 1)
    return base / factor * ramp + base * (1 - ramp)


def read_rope(hp: Hparams, n_rot: int, n_ctx: int = 0, whole_yarn: bool = True) -> Rope:
    """The rotary embedding of a file.

    Parameters
    ----------
    hp : Hparams
    n_rot : int
    n_ctx : int
        The context that the model is loaded for: LongRoPE has other frequencies for long ones.
    whole_yarn : bool
        See `_yarn`.

    Raises
    ------
    UnsupportedError
        A kind of scaling that isn't known.
    GGUFError
        A key of the wrong type, a number out of its range.
    """
    if n_rot > _MOST_ROTATED:
        raise hp.error(f"{n_rot} values of a head are rotated; ggpy rotates up to {_MOST_ROTATED}")
    freq_base = _base(hp, "rope.freq_base", 10000.0)
    base = _frequencies(freq_base, n_rot)
    kind = hp.text("rope.scaling.type", "none")
    # Files from before `rope.scaling.*` say only how positions are divided.
    linear = hp.positive("rope.scale_linear", 1.0)
    factor = hp.positive("rope.scaling.factor", linear)
    magnitude = hp.number("rope.scaling.attn_factor", 1.0)
    if kind == "linear" or (kind == "none" and linear != 1.0):
        base = base / factor
    elif kind == "yarn":
        n_trained = hp.positive("rope.scaling.original_context_length")
        fast, slow = hp.positive("rope.scaling.yarn_beta_fast", 32.0), hp.positive("rope.scaling.yarn_beta_slow", 1.0)
        base = _yarn(base, n_rot, freq_base, factor, n_trained, fast, slow, whole_yarn)
        magnitude *= yarn_magnitude(factor)
    elif kind not in ("none", "linear", "longrope"):
        raise UnsupportedError(f"{hp.file.path}: rope scaling {kind!r}; there are none, linear, yarn, longrope")
    # Divisors worked out by the converter: of Llama 3's scaling; of LongRoPE's (Ding et al. 2024), in two sets.
    original = hp.count("rope.scaling.original_context_length")
    for name in ("rope_freqs", "rope_factors_long" if n_ctx > original else "rope_factors_short"):
        factors = hp.file.tensors.get(f"{name}.weight")
        if factors is not None:
            values = factors.dequantize()
            if values.shape != base.shape:
                raise UnsupportedError(f"{hp.file.path}: {name}.weight has shape {values.shape}, expected {base.shape}")
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise hp.error(f"{name}.weight has values that aren't above 0")
            base = base / values
    return Rope(n_rot, base.astype(np.float32), magnitude)


def unscaled_rope(hp: Hparams, n_rot: int, freq_base: float) -> Rope:
    """That of layers with windows where it isn't the others': without scaling, from `rope.freq_base_swa`.

    Parameters
    ----------
    freq_base : float
        The base where the file has none; 0 for that of the other layers.
    """
    freq_base = _base(hp, "rope.freq_base_swa", freq_base or _base(hp, "rope.freq_base", 10000.0))
    return Rope(n_rot, _frequencies(freq_base, n_rot).astype(np.float32))


def _base(hp: Hparams, key: str, default: float) -> float:
    base = hp.positive(key, default)
    if base == 1:
        raise hp.error(f"key {hp.arch}.{key}: 1 turns nothing")
    return base


def _frequencies(freq_base: float, n_rot: int) -> np.ndarray:
    return freq_base ** -(np.arange(0, n_rot, 2) / n_rot)
