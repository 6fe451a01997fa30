"""What sets a decoder apart from Llama, as a row of facts (`Traits`), and the family that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from .checkpoint import ChangedRows, Config, ReshapedRows, Rows
from .experts import gather_experts
from .family import (
    ROPE_OF_SOME,
    Family,
    Shapes,
    attention_shapes,
    biases,
    ffn_shapes,
    head_dim,
    llama3_rope_factors,
    longrope_factors,
    model_shapes,
    rope_parameters,
    write_rope_hparams,
    write_sizes,
    write_windows,
)
from .llama import transform as interleave

MODEL = gguf.MODEL_ARCH
# What several families have.
QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
PARTIAL, BY_KIND = ("partial_rotary_factor",), ("full_attention",)  # settings of the rotary embedding


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
    norms : tuple of str, or callable
        A layer's norms, by GGUF's names; a function of config.json may say. Without any the last has no weights, either.
    norm_biases : bool
        Whether norms have biases.
    norm_shift : float
        What is added to norms' weights.
    qk_norm : callable
        How queries' and keys' norms are shaped: one "head"'s, one of its own for each of the "heads", or "all" heads'
        together; "" for none.
    biases : callable
        The names of a layer's matrices that have biases.
    fused : tuple of str
        What is one matrix: "qkv", "gate_up".
    gated : bool
        Whether the feed-forward part has a gate.
    output_bias : bool
        Whether logits have a bias.
    positions : bool
        Whether positions are learned, instead of rotations.
    interleaved : bool
        Whether GGUF rotates neighbouring values where the checkpoint rotates halves.
    windows : {"", "all", "types"}
        Whether layers attend to windows: none, all if there is a `sliding_window`, or those that `layer_types` names.
    write : callable
        Adds further metadata.
    experts : callable
        What a layer has instead of the dense feed-forward part, by layer; None for that.
    rope : tuple of str
        Settings of the rotary embedding that are understood beside those of its kind.
    whole_yarn : bool
        See `write_rope_hparams`.
    """

    act: str = "silu"
    act_key: str = "hidden_act"
    eps: str = "rms_norm_eps"
    norms: tuple[str, ...] | Callable[[Config], tuple[str, ...]] = ("attn_norm", "ffn_norm")
    norm_biases: bool = False
    norm_shift: float = 0.0
    qk_norm: Callable[[Config], str] = lambda config: ""
    biases: Callable[[Config], tuple[str, ...]] = _none
    fused: tuple[str, ...] = ()
    gated: bool = True
    output_bias: bool = False
    positions: bool = False
    interleaved: bool = False
    windows: str = ""
    write: Callable[[gguf.GGUFWriter, Config], None] = _nothing
    experts: Callable[[Config, int], Shapes | None] = lambda config, i: None
    rope: tuple[str, ...] = ()
    whole_yarn: bool = True


def _block(traits: Traits, config: Config, i: int) -> Shapes:
    """The tensors of layer i."""
    n_embd, n = config.integer("hidden_size"), head_dim(config)
    block = {name: shape for name, shape in attention_shapes(config).items() if "norm" not in name}
    norms = traits.norms(config) if callable(traits.norms) else traits.norms
    block |= {f"{name}.weight": (n_embd,) for name in norms}
    if traits.norm_biases:
        block |= biases(block, *norms)
    kind = traits.qk_norm(config)
    for part in "qk":
        if kind:
            n_all = block[f"attn_{part}.weight"][0]
            block[f"attn_{part}_norm.weight"] = {"head": (n,), "heads": (n_all // n, n), "all": (n_all,)}[kind]
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
    usual: Callable[[Config], dict[str, Any]] = lambda config: {},
    arch_name: str = "",
    **defaults: Any,
) -> Family:
    """The family that has these traits; `arch_name`: see `Family`."""

    def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
        config.only(traits.act_key, traits.act)
        write_sizes(writer, config)
        eps = config.number(traits.eps, least=0)
        (writer.add_layer_norm_rms_eps if traits.eps.startswith("rms") else writer.add_layer_norm_eps)(eps)
        write_windows(writer, config, traits.windows)
        if traits.positions:
            return
        write_rope_hparams(writer, config, *traits.rope, whole_yarn=traits.whole_yarn)
        writer.add_rope_dimension_count(int(head_dim(config) * rotary_share(config, traits.rope)))
        traits.write(writer, config)

    def shapes(config: Config) -> Shapes:
        tensors = model_shapes(config, lambda i: _block(traits, config, i))
        if traits.norm_biases:
            tensors["output_norm.bias"] = tensors["output_norm.weight"]
        if not traits.norms:
            del tensors["output_norm.weight"]
        if traits.positions:
            tensors["position_embd.weight"] = (config.integer("max_position_embeddings"), config.integer("hidden_size"))
        if traits.output_bias:
            tensors["output.bias"] = (config.integer("vocab_size"),)
        return tensors

    def transform(name: str, rows: Rows, config: Config) -> Rows:
        if traits.norm_shift and name.endswith("norm.weight"):
            return ChangedRows(rows, lambda x: x + np.float32(traits.norm_shift))
        return interleave(name, rows, config) if traits.interleaved and name.endswith(("weight", "bias")) else rows

    values = {name: dict(defaults) for name in checkpoints} if defaults else {}
    functions = (write_hparams, shapes, gather, transform, rope_factors, usual)
    return Family(checkpoints, arch, *functions, values, arch_name)


def rotary_share(config: Config, also: tuple[str, ...]) -> float:
    """How much of a head is rotated; in three places of config.json, as transformers came along."""
    if "partial_rotary_factor" not in also:
        return 1.0
    rope = rope_parameters(config, *also)
    keys = ("partial_rotary_factor", "rotary_pct")
    found = [config.number(key) for key in keys if config.get(key) is not None]
    return rope.number("partial_rotary_factor", found[0] if found else 1.0)


def rope_factors(config: Config) -> dict[str, np.ndarray]:
    """Divisors of the rotary embedding's frequencies, which GGUF keeps as tensors."""
    if rope_parameters(config, *ROPE_OF_SOME).get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_rope_factors(config)}
    return longrope_factors(config)


def biases_if(key: str, *names: str) -> Callable[[Config], tuple[str, ...]]:
    """Biases of these matrices, and of no others, if the key is true."""
    return lambda config: names if config.get(key) else ()


def biases_of_all(config: Config) -> tuple[str, ...]:
    """Biases of attention's matrices, and of the feed-forward part's, by their keys."""
    return (*(ATTENTION if config.get("attention_bias") else ()), *(FFN if config.get("mlp_bias") else ()))


def without_further_layers(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    """Drops the layers after the last, which predict further tokens (MTP), and stacks the experts."""
    prefixes = (*(f"model.layers.{config.integer('num_hidden_layers') + i}." for i in range(8)), "mtp.", "model.mtp_")
    renamed: dict[str, Rows] = {}
    for name, rows in tensors.items():
        if name.startswith(prefixes):
            continue
        if name.endswith("e_score_correction_bias"):
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            rows = ReshapedRows(rows, rows.shape[-1:]) if rows.shape[:-1] == (1,) else rows
        renamed[name] = rows
    return gather_experts(renamed, config)


def only(**values: Any) -> Callable[[gguf.GGUFWriter, Config], None]:
    """Only these values of keys."""

    def write(writer: gguf.GGUFWriter, config: Config) -> None:
        for key, value in values.items():
            config.only(key, value)

    return write
