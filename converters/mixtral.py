"""Mixtral: GGUF's llama with experts."""

from __future__ import annotations

import gguf

from . import llama
from .checkpoint import Config
from .experts import expert_shapes, gather_experts, write_expert_hparams
from .family import Family, Shapes, attention_shapes, model_shapes


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    llama.write_hparams(writer, config)
    write_expert_hparams(writer, config)


def shapes(config: Config) -> Shapes:
    block = attention_shapes(config) | expert_shapes(config, config.integer("intermediate_size"))
    return model_shapes(config, lambda i: block)


FAMILY = Family(
    checkpoints=("MixtralForCausalLM",),
    arch=gguf.MODEL_ARCH.LLAMA,
    write_hparams=write_hparams,
    shapes=shapes,
    gather=gather_experts,
    transform=llama.transform,
    computed=llama.computed,
    defaults={"MixtralForCausalLM": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}},
)
