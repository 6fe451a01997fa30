"""Gemma 4 (Google 2026): Gemma 3's layers with what its smaller models share between them.

Layers with windows have heads of another length than the others. Values are normalized, too, and are the keys where there
is no matrix for them. The last layers attend to the keys and values of the last layer of their kind that has any. In E2B
and E4B each layer takes a small embedding of the token of its own, from a table that is read row by row. Scores aren't
scaled. In 26B-A4B a mixture of experts stands beside the feed-forward part; each has norms of its own.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from .decoder import Decoder, Style
from .hparams import Hparams, Options
from .rope import unscaled_rope

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights

_STYLE = Style(norm_after=True, act="geglu", embd_root=True, window_base=10000.0, normalize=True)


@dataclass(frozen=True)
class Gemma4(Decoder):
    """The hyperparameters, and how they make a graph.

    Attributes
    ----------
    head_dims : tuple of int
        Of each layer.
    kv_of : tuple of int
        Whose keys and values each layer attends to.
    n_per_layer : int
        Values of a token's embedding for each layer; 0 for none.
    """

    head_dims: tuple[int, ...]
    kv_of: tuple[int, ...]
    n_per_layer: int

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "Gemma4":
        """Reads them from a file's metadata. Raises as `Style.read`."""
        base = _STYLE.read(hp, options)
        short = hp.size("attention.key_length_swa", base.head_dim)
        n_own = base.n_layer - hp.count("attention.shared_kv_layers")
        windows = [bool(window) for window in base.windows]
        if not {*windows} <= {*windows[: max(n_own, 0)]}:
            raise hp.error(f"key {hp.arch}.attention.shared_kv_layers: layers have no keys to share")
        last = {kind: max(i for i in range(n_own) if windows[i] == kind) for kind in {*windows}}
        values = {f.name: getattr(base, f.name) for f in fields(base)}
        values["ropes"] = {
            "rope": base.ropes["rope"],
            "rope_window": unscaled_rope(hp, hp.size("rope.dimension_count_swa", short), 10000.0),
        }
        return cls(
            **{**values, "scale": 1.0},
            head_dims=tuple(short if kind else base.head_dim for kind in windows),
            kv_of=tuple(i if i < n_own else last[kind] for i, kind in enumerate(windows)),
            n_per_layer=hp.count("embedding_length_per_layer_input"),
        )

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd); beside that the layers' own embeddings, node "per_layer"."""
        x = super().embed(g, w, ids)
        if self.n_per_layer:
            shape = (self.n_layer, self.n_per_layer)
            n = self.n_layer * self.n_per_layer
            own = g.op("GET_ROWS", w("per_layer_token_embd.weight", self.n_vocab, n), ids, name="per_layer_embd")
            own = g.op("SCALE", own, factor=self.n_per_layer**0.5, name="per_layer_embd.scaled")
            y = g.op(
                "SCALE", w.linear("per_layer_model_proj", n, x), factor=self.n_embd**-0.5, name="per_layer_proj.scaled"
            )
            y = w.norm("per_layer_proj_norm", g.op("RESHAPE", y, shape=shape, name="per_layer_proj.parts"), self.eps)
            total = g.op("ADD", y, g.op("RESHAPE", own, shape=shape, name="per_layer_embd.parts"), name="per_layer_sum")
            g.op("SCALE", total, factor=0.5**0.5, name="per_layer")
        return x

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        p, x = f"blk.{i}", super().layer(g, w, x, i)
        if self.n_per_layer:
            if "per_layer" not in g:
                raise UnsupportedError("a graph of some layers of a Gemma 4 with embeddings for each layer")
            own = g.op("HEAD", g["per_layer"], index=i, name=f"{p}.own_embd")
            y = g.op("GELU", w.linear(f"{p}.inp_gate", self.n_per_layer, x), kind="tanh", name=f"{p}.own_gate")
            y = w.linear(f"{p}.proj", self.n_embd, g.op("MUL", y, own, name=f"{p}.own_gated"))
            x = g.op("ADD", x, w.norm(f"{p}.post_norm", y, self.eps), name=f"{p}.with_own")
        scale = w.number(f"{p}.layer_output_scale.weight")
        return x if scale is None else g.op("SCALE", x, factor=scale, name=f"{p}.scaled")

    def feed_forward(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's feed-forward part, normalized (n_tokens, n_embd) to the same, and the experts beside it."""
        p = f"blk.{i}"
        y = w.feed_forward(p, self.n_ff[i], x, self.style.act)
        if self.experts is None:
            return y
        total = g[f"{p}.attn_residual"]
        scales = w(f"{p}.ffn_gate_inp.scale", self.n_embd)
        taken = g.op("RMS_NORM", total, scales, eps=self.eps, name=f"{p}.router_norm")
        logits = w.linear(f"{p}.ffn_gate_inp", self.experts.n_expert, taken, node=f"{p}.router_unscaled")
        logits = g.op("SCALE", logits, factor=self.n_embd**-0.5, name=f"{p}.router")
        mixed = self.experts.build(g, w, w.norm(f"{p}.pre_ffw_norm_2", total, self.eps), p, logits)
        parts = [w.norm(f"{p}.post_ffw_norm_{n}", part, self.eps) for n, part in ((1, y), (2, mixed))]
        return g.op("ADD", *parts, name=f"{p}.ffn_and_experts")

    def attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's attention: (n_tokens, n_embd), normalized, to the same."""
        p, n, n_head, n_kv = f"blk.{i}", self.head_dims[i], self.n_head[i], self.n_head_kv[i]

        def heads(part: str, count: int) -> "Tensor":
            y = w.linear(f"{p}.attn_{part}", count * n, x)
            return g.op("RESHAPE", y, shape=(count, n), name=f"{p}.attn_{part}.heads")

        def rotated(part: str, y: "Tensor") -> "Tensor":
            y = w.norm(f"{p}.attn_{part}_norm", y, self.eps)
            table = g.input(self.rope_of[i], (self.ropes[self.rope_of[i]].n_rot,))
            return g.op("ROPE", y, table, kind="neox", name=f"{p}.{part}_rope")

        q = rotated("q", heads("q", n_head))
        how = {"scale": self.scale, "window": self.windows[i]}
        name = f"blk.{self.kv_of[i]}.cache"
        cache = g[name] if name in g else g.cache(name, n_kv, n, n)
        if self.kv_of[i] == i:
            k = heads("k", n_kv)
            v = heads("v", n_kv) if w.has(f"{p}.attn_v.weight") else k
            v = g.op("RMS_NORM", v, eps=self.eps, name=f"{p}.attn_v_norm")
            y = g.op("ATTENTION", q, rotated("k", k), v, cache, name=f"{p}.attn", **how)
        else:
            y = g.op("ATTENTION_AGAIN", q, cache, name=f"{p}.attn", **how)
        return w.linear(f"{p}.attn_output", self.n_embd, g.op("RESHAPE", y, shape=(n_head * n,), name=f"{p}.attn_rows"))
