"""What a converter must know of a family of checkpoints, and what most families share.

A new family is one file beside `converters.llama`, and a row in `converters.conversion.FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import Checkpoint, Config, Rows, shown

Shapes = dict[str, tuple[int, ...]]
Gather = Callable[[Mapping[str, Rows], Config], dict[str, Rows]]

# Kinds of rope scaling, and their settings that are understood. Whatever else stands there is refused.
ROPE_SCALINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
        | {"attention_factor", "mscale", "mscale_all_dim", "truncate", "extrapolation_factor"}
    ),
    "proportional": frozenset(),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}
# Settings that only some families understand, and ask for.
ROPE_OF_SOME = (
    "longrope",
    "proportional",
    "full_attention",
    "partial_rotary_factor",
    "llama_4_scaling_beta",
    "max_position_embeddings",
)
# "finetuned" says how the model came to it.
ROPE_COMMON = frozenset({"rope_type", "type", "rope_theta", "finetuned"})

# Keys of config.json that change nothing in a forward pass of a decoder: where it comes from, what training and sampling
# did, ids of special tokens (which the tokenizer's files have), what programs keep there for themselves.
_HARMLESS_NAMES = (
    "_model_name_or_path compression_config max_sequence_length model_max_length tokenizer_model_max_length model_name "
    "tokenizer_padding_side use_flash_attn neftune_noise_alpha multiple_of description license author "
    "architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype auto_map "
    "custom_pipelines tokenizer_class processor_class finetuning_task task_specific_params problem_type id2label "
    "label2id num_labels transformers.js_config is_llama_config unsloth_fixed unsloth_version base_model_tp_plan "
    "base_model_pp_plan _attn_implementation _attn_implementation_autoset attn_implementation "
    "_experts_implementation _flash_attn_2_enabled _commit_hash _rope_scaling_validation use_cache "
    "cache_implementation output_attentions output_hidden_states return_dict use_return_dict torchscript "
    "use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing keys_to_ignore_at_inference "
    "initializer_range initializer_factor attention_dropout attn_dropout attn_pdrop hidden_dropout "
    "hidden_dropout_prob resid_pdrop resid_dropout residual_dropout embd_pdrop embedding_dropout dropout "
    "summary_first_dropout "
    "classifier_dropout attention_probs_dropout_prob router_aux_loss_coef router_jitter_noise router_z_loss_coef "
    "output_router_logits aux_loss_alpha seq_aux ep_size pretraining_tp num_nextn_predict_layers use_mtp "
    "mtp_loss_scaling_factor bos_token_id eos_token_id eod_token_id pad_token_id sep_token_id unk_token_id cls_token_id "
    "mask_token_id decoder_start_token_id max_length max_new_tokens min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix quantization_config "
)
HARMLESS = frozenset(_HARMLESS_NAMES.split())
# Keys that change nothing at this value.
NEUTRAL: dict[str, Any] = {
    "partial_rotary_factor": 1,
    "rotary_pct": 1,
    "is_decoder": True,
    "use_qk_norm": True,  # Qwen 3 without it would lack the norms' tensors
    "shared_expert_intermediate_size": 0,
}


def as_they_are(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    return dict(tensors)


def _unchanged(name: str, rows: Rows, config: Config) -> Rows:
    return rows


def _nothing(config: Config) -> dict[str, np.ndarray]:
    return {}


def _itself(checkpoint: Checkpoint, family: Family) -> Family:
    return family


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
    usual : callable
        ``usual(config)`` gives values under the names that the functions above ask for, where config.json has others.
    defaults : mapping
        What transformers takes for keys that config.json lacks, where that isn't what the functions above take: values by
        key, for each of `checkpoints` that has such.
    arch_name : str
        GGUF's name for it where gguf's table lacks it; `arch` is then one with the same names of tensors.
    arch_of : callable, optional
        ``arch_of(config)`` gives `arch` where config.json decides.
    special : callable
        ``special(checkpoint, family)`` gives the family of checkpoints that differ by more than config.json's architecture.
    """

    checkpoints: tuple[str, ...]
    arch: gguf.MODEL_ARCH
    write_hparams: Callable[[gguf.GGUFWriter, Config], None]
    shapes: Callable[[Config], Shapes]
    gather: Gather = as_they_are
    transform: Callable[[str, Rows, Config], Rows] = _unchanged
    computed: Callable[[Config], dict[str, np.ndarray]] = _nothing
    usual: Callable[[Config], dict[str, Any]] = _nothing
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arch_name: str = ""
    arch_of: Callable[[Config], gguf.MODEL_ARCH] | None = None
    special: Callable[[Checkpoint, Family], Family] = _itself

    @property
    def name(self) -> str:
        """`general.architecture`."""
        return self.arch_name or gguf.MODEL_ARCH_NAMES[self.arch]


def refuse_unread(config: Config) -> None:
    """Refuse keys of config.json that nobody has asked for, once the file's metadata and tensors are planned: what they
    say would be missing in the file. Null, false and what is empty say nothing.

    Raises
    ------
    UnsupportedError
        There is such a key.
    """
    for key, value in config.values.items():
        if key in config.asked or key in HARMLESS or value in (None, False, "", [], {}):
            continue
        if key not in NEUTRAL or value != NEUTRAL[key]:
            raise UnsupportedError(
                f"{config.path}: {key} {shown(value)} isn't understood; if it changes nothing, take it out"
            )


def text_part(config: Config) -> dict[str, Any]:
    """The language model's settings where a checkpoint also sees or hears: what it has as ``text_config``.

    What stands beside that is about the rest, or repeats it.
    """
    values = config.get("text_config")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConversionError(f"{config.path}: text_config is not an object")
    tied = bool(values.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    config.asked.update(key for key in config.values if key not in values)
    return values | {"architectures": config.get("architectures"), "tie_word_embeddings": tied}


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


def refuse_windows(config: Config) -> None:
    """Refuse layers that attend to a window smaller than the context: nothing that runs the file would heed it.

    Transformers' rules: where an architecture has `use_sliding_window`, that must be true and `layer_types` may say which
    layers; for others `sliding_window` alone decides.

    Raises
    ------
    UnsupportedError
        There is a window.
    """
    used, kinds = config.get("use_sliding_window"), config.get("layer_types")
    window, _ = config.get("sliding_window"), config.get("max_window_layers")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise UnsupportedError(f"{config.path}: layer_types {shown(kinds)}; known: full_attention in all layers")
    if not window or ("use_sliding_window" in config.defaults and (not used or kinds is not None)):
        return
    n_ctx = config.integer("max_position_embeddings")
    if config.integer("sliding_window") < n_ctx:
        missing = "" if "sliding_window" in config.values else "missing, which means "
        raise UnsupportedError(
            f"{config.path}: sliding_window {missing}{window} of {n_ctx} positions; windows aren't supported here"
        )


def write_clip(writer: gguf.GGUFWriter, config: Config) -> None:
    """Add the bound of queries, keys and values, if there is one."""
    if config.get("clip_qkv") is not None:
        writer.add_clamp_kqv(config.number("clip_qkv", least=1e-30))


def write_windows(writer: gguf.GGUFWriter, config: Config, rule: str) -> None:
    """Add the window of attention, and which layers have it unless all do.

    Parameters
    ----------
    writer, config
    rule : str
        "all": every layer has it. "types N": those that ``layer_types`` names, or all but every N-th. "": none may have it.

    Raises
    ------
    UnsupportedError
        Layers of another kind, or a window where none is understood.
    """
    if not rule:
        refuse_windows(config)
        return
    n_layer = config.integer("num_hidden_layers")
    has = [True] * n_layer
    if rule != "all":
        every = int(rule.split()[1])
        default = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n_layer)]
        kinds = config.words("layer_types", ("full_attention", "sliding_attention"), n_layer, default)
        for key in ("sliding_window_pattern", "_sliding_window_pattern"):  # what layer_types is made of
            config.get(key)
        has = [kind == "sliding_attention" for kind in kinds]
    elif config.get("sliding_window") is None:
        return
    # Also where it is longer than the context: layers with it may be rotated in another way, or alone.
    if any(has) and (rule != "all" or config.integer("sliding_window") < config.integer("max_position_embeddings")):
        writer.add_sliding_window(config.integer("sliding_window"))
        if rule != "all":
            writer.add_sliding_window_pattern(has)


def rope_parameters(config: Config, *also: str) -> Config:
    """``rope_parameters``, formerly ``rope_scaling``, with ``rope_type`` and ``rope_theta`` always there.

    Parameters
    ----------
    config : Config
    *also : str
        Settings that the caller reads, beyond those of `ROPE_SCALINGS`. With "full_attention", parameters may be there for
        each kind of layer; those of layers without windows are taken. The names of some kinds allow for these.

    Raises
    ------
    UnsupportedError
        A kind or a setting that isn't understood.
    """
    old, values = config.part("rope_scaling"), config.part("rope_parameters")
    if old and values and old != values:
        raise UnsupportedError(f"{config.path}: rope_scaling and rope_parameters differ")
    values = old or values
    if "full_attention" in also and "full_attention" in values:
        values = rope_of_kind(config, "full_attention").values
    rope = Config(
        {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": values.get("type", "default")}, config.path
    )
    rope.values |= {key: value for key, value in values.items() if value is not None}
    kind = rope.choice("rope_type", [k for k in ROPE_SCALINGS if k not in ROPE_OF_SOME or k in also], "default")
    for key, value in values.items():
        if key in ROPE_COMMON or key in ROPE_SCALINGS[kind] or key in also or value in (None, False):
            continue
        if key not in NEUTRAL or value != NEUTRAL[key]:
            raise UnsupportedError(f"{config.path}: rope's {key} {shown(value)} isn't understood for rope type {kind!r}")
    return rope


def require_rope(config: Config) -> None:
    """Of architectures whose rotary embedding transformers scales, or has several of, where config.json is silent.

    Raises
    ------
    ConversionError
        It is.
    """
    if not (config.part("rope_parameters") or config.part("rope_scaling")):
        raise ConversionError(f"{config.path}: rope_parameters missing: nothing says how positions are turned")


def rope_of_kind(config: Config, kind: str) -> Config:
    """What ``rope_parameters`` has for layers of one kind; nothing where it isn't divided by kinds.

    Raises
    ------
    ConversionError
        Not an object.
    UnsupportedError
        Other kinds.
    """
    parts = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for key, part in parts.items() if isinstance(parts, dict) else ():
        if key not in ("full_attention", "sliding_attention") and part not in (None, False):
            raise UnsupportedError(f"{config.path}: rope_parameters' {key} {shown(part)} isn't understood beside {kind}")
        if not isinstance(part, dict | None):
            raise ConversionError(f"{config.path}: rope_parameters' {key} is not an object")
    return Config(dict(parts.get(kind) or {}), config.path)


def plain_base(config: Config, kind: str, default: float) -> float | None:
    """The base of the rotary embedding, without scaling, of layers of a kind; None where ``rope_parameters`` has no kinds.

    Raises
    ------
    UnsupportedError
        Scaling, or another setting.
    """
    if not (config.part("rope_parameters").keys() & {"full_attention", "sliding_attention"}):
        return None
    rope = rope_of_kind(config, kind)
    rope.only("rope_type", "default")
    for key, value in rope.values.items():
        if key not in ROPE_COMMON and value not in (None, False) and value != NEUTRAL.get(key):
            raise UnsupportedError(f"{config.path}: rope's {key} {shown(value)} isn't understood for {kind}")
    return rope.number("rope_theta", default, least=1e-30)


def write_decoder_hparams(
    writer: gguf.GGUFWriter, config: Config, n_head_kv: list[int] | None = None, n_ff: list[int] | None = None
) -> None:
    """Add the metadata that nearly all decoders have; `n_head_kv` and `n_ff`: see `write_sizes`."""
    config.only("hidden_act", "silu")
    every_layer = "sliding_window" in config.defaults and "use_sliding_window" not in config.defaults  # Mistral's
    write_windows(writer, config, "all" if every_layer else "")
    write_sizes(writer, config, n_head_kv, n_ff)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", 1e-6, least=0))
    write_rope_hparams(writer, config)


def write_sizes(
    writer: gguf.GGUFWriter, config: Config, n_head_kv: list[int] | None = None, n_ff: list[int] | None = None
) -> None:
    """Add a decoder's sizes, named as in config.json for most of them.

    Parameters
    ----------
    n_head_kv, n_ff : list of int, optional
        Heads of keys and values, and values inside the feed-forward part, of each layer, where they differ.
    """
    writer.add_block_count(config.integer("num_hidden_layers"))
    writer.add_context_length(config.integer("max_position_embeddings"))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(n_ff or config.integer("intermediate_size"))
    n_head = config.integer("num_attention_heads")
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv or config.integer("num_key_value_heads", n_head))
    if config.get("head_dim") is not None:
        writer.add_key_length(config.integer("head_dim"))
        writer.add_value_length(config.integer("head_dim"))
    writer.add_vocab_size(config.integer("vocab_size"))


def write_rope_hparams(writer: gguf.GGUFWriter, config: Config, *also: str, whole_yarn: bool = True) -> None:
    """Add the metadata of rotary embeddings and their scaling; `also`: see `rope_parameters`, `whole_yarn`: whether the
    parts of YaRN's frequencies begin and end at whole dimensions for those who read the file."""
    rope = rope_parameters(config, *also)
    writer.add_rope_freq_base(rope.number("rope_theta", least=1e-30))
    kind = rope.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor", least=1e-30))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn_factor(config, rope))
        writer.add_rope_scaling_orig_ctx_len(original_context(config, rope))
        if bool(rope.get("truncate", True)) != whole_yarn:
            rope.only("truncate", whole_yarn)
        rope.only("extrapolation_factor", 1)
        for key, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key):  # transformers takes its default for 0 as well
                add(rope.number(key, least=0))
        quotient = yarn_magnitude(config, rope) / magnitude(yarn_factor(config, rope))
        if quotient != 1:
            writer.add_rope_scaling_attn_factors(quotient)
    elif kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original_context(config, rope))
        writer.add_rope_scaling_attn_factors(longrope_magnitude(config, rope))


def original_context(config: Config, rope: Config) -> int:
    """How many positions the model was trained with before its rope was scaled."""
    n_ctx, least = config.integer("max_position_embeddings"), 1
    if rope.get("rope_type") == "longrope":
        least = 2  # its logarithm is a divisor
        n_ctx = config.integer("original_max_position_embeddings", n_ctx, least)
    return rope.integer("original_max_position_embeddings", n_ctx, least)


def longrope_magnitude(config: Config, rope: Config) -> float:
    """What LongRoPE multiplies cosines and sines by (transformers' modeling_rope_utils.py)."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    n_ctx = original_context(config, rope)
    factor = rope.number("factor", config.integer("max_position_embeddings") / n_ctx)
    if config.get("original_max_position_embeddings"):
        factor = config.integer("max_position_embeddings") / n_ctx
    return math.sqrt(1 + math.log(factor) / math.log(n_ctx)) if factor > 1 else 1.0


def longrope_factors(config: Config) -> dict[str, np.ndarray]:
    """LongRoPE's divisors of frequencies, for contexts beyond the original one and others."""
    rope = rope_parameters(config, *ROPE_OF_SOME)
    if rope.get("rope_type") != "longrope":
        return {}
    found = {}
    for kind in ("long", "short"):
        values = rope.get(f"{kind}_factor")
        if not isinstance(values, list) or not all(isinstance(x, int | float) and x > 0 for x in values):
            raise ConversionError(f"{config.path}: rope's {kind}_factor must be a list of numbers above 0")
        found[f"rope_factors_{kind}.weight"] = np.array(values, np.float32)
    return found


def yarn_factor(config: Config, rope: Config) -> float:
    """YaRN's factor of the context; where it is null, the ratio of the contexts."""
    return rope.number("factor", config.integer("max_position_embeddings") / original_context(config, rope), least=1e-30)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's ``0.1 scale ln(factor) + 1``, which lets attention stay as sharp over a context `factor` times as long."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_magnitude(config: Config, rope: Config) -> float:
    """What cosines and sines are multiplied by: `attention_factor`, or the quotient of the magnitudes for `mscale` and
    `mscale_all_dim` where both are given, or YaRN's own (transformers' modeling_rope_utils.py).

    GGUF's `attn_factor` is this over YaRN's own.
    """
    factor = yarn_factor(config, rope)
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if not (mscale and mscale_all_dim):
        return magnitude(factor)
    if magnitude(factor, mscale_all_dim) <= 0:
        raise ConversionError(f"{config.path}: rope's mscale_all_dim {mscale_all_dim:g} makes no sense")
    return magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)


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
    low, high, factor = (rope.number(key) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    n_ctx = original_context(config, rope)
    if not 0 < low < high or factor <= 0:
        raise ConversionError(f"{config.path}: rope needs 0 < low_freq_factor < high_freq_factor and factor > 0")
    wavelength = 2 * np.pi * rope.number("rope_theta") ** (np.arange(0, n, 2) / n)
    smooth = np.clip((n_ctx / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
