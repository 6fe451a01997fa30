"""Llama 1, 2, 3 (Touvron et al. 2023) and their like: RMS norm, rotary embedding, grouped heads, SwiGLU.

Mistral and SmolLM2 differ in sizes alone. Mixtral has experts. Qwen 2 and 3 and OLMoE have the other kind of rotary
embedding, biases or norms on queries and keys: what the file holds is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GGUFError
from .moe import Experts
from .rope import Rope, read_rope

if TYPE_CHECKING:
    from ..file import GGUFFile
    from ..graph import Graph, Tensor
    from .weights import Weights


#: architectures whose experts' weights sum to 1
_NORMALIZED = ("llama", "qwen3moe")


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
    rope_kind: str
    experts: Experts | None

    @classmethod
    def read(cls, file: "GGUFFile", n_expert_used: int | None = None) -> "Llama":
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
        # Models of experts alone may leave it out.
        n_ff = size("feed_forward_length", file.get(f"{arch}.expert_feed_forward_length", int, default=None))
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise GGUFError(f"{file.path}: tensor token_embd.weight is missing or no matrix")
        return cls(
            n_layer=size("block_count"),
            n_embd=n_embd,
            n_ff=n_ff,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_vocab=embedding.shape[0],
            n_ctx_train=size("context_length"),
            rms_eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
            rope=read_rope(file, arch, n_rot),
            rope_kind="norm" if arch == "llama" else "neox",
            experts=Experts.read(file, arch, n_ff, arch in _NORMALIZED, n_expert_used),
        )

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd)."""
        return g.op("GET_ROWS", w("token_embd.weight", self.n_vocab, self.n_embd), ids, name="embd")

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        p = f"blk.{i}"
        y = self._attention(g, w, w.norm(f"{p}.attn_norm", x, self.rms_eps), p)
        x = g.op("ADD", x, y, name=f"{p}.attn_residual")
        y = w.norm(f"{p}.ffn_norm", x, self.rms_eps)
        y = w.swiglu(p, self.n_ff, y) if self.experts is None else self.experts.build(g, w, y, p)
        return g.op("ADD", x, y, name=f"{p}.out")

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """The last layer's (n_tokens, n_embd) normalized: what logits are made of, and embeddings."""
        return w.norm("output_norm", x, self.rms_eps)

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """(n_tokens, n_embd), normalized, to logits (n_tokens, n_vocab)."""
        return w.logits(x, self.n_vocab)

    def _attention(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        table = g.input("rope", (self.rope.n_rot,))
        q, k, v = (
            self._heads(g, w, x, f"{p}.attn_{part}", n)
            for part, n in (("q", self.n_head), ("k", self.n_head_kv), ("v", self.n_head_kv))
        )
        q = g.op("ROPE", q, table, kind=self.rope_kind, name=f"{p}.q_rope")
        k = g.op("ROPE", k, table, kind=self.rope_kind, name=f"{p}.k_rope")
        cache = g.cache(f"{p}.cache", self.n_head_kv, self.head_dim, self.head_dim)
        y = g.op("ATTENTION", q, k, v, cache, scale=self.head_dim**-0.5, name=f"{p}.attn")
        y = g.op("RESHAPE", y, shape=(self.n_head * self.head_dim,), name=f"{p}.attn_rows")
        return w.linear(f"{p}.attn_output", self.n_embd, y)

    def _heads(self, g: "Graph", w: "Weights", x: "Tensor", name: str, n_head: int) -> "Tensor":
        """Queries, keys or values (n_tokens, n_head, head_dim), normalized where the file has weights for that: all heads
        together, or one by one."""
        y = w.linear(name, n_head * self.head_dim, x)
        norm = w.stored_shape(f"{name}_norm.weight")
        if norm == (n_head * self.head_dim,):
            y = w.norm(f"{name}_norm", y, self.rms_eps)
        y = g.op("RESHAPE", y, shape=(n_head, self.head_dim), name=f"{name}.heads")
        if norm is not None and norm != (n_head * self.head_dim,):
            y = w.norm(f"{name}_norm", y, self.rms_eps)
        return y
