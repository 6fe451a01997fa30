"""Gemma 1 to 3, and EmbeddingGemma."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import gguf

from .checkpoint import Config
from .decoder import ATTENTION, BY_KIND, MODEL, SANDWICH, Traits, biases_if, decoder, only
from .family import Family, head_dim, plain_base
from .pooling import with_projections


def _write_gemma(writer: gguf.GGUFWriter, config: Config, bidirectional: bool = False) -> None:
    config.only("attention_bias", False)
    if bool(config.get("use_bidirectional_attention")) != bidirectional:
        config.only("use_bidirectional_attention", bidirectional)
    scale = config.number("query_pre_attn_scalar", 256.0, least=1e-30)
    if scale != head_dim(config):
        writer.add_attention_scale(1 / math.sqrt(scale))
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key):
            add(config.number(key, least=1e-30))


def _write_gemma3(writer: gguf.GGUFWriter, config: Config, bidirectional: bool = False) -> None:
    _write_gemma(writer, config, bidirectional)
    base = plain_base(config, "sliding_attention", 10000.0)
    writer.add_rope_freq_base_swa(config.number("rope_local_base_freq", 10000.0) if base is None else base)


GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "sliding_window": 4096,
}
CAPS: dict[str, Any] = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA: dict[str, Any] = {
    "act": "gelu_pytorch_tanh",
    "act_key": "hidden_activation",
    "norms": SANDWICH,
    "norm_shift": 1.0,
}
_GEMMA3: dict[str, Any] = _GEMMA | {"qk_norm": lambda config: "head", "windows": "types 6", "rope": BY_KIND}


def _usual_gemma(config: Config) -> dict[str, Any]:
    """ "gelu" has always meant its approximation."""
    config.get("hidden_activation")
    return {"hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else {}


FAMILIES: tuple[Family, ...] = (
    decoder(
        ("GemmaForCausalLM",),
        MODEL.GEMMA,
        Traits(
            act="gelu_pytorch_tanh",
            norm_shift=1.0,
            biases=biases_if("attention_bias", *ATTENTION),
            write=only(use_bidirectional_attention=None),
        ),
        usual=_usual_gemma,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        head_dim=256,
    ),
    decoder(("Gemma2ForCausalLM",), MODEL.GEMMA2, Traits(**_GEMMA, windows="types 2", write=_write_gemma), **GEMMA, **CAPS),
    decoder(
        ("Gemma3ForCausalLM",),
        MODEL.GEMMA3,
        Traits(**_GEMMA3, write=_write_gemma3),
        **GEMMA,
        rope_theta=1000000.0,
    ),
    replace(
        decoder(
            ("Gemma3TextModel",),
            MODEL.GEMMA_EMBEDDING,
            Traits(**_GEMMA3, write=partial(_write_gemma3, bidirectional=True)),
            **GEMMA,
            rope_theta=1000000.0,
            use_bidirectional_attention=False,
        ),
        special=with_projections,
    ),
)
