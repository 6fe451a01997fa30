"""Encoders: every token sees all of its text; what they give are embeddings.

Layers are those of the first transformers (Vaswani et al. 2017): norms come after sums. What a file has is used: learned
positions, types of tokens, fused matrices, biases.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from .hparams import Hparams, Options
from .rope import Rope, read_rope

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor
    from .weights import Weights


@dataclass(frozen=True)
class EncoderStyle:
    """What sets an architecture apart and its files don't say.

    Attributes
    ----------
    rope : bool
        Whether queries and keys are rotated; otherwise positions are learned and added to the embedding.
    act : str
        The feed-forward part's activation, a key of `weights.ACTS`.
    """

    rope: bool = False
    act: str = "gelu_erf"

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
        if hp.count("moe_every_n_layers"):
            raise UnsupportedError(f"{hp.file.path}: key {hp.arch}.moe_every_n_layers: not supported")
        n_embd, n_head = hp.size("embedding_length"), hp.size("attention.head_count")
        if n_embd % n_head:
            raise hp.error(f"{n_embd} values can't be shared by {n_head} heads")
        head_dim = n_embd // n_head
        return Encoder(
            file=hp.file,
            style=self,
            n_layer=hp.n_layer(),
            n_embd=n_embd,
            n_ff=hp.size("feed_forward_length"),
            n_head=n_head,
            head_dim=head_dim,
            n_vocab=hp.n_vocab(),
            n_types=hp.file.get("tokenizer.ggml.token_type_count", int, default=1),
            n_ctx_train=hp.size("context_length"),
            eps=hp.positive("attention.layer_norm_epsilon"),
            ropes={"rope": read_rope(hp, head_dim)} if self.rope else {},
        )


@dataclass(frozen=True)
class Encoder:
    """The hyperparameters, and how they make a graph. Names are GGUF's."""

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
    ropes: dict[str, Rope]

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
        total = g.op("ADD", x, self._attention(g, w, x, p), name=f"{p}.attn_residual")
        x = w.layer_norm(f"{p}.attn_output_norm", total, self.eps)
        total = g.op("ADD", x, w.feed_forward(p, self.n_ff, x, self.style.act), name=f"{p}.ffn_residual")
        return w.layer_norm(f"{p}.layer_output_norm", total, self.eps)

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """What the last layer gives is normalized."""
        return x

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """Encoders have none."""
        raise UnsupportedError(f"{self.file.path}: an encoder, which gives embeddings, not logits")

    def _attention(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        shape = (self.n_head, self.head_dim)
        fused = w.has(f"{p}.attn_qkv.weight")
        heads = []
        for j, part in enumerate("qkv"):
            of = (f"{p}.attn_qkv", j * self.n_embd, 3 * self.n_embd) if fused else None
            y = w.linear(f"{p}.attn_{part}", self.n_embd, x, of)
            y = g.op("RESHAPE", y, shape=shape, name=f"{p}.attn_{part}.heads")
            if self.style.rope and part != "v":
                y = g.op("ROPE", y, g.input("rope", (self.head_dim,)), kind="neox", name=f"{p}.{part}_rope")
            heads.append(y)
        # One for all layers: no run needs what another has left there.
        cache = g.cache("cache", self.n_head, self.head_dim, self.head_dim)
        y = g.op("ATTENTION", *heads, cache, scale=self.head_dim**-0.5, causal=False, name=f"{p}.attn")
        y = g.op("RESHAPE", y, shape=(self.n_embd,), name=f"{p}.attn_rows")
        return w.linear(f"{p}.attn_output", self.n_embd, y)
