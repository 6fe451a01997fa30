"""Mamba-2 (Dao & Gu 2024), by itself, in most layers of a decoder (Granite 4, Nemotron-H), or in all (Falcon-H1)."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .decoder import Decoder, Style
from .hparams import Hparams, Options
from .rope import Rope
from .weights import DerivedWeight

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights


@dataclass(frozen=True)
class Scan:
    """A Mamba-2 layer.

    Attributes
    ----------
    n_head, head_dim : int
        Heads, and the values of each.
    n_group, n_state : int
        Heads of keys and queries, which neighbours share, and their values.
    width : int
        Tokens that its convolution sees.
    least_step : float
        Steps are no smaller.
    """

    n_head: int
    head_dim: int
    n_group: int
    n_state: int
    width: int
    least_step: float

    @classmethod
    def read(cls, hp: Hparams) -> "Scan":
        """Reads it from a file's metadata. Raises GGUFError where a key is missing or makes no sense."""
        n_head, inner, n_group = hp.size("ssm.time_step_rank"), hp.size("ssm.inner_size"), hp.size("ssm.group_count")
        if inner % n_head or n_head % n_group or inner % n_group:
            raise hp.error(f"{inner} values of {n_head} heads can't share {n_group} groups")
        least = hp.number("ssm.time_step_min", 0.0)
        if not 0 <= least <= 1:
            raise hp.error(f"key {hp.arch}.ssm.time_step_min: {least} makes no sense")
        return cls(n_head, inner // n_head, n_group, hp.size("ssm.state_size"), hp.size("ssm.conv_kernel"), least)

    def build(self, g: "Graph", w: "Weights", x: "Tensor", p: str, eps: float) -> "Tensor":
        """The layer for (n_tokens, n_embd), of the tensors that begin with `p`."""
        n_values, n_keys = self.n_head * self.head_dim, self.n_group * self.n_state
        n_conv = n_values + 2 * n_keys
        n_all = n_values + n_conv + self.n_head

        def part(name: str, first: int, n: int) -> "Tensor":
            return w.linear(f"{p}.ssm_{name}", n, x, (f"{p}.ssm_in", first, n_all))

        given = [w.by_columns(f"{p}.ssm_conv1d.weight", n_conv, self.width), g.state(f"{p}.tail", self.width - 1, n_conv)]
        bias = w.optional(f"{p}.ssm_conv1d.bias", n_conv)
        given += [] if bias is None else [bias]
        y = g.op("SHORT_CONV", part("xbc", n_values, n_conv), *given, silu=True, name=f"{p}.conv")
        a, skip = (w.values(f"{p}.ssm_{name}", self.n_head) for name in "ad")
        step = part("step", n_values + n_conv, self.n_head)
        gates = g.op("DELTA_GATES", step, a, self._steps(w, f"{p}.ssm_dt.bias"), name=f"{p}.gates")
        memory = g.state(f"{p}.memory", self.n_head, self.n_state, self.head_dim)
        y = g.op("STATE_SCAN", y, gates, memory, skip, n_head_k=self.n_group, name=f"{p}.scan")
        y = g.op("RESHAPE", y, shape=(n_values,), name=f"{p}.scan_rows")
        y = g.op("SWIGLU", part("z", 0, n_values), y, name=f"{p}.scan_gated")
        if w.has(f"{p}.ssm_norm.weight"):
            y = self._norm(g, w, y, f"{p}.ssm_norm", eps)
        return w.linear(f"{p}.ssm_out", x.shape[1], y)

    def _steps(self, w: "Weights", name: str) -> "Tensor":
        """The heads' biases of steps and, behind them, what softplus gives the least step for."""
        stored = w.stored(name, self.n_head)

        def make() -> DerivedWeight:
            least = math.log(math.expm1(self.least_step)) if self.least_step else -math.inf
            values = np.append(stored.dequantize(), np.float32(least))
            return DerivedWeight(f"{name}.limited", "F32", values.shape, values.view(np.uint8))

        return w.derived(f"{name}.limited", make)

    def _norm(self, g: "Graph", w: "Weights", y: "Tensor", name: str, eps: float) -> "Tensor":
        """RMS norm of each group's values."""
        n = y.shape[1]
        weight = w.values(f"{name}.weight", n)
        if self.n_group == 1:
            return g.op("RMS_NORM", y, weight, eps=eps, name=name)
        y = g.op("RESHAPE", y, shape=(self.n_group, n // self.n_group), name=f"{name}.groups")
        y = g.op("RMS_NORM", y, eps=eps, name=f"{name}.plain")
        y = g.op("RESHAPE", y, shape=(n,), name=f"{name}.rows")
        return g.op("MUL_ROW", y, weight, name=name)


def granite_style(hp: Hparams) -> Style:
    """That of Granite's files. Whether they rotate is said where others say that YaRN was trained."""
    rotated = hp.flag("rope.scaling.finetuned", True)
    return Style(rope="norm", normalize=True, divide_logits=True, no_rope_every=0 if rotated else 1)


@dataclass(frozen=True)
class Hybrid(Decoder):
    """A decoder whose layers without heads of keys are Mamba-2's.

    Attributes
    ----------
    scan : Scan
    """

    scan: Scan

    @classmethod
    def read_granite(cls, hp: Hparams, options: Options) -> "Hybrid":
        """Reads Granite 4's from a file's metadata; raises as `Style.read`."""
        return cls(**vars(replace(granite_style(hp), mixed=True).read(hp, options)), scan=Scan.read(hp))

    def attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's attention or scan: (n_tokens, n_embd), normalized, to the same."""
        if self.n_head_kv[i]:
            return super().attention(g, w, x, i)
        return self.scan.build(g, w, x, f"blk.{i}", self.eps)


@dataclass(frozen=True)
class Parallel(Hybrid):
    """A decoder whose layers have attention and a scan side by side."""

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "Parallel":
        """Reads Falcon-H1's from a file's metadata; raises as `Style.read`."""
        return cls(**vars(Style().read(hp, options)), scan=Scan.read(hp))

    def attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's attention and its scan: (n_tokens, n_embd), normalized, to the same."""
        scanned = self.scan.build(g, w, x, f"blk.{i}", self.eps)
        return g.op("ADD", super().attention(g, w, x, i), scanned, name=f"blk.{i}.both")


@dataclass(frozen=True)
class Single(Hybrid):
    """A decoder whose layers are one thing each: attention, a feed-forward part or, where they have neither, a scan."""

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "Single":
        """Reads Nemotron-H's from a file's metadata; raises as `Style.read`."""
        style = Style(act="relu_squared", gating="sigmoid", normalize=True, mixed=True, no_rope_every=1)
        return cls(**vars(style.read(hp, options)), scan=Scan.read(hp))

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        y = w.norm(f"blk.{i}.attn_norm", x, self.eps)
        y = self.feed_forward(g, w, y, i) if self.n_ff[i] else self.attention(g, w, y, i)
        return g.op("ADD", x, y, name=f"blk.{i}.out")

    def feed_forward(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's feed-forward part, normalized (n_tokens, n_embd) to the same: experts where it has a router."""
        if self.experts is not None and w.has(f"blk.{i}.ffn_gate_inp.weight"):
            return self.experts.build(g, w, x, f"blk.{i}")
        return w.feed_forward(f"blk.{i}", self.n_ff[i], x, self.style.act)


@dataclass(frozen=True)
class Mamba2:
    """A model whose layers are scans alone, so that it needs no keys and values.

    Attributes
    ----------
    scan : Scan
    """

    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    eps: float
    scan: Scan
    ropes: dict[str, Rope] = field(default_factory=dict)

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "Mamba2":
        """Reads them from a file's metadata. Raises GGUFError where a key is missing or makes no sense."""
        sizes = (hp.n_layer(), hp.size("embedding_length"), hp.n_vocab(), hp.size("context_length"))
        return cls(*sizes, hp.number("attention.layer_norm_rms_epsilon"), Scan.read(hp))

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd)."""
        return g.op("GET_ROWS", w("token_embd.weight", self.n_vocab, self.n_embd), ids, name="embd")

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        y = self.scan.build(g, w, w.norm(f"blk.{i}.attn_norm", x, self.eps), f"blk.{i}", self.eps)
        return g.op("ADD", x, y, name=f"blk.{i}.out")

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """The last layer's (n_tokens, n_embd) normalized: what logits are made of, and embeddings."""
        return w.norm("output_norm", x, self.eps)

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """(n_tokens, n_embd), normalized, to logits (n_tokens, n_vocab)."""
        return w.logits(x, self.n_vocab)
