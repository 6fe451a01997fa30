"""Qwen 3.5 and Qwen3-Next: gated delta rules in most layers, attention with gated results in every fourth.

The gated delta rule (Yang et al. 2025) keeps a matrix for each head, which learns what value belongs to which key.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .decoder import Decoder, Style
from .hparams import Hparams, Options
from .weights import DerivedWeight

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights

_EPS = 1e-6  # under the root of a key's length


@dataclass(frozen=True)
class Qwen35(Decoder):
    """The hyperparameters, and how they make a graph.

    Attributes
    ----------
    recurrent : tuple of bool
        Which layers have delta rules.
    n_head_rule, n_head_k : int
        Heads of a delta rule, and of its queries and keys.
    head_dim_rule, head_dim_k : int
        Their values.
    width : int
        Tokens that a convolution sees.
    tiled : bool
        Whether a head of keys serves every n-th head, else neighbours.
    """

    recurrent: tuple[bool, ...]
    n_head_rule: int
    n_head_k: int
    head_dim_rule: int
    head_dim_k: int
    width: int
    tiled: bool

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "Qwen35":
        """Reads them from a file's metadata; raises as `Style.read`."""
        decoder = Style(ffn_norm="post_attention_norm", normalize=True, sections=True).read(hp, options)
        n_layer = decoder.n_layer
        flags = hp.file.metadata.get(f"{hp.arch}.attention.recurrent_layers")
        if isinstance(flags, np.ndarray) and len(flags) >= n_layer:
            recurrent = tuple(bool(x) for x in flags[:n_layer])
        else:
            every = hp.size("full_attention_interval", 4)
            n_own = n_layer - hp.count("nextn_predict_layers") * hp.whole
            recurrent = tuple(i < n_own and (i + 1) % every != 0 for i in range(n_layer))
        n_head, n_head_k, inner = hp.size("ssm.time_step_rank"), hp.size("ssm.group_count"), hp.size("ssm.inner_size")
        if n_head % n_head_k or inner % n_head:
            raise hp.error(f"{inner} values can't be shared by {n_head} heads, or these can't share {n_head_k} keys")
        return cls(
            **vars(decoder),
            recurrent=recurrent,
            n_head_rule=n_head,
            n_head_k=n_head_k,
            head_dim_rule=inner // n_head,
            head_dim_k=hp.size("ssm.state_size"),
            width=hp.size("ssm.conv_kernel"),
            tiled=hp.arch != "qwen3next",
        )

    def attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's attention or delta rule: (n_tokens, n_embd), normalized, to the same."""
        return self._delta_rule(g, w, x, f"blk.{i}") if self.recurrent[i] else self._gated_attention(g, w, x, i)

    def _gated_attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        p, n, n_head, n_kv = f"blk.{i}", self.head_dim, self.n_head[i], self.n_head_kv[i]
        # Each head's query, then the gate of its result.
        both = g.op("RESHAPE", w.linear(f"{p}.attn_q", 2 * n_head * n, x), shape=(n_head, 2 * n), name=f"{p}.attn_q.heads")
        q = w.norm(f"{p}.attn_q_norm", both, self.eps, n)
        table = g.input("rope", (self.ropes["rope"].n_rot,))
        q = g.op("ROPE", q, table, kind=self.style.rope, name=f"{p}.q_rope")
        k, v = (self._heads(g, w, w.linear(f"{p}.attn_{part}", n_kv * n, x), f"{p}.attn_{part}", n_kv, i) for part in "kv")
        y = g.op("ATTENTION", q, k, v, g.cache(f"{p}.cache", n_kv, n, n), scale=self.scale, name=f"{p}.attn")
        y = g.op("GATED", y, both, first=n, name=f"{p}.attn_gated")
        y = g.op("RESHAPE", y, shape=(n_head * n,), name=f"{p}.attn_rows")
        return w.linear(f"{p}.attn_output", self.n_embd, y)

    def _delta_rule(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        n_head, n_keys = self.n_head_rule, 2 * self.n_head_k * self.head_dim_k
        n_values = n_head * self.head_dim_rule
        n = n_keys + n_values
        y = w.linear(f"{p}.attn_qkv", n, x)
        kernel, tail = w.by_columns(f"{p}.ssm_conv1d.weight", n, self.width), g.state(f"{p}.tail", self.width - 1, n)
        y = g.op("SHORT_CONV", y, kernel, tail, silu=True, name=f"{p}.conv")
        keys = g.op("L2_NORM", y, n_head=2 * self.n_head_k, head_dim=self.head_dim_k, eps=_EPS, name=f"{p}.keys")
        alpha, beta = self._alpha_beta(g, w, x, p)
        gates = g.op("DELTA_GATES", alpha, w(f"{p}.ssm_a", n_head), w(f"{p}.ssm_dt.bias", n_head), beta, name=f"{p}.gates")
        memory = g.state(f"{p}.memory", n_head, self.head_dim_k, self.head_dim_rule)
        how = {"first": n_keys, "tiled": self.tiled, "scale": self.head_dim_k**-0.5}
        y = g.op("DELTA_RULE", keys, y, gates, memory, name=f"{p}.rule", **how)
        y = w.norm(f"{p}.ssm_norm", y, self.eps)
        y = g.op("RESHAPE", y, shape=(n_values,), name=f"{p}.rule_rows")
        y = g.op("SWIGLU", w.linear(f"{p}.attn_gate", n_values, x), y, name=f"{p}.rule_gated")
        return w.linear(f"{p}.ssm_out", self.n_embd, y)

    def _alpha_beta(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "tuple[Tensor, Tensor]":
        """What becomes the decay of each head's memory, and how much of a value it takes: (n_tokens, n_head) each."""
        name, n = f"{p}.ssm_ba", self.n_head_rule
        if not w.has(f"{name}.weight"):
            return w.linear(f"{p}.ssm_alpha", n, x), w.linear(f"{p}.ssm_beta", n, x)
        # For each head of keys: the rows of its heads' betas, then of their alphas.
        stored = w.stored(f"{name}.weight", 2 * n, self.n_embd)

        def rows(part: str, k: int) -> "Tensor":
            def make() -> DerivedWeight:
                data = stored.data.reshape(self.n_head_k, 2, n // self.n_head_k, -1)[:, k]
                return DerivedWeight(f"{name}.{part}", stored.type, (n, self.n_embd), data.reshape(n, -1))

            return g.op("MUL_MAT", w.derived(f"{name}.{part}", make), x, name=f"{p}.ssm_{part}")

        return rows("alpha", 1), rows("beta", 0)
