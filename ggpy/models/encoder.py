"""Encoders: every token sees all of its text, or a window of it; what they give are embeddings.

Layers are those of the first transformers (Vaswani et al. 2017), with norms after sums, or ModernBERT's. What a file has is
used: learned positions, types of tokens, fused matrices, biases, experts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedError
from .hparams import Hparams, Options
from .moe import Experts
from .rope import Rope, read_rope, unscaled_rope

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor
    from .weights import Weights

#: the gated activation by `{arch}.hidden_activation`
_GATED = {"gelu": "geglu_erf", "silu": "swiglu"}


@dataclass(frozen=True)
class EncoderStyle:
    """What sets an architecture apart and its files don't say.

    Attributes
    ----------
    rope : bool
        Whether queries and keys are rotated; otherwise positions are learned and added to the embedding.
    act : str
        The feed-forward part's activation, a key of `weights.ACTS`; "" if the file says, GELU with gates if not.
    modern : bool
        ModernBERT's layers: norms before attention and the feed-forward part but for the first, and one at the end; most
        layers see a window, and are rotated by an embedding of their own.
    """

    rope: bool = False
    act: str = "gelu_erf"
    modern: bool = False

    def read(self, hp: Hparams, options: Options) -> "Encoder":
        """The encoder of a file.

        Raises
        ------
        GGUFError
            A key is missing, or its value makes no sense.
        UnsupportedError
            A key asks for something that encoders here don't have.
        """
        if hp.flag("attention.causal", False):
            raise UnsupportedError(f"{hp.file.path}: key {hp.arch}.attention.causal: a causal {hp.arch} isn't supported")
        n_embd, n_head = hp.size("embedding_length"), hp.size("attention.head_count")
        if n_embd % n_head:
            raise hp.error(f"{n_embd} values can't be shared by {n_head} heads")
        head_dim, n_layer, n_ff = n_embd // n_head, hp.n_layer(), hp.size("feed_forward_length")
        windows = self._windows(hp, n_layer)
        ropes = {"rope": read_rope(hp, head_dim)} if self.rope else {}
        if any(windows):
            ropes["rope_window"] = unscaled_rope(hp, head_dim, 10000.0)
        act = self.act or _GATED.get(hp.text("hidden_activation", "gelu"), "")
        if not act:
            raise UnsupportedError(f"{hp.file.path}: key {hp.arch}.hidden_activation: known are {', '.join(_GATED)}")
        every = hp.count("moe_every_n_layers")
        experts = Experts.read(hp, n_ff, options.n_expert_used, act=act) if every else None
        return Encoder(
            file=hp.file,
            style=self,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=n_ff,
            n_head=n_head,
            head_dim=head_dim,
            n_vocab=hp.n_vocab(),
            n_types=hp.file.get("tokenizer.ggml.token_type_count", int, default=1),
            n_ctx_train=hp.size("context_length"),
            eps=hp.positive("attention.layer_norm_epsilon"),
            act=act,
            ropes=ropes,
            windows=windows,
            experts=tuple(experts if every and i % every == 1 else None for i in range(n_layer)),
        )

    def _windows(self, hp: Hparams, n_layer: int) -> tuple[int, ...]:
        """The window of each layer, 0 for none: every so many, the first of them, see all of their text."""
        key = "attention.sliding_window"
        window, pattern = hp.count(key), hp.file.metadata.get(f"{hp.arch}.{key}_pattern")
        if window and not self.modern:
            raise UnsupportedError(f"{hp.file.path}: key {hp.arch}.{key}: windows aren't supported in {hp.arch}")
        if not isinstance(pattern, np.ndarray):
            pattern = np.arange(n_layer) % hp.size(f"{key}_pattern", 3)
        if len(pattern) < n_layer:
            raise hp.error(f"key {hp.arch}.{key}_pattern: {len(pattern)} of {n_layer} layers")
        return tuple(window if has else 0 for has in pattern[:n_layer].tolist())


@dataclass(frozen=True)
class Encoder:
    """The hyperparameters, and how they make a graph. Names are GGUF's; tuples have a value for each layer.

    Attributes
    ----------
    windows : tuple of int
        See `ATTENTION`; 0 for none.
    """

    file: "GGUFFile"
    style: EncoderStyle
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    head_dim: int
    n_vocab: int
    n_types: int
    n_ctx_train: int
    eps: float
    act: str
    ropes: dict[str, Rope]
    windows: tuple[int, ...]
    experts: tuple[Experts | None, ...]

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd), normalized."""
        x = g.op("GET_ROWS", w("token_embd.weight", self.n_vocab, self.n_embd), ids, name="embd_tokens")
        if w.has("token_types.weight"):
            table = w("token_types.weight", self.n_types, self.n_embd)
            x = g.op("ADD", x, g.op("GET_ROWS", table, g.input("types", (), "I32"), name="embd_types"), name="embd_typed")
        if not self.style.rope:
            table = w("position_embd.weight", self.n_ctx_train, self.n_embd)
            places = g.op("GET_ROWS", table, g.input("positions", (), "I32"), name="embd_positions")
            x = g.op("ADD", x, places, name="embd_placed")
        return w.layer_norm("token_embd_norm", x, self.eps)

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        p = f"blk.{i}"
        if self.style.modern:
            # What the first layer takes is normalized already.
            taken = w.layer_norm(f"{p}.attn_norm", x, self.eps) if i or w.has(f"{p}.attn_norm.weight") else x
            total = g.op("ADD", x, self._attention(g, w, taken, i), name=f"{p}.attn_residual")
            y = self._feed_forward(g, w, w.layer_norm(f"{p}.ffn_norm", total, self.eps), i)
            return g.op("ADD", total, y, name=f"{p}.out")
        total = g.op("ADD", x, self._attention(g, w, x, i), name=f"{p}.attn_residual")
        x = w.layer_norm(f"{p}.attn_output_norm", total, self.eps)
        total = g.op("ADD", x, self._feed_forward(g, w, x, i), name=f"{p}.ffn_residual")
        return w.layer_norm(f"{p}.layer_output_norm", total, self.eps)

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """The last layer's (n_tokens, n_embd), normalized."""
        return w.layer_norm("output_norm", x, self.eps) if self.style.modern else x

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """Encoders have none."""
        raise UnsupportedError(f"{self.file.path}: an encoder, which gives embeddings, not logits")

    def _feed_forward(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        experts = self.experts[i]
        if experts is not None:
            return experts.build(g, w, x, f"blk.{i}")
        return w.feed_forward(f"blk.{i}", self.n_ff, x, self.act)

    def _attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        p, shape, window = f"blk.{i}", (self.n_head, self.head_dim), self.windows[i]
        fused = w.has(f"{p}.attn_qkv.weight")
        heads = []
        for j, part in enumerate("qkv"):
            of = (f"{p}.attn_qkv", j * self.n_embd, 3 * self.n_embd) if fused else None
            y = w.linear(f"{p}.attn_{part}", self.n_embd, x, of)
            y = g.op("RESHAPE", y, shape=shape, name=f"{p}.attn_{part}.heads")
            if self.style.rope and part != "v":
                y = g.op(
                    "ROPE",
                    y,
                    g.input("rope_window" if window else "rope", (self.head_dim,)),
                    kind="neox",
                    name=f"{p}.{part}_rope",
                )
            heads.append(y)
        # One for all layers: no run needs what another has left there.
        cache = g.cache("cache", self.n_head, self.head_dim, self.head_dim)
        how = {"scale": self.head_dim**-0.5, "causal": False, "window": window}
        y = g.op("ATTENTION", *heads, cache, name=f"{p}.attn", **how)
        y = g.op("RESHAPE", y, shape=(self.n_embd,), name=f"{p}.attn_rows")
        return w.linear(f"{p}.attn_output", self.n_embd, y)
