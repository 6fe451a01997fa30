"""Families of decoders that differ from Llama in a few ways: each is a row of what differs (`Traits`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from .checkpoint import Config, Rows, ShiftedRows
from .experts import gather_experts
from .family import (
    Family,
    Shapes,
    attention_shapes,
    biases,
    ffn_shapes,
    head_dim,
    model_shapes,
    rope_parameters,
    write_rope_hparams,
    write_sizes,
    write_windows,
)
from .llama import computed as llama3_factors
from .llama import transform as interleave

MODEL = gguf.MODEL_ARCH


def _nothing(writer: gguf.GGUFWriter, config: Config) -> None:
    pass


def _none(config: Config) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Traits:
    """What sets a family apart from Llama.

    Attributes
    ----------
    act : str
        The only activation that is understood, and `act_key`, the key of config.json that names it.
    eps : str
        The key of the norms' epsilon; RMS norms' if it begins with "rms".
    norms : tuple of str
        A layer's norms, by GGUF's names.
    norm_biases : bool
        Whether norms have biases.
    norm_shift : float
        What is added to norms' weights.
    qk_norm : callable
        How queries' and keys' norms are shaped: a head's, or all heads' together, or "" for none.
    biases : callable
        The names of a layer's matrices that have biases.
    fused : tuple of str
        What is one matrix: "qkv", "gate_up".
    gated : bool
        Whether the feed-forward part has a gate.
    interleaved : bool
        Whether GGUF rotates neighbouring values where the checkpoint rotates halves.
    windows : {"", "all", "types"}
        Whether layers attend to windows: none, all if there is a `sliding_window`, or those that `layer_types` names.
    write : callable
        Adds further metadata.
    experts : callable
        What a layer has instead of the dense feed-forward part, by layer; None for that.
    computed : callable
        See `Family`.
    """

    act: str = "silu"
    act_key: str = "hidden_act"
    eps: str = "rms_norm_eps"
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    norm_biases: bool = False
    norm_shift: float = 0.0
    qk_norm: Callable[[Config], str] = lambda config: ""
    biases: Callable[[Config], tuple[str, ...]] = _none
    fused: tuple[str, ...] = ()
    gated: bool = True
    interleaved: bool = False
    windows: str = ""
    write: Callable[[gguf.GGUFWriter, Config], None] = _nothing
    experts: Callable[[Config, int], Shapes | None] = lambda config, i: None
    computed: Callable[[Config], dict[str, np.ndarray]] = llama3_factors


def _block(traits: Traits, config: Config, i: int) -> Shapes:
    """The tensors of layer i."""
    n_embd, n = config.integer("hidden_size"), head_dim(config)
    block = {name: shape for name, shape in attention_shapes(config).items() if "norm" not in name}
    block |= {f"{name}.weight": (n_embd,) for name in traits.norms}
    if traits.norm_biases:
        block |= biases(block, *traits.norms)
    kind = traits.qk_norm(config)
    for part in "qk":
        if kind:
            block[f"attn_{part}_norm.weight"] = (n,) if kind == "head" else block[f"attn_{part}.weight"][:1]
    ffn = traits.experts(config, i)
    if ffn is None:
        ffn = ffn_shapes(n_embd, config.integer("intermediate_size"))
        gate = ffn.pop("ffn_gate.weight") if not traits.gated or "gate_up" in traits.fused else None
        if gate is not None and traits.gated:
            ffn["ffn_up.weight"] = (2 * gate[0], n_embd)
    block |= ffn
    if "qkv" in traits.fused:
        parts = [block.pop(f"attn_{part}.weight") for part in "qkv"]
        block["attn_qkv.weight"] = (sum(shape[0] for shape in parts), n_embd)
    return block | biases(block, *(name for name in traits.biases(config) if f"{name}.weight" in block))


def decoder(
    checkpoints: tuple[str, ...],
    arch: gguf.MODEL_ARCH,
    traits: Traits,
    gather: Callable[[Mapping[str, Rows], Config], dict[str, Rows]] = gather_experts,
    output_bias: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Family:
    """The family that has these traits."""

    def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
        config.only(traits.act_key, traits.act)
        write_sizes(writer, config)
        eps = config.number(traits.eps, least=0)
        (writer.add_layer_norm_rms_eps if traits.eps.startswith("rms") else writer.add_layer_norm_eps)(eps)
        write_windows(writer, config, traits.windows)
        write_rope_hparams(writer, config)
        share = rope_parameters(config, "partial_rotary_factor").number("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(head_dim(config) * config.number("partial_rotary_factor", share)))
        traits.write(writer, config)

    def shapes(config: Config) -> Shapes:
        tensors = model_shapes(config, lambda i: _block(traits, config, i))
        if traits.norm_biases:
            tensors["output_norm.bias"] = tensors["output_norm.weight"]
        if output_bias:
            tensors["output.bias"] = (config.integer("vocab_size"),)
        return tensors

    def transform(name: str, rows: Rows, config: Config) -> Rows:
        if traits.norm_shift and name.endswith("norm.weight"):
            return ShiftedRows(rows, traits.norm_shift)
        return interleave(name, rows, config) if traits.interleaved and name.endswith(("weight", "bias")) else rows

    values = {name: dict(defaults) for name in checkpoints} if defaults else {}
    return Family(checkpoints, arch, write_hparams, shapes, gather, transform, traits.computed, values)


# --- Gemma ---


def _write_gemma(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("attention_bias", False)
    config.only("use_bidirectional_attention", False)
    scale = config.number("query_pre_attn_scalar", 256.0, least=1e-30)
    if scale != head_dim(config):
        writer.add_attention_scale(1 / math.sqrt(scale))
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key):
            add(config.number(key, least=1e-30))


def _write_gemma3(writer: gguf.GGUFWriter, config: Config) -> None:
    _write_gemma(writer, config)
    nested = (config.get("rope_parameters") or {}).get("sliding_attention")
    if nested is None:
        writer.add_rope_freq_base_swa(config.number("rope_local_base_freq", 10000.0))
    else:
        local = Config(nested, config.path)
        local.only("rope_type", "default")
        writer.add_rope_freq_base_swa(local.number("rope_theta", 10000.0))


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "rms_norm_eps": 1e-6}
_SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_GEMMA = {"act": "gelu_pytorch_tanh", "act_key": "hidden_activation", "norms": _SANDWICH, "norm_shift": 1.0}

FAMILIES: tuple[Family, ...] = (
    decoder(
        ("Gemma2ForCausalLM",),
        MODEL.GEMMA2,
        Traits(**_GEMMA, windows="types 2", write=_write_gemma),  # type: ignore[arg-type]
        defaults={**GEMMA, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    decoder(
        ("Gemma3ForCausalLM",),
        MODEL.GEMMA3,
        Traits(**_GEMMA, qk_norm=lambda config: "head", windows="types 6", write=_write_gemma3),  # type: ignore[arg-type]
        defaults={**GEMMA, "sliding_window": 4096},
    ),
)
