"""The language models of checkpoints that also see or hear: their settings and tensors, as if they were alone."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ggpy.errors import ConversionError

from .checkpoint import Checkpoint, Config, Rows, TransposedRows

# Kinds of text models, by `model_type`, that are the same as one without images where there is only text: their rotations
# by several positions are rotations by one then.
KINDS = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
}
# What their configurations take for keys that files leave out, where that isn't what the text model's takes.
_QWEN2_VL: dict[str, Any] = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), _QWEN2_VL),
    "qwen3_vl_text": {"rope_theta": 500000.0},
    "qwen3_vl_moe_text": {"rope_theta": 500000.0, "norm_topk_prob": True},  # as it always does
}
# How their tensors' names begin, and what stands for that in a text model's.
PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.text_model.": "model.",
}
OTHERS = re.compile(
    r"(?:model\.)?(?:visual|vision_tower|vision_model|vision_embed_tokens|multi_modal_projector|connector|audio_tower|"
    r"embed_vision|embed_audio)\."
)
SECTIONS = ("mrope_section", "mrope_interleaved")


def take_text_part(checkpoint: Checkpoint) -> None:
    """Make a checkpoint that also sees or hears one of its language model; leave others as they are.

    Raises
    ------
    ConversionError
        Its configuration isn't sound.
    """
    config = checkpoint.config
    part = config.get("text_config")
    if not checkpoint.architecture.endswith("ForConditionalGeneration") or not isinstance(part or {}, dict):
        return
    values = dict(part or config.values)
    kind = KINDS.get(str(values.get("model_type")))
    if kind is None:
        return
    # What stands beside the text's settings is about the rest, or repeats them.
    config.asked |= {key for key in config.values if part or key.startswith("vision_") or "_token_i" in key}
    ties = [v["tie_word_embeddings"] for v in (values, config.values) if v.get("tie_word_embeddings") is not None]
    for key in ("rope_scaling", "rope_parameters"):
        values[key] = _one_position(values[key]) if isinstance(values.get(key), dict) else values.get(key)
    if part:
        values = {key: value for key, value in values.items() if key not in ("vision_config", "audio_config")}
        config.values = {}
    config.values = {**config.values, **DEFAULTS.get(str(values["model_type"]), {}), **values, "architectures": [kind]}
    if ties:
        config.values["tie_word_embeddings"] = any(ties)
    tensors: dict[str, Rows] = {}
    others: Counter[str] = Counter()
    for name, rows in checkpoint.tensors.items():
        if match := OTHERS.match(name):
            others[match[0].removeprefix("model.").rstrip(".")] += 1
            continue
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        renamed = PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        if renamed in tensors:
            raise ConversionError(f"{checkpoint.folder}: tensors {name} and another are both {renamed}")
        tensors[renamed] = _upright(renamed, rows, config)
    left = ", ".join(f"{n} tensors of {what}" for what, n in others.items()) or "no tensors"
    checkpoint.notes.append(
        f"{config.path}: of a {checkpoint.architecture} the language model is converted ({kind}); {left} left aside"
    )
    checkpoint.tensors, checkpoint.architecture = tensors, kind


def _upright(name: str, rows: Rows, config: Config) -> Rows:
    """Experts' matrices as transformers has them in memory; official Qwen3-VL files have them transposed."""
    match = re.fullmatch(r".+\.experts\.(gate_up|down)_proj", name)
    if match is None or len(rows.shape) != 3:
        return rows
    sizes = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    stored = sizes[::-1] if match[1] == "down" else (sizes[0], 2 * sizes[1])
    return TransposedRows(rows) if rows.shape[1:] == stored and stored[0] != stored[1] else rows


def _one_position(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope's settings where a token has one position instead of three."""
    values = {key: value for key, value in rope.items() if key not in SECTIONS}
    return {key: "default" if key in ("type", "rope_type") and value == "mrope" else value for key, value in values.items()}
