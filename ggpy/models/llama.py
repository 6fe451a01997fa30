"""Llama 1, 2, 3, Mistral, SmolLM2 and their like (Touvron et al. 2023): RMS norm, rotary embedding, SwiGLU."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GGUFError
from .rope import Rope, read_rope

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor
    from .weights import Weights


@dataclass(frozen=True)
class Llama:
    """The hyperparameters, and how they make a graph. Names are GGUF's."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    rope: Rope

    @classmethod
    def read(cls, file: "GGUFFile") -> "Llama":
        """Reads them from a file's metadata.

        Raises
        ------
        GGUFError
            A key is missing, or its value makes no sense.
        """
        arch = file.get("general.architecture", str)

        def size(key: str, default: int | None = None) -> int:
            options = {} if default is None else {"default": default}
            value = file.get(f"{arch}.{key}", int, **options)
            if not 0 < value < 1 << 31:
                raise GGUFError(f"{file.path}: key {arch}.{key}: {value} makes no sense")
            return value

        n_embd, n_head = size("embedding_length"), size("attention.head_count")
        n_head_kv = size("attention.head_count_kv", n_head)
        if n_head % n_head_kv:
            raise GGUFError(f"{file.path}: {n_head} heads can't share {n_head_kv} heads of keys and values")
        head_dim = size("attention.key_length", n_embd // n_head)
        if size("attention.value_length", head_dim) != head_dim:
            raise GGUFError(f"{file.path}: keys and values of different lengths in architecture {arch}")
        n_rot = size("rope.dimension_count", head_dim)
        if n_rot > head_dim or n_rot % 2:
            raise GGUFError(f"{file.path}: key {arch}.rope.dimension_count: {n_rot} of {head_dim} values")
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise GGUFError(f"{file.path}: tensor token_embd.weight is missing or no matrix")
        return cls(
            n_layer=size("block_count"),
            n_embd=n_embd,
            n_ff=size("feed_forward_length"),
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_vocab=embedding.shape[0],
            n_ctx_train=size("context_length"),
            rms_eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
            rope=read_rope(file, arch, n_rot),
        )

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd)."""
        return g.op("GET_ROWS", w("token_embd.weight", self.n_vocab, self.n_embd), ids, name="embd")

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        p = f"blk.{i}"
        x = g.op("ADD", x, self._attention(g, w, self._norm(g, w, x, f"{p}.attn_norm"), p), name=f"{p}.attn_residual")
        return g.op("ADD", x, self._ffn(g, w, self._norm(g, w, x, f"{p}.ffn_norm"), p), name=f"{p}.out")

    def head(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """(n_tokens, n_embd) to logits (n_tokens, n_vocab). Without `output.weight` the embedding serves."""
        x = self._norm(g, w, x, "output_norm")
        matrix = w.optional("output.weight", self.n_vocab, self.n_embd)
        if matrix is None:
            matrix = w("token_embd.weight", self.n_vocab, self.n_embd)
        return g.op("MUL_MAT", matrix, x, name="logits")

    def _norm(self, g: "Graph", w: "Weights", x: "Tensor", name: str) -> "Tensor":
        return g.op("RMS_NORM", x, w(f"{name}.weight", self.n_embd), eps=self.rms_eps, name=name)

    def _attention(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        table = g.input("rope", (self.rope.n_rot,))
        parts = {}
        for part, n in {"q": self.n_head, "k": self.n_head_kv, "v": self.n_head_kv}.items():
            y = w.linear(f"{p}.attn_{part}", n * self.head_dim, x)
            parts[part] = g.op("RESHAPE", y, shape=(n, self.head_dim), name=f"{p}.{part}_heads")
        q = g.op("ROPE", parts["q"], table, kind="norm", name=f"{p}.q_rope")
        k = g.op("ROPE", parts["k"], table, kind="norm", name=f"{p}.k_rope")
        cache = g.cache(f"{p}.cache", self.n_head_kv, self.head_dim)
        y = g.op("ATTENTION", q, k, parts["v"], cache, scale=self.head_dim**-0.5, name=f"{p}.attn")
        y = g.op("RESHAPE", y, shape=(self.n_head * self.head_dim,), name=f"{p}.attn_rows")
        return w.linear(f"{p}.attn_output", self.n_embd, y)

    def _ffn(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        gate, up = w.linear(f"{p}.ffn_gate", self.n_ff, x), w.linear(f"{p}.ffn_up", self.n_ff, x)
        return w.linear(f"{p}.ffn_down", self.n_embd, g.op("SWIGLU", gate, up, name=f"{p}.ffn_act"))
