"""Language models of checkpoints that also see, against transformers."""

import json

import numpy as np
import pytest
import transformers

import ggpy
from converters import convert
from ggpy.errors import ConversionError
from tests.models.checkpoints import ids, random_model, transformers_logits

from .conftest import N_VOCAB, save_tokenizer
from .test_conversion import edit_tensors

TEXT = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SECTIONS = {**ROPE, "mrope_section": [4, 2, 2]}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYE = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
#: the class without ForConditionalGeneration, its language model's settings, its eye's, others
MODELS = {
    "Gemma3": ({"sliding_window": 8, "query_pre_attn_scalar": 16}, CLIP, {"mm_tokens_per_image": 4}),
    "Qwen3VL": ({"rope_parameters": {**SECTIONS, "mrope_interleaved": True}}, QWEN_EYE, {}),
    "Qwen2_5_VL": (
        {"rope_parameters": SECTIONS, "layer_types": ["full_attention"] * 2, "use_sliding_window": False},
        QWEN_EYE,
        {},
    ),
    "Qwen3VLMoe": (
        {
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [],
            "rope_parameters": {**SECTIONS, "mrope_interleaved": True},
        },
        QWEN_EYE,
        {},
    ),
    "Gemma4": (
        {
            "sliding_window": 8,
            "global_head_dim": 28,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": N_VOCAB,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "pad_token_id": 0,
        },
        {**CLIP, "head_dim": 16, "global_head_dim": 16, "num_key_value_heads": 2},
        {"audio_config": None},
    ),
    "Mistral3": ({"model_type": "mistral", "sliding_window": None}, {"model_type": "pixtral", **CLIP}, {}),
    "Mistral3, Ministral": (
        {"model_type": "ministral3", "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
        {"model_type": "pixtral", **CLIP},
        {},
    ),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **CLIP}, {}),
    "SmolVLM": ({"model_type": "llama"}, CLIP, {"scale_factor": 1}),
    "Lfm2Vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"model_type": "siglip2_vision_model", **CLIP, "num_patches": 4},
        {},
    ),
}


def saved(folder, name):
    """A random checkpoint; the model."""
    cls, (text, eye, others) = name.split(",")[0], MODELS[name]
    config = getattr(transformers, f"{cls}Config")(
        text_config={**TEXT, **text}, vision_config=eye, image_token_id=5, image_token_index=5, **others
    )
    model = random_model(getattr(transformers, f"{cls}ForConditionalGeneration"), config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_language_models_give_transformers_logits(name, tmp_path):
    model = saved(tmp_path, name)
    tokens = [i for i in ids(40) if i > 5]
    expected = transformers_logits(model, tokens)
    plan = convert(tmp_path, tmp_path / "model.gguf", "f32")
    assert np.ptp(expected) > 1
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32", n_threads=2) as ours:
        assert np.abs(ours.logits(tokens) - expected).max() <= 2e-3
    assert any("the language model is converted" in note and "left aside" in note for note in plan.notes)
    assert sum("left aside" in note for note in plan.notes) == 1


@pytest.mark.parametrize("name", ["Gemma3", "Qwen2_5_VL"])
def test_names_of_older_files_are_known(name, tmp_path):
    """As before transformers 4.52: the language model's prefix in another order, or none at all."""
    saved(tmp_path, name)
    convert(tmp_path, tmp_path / "new.gguf", "f32")
    older = {"model.language_model.": "language_model.model."} if name == "Gemma3" else {"model.language_model.": "model."}
    older |= {"model.vision_tower.": "vision_tower.", "model.visual.": "visual.", "model.multi_modal": "multi_modal"}

    def rename(tensors):
        for old in list(tensors):
            prefix = next((p for p in older if old.startswith(p)), "")
            tensors[older.get(prefix, "") + old.removeprefix(prefix)] = tensors.pop(old)

    edit_tensors(tmp_path, rename)
    if name == "Qwen2_5_VL":  # the text's settings stood beside the others
        values = json.loads((tmp_path / "config.json").read_text())
        text = values.pop("text_config")
        text["rope_scaling"] = text.pop("rope_parameters") | {"type": "mrope", "rope_type": "default"}
        text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
        values = text | values | {"model_type": "qwen2_5_vl"}
        (tmp_path / "config.json").write_text(json.dumps(values))
    convert(tmp_path, tmp_path / "old.gguf", "f32")
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def test_experts_matrices_may_be_transposed(tmp_path):
    """As in official files of Qwen3-VL."""
    saved(tmp_path, "Qwen3VLMoe")
    convert(tmp_path, tmp_path / "a.gguf", "f32")

    def transpose(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    edit_tensors(tmp_path, transpose)
    convert(tmp_path, tmp_path / "b.gguf", "f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_keys_that_official_gemma_3_files_leave_out(tmp_path):
    saved(tmp_path, "Gemma3")
    values = json.loads((tmp_path / "config.json").read_text())
    left = ("max_position_embeddings", "rope_parameters", "tie_word_embeddings", "_sliding_window_pattern", "layer_types")
    values["text_config"] = {key: value for key, value in values["text_config"].items() if key not in left}
    del values["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight", None))
    metadata = convert(tmp_path, tmp_path / "model.gguf", "f32", dry_run=True).metadata
    theirs = transformers.Gemma3TextConfig()
    assert metadata["gemma3.context_length"] == theirs.max_position_embeddings
    assert metadata["gemma3.rope.freq_base"] == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert metadata["gemma3.rope.freq_base_swa"] == theirs.rope_parameters["sliding_attention"]["rope_theta"]


def test_tensors_of_an_unknown_part_are_refused(tmp_path):
    saved(tmp_path, "Gemma3")
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.nose.weight": np.zeros((2, 2), np.float32)}))
    with pytest.raises(ConversionError, match=r"tensor model\.nose\.weight has no place"):
        convert(tmp_path, tmp_path / "model.gguf", "f32")
