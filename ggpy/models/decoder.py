"""Decoders: layers of attention and a feed-forward part between norms, as nearly all language models have them.

What a file says is used as it is: sizes, windows, caps, scales, experts; biases, norms of queries and keys, sinks, fused
matrices where it has such tensors. What files don't say stands in a `Style`; `ggpy.models` has one for each architecture.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedError
from .hparams import Hparams, Options
from .moe import Experts
from .rope import Rope, read_rope, unscaled_rope, yarn_magnitude

if TYPE_CHECKING:
    from ..graph import Graph, Tensor
    from .weights import Weights

#: keys that would change what a decoder computes
_UNKNOWN = ("attention.max_alibi_bias", "attention.clamp_kqv", "rope.dimension_sections", "swiglu_clamp_exp")


@dataclass(frozen=True)
class Style:
    """What sets an architecture apart and its files don't say. Llama with the other kind of rotary embedding by default.

    Attributes
    ----------
    rope : {"neox", "norm", ""}
        Which values of a head are rotated together: i and i + n_rot / 2, or 2i and 2i + 1. "": none is, positions are
        learned and added to the embedding.
    layer_norm : bool
        Layer norm with biases where the file has them, instead of RMS norm.
    norm_before, norm_after : bool
        Whether attention's and the feed-forward part's inputs are normalized, and their results before they are added.
    ffn_norm : str
        The name of the norm before the feed-forward part; "" if it takes what attention takes.
    act : str
        The feed-forward part's activation, a key of `weights.ACTS`.
    parallel : bool, optional
        Whether attention and feed-forward part both take a layer's input; None: the file says.
    norm_rotated : bool
        Whether queries and keys are normalized after they are rotated.
    window, window_every : int
        The window of attention where the file has none; which layers go without: every so many, the last of them; 0: none.
    window_base : float, optional
        Layers with windows are rotated by an embedding of their own, without scaling, of this base where the file has
        none; 0 for that of the other layers.
    no_rope_every : int
        Every so many layers, the last of them, aren't rotated.
    no_rope_unless_window : bool
        In models with windows, layers without aren't rotated.
    embd_root : bool
        Whether the embedding is multiplied by the square root of its length.
    divide_logits : bool
        Whether logits are divided by the file's factor for them, not multiplied.
    normalize : bool
        Whether the weights of a token's experts sum to 1, where the file doesn't say.
    gating : {"softmax", "sigmoid"}
        How routers turn logits into weights, where the file doesn't say.
    shared_scale_at : int
        In models of so many layers scores are scaled as if heads shared the embedding evenly, where the file doesn't say.
    whole_yarn : bool
        Whether the parts of YaRN's frequencies begin and end at whole dimensions.
    mixed : bool
        Whether layers may have no heads of keys, or no feed-forward part: they have something else.
    causal : bool
        Whether tokens see only those before them, where the file doesn't say.
    norm_weights : bool
        Whether norms have weights.
    clamps : bool
        Whether files may bound the values of queries, keys and values.
    sections : bool
        Whether rotary embeddings may have sections: text has the same position in all.
    """

    rope: str = "neox"
    layer_norm: bool = False
    norm_before: bool = True
    norm_after: bool = False
    ffn_norm: str = "ffn_norm"
    act: str = "swiglu"
    parallel: bool | None = False
    norm_rotated: bool = False
    window: int = 0
    window_every: int = 0
    window_base: float | None = None
    no_rope_every: int = 0
    no_rope_unless_window: bool = False
    embd_root: bool = False
    divide_logits: bool = False
    normalize: bool = False
    gating: str = "softmax"
    shared_scale_at: int = 0
    whole_yarn: bool = True
    mixed: bool = False
    sections: bool = False
    causal: bool = True
    norm_weights: bool = True
    clamps: bool = False

    def read(self, hp: Hparams, options: Options) -> "Decoder":
        """The decoder of a file.

        Raises
        ------
        GGUFError
            A key is missing, or its value makes no sense.
        UnsupportedError
            A key asks for something that decoders here don't have.
        """
        for key in _UNKNOWN:
            value = hp.file.metadata.get(f"{hp.arch}.{key}")
            known = (self.sections and key.endswith("_sections")) or (self.clamps and key.endswith("clamp_kqv"))
            if value is not None and np.any(np.asarray(value)) and not known:
                raise UnsupportedError(f"{hp.file.path}: key {hp.arch}.{key}: not supported")
        n_layer, n_embd = hp.n_layer(), hp.size("embedding_length")
        n_head, least = hp.sizes("attention.head_count", n_layer), 0 if self.mixed else 1
        n_head_kv = hp.sizes("attention.head_count_kv", n_layer, n_head[0], least)
        for n, n_kv in zip(n_head, n_head_kv, strict=True):
            if n_kv and n % n_kv:
                raise hp.error(f"{n} heads can't share {n_kv} heads of keys and values")
        head_dim = hp.size("attention.key_length", n_embd // n_head[0])
        if hp.size("attention.value_length", head_dim) != head_dim:
            raise hp.error(f"keys and values of different lengths in architecture {hp.arch}")
        n_rot = hp.size("rope.dimension_count", head_dim)
        if n_rot > head_dim or n_rot % 2:
            raise hp.error(f"key {hp.arch}.rope.dimension_count: {n_rot} of {head_dim} values")
        windows = self._windows(hp, n_layer)
        ropes, rope_of = self._ropes(hp, options, n_rot, windows)
        # Models of experts alone may leave it out.
        n_ff = hp.sizes("feed_forward_length", n_layer, hp.count("expert_feed_forward_length") or None, least)
        how = {"normalize": self.normalize, "gating": self.gating, "act": self.act}
        experts = Experts.read(hp, n_ff[0], options.n_expert_used, **how)  # type: ignore[arg-type]
        length = n_embd / n_head[0] if n_layer == self.shared_scale_at else head_dim
        logit_scale = hp.number("logit_scale", 0.0) or 1.0
        norm = "layer_norm_epsilon" if self.layer_norm else "layer_norm_rms_epsilon"
        return Decoder(
            style=self,
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=n_ff,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_vocab=hp.n_vocab(),
            n_ctx_train=hp.size("context_length"),
            eps=hp.number(f"attention.{norm}"),
            ropes=ropes,
            rope_of=rope_of,
            windows=windows,
            causal=hp.flag("attention.causal", self.causal),
            scale=hp.number("attention.scale", 0.0) or length**-0.5,
            cap=hp.number("attn_logit_softcapping", 0.0),
            clamp=hp.number("attention.clamp_kqv", 0.0),
            logit_cap=hp.number("final_logit_softcapping", 0.0),
            embd_scale=n_embd**0.5 if self.embd_root else hp.number("embedding_scale", 1.0),
            residual_scale=hp.number("residual_scale", 1.0),
            logit_scale=1 / logit_scale if self.divide_logits else logit_scale,
            parallel=hp.flag("use_parallel_residual", True) if self.parallel is None else self.parallel,
            experts=experts,
            n_dense=hp.count("leading_dense_block_count"),
            experts_every=hp.size("interleave_moe_layer_step", 1),
        )

    def _windows(self, hp: Hparams, n_layer: int) -> tuple[int, ...]:
        """The window of each layer, 0 for none."""
        window = hp.count("attention.sliding_window", self.window)
        pattern = hp.file.metadata.get(f"{hp.arch}.attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray):
            if len(pattern) < n_layer:
                raise hp.error(f"key {hp.arch}.attention.sliding_window_pattern: {len(pattern)} of {n_layer} layers")
            has = [bool(x) for x in pattern[:n_layer]]
        else:
            every = hp.count("attention.sliding_window_pattern", self.window_every)
            has = [not every or i % every < every - 1 for i in range(n_layer)]
        return tuple(window if x else 0 for x in has)

    def _ropes(
        self, hp: Hparams, options: Options, n_rot: int, windows: tuple[int, ...]
    ) -> tuple[dict[str, Rope], tuple[str, ...]]:
        """The rotary embeddings by their inputs' names, and each layer's; "" for none."""
        if not self.rope:
            return {}, ("",) * len(windows)
        rope = read_rope(hp, n_rot, options.n_ctx and min(options.n_ctx, hp.size("context_length")), self.whole_yarn)
        multiplier = hp.number("rope.scaling.yarn_log_multiplier", 0.0)
        if multiplier:  # YaRN's magnitude over that with this factor of its logarithm
            factor = hp.positive("rope.scaling.factor")
            rope = replace(rope, magnitude=rope.magnitude / yarn_magnitude(factor, multiplier))
        ropes = {"rope": rope}
        if self.window_base is not None and any(windows):
            ropes["rope_window"] = unscaled_rope(hp, n_rot, self.window_base)
        temperature = hp.number("attention.temperature_scale", 0.0)
        if temperature:
            ropes["rope_q"] = replace(rope, temperature=(temperature, hp.size("rope.scaling.original_context_length")))

        rotated = hp.file.metadata.get(f"{hp.arch}.attention.rope_pattern")
        if rotated is not None and (not isinstance(rotated, np.ndarray) or len(rotated) < len(windows)):
            raise hp.error(f"key {hp.arch}.attention.rope_pattern: no array with a value for each layer")

        def of(i: int) -> str:
            if rotated is not None and not rotated[i]:
                return ""
            if self.no_rope_every and (i + 1) % self.no_rope_every == 0:
                return ""
            if self.no_rope_unless_window and any(windows) and not windows[i]:
                return ""
            return "rope_window" if windows[i] and "rope_window" in ropes else "rope"

        return ropes, tuple(of(i) for i in range(len(windows)))


@dataclass(frozen=True)
class Decoder:
    """The hyperparameters, and how they make a graph. Names are GGUF's; tuples have a value for each layer.

    Attributes
    ----------
    ropes : dict of str to Rope
        Rotary embeddings by their inputs' names.
    rope_of : tuple of str
        Which of them; "" for none.
    windows : tuple of int
        See `ATTENTION`; 0 for none.
    """

    style: Style
    n_layer: int
    n_embd: int
    n_ff: tuple[int, ...]
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    eps: float
    ropes: dict[str, Rope]
    rope_of: tuple[str, ...]
    windows: tuple[int, ...]
    causal: bool
    scale: float
    cap: float
    clamp: float
    logit_cap: float
    embd_scale: float
    residual_scale: float
    logit_scale: float
    parallel: bool
    experts: Experts | None
    n_dense: int
    experts_every: int

    def embed(self, g: "Graph", w: "Weights", ids: "Tensor") -> "Tensor":
        """Token ids (n_tokens,) to (n_tokens, n_embd)."""
        x = g.op("GET_ROWS", w("token_embd.weight", self.n_vocab, self.n_embd), ids, name="embd")
        if not self.style.rope:
            table = w("position_embd.weight", self.n_ctx_train, self.n_embd)
            places = g.op("GET_ROWS", table, g.input("positions", (), "I32"), name="embd_positions")
            x = g.op("ADD", x, places, name="embd_placed")
        return self._scaled(g, x, self.embd_scale)

    def layer(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i: (n_tokens, n_embd) to the same."""
        p, style = f"blk.{i}", self.style
        taken = self._norm(w, f"{p}.attn_norm", x) if style.norm_before else x
        own = f"{p}.attn_norm_2"  # attention's, beside that of the feed-forward part
        y = self.attention(g, w, self._norm(w, own, x) if w.has(f"{own}.weight") else taken, i)
        if style.norm_after:
            y = self._norm(w, f"{p}.post_attention_norm", y)
        total = g.op("ADD", x, self._scaled(g, y, self.residual_scale), name=f"{p}.attn_residual")
        if style.norm_before and style.ffn_norm:
            taken = self._norm(w, f"{p}.{style.ffn_norm}", x if self.parallel else total)
        elif not style.norm_before:
            taken = total
        y = self.feed_forward(g, w, taken, i)
        if style.norm_after:
            y = self._norm(w, f"{p}.post_ffw_norm", y)
        return g.op("ADD", total, self._scaled(g, y, self.residual_scale), name=f"{p}.out")

    def norm(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """The last layer's (n_tokens, n_embd) normalized: what logits are made of, and embeddings."""
        return self._norm(w, "output_norm", x)

    def logits(self, g: "Graph", w: "Weights", x: "Tensor") -> "Tensor":
        """(n_tokens, n_embd), normalized, to logits (n_tokens, n_vocab)."""
        steps = []
        if self.logit_scale != 1.0:
            steps.append(("SCALE", {"factor": self.logit_scale}))
        if self.logit_cap:
            steps.append(("SOFT_CAP", {"cap": self.logit_cap}))
        names = [*(f"logits_{i}" for i in range(len(steps))), "logits"]
        y = w.logits(x, self.n_vocab, names[0])
        for (op, attrs), name in zip(steps, names[1:], strict=True):
            y = g.op(op, y, name=name, **attrs)
        return y

    def attention(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's attention: (n_tokens, n_embd), normalized, to the same."""
        p, head_dim, n_head, n_head_kv = f"blk.{i}", self.head_dim, self.n_head[i], self.n_head_kv[i]
        first, heads = 0, []
        for part, n in (("q", n_head), ("k", n_head_kv), ("v", n_head_kv)):
            fused = None
            if w.has(f"{p}.attn_qkv.weight"):
                fused = (f"{p}.attn_qkv", first * head_dim, (n_head + 2 * n_head_kv) * head_dim)
            y = w.linear(f"{p}.attn_{part}", n * head_dim, x, fused)
            heads.append(self._heads(g, w, y, f"{p}.attn_{part}", n, i))
            first += n
        q, k, v = heads
        cache = g.cache(f"{p}.cache", n_head_kv, head_dim, head_dim)
        sinks = w.optional(f"{p}.attn_sinks.weight", n_head)
        how = {"scale": self.scale, "window": self.windows[i], "cap": self.cap, "causal": self.causal}
        y = g.op("ATTENTION", q, k, v, cache, *([] if sinks is None else [sinks]), name=f"{p}.attn", **how)
        y = g.op("RESHAPE", y, shape=(n_head * head_dim,), name=f"{p}.attn_rows")
        if w.has(f"{p}.attn_gate.weight"):
            y = g.op("GATED", y, w.linear(f"{p}.attn_gate", n_head * head_dim, x), name=f"{p}.attn_gated")
        return w.linear(f"{p}.attn_output", self.n_embd, y)

    def feed_forward(self, g: "Graph", w: "Weights", x: "Tensor", i: int) -> "Tensor":
        """Layer i's feed-forward part, normalized (n_tokens, n_embd) to the same."""
        if self.experts is None or i < self.n_dense or (i + 1) % self.experts_every:
            return w.feed_forward(f"blk.{i}", self.n_ff[i], x, self.style.act)
        return self.experts.build(g, w, x, f"blk.{i}")

    def _heads(self, g: "Graph", w: "Weights", y: "Tensor", name: str, n: int, i: int) -> "Tensor":
        """Queries, keys or values (n_tokens, n, head_dim), normalized where the file has weights for that, all heads
        together or one by one, bounded and rotated."""
        part, p = name[-1], name.rpartition(".")[0]
        norm = w.stored_shape(f"{name}_norm.weight")
        if norm == (n * self.head_dim,) and (n > 1 or not self.style.norm_rotated):
            y = self._norm(w, f"{name}_norm", y)
            norm = None
        if self.clamp > 0:
            y = g.op("CLAMP", y, limit=self.clamp, name=f"{name}.clamped")
        y = g.op("RESHAPE", y, shape=(n, self.head_dim), name=f"{name}.heads")
        if norm == (n, self.head_dim):
            y = self._norm_of_each(g, w, f"{name}_norm", y)
            norm = None
        if norm is not None and not self.style.norm_rotated:
            y = self._norm(w, f"{name}_norm", y)
        rope = self.rope_of[i]
        if rope and part != "v":
            rope = "rope_q" if part == "q" and "rope_q" in self.ropes else rope
            table = g.input(rope, (self.ropes[rope].n_rot,))
            y = g.op("ROPE", y, table, kind=self.style.rope, name=f"{p}.{part}_rope")
        if norm is not None and self.style.norm_rotated:
            y = self._norm(w, f"{name}_norm", y)
        return y

    def _norm_of_each(self, g: "Graph", w: "Weights", name: str, x: "Tensor") -> "Tensor":
        """Heads (n_tokens, n, head_dim), each normalized with weights of its own."""
        n = x.shape[1] * self.head_dim
        y = g.op("LAYER_NORM" if self.style.layer_norm else "RMS_NORM", x, eps=self.eps, name=f"{name}.plain")
        y = g.op("RESHAPE", y, shape=(n,), name=f"{name}.rows")
        y = g.op("MUL_ROW", y, w.values(f"{name}.weight", n), name=name)
        return g.op("RESHAPE", y, shape=x.shape[1:], name=f"{name}.heads")

    def _norm(self, w: "Weights", name: str, x: "Tensor") -> "Tensor":
        if not self.style.norm_weights:
            return w.plain_layer_norm(name, x, self.eps)
        return (w.layer_norm if self.style.layer_norm else w.norm)(name, x, self.eps)

    def _scaled(self, g: "Graph", x: "Tensor", factor: float) -> "Tensor":
        return x if factor == 1.0 else g.op("SCALE", x, factor=factor, name=f"{x.name}.scaled")
