"""What a converter must know of a family of checkpoints, and what most families share.

A new family is one file beside `converters.llama`, and a row in `converters.conversion.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Config, Rows

Shapes = dict[str, tuple[int, ...]]

ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


def _as_they_are(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    return dict(tensors)


def _unchanged(name: str, rows: Rows, config: Config) -> Rows:
    return rows


def _nothing(config: Config) -> dict[str, np.ndarray]:
    return {}


@dataclass(frozen=True)
class Family:
    """How checkpoints of one family become GGUF models.

    Attributes
    ----------
    checkpoints : tuple of str
        The names in config.json's ``architectures`` that belong to it.
    arch : gguf.MODEL_ARCH
        GGUF's name for it, which also selects the table of tensor names.
    write_hparams : callable
        ``write_hparams(writer, config)`` adds the ``{arch}.*`` metadata.
    shapes : callable
        ``shapes(config)`` lists the model's tensors: NumPy shapes by GGUF name. The checkpoint must hold just these.
    gather : callable
        ``gather(tensors, config)`` joins, splits, renames or drops the checkpoint's tensors where GGUF's differ in more
        than a name; what it returns has names that gguf's table knows.
    transform : callable
        ``transform(name, rows, config)`` gives the rows to write as GGUF tensor `name` for the checkpoint's `rows`.
    computed : callable
        ``computed(config)`` gives the tensors that the checkpoint doesn't hold: float32 arrays by GGUF name.
    """

    checkpoints: tuple[str, ...]
    arch: gguf.MODEL_ARCH
    write_hparams: Callable[[gguf.GGUFWriter, Config], None]
    shapes: Callable[[Config], Shapes]
    gather: Callable[[Mapping[str, Rows], Config], dict[str, Rows]] = _as_they_are
    transform: Callable[[str, Rows, Config], Rows] = _unchanged
    computed: Callable[[Config], dict[str, np.ndarray]] = _nothing


def head_dim(config: Config) -> int:
    """Length of a head's query and key; where config.json has none, the embedding shared evenly by the heads."""
    if config.get("head_dim") is not None:
        return config.integer("head_dim")
    n_embd, n_head = config.integer("hidden_size"), config.integer("num_attention_heads")
    if n_embd % n_head:
        raise ConversionError(f"{config.path}: hidden_size {n_embd} can't be shared by {n_head} heads")
    return n_embd // n_head


def model_shapes(config: Config, block: Callable[[int], Shapes]) -> Shapes:
    """The tensors of a decoder; ``block(i)`` gives those of its layer i, without the prefix."""
    n_embd, n_vocab = config.integer("hidden_size"), config.integer("vocab_size")
    tensors: Shapes = {"token_embd.weight": (n_vocab, n_embd)}
    for i in range(config.integer("num_hidden_layers")):
        tensors |= {f"blk.{i}.{name}": shape for name, shape in block(i).items()}
    tensors["output_norm.weight"] = (n_embd,)
    if not config.get("tie_word_embeddings", False):
        tensors["output.weight"] = (n_vocab, n_embd)
    return tensors


def attention_shapes(config: Config) -> Shapes:
    """Norms and matrices of attention with grouped heads; the feed-forward part's norm too."""
    n_embd, n_head = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_q = n_head * head_dim(config)
    n_kv = config.integer("num_key_value_heads", n_head) * head_dim(config)
    return {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_q, n_embd),
        "attn_k.weight": (n_kv, n_embd),
        "attn_v.weight": (n_kv, n_embd),
        "attn_output.weight": (n_embd, n_q),
        "ffn_norm.weight": (n_embd,),
    }


def biases(block: Shapes, *names: str) -> Shapes:
    """Biases of some of a layer's matrices."""
    return {f"{name}.bias": block[f"{name}.weight"][:1] for name in names}


def ffn_shapes(n_embd: int, n_ff: int, kind: str = "") -> Shapes:
    """The matrices of a feed-forward part; `kind` is GGUF's suffix, such as ``_shexp``."""
    return {
        f"ffn_gate{kind}.weight": (n_ff, n_embd),
        f"ffn_up{kind}.weight": (n_ff, n_embd),
        f"ffn_down{kind}.weight": (n_embd, n_ff),
    }


def rope_parameters(config: Config) -> Config:
    """``rope_parameters``, formerly ``rope_scaling``, with ``rope_type`` and ``rope_theta`` always there."""
    values = config.get("rope_parameters", config.get("rope_scaling", {}))
    if not isinstance(values, dict):
        raise ConversionError(f"{config.path}: rope_parameters is not an object")
    rope = Config(
        {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": values.get("type", "default")}, config.path
    )
    rope.values |= {key: value for key, value in values.items() if value is not None}
    if rope.get("rope_type") not in ROPE_SCALINGS:
        raise UnsupportedError(f"{config.path}: rope type {rope.get('rope_type')!r}; known: {', '.join(ROPE_SCALINGS)}")
    return rope


def write_decoder_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    """Add the metadata that nearly all decoders have, named as in config.json for most of them."""
    config.only("hidden_act", "silu")
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    n_head = config.integer("num_attention_heads")
    writer.add_head_count(n_head)
    writer.add_head_count_kv(config.integer("num_key_value_heads", n_head))
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6))
    if config.get("head_dim") is not None:
        writer.add_key_length(config.integer("head_dim"))
        writer.add_value_length(config.integer("head_dim"))
    writer.add_vocab_size(config.integer("vocab_size"))

    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope.number("rope_theta"))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor"))
    elif rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.number("factor"))
        n_ctx = config.integer("max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(rope.integer("original_max_position_embeddings", n_ctx))
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope.number(key))


def llama3_rope_factors(config: Config) -> np.ndarray:
    """Divisors of rope's frequencies in Llama 3.1's scaling, which GGUF keeps as the tensor ``rope_freqs.weight``.

    Frequencies whose wavelength is short against the original context stay (1), long ones are divided by ``factor``,
    and those between are blended (Llama 3.1's reference code, ``apply_scaling``).

    Returns
    -------
    numpy.ndarray
        float32, (head_dim / 2,)
    """
    rope = rope_parameters(config)
    n = head_dim(config)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    factor, n_ctx = rope.number("factor", 8.0), rope.integer("original_max_position_embeddings", 8192)
    if not 0 < low < high or factor <= 0:
        raise ConversionError(f"{config.path}: rope needs 0 < low_freq_factor < high_freq_factor and factor > 0")
    wavelength = 2 * np.pi * rope.number("rope_theta") ** (np.arange(0, n, 2) / n)
    smooth = np.clip((n_ctx / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
