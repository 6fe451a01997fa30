"""Checkpoints as people have them, against transformers and llama.cpp: what isn't understood is refused, what is changed is
said, and a model card is decoration."""

import json
import os
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoConfig, AutoModelForCausalLM

import ggpy
from converters import convert
from converters.checkpoint import Config
from converters.conversion import FAMILIES
from converters.family import HARMLESS, NEUTRAL, refuse_windows
from converters.pickled import read_pickled
from ggpy.errors import ConversionError, Error, UnsupportedError
from ggpy.file import GGUFFile
from ggpy.models.hparams import Hparams
from ggpy.models.rope import read_rope
from tests.models.checkpoints import ids, transformers_logits
from tests.models.test_architectures import made

from .conftest import save_tokenizer
from .test_conversion import edit_config, edit_tensors, expected_tensors, written_floats
from .test_families import MODELS, YARN, damaged, folder_of, llama_cpp_logprobs

__all__ = ["damaged", "folder_of"]  # fixtures


def dry(folder):
    return convert(folder, folder / "out.gguf", "f32", dry_run=True)


# Tied embeddings.


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_output_matrix_counts_unless_it_is_the_embeddings(same, damaged_folder, tmp_path):
    """Where tie_word_embeddings is true: as transformers 5 loads it."""

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * np.float32(1 if same else 2)

    edit_tensors(damaged_folder, add)
    plan = convert(damaged_folder, tmp_path / "model.gguf", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(damaged_folder).lm_head.weight.detach().numpy()
    written = written_floats(tmp_path / "model.gguf")
    np.testing.assert_array_equal(written.get("output.weight", written["token_embd.weight"]), theirs)
    assert ("output.weight" in written) is not same
    assert any("lm_head.weight isn't the embeddings" in note for note in plan.notes) is not same


def test_missing_output_matrix_is_named_with_the_setting(damaged_folder):
    edit_config(damaged_folder, tie_word_embeddings=None)
    with pytest.raises(ConversionError, match=r"lm_head\.weight.*tie_word_embeddings"):
        dry(damaged_folder)


# Settings of config.json.

ROPES = {
    "attention factor": {"attention_factor": 0.7},
    "mscale": {"mscale": 1.4, "mscale_all_dim": 0.6},
    "mscale alone": {"mscale": 1.4},
    "betas of 0": {"beta_fast": 0, "beta_slow": 0},
    "no original context": {"original_max_position_embeddings": None},
    "finetuned": {"finetuned": True, "truncate": True},
}


@pytest.mark.parametrize("name", ROPES)
def test_yarns_tables_are_transformers_own(name, damaged_folder, tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    rope = {key: value for key, value in (rope | ROPES[name]).items() if value is not None}
    edit_config(damaged_folder, rope_parameters=rope)
    convert(damaged_folder, tmp_path / "model.gguf", "f32")
    with GGUFFile(tmp_path / "model.gguf") as file:
        table = read_rope(Hparams(file), 16).table(np.arange(100))
    rotary = AutoModelForCausalLM.from_pretrained(damaged_folder).model.rotary_emb
    cos, sin = (part[0, :, :8].numpy() for part in rotary(torch.zeros(1), torch.arange(100)[None]))
    np.testing.assert_allclose(table, np.concatenate([cos, sin], axis=1), atol=2e-5)
    assert name != "mscale" or not 0.99 < np.hypot(cos, sin).mean() < 1.01


@pytest.mark.parametrize(
    ("model", "rope"),
    [
        ("qwen3", YARN | {"attention_factor": 0.8}),
        ("qwen3", YARN | {"mscale": 1.0}),
        ("deepseek2 yarn", YARN),
    ],
)
def test_llama_cpp_agrees_on_yarns_magnitudes(model, rope, damaged, tmp_path):
    folder, lengths = damaged(model), [40, 200]
    edit_config(folder, rope_parameters=rope)
    tokens = ids(lengths[-1])
    logits = transformers_logits(AutoModelForCausalLM.from_pretrained(folder), tokens)[[n - 1 for n in lengths]]
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    convert(folder, tmp_path / "model.gguf", "f32")
    got = llama_cpp_logprobs(tmp_path / "model.gguf", folder, [tokens[:n] for n in lengths], n_ctx=512)
    np.testing.assert_allclose(got, expected, atol=2e-3)


UNDERSTOOD_BY_NOBODY = [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate false"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5}}, "extrapolation_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope's factor 4.0 isn't understood for rope type 'def"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "alpha": 2}}, "rope's alpha 2 isn't understood"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope's full_attention"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, r'rope_type \["yarn"\]; known'),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 isn't understood"),
    ({"residual_multiplier": 0.2}, "residual_multiplier 0.2 isn't understood"),
    ({"final_logit_softcapping": 30}, "final_logit_softcapping 30 isn't understood"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters differ"),
]


@pytest.mark.parametrize(("changes", "message"), UNDERSTOOD_BY_NOBODY)
def test_settings_that_are_not_understood_are_refused(changes, message, damaged_folder):
    edit_config(damaged_folder, **changes)
    with pytest.raises(UnsupportedError, match=message):
        dry(damaged_folder)


def test_settings_that_change_nothing_are_taken(damaged_folder):
    before = dry(damaged_folder)
    edit_config(
        damaged_folder, residual_multiplier=None or False, partial_rotary_factor=1.0, some_list=[], torch_dtype="float16"
    )
    edit_config(damaged_folder, pretraining_tp=2, attention_dropout=0.5, unsloth_version="2025.1", temperature=0.5)
    assert dry(damaged_folder) == before
    assert not HARMLESS & NEUTRAL.keys()


# Keys, beyond those of a forward pass, that released models have.
RELEASED = {
    "SmolLM2-135M-Instruct": ("llama", {"_model_name_or_path": "x", "is_llama_config": True, "rope_interleaved": False}),
    "Qwen3-Coder": ("qwen3moe", {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}),
    "Qwen2.5": (
        "qwen2",
        {"use_mrope": False, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False},
    ),
    "DeepSeek-R1": (
        "deepseek3",
        {"auto_map": {}, "ep_size": 1, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
        | {"moe_layer_freq": 1, "pretraining_tp": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_keys_that_released_models_have_are_taken(name, request):
    model, keys = RELEASED[name]
    folder = request.getfixturevalue("damaged_folder") if model == "llama" else request.getfixturevalue("damaged")(model)
    before = dry(folder)
    edit_config(folder, **keys)
    assert dry(folder) == before


def test_dynamic_scaling_begins_where_the_context_ends(damaged_folder, tmp_path):
    """It changes nothing before max_position_embeddings, which is what the file has as its context."""
    edit_config(damaged_folder, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    plan = convert(damaged_folder, tmp_path / "model.gguf", "f32")
    assert plan.metadata["llama.context_length"] == 256
    assert any("dynamic" in note for note in plan.notes)
    rotary = AutoModelForCausalLM.from_pretrained(damaged_folder).model.rotary_emb
    with GGUFFile(tmp_path / "model.gguf") as file:
        table = read_rope(Hparams(file), 16).table(np.arange(256))
    cos, sin = (part[0, :, :8].numpy() for part in rotary(torch.zeros(1), torch.arange(256)[None]))
    np.testing.assert_allclose(table, np.concatenate([cos, sin], axis=1), atol=2e-5)


def facts(folder, values):
    """Metadata and shapes that a config.json makes, or which of its keys is missing."""
    import gguf

    config = Config(values, folder / "config.json")
    family = next(family for family in FAMILIES if values["architectures"][0] in family.checkpoints)
    config.defaults = family.defaults.get(values["architectures"][0], {})
    writer = gguf.GGUFWriter(None, family.name)
    try:
        family.write_hparams(writer, config)
        return {key: value.value for key, value in writer.kv_data[0].items()}, family.shapes(config)
    except Error as error:
        return str(error).replace("missing, which means ", "")


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_key_means_what_transformers_takes_it_for_or_is_refused(name, folder_of, tmp_path):
    folder = folder_of(name)
    values = json.loads((folder / "config.json").read_text())
    n_compared = 0
    if "layer_types" in values:  # must fit num_hidden_layers
        values = {key: value for key, value in values.items() if key != "layer_types"}
    for key in values.keys() - HARMLESS - {"rope_parameters"}:
        without = {k: v for k, v in values.items() if k != key}
        (tmp_path / "config.json").write_text(json.dumps(without))
        meant = AutoConfig.from_pretrained(tmp_path).to_dict().get(key)
        found = facts(folder, without)
        if isinstance(found, str) and "not null" in found:
            continue  # a key that must be there
        assert found == facts(folder, values | {key: meant}), key
        n_compared += 1
    assert n_compared > 3


def test_mixtral_with_llama3_rope_gets_its_factors(damaged):
    folder = damaged("mixtral")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e6}
    edit_config(folder, rope_parameters=rope | {"original_max_position_embeddings": 64})
    assert "rope_freqs.weight" in {tensor.name for tensor in dry(folder).tensors}


# Windows.

WINDOWS = [
    ("mistral", {"sliding_window": 100}, "sliding_window 100 of 512"),
    ("mistral", {"sliding_window": 512}, None),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {}, None),  # 4096, but no longer than that
    ("mistral", {"max_position_embeddings": 32768}, "sliding_window missing, which means 4096 of 32768"),
    ("mistral", {"sliding_window": 100, "layer_types": ["full_attention"] * 3}, "sliding_window 100"),
    ("mistral", {"sliding_window": 100, "use_sliding_window": False}, "sliding_window 100"),
    ("qwen2", {"sliding_window": 100}, None),
    ("qwen2", {"sliding_window": 100, "use_sliding_window": True}, "sliding_window 100"),
    ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
    ("qwen2", {"sliding_window": 100, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
]


@pytest.mark.parametrize(("model", "changes", "message"), WINDOWS)
def test_windows_that_would_be_ignored_are_refused(model, changes, message, tmp_path):
    values = {"max_position_embeddings": 512, "num_hidden_layers": 3} | changes
    config = Config(values, tmp_path / "config.json")
    architecture = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model]
    config.defaults = next(f for f in FAMILIES if architecture in f.checkpoints).defaults[architecture]
    if message is None:
        refuse_windows(config)
        return
    with pytest.raises(UnsupportedError, match=message):
        refuse_windows(config)


# Templates.


def test_a_converted_models_template_has_its_tools_and_tokens(damaged_folder, tmp_path):
    """As transformers renders it: the template named tool_use where tools are given; pad_token and unk_token."""
    named = [
        {"name": "default", "template": "{{ pad_token }}"},
        {"name": "tool_use", "template": "{{ tools }}{{ unk_token }}"},
    ]
    path = damaged_folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {
        "chat_template": named,
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    path.write_text(json.dumps(values))
    convert(damaged_folder, tmp_path / "model.gguf", "f32")
    own = transformers.AutoTokenizer.from_pretrained(damaged_folder)
    messages = [{"role": "user", "content": "?"}]
    with ggpy.load(tmp_path / "model.gguf", n_threads=1) as model:
        for tools in (None, [{"name": "search"}]):
            expected = own.apply_chat_template(messages, tools=tools, tokenize=False)
            assert model.chat_template.render(messages, tools=tools) == expected


# Which files.


def test_a_single_file_counts_before_an_index(mistral_folder, tmp_path):
    """As save_pretrained leaves a folder that had shards before, and as from_pretrained reads it."""
    folder = shutil.copytree(mistral_folder, tmp_path / "checkpoint")
    merged = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        merged |= {name: tensor * 2 for name, tensor in transformers_file(shard).items()}
    save_torch(merged, folder / "model.safetensors", {"format": "pt"})
    plan = convert(folder, tmp_path / "model.gguf", "f32")
    assert any("index.json and its shards are left aside" in note for note in plan.notes)
    written, expected = written_floats(tmp_path / "model.gguf"), expected_tensors(folder)
    np.testing.assert_array_equal(written["blk.1.ffn_up.weight"], expected["blk.1.ffn_up.weight"])
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    assert dry(folder).tensors == plan.tensors


def transformers_file(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("how", ["no index", "not in the index"])
def test_shards_are_taken_without_the_index_saying_so(how, mistral_folder, tmp_path):
    folder = shutil.copytree(mistral_folder, tmp_path / "checkpoint")
    index = folder / "model.safetensors.index.json"
    if how == "no index":
        index.unlink()
    else:
        values = json.loads(index.read_text())
        del values["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(values))
    convert(folder, tmp_path / "model.gguf", "f32")
    plan = convert(mistral_folder, tmp_path / "expected.gguf", "f32")
    written, expected = written_floats(tmp_path / "model.gguf"), written_floats(tmp_path / "expected.gguf")
    assert plan.notes == () and written.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(written[name], values)
    assert len(dry(folder).notes) == 1


def test_a_missing_shard_is_named_without_an_index_too(mistral_folder, tmp_path):
    folder = shutil.copytree(mistral_folder, tmp_path / "checkpoint")
    (folder / "model.safetensors.index.json").unlink()
    missing = sorted(folder.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ConversionError, match=f"{missing.name} is missing"):
        dry(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix, damaged_folder):
    before = dry(damaged_folder)
    tensors = load_file(damaged_folder / "model.safetensors")
    save_file({prefix + name: values for name, values in tensors.items()}, damaged_folder / "model.safetensors")
    plan = dry(damaged_folder)
    assert [t.name for t in plan.tensors] == [t.name for t in before.tensors]
    assert len(plan.notes) == prefix.count(".") - (prefix == "base_model.model.")


def test_an_adapter_is_called_what_it_is(damaged_folder, tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/base-1B"}
    (damaged_folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UnsupportedError, match=r"an adapter of someone/base-1B; if its weights are merged"):
        dry(damaged_folder)
    (damaged_folder / "config.json").unlink()
    with pytest.raises(UnsupportedError, match=r"a LORA adapter of someone/base-1B, not a model; convert that with 'lora'"):
        dry(damaged_folder)


# PyTorch's own form.


def saved_as_pickles(folder, n_files=1):
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if n_files == 1:
        torch.save(OrderedDict(tensors), folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-{i % n_files + 1:05}-of-{n_files:05}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("n_files", [1, 3])
def test_weights_in_pytorchs_form_make_the_same_file(n_files, damaged_folder, tmp_path):
    convert(damaged_folder, tmp_path / "expected.gguf", "q8_0")
    saved_as_pickles(damaged_folder, n_files)
    convert(damaged_folder, tmp_path / "model.gguf", "q8_0")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_in_pytorchs_form_are_torchs(dtype, tmp_path):
    whole = torch.randn(6, 4).to(dtype)
    parameter = torch.nn.Parameter(whole[:2])
    torch.save({"part": whole[2:5], "all": whole, "parameter": parameter, "scalar": whole[0, 0]}, tmp_path / "m.bin")
    read = read_pickled(tmp_path / "m.bin")
    np.testing.assert_array_equal(read["part"].read(1, 3), whole[3:5].float().numpy())
    np.testing.assert_array_equal(read["all"].read(0, 6), whole.float().numpy())
    np.testing.assert_array_equal(read["parameter"].read(0, 2), whole[:2].float().numpy())
    assert read["scalar"].shape == ()


class Harm:
    def __reduce__(self):
        return os.system, ("touch harm",)


NOT_WEIGHTS = {
    "code": ({"w": Harm()}, "it names posix.system, which no weights need"),
    "a module": (torch.nn.Linear(2, 2), "it names torch.nn.modules.linear.Linear"),
    "more than tensors": ({"model": {"w": torch.ones(2)}}, "more than tensors and their names"),
    "transposed": ({"w": torch.randn(3, 4).T}, "tensor w: its values don't lie in order"),
    "a number": (5, "not weights alone"),
}


@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_other_pickles_are_refused_and_not_run(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, message = NOT_WEIGHTS[what]
    torch.save(value, tmp_path / "m.bin")
    with pytest.raises(UnsupportedError, match=f"m.bin: .*{message}|m.bin: {message}") as caught:
        read_pickled(tmp_path / "m.bin")
    assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()


def test_the_form_from_before_pytorch_1_6_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"from version 1\.6 on"):
        read_pickled(tmp_path / "m.bin")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 3000)
)
def test_damaged_pickles_are_read_or_refused(changes, cut, tmp_path):
    path = tmp_path / "m.bin"
    torch.save({"w": torch.ones(3, 2), "v": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    for at, byte in changes:
        content[at % len(content)] = byte
    path.write_bytes(content[: max(len(content) - cut // 10, 1)] if cut % 2 else content)
    try:
        for rows in read_pickled(path).values():
            if rows.shape and rows.dtype == "F32":
                rows.read(0, 1)
    except Error as error:
        assert "m.bin" in str(error)


# Quantized weights.


def quantized(values, block):
    """Values in blocks as DeepSeek V3's: E4M3 bits and the scales that were divided by, from torch."""
    n, m = values.shape
    scales = np.empty((-(-n // block), -(-m // block)), np.float32)
    bits = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = np.abs(values[part]).max() / 448
            bits[part] = torch.tensor(values[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return bits, torch.tensor(scales)


@pytest.mark.parametrize("form", ["blocks", "row", "tensor"])
def test_8_bit_floats_are_taken_with_their_scales(form, damaged, tmp_path):
    """Blocks of 32, since the matrices are small: some are cut at the edges, as the experts of 96 columns' are."""
    folder = damaged("deepseek3")
    tensors = {name: torch.tensor(values) for name, values in load_file(folder / "model.safetensors").items()}
    expected = {}
    for name in list(tensors):
        if name.endswith("_proj.weight") and ".layers." in name:
            bits, scales = quantized(tensors[name].numpy(), 40 if form == "blocks" else 10**6)
            if form == "row":
                scales = scales.expand(bits.shape[0], 1).contiguous()
            elif form == "tensor":
                scales = scales[0, 0].clone()
            tensors[name], tensors[f"{name}_scale{'_inv' if form == 'blocks' else ''}"] = bits, scales
            tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)
            spread = scales.repeat_interleave(40, 0).repeat_interleave(40, 1) if form == "blocks" else scales
            spread = spread[: bits.shape[0], : bits.shape[1]] if form == "blocks" else spread
            expected[name] = (bits.float() * spread).numpy()
    save_torch(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [40, 40]})
    plan = convert(folder, tmp_path / "model.gguf", "f32")
    written = written_floats(tmp_path / "model.gguf")
    assert any("8-bit floats" in note for note in plan.notes)
    np.testing.assert_array_equal(
        written["blk.1.ffn_up_exps.weight"],
        np.stack([expected[f"model.layers.1.mlp.experts.{i}.up_proj.weight"] for i in range(8)]),
    )
    np.testing.assert_array_equal(written["blk.2.attn_output.weight"], expected["model.layers.2.self_attn.o_proj.weight"])


def test_quantization_config_left_behind_is_left_aside(damaged_folder):
    before = dry(damaged_folder)
    edit_config(damaged_folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    plan = dry(damaged_folder)
    assert plan.tensors == before.tensors
    assert any("quantization_config ('bitsandbytes') is left aside" in note for note in plan.notes)


NOT_FLOATS = {
    "integers": (torch.zeros(64, 64, dtype=torch.int32), {"quant_method": "gptq"}, r"is I32: .*quantized already \(gptq\)"),
    "no scale": (torch.zeros(64, 64).to(torch.float8_e4m3fn), {"quant_method": "fp8"}, "without .*_scale_inv"),
}


@pytest.mark.parametrize("what", NOT_FLOATS)
def test_other_quantized_weights_are_refused_by_their_tensors(what, damaged_folder):
    values, config, message = NOT_FLOATS[what]
    tensors = {name: torch.tensor(v) for name, v in load_file(damaged_folder / "model.safetensors").items()}
    save_torch(tensors | {"model.layers.0.self_attn.o_proj.weight": values}, damaged_folder / "model.safetensors")
    edit_config(damaged_folder, quantization_config=config)
    with pytest.raises(UnsupportedError, match=message):
        dry(damaged_folder)


# Model cards.

ALIASES = "---\na: &a [x, x, x, x, x, x]\n"
for before, name in zip("abcdefgh", "bcdefghi", strict=True):
    ALIASES += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
ALIASES += "tags: *i\n---\n"
CARDS = {
    "numbers": ("---\nversion: 1.0\ntags: [1, two, 3.5]\nmodel_name: 7\nlanguage: no\n---\n# A model", 0),
    "no end": ("---\nlicense: mit\n# A model\n", 1),
    "a tab": ("---\nlicense:\tmit\ntags:\n\t- a\n---\n", 0),
    "not UTF-8": (b"\xef\xbb\xbf---\nlicense: mit\nname: \xe9t\xe9\n---\n\xff\xfe", 0),
    "aliases": (ALIASES, 1),
    "odd values": ("---\nlicense: [1, {}]\nbase_model: {a: b}\nname: [a, b]\ntags: [[a]]\n---\n", 0),
    "surrogates": ('---\nlicense: "\\ud800"\n---\n', 0),
    "deep": ("---\ntags: " + "[" * 5000 + "\n---\n", 1),
    "broken": ("---\nlicense: [mit\n---\n", 1),
    "results": ("---\nlicense: mit\nmodel-index:\n" + "- name: x\n" * 20_000 + "---\n", 0),
    "long": ("---\nlicense: mit\nx: " + "y" * 200_000 + "\n---\n", 1),
}


@pytest.mark.parametrize("card", CARDS)
def test_a_card_never_stops_a_conversion(card, damaged_folder, tmp_path):
    text, n_notes = CARDS[card]
    (damaged_folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    plan = convert(damaged_folder, tmp_path / "model.gguf", "q8_0")
    assert len(plan.notes) == n_notes
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert ("general.license" in file.metadata) == (card in ("a tab", "not UTF-8", "results"))
        if card == "numbers":
            assert file.metadata["general.version"] == "1.0" and file.metadata["general.name"] == "7"
            assert list(file.metadata["general.tags"]) == ["1", "two", "3.5"]
            assert list(file.metadata["general.languages"]) == ["no"]


@pytest.mark.parametrize("value", [7, "a/b/c", ["x"], None])
def test_odd_origins_and_sampling_settings_are_taken(value, damaged_folder):
    edit_config(damaged_folder, _name_or_path="" if value is None else value)
    settings = {"temperature": "hot", "top_k": -1, "top_p": float("nan"), "min_p": 0.1}
    (damaged_folder / "generation_config.json").write_text(json.dumps(settings))
    metadata = dry(damaged_folder).metadata
    assert {key: v for key, v in metadata.items() if ".sampling." in key} == {"general.sampling.min_p": 0.1}


# Hostile ones.

HOSTILE = {
    "layers": ({"num_hidden_layers": 2**40}, "num_hidden_layers must be a positive integer"),
    "many layers": ({"num_hidden_layers": 2**30}, r"num_hidden_layers 1073741824, of \d+ tensors in all"),
    "vocabulary": ({"vocab_size": 2**31 - 1}, "config.json asks for"),
    "head": ({"head_dim": 2**31 - 2}, "config.json asks for"),
    "head and rope": ({"head_dim": 2**31 - 2, "rope_parameters": {"rope_type": "llama3"}}, "config.json asks for"),
    "epsilon": ({"rms_norm_eps": -1e308}, "rms_norm_eps must be a number"),
    "negative epsilon": ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number of at least 0"),
    "heads": ({"num_attention_heads": 1e300}, "num_attention_heads must be a positive integer"),
    "theta": ({"rope_parameters": {"rope_theta": -5}}, "rope_theta must be a number of at least"),
    "factor": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor must be a number of at least"),
    "mscale": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 40.0, "mscale": 1, "mscale_all_dim": -9}},
        "mscale_all_dim -9 makes no sense",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_numbers_out_of_all_bounds_are_refused_at_once(what, damaged_folder):
    changes, message = HOSTILE[what]
    edit_config(damaged_folder, **changes)
    with pytest.raises(Error, match=message) as caught:
        dry(damaged_folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 1e300}, "n_routed_experts must be a positive integer"),
        ({"n_routed_experts": 2**30}, "of experts 0-7; config.json asks for 1073741824"),
        ({"num_experts_per_tok": 2**64}, "num_experts_per_tok must be a positive integer"),
        ({"scoring_func": [1]}, r"scoring_func \[1\]; known"),
        ({"routed_scaling_factor": 1e200}, "routed_scaling_factor must be a number"),
    ],
)
def test_experts_out_of_all_bounds_are_refused_at_once(changes, message, damaged):
    folder = damaged("deepseek3")
    edit_config(folder, **changes)
    with pytest.raises(Error, match=message):
        dry(folder)


@pytest.mark.skipif(os.name != "posix", reason="has no pipes with names")
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "README.md", "generation_config.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_pipes_and_devices_are_not_waited_for(name, kind, damaged_folder):
    path = damaged_folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    if name == "README.md":
        assert any("not a regular file" in note for note in dry(damaged_folder).notes)
        return
    with pytest.raises(ConversionError, match=f"{name}: not a regular file"):
        dry(damaged_folder)


def test_a_key_twice_is_refused(damaged_folder):
    path = damaged_folder / "config.json"
    path.write_text(path.read_text().rstrip("}\n ") + ', "rms_norm_eps": 1}')
    with pytest.raises(ConversionError, match="not a JSON file: the key 'rms_norm_eps' is there twice"):
        dry(damaged_folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma4", {"per_layer_config": 6}, "per_layer_config must be an object, not 6"),
        ("gemma4", {"per_layer_config": {"2": [28]}}, r"2 must be an object, not \[28\]"),
        ("gemma4", {"rope_parameters": "default"}, "rope_parameters must be an object"),
        ("granite_swa", {"layer_rope_theta": 900.0}, "layer_rope_theta must be a list"),
        ("granite_swa", {"layer_rope_theta": [[1]] * 4}, "rope_theta must be a number"),
        ("mellum", {"mlp_layer_types": True}, "mlp_layer_types must be a list"),
        ("stablelm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": -1}}, "that GGUF can't hold"),
    ],
)
def test_values_of_another_kind_are_refused(name, changes, message, tmp_path):
    made(name).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Error, match=message):
        convert(tmp_path, tmp_path / "out.gguf", "f32")
    assert not (tmp_path / "out.gguf").exists()
