"""DeepSeek-V2 and V3 (DeepSeek-AI 2024), GLM-4.7-Flash: latent attention (MLA) and a mixture of experts with shared ones.

Keys and values of a token are one latent vector and one rotated key, shared by all heads. In the *absorbed* form queries
are brought into the latent space (by attn_k_b, head by head) and attend there; what comes out is brought back (by
attn_v_b). The cache holds n_latent + n_rot values a token. In the *naive* form keys and values are expanded to full heads
first, and cached so: 9 times as much in V2-Lite's case, but fewer operations for long prompts.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedError
from ..quant import block_type
from .hparams import Hparams, Options
from .moe import Experts
from .rope import Rope, read_rope, yarn_magnitude
from .weights import DerivedWeight

if TYPE_CHECKING:
    from ..file import GGUFFile, GGUFTensor
    from ..graph import Graph, Tensor
    from .weights import Weights


@dataclass(frozen=True)
class DeepSeek2:
    """The hyperparameters, and how they make a graph."""

    file: "GGUFFile"
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_q_lora: int
    n_latent: int
    n_nope: int
    head_dim_v: int
    n_vocab: int
    n_ctx_train: int
    n_dense: int
    rms_eps: float
    scale: float
    experts: Experts
    rope: Rope
    mla: str = "absorbed"
    indexed: bool = False

    @classmethod
    def read_indexed(cls, hp: Hparams, options: Options) -> "DeepSeek2":
        """The same for DeepSeek-V3.2, where an indexer chooses the keys that a token attends to: all, in contexts no longer
        than their number.

        Raises
        ------
        UnsupportedError
            A longer context.
        """
        n = hp.size("attention.indexer.top_k")
        if options.n_ctx > n:
            raise UnsupportedError(
                f"{hp.file.path}: a context of {options.n_ctx}; beyond {n} tokens this model attends to chosen ones alone, "
                f"which isn't supported: n_ctx={n} is the most"
            )
        found = cls.read(hp, options)
        return replace(found, indexed=True, n_ctx_train=min(found.n_ctx_train, n))

    @classmethod
    def read(cls, hp: Hparams, options: Options) -> "DeepSeek2":
        """Reads them from a file's metadata. Raises GGUFError where a key is missing or makes no sense."""
        size = hp.size
        n_rot = size("rope.dimension_count")
        # Files with split attn_kv_b have the length of a latent key in key_length, and a head's in key_length_mla.
        head_dim_k = size("attention.key_length_mla", size("attention.key_length"))
        n_nope = head_dim_k - n_rot
        if n_nope <= 0 or n_rot % 2:
            raise hp.error(f"{n_rot} of {head_dim_k} values of a key are rotated")
        n_ff = size("feed_forward_length")
        # Early files of GLM-4.7-Flash don't say how its routers score; no other model has this vocabulary.
        gating = "sigmoid" if hp.n_vocab() == 154880 else "softmax"
        experts = Experts.read(hp, n_ff, options.n_expert_used, gating=gating)
        if experts is None:
            raise hp.error(f"key {hp.arch}.expert_count is missing")
        rope, scale = _read_scaling(hp, n_rot, head_dim_k)
        return cls(
            file=hp.file,
            n_layer=hp.n_layer(),
            n_embd=size("embedding_length"),
            n_ff=n_ff,
            n_head=size("attention.head_count"),
            n_q_lora=hp.count("attention.q_lora_rank"),
            n_latent=size("attention.kv_lora_rank"),
            n_nope=n_nope,
            head_dim_v=size("attention.value_length_mla", size("attention.value_length")),
            n_vocab=hp.n_vocab(),
            n_ctx_train=size("context_length"),
            n_dense=hp.count("leading_dense_block_count"),
            rms_eps=hp.number("attention.layer_norm_rms_epsilon"),
            scale=scale,
            experts=experts,
            rope=rope,
            mla=options.mla,
        )

    @property
    def ropes(self) -> dict[str, Rope]:
        """The rotary embedding, by its input's name."""
        return {"rope": self.rope}

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd)."""
        return g.op("GET_ROWS", w("token_embd.weight", self.n_vocab, self.n_embd), ids, name="embd")

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        p = f"blk.{i}"
        y = self._attention(g, w, w.norm(f"{p}.attn_norm", x, self.rms_eps), p)
        x = g.op("ADD", x, y, name=f"{p}.attn_residual")
        y = w.norm(f"{p}.ffn_norm", x, self.rms_eps)
        y = w.feed_forward(p, self.n_ff, y) if i < self.n_dense else self.experts.build(g, w, y, p)
        return g.op("ADD", x, y, name=f"{p}.out")

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """The last layer's (n_tokens, n_embd) normalized: what logits are made of, and embeddings."""
        return w.norm("output_norm", x, self.rms_eps)

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """(n_tokens, n_embd), normalized, to logits (n_tokens, n_vocab)."""
        return w.logits(x, self.n_vocab)

    def _attention(self, g: "Graph", w: "Weights", x: "Tensor", p: str) -> "Tensor":
        n_rot, n_latent, n_head = self.rope.n_rot, self.n_latent, self.n_head
        if self.indexed:
            w.leave_aside(f"{p}.indexer.")
        table = g.input("rope", (n_rot,))
        q = x
        if self.n_q_lora:
            q = w.norm(f"{p}.attn_q_a_norm", w.linear(f"{p}.attn_q_a", self.n_q_lora, x), self.rms_eps)
        head_dim = self.n_nope + n_rot
        q = w.linear(f"{p}.attn_q_b" if self.n_q_lora else f"{p}.attn_q", n_head * head_dim, q)
        q = g.op("RESHAPE", q, shape=(n_head, head_dim), name=f"{p}.q_heads")
        q_rot = g.op("ROPE", q, table, kind="norm", first=self.n_nope, name=f"{p}.q_rope")
        both = w.linear(f"{p}.attn_kv_a_mqa", n_latent + n_rot, x)
        latent = w.norm(f"{p}.attn_kv_a_norm", both, self.rms_eps, n_latent)
        one_head = g.op("RESHAPE", both, shape=(1, n_latent + n_rot), name=f"{p}.k_head")
        k_rot = g.op("ROPE", one_head, table, kind="norm", first=n_latent, name=f"{p}.k_rope")
        attend = {"absorbed": self._absorbed, "naive": self._naive}[self.mla]
        y = attend(g, w, p, q, q_rot, latent, k_rot)
        y = g.op("RESHAPE", y, shape=(n_head * self.head_dim_v,), name=f"{p}.attn_rows")
        return w.linear(f"{p}.attn_output", self.n_embd, y)

    def _absorbed(
        self, g: "Graph", w: "Weights", p: str, q: "Tensor", q_rot: "Tensor", latent: "Tensor", k_rot: "Tensor"
    ) -> "Tensor":
        """What the heads attend to (n_tokens, n_head, head_dim_v), by way of the latent space."""
        if self._is_split(p):
            to_latent = w(f"{p}.attn_k_b.weight", self.n_head, self.n_latent, self.n_nope)
            from_latent = self._values(w, p)
        else:
            keys, values = self._parts(w, p)
            to_latent = w.derived(f"{p}.attn_k_b", lambda: transposed(keys))
            from_latent = w.derived(f"{p}.attn_v_b", lambda: values)
        q = g.op("MUL_MAT_HEADS", to_latent, q, name=f"{p}.q_latent")
        cache = g.cache(f"{p}.cache", self.n_latent + self.rope.n_rot)
        y = g.op("ATTENTION_LATENT", q, q_rot, latent, k_rot, cache, scale=self.scale, name=f"{p}.attn")
        return g.op("MUL_MAT_HEADS", from_latent, y, name=f"{p}.attn_heads")

    def _naive(
        self, g: "Graph", w: "Weights", p: str, q: "Tensor", q_rot: "Tensor", latent: "Tensor", k_rot: "Tensor"
    ) -> "Tensor":
        """The same, by full keys and values of each head."""
        if self._is_split(p):
            w.check(f"{p}.attn_k_b.weight", self.n_head, self.n_latent, self.n_nope)
            to_keys = w.derived(f"{p}.attn_k_b", lambda: transposed(self.file.tensors[f"{p}.attn_k_b.weight"]))
            to_values = self._values(w, p)
        else:
            keys, values = self._parts(w, p)
            to_keys = w.derived(f"{p}.attn_k_b", lambda: keys)
            to_values = w.derived(f"{p}.attn_v_b", lambda: values)
        latent = g.op("RESHAPE", latent, shape=(1, self.n_latent), name=f"{p}.latent_head")
        k = g.op("MUL_MAT_HEADS", to_keys, latent, name=f"{p}.k_nope")
        k = g.op("JOIN_HEADS", k, k_rot, n=self.n_nope, name=f"{p}.k_joined")
        q = g.op("JOIN_HEADS", q, q_rot, n=self.n_nope, name=f"{p}.q_joined")
        v = g.op("MUL_MAT_HEADS", to_values, latent, name=f"{p}.v_heads")
        cache = g.cache(f"{p}.cache", self.n_head, self.n_nope + self.rope.n_rot, self.head_dim_v)
        return g.op("ATTENTION", q, k, v, cache, scale=self.scale, name=f"{p}.attn")

    def _is_split(self, p: str) -> bool:
        """Whether the file has attn_k_b and attn_v_b, as newer ones do, or both as attn_kv_b."""
        return f"{p}.attn_k_b.weight" in self.file.tensors

    def _values(self, w: "Weights", p: str) -> "Tensor":
        return w(f"{p}.attn_v_b.weight", self.n_head, self.head_dim_v, self.n_latent)

    def _parts(self, w: "Weights", p: str) -> tuple[DerivedWeight, DerivedWeight]:
        name = f"{p}.attn_kv_b.weight"
        w.check(name, self.n_head * (self.n_nope + self.head_dim_v), self.n_latent)
        return parts_of_kv_b(self.file.tensors[name], self.n_head, self.n_nope)


def parts_of_kv_b(stored: "GGUFTensor", n_head: int, n_nope: int) -> tuple[DerivedWeight, DerivedWeight]:
    """Views of the keys' part (n_head, n_nope, n_latent) and the values' part (n_head, head_dim_v, n_latent) of an
    attn_kv_b."""
    blocks = stored.data.reshape(n_head, -1, stored.data.shape[-1])
    n_latent = stored.shape[1]
    head_dim_v = blocks.shape[1] - n_nope
    keys = DerivedWeight(f"{stored.name}.keys", stored.type, (n_head, n_nope, n_latent), blocks[:, :n_nope])
    return keys, DerivedWeight(f"{stored.name}.values", stored.type, (n_head, head_dim_v, n_latent), blocks[:, n_nope:])


def transposed(weight: "GGUFTensor | DerivedWeight") -> DerivedWeight:
    """Each matrix of (n, n_rows, n_cols) transposed.

    Blocks don't allow that: it is made anew as Q8_0, sixteen times finer than the 4 bits it mostly comes from.
    """
    n, n_rows, n_cols = weight.shape
    kind = block_type("Q8_0" if n_rows % 32 == 0 and weight.type not in ("F32", "F16", "BF16") else "F32")
    values = np.ascontiguousarray(weight.dequantize().transpose(0, 2, 1))
    return DerivedWeight(f"{weight.name}.transposed", kind.name, (n, n_cols, n_rows), kind.quantize(values))


def _read_scaling(hp: Hparams, n_rot: int, head_dim: int) -> tuple[Rope, float]:
    """The rotary embedding, and the factor of the attention's logits.

    DeepSeek's YaRN has two magnitudes of the form 0.1 m ln(factor) + 1: cosines and sines get that for `mscale` over that
    for `mscale_all_dim`, which are equal in every released model, so that their ratio is 1; the logits get the square of
    the latter. Files hold 0.1 `mscale_all_dim` as yarn_log_multiplier.
    """
    rope, scale = read_rope(hp, n_rot), head_dim**-0.5
    if hp.text("rope.scaling.type", "none") != "yarn":
        return rope, scale
    factor = hp.number("rope.scaling.factor")
    log_multiplier = hp.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not log_multiplier:
        return rope, scale
    all_dims = log_multiplier * math.log(factor) + 1.0
    return replace(rope, magnitude=rope.magnitude / yarn_magnitude(factor)), scale * all_dims**2
