"""OLMoE: norms over the queries and keys of all heads together. Its rope is as in `converters.qwen`."""

from __future__ import annotations

import gguf

from .checkpoint import Config
from .experts import expert_shapes, gather_experts, write_expert_hparams
from .family import Family, Shapes, attention_shapes, model_shapes, write_clip, write_decoder_hparams


def write_hparams(writer: gguf.GGUFWriter, config: Config) -> None:
    config.only("norm_topk_prob", False)
    write_clip(writer, config)
    write_decoder_hparams(writer, config)
    write_expert_hparams(writer, config)


def shapes(config: Config) -> Shapes:
    block = attention_shapes(config)
    block |= {f"{part}_norm.weight": block[f"{part}.weight"][:1] for part in ("attn_q", "attn_k")}
    block |= expert_shapes(config, config.integer("intermediate_size"))
    return model_shapes(config, lambda i: block)


FAMILY = Family(
    checkpoints=("OlmoeForCausalLM",),
    arch=gguf.MODEL_ARCH.OLMOE,
    write_hparams=write_hparams,
    shapes=shapes,
    gather=gather_experts,
    defaults={"OlmoeForCausalLM": {"rms_norm_eps": 1e-5}},
)
