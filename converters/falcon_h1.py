"""Falcon-H1: attention and Mamba-2 side by side in each layer. Its factors are multiplied into the matrices."""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import ChangedRows, ComputedRows, Config, Rows, ScaledRows, shown
from .family import Family, Shapes, attention_shapes, ffn_shapes, model_shapes, write_decoder_hparams
from .mamba2 import Scan, decays

# Keys of config.json with factors, and which of a list: of what tensors take, give, or both.
FACTORS: dict[str, tuple[tuple[str, int], ...]] = {
    "token_embd": (("embedding_multiplier", 0),),
    "output": (("lm_head_multiplier", 0),),
    "attn_q": (("attention_in_multiplier", 0),),
    "attn_k": (("attention_in_multiplier", 0), ("key_multiplier", 0)),
    "attn_v": (("attention_in_multiplier", 0),),
    "attn_output": (("attention_out_multiplier", 0),),
    "ffn_gate": (("mlp_multipliers", 0),),
    "ffn_down": (("mlp_multipliers", 1),),
    "ssm_in": (("ssm_in_multiplier", 0),),
    "ssm_out": (("ssm_out_multiplier", 0),),
}


def factors(config: Config, key: str, n: int) -> list[float]:
    """The n factors of a key; 1 where it is missing."""
    values = config.get(key, [1.0] * n)
    values = values if isinstance(values, list) else [values]
    if len(values) != n or not all(isinstance(x, int | float) and abs(x) < 1e30 for x in values):
        raise ConversionError(f"{config.path}: {key} {shown(values)}; {n} numbers are expected")
    return values


def factor(config: Config, name: str) -> float:
    """That of a GGUF tensor."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    lengths = {"mlp_multipliers": 2}
    return float(np.prod([factors(config, key, lengths.get(key, 1))[i] for key, i in FACTORS.get(part, ())]))


def scan(config: Config) -> Scan:
    return Scan.of_hybrid(
        config, config.integer("mamba_d_ssm", config.integer("mamba_expand") * config.integer("hidden_size"))
    )


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    for key in ("attention_bias", "mlp_bias", "projectors_bias", "mamba_proj_bias"):
        config.only(key, False)
    for key in ("mamba_chunk_size", "num_logits_to_keep", "mamba_use_mlp"):
        config.get(key)
    if config.get("mamba_norm_before_gate") and config.get("mamba_rms_norm"):
        raise UnsupportedError(f"{config.path}: mamba_norm_before_gate true with mamba_rms_norm; known: false")
    write_decoder_hparams(writer, config)
    scan(config).write_hparams(writer, config)


def shapes(config: Config) -> Shapes:
    n_embd = config.integer("hidden_size")
    block = attention_shapes(config) | scan(config).shapes(n_embd) | ffn_shapes(n_embd, config.integer("intermediate_size"))
    block["ffn_norm"] = block.pop("ffn_norm.weight")  # its name in llama.cpp
    if not config.get("mamba_rms_norm"):
        del block["ssm_norm.weight"]
    tensors = model_shapes(config, lambda i: block)
    if _differ(config):
        tensors["output.weight"] = tensors["token_embd.weight"]
    return tensors


def _differ(config: Config) -> bool:
    """Whether embeddings and logits have other factors, so that a matrix for both won't do."""
    return factor(config, "token_embd") != factor(config, "output")


def gather(tensors: Mapping[str, Rows], config: Config) -> dict[str, Rows]:
    layer = scan(config)
    named = dict(layer.gathered(name, rows) for name, rows in tensors.items())
    if _differ(config) and "model.embed_tokens.weight" in named:
        named.setdefault("lm_head.weight", named["model.embed_tokens.weight"])
    return named


def transform(name: str, rows: Rows, config: Config) -> Rows:
    """Matrices times their factors, of which ssm_in has one for each of its parts; decays as they are used."""
    if name.endswith("ssm_in.weight"):
        layer = scan(config)
        n_keys = layer.n_group * layer.n_state
        lengths = (layer.n, layer.n, n_keys, n_keys, layer.n_head)
        scales = np.repeat(factors(config, "ssm_multipliers", 5), lengths) * factor(config, name)
        return ScaledRows(rows, ComputedRows(scales.astype(np.float32)[:, None]), (1, rows.shape[1]))
    times = np.float32(factor(config, name))
    return decays(name, rows if times == 1 else ChangedRows(rows, lambda x: x * times))


FAMILY = Family(
    ("FalconH1ForCausalLM",),
    gguf.MODEL_ARCH.FALCON_H1,
    write_hparams,
    shapes,
    gather,
    transform,
    defaults={
        "FalconH1ForCausalLM": {
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 128,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_norm_before_gate": True,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
        }
    },
)
