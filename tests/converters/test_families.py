"""Every family but Llama's own, against transformers and llama.cpp; tensors by a mapping written once more, here."""

import functools
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
import xllamacpp
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import ggpy
from converters import conversion, convert
from ggpy.errors import ConversionError, UnsupportedError
from ggpy.quantization import quantize_model
from tests.models.checkpoints import ids, random_model, transformers_logits

from .conftest import SIZES, save_tokenizer
from .test_conversion import edit_config, edit_tensors, interleaved, written_fields, written_floats, written_tensors

DEMO = Path(ggpy.__file__).parent / "demo_model"

COMMON = {**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 512}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
GROUPED = {"n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MODELS = {
    "deepseek2": ("DeepseekV2", LATENT),
    "deepseek2 yarn": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": 32,
            "rope_parameters": YARN,
            "routed_scaling_factor": 16.0,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek3": ("DeepseekV3", {**LATENT, **GROUPED, "q_lora_rank": 32, "routed_scaling_factor": 2.5}),
    "mixtral": ("Mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}),
    "qwen2": ("Qwen2", {**COMMON, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**COMMON, "head_dim": 32}),
    "qwen2moe": ("Qwen2Moe", {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3moe": ("Qwen3Moe", {**COMMON, **EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {**COMMON, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 3}),
}
WITH_EXPERTS = [name for name in MODELS if name not in ("qwen2", "qwen3")]


@functools.cache
def model_of(name):
    kind, sizes = MODELS[name]
    model = random_model(getattr(transformers, f"{kind}ForCausalLM"), getattr(transformers, f"{kind}Config")(**sizes))
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    return model


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of(name)``: the model's checkpoint, saved once."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        model_of(name).save_pretrained(folder)
        save_tokenizer(folder)
        return folder

    return save


@pytest.fixture
def damaged(folder_of, tmp_path):
    """``damaged(name)``: a copy of the model's checkpoint for a test to damage."""
    return lambda name: shutil.copytree(folder_of(name), tmp_path / "checkpoint")


NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}


def expected_tensors(name):
    """What GGUF should hold, from the model in memory."""
    model, expected = model_of(name), {}
    config = model.config
    for key, weight in model.state_dict().items():
        values = weight.numpy()
        if not key.startswith("model.layers."):
            top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            expected[f"{top[key.removesuffix('.weight')]}.weight"] = values
            continue
        i, part = key.removeprefix("model.layers.").split(".", 1)
        if part == "mlp.experts.gate_up_proj":
            half = values.shape[1] // 2
            expected[f"blk.{i}.ffn_gate_exps.weight"] = np.stack([expert[:half] for expert in values])
            expected[f"blk.{i}.ffn_up_exps.weight"] = np.stack([expert[half:] for expert in values])
        elif part == "self_attn.kv_b_proj.weight":
            heads = np.split(values, config.num_attention_heads)
            n = config.qk_nope_head_dim
            expected[f"blk.{i}.attn_k_b.weight"] = np.stack([head[:n].T for head in heads])
            expected[f"blk.{i}.attn_v_b.weight"] = np.stack([head[n:] for head in heads])
        else:
            if name == "mixtral" and part == "self_attn.q_proj.weight":
                values = interleaved(values, config.num_attention_heads)
            if name == "mixtral" and part == "self_attn.k_proj.weight":
                values = interleaved(values, config.num_key_value_heads)
            expected[f"blk.{i}.{NAMES[part]}"] = values
    if config.tie_word_embeddings:
        del expected["output.weight"]
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_f32_file_holds_the_models_values(name, folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "CHUNK_VALUES", 5000)  # chunks that begin and end inside of experts and heads
    convert(folder_of(name), tmp_path / "model.gguf", "f32")
    written, expected = written_floats(tmp_path / "model.gguf"), expected_tensors(name)
    assert written.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(written[tensor], values, err_msg=tensor)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("type_", ["q4_0", "q4_k_m"])
def test_quantized_file_is_what_quantizing_an_f32_conversion_gives(name, type_, folder_of, tmp_path, monkeypatch):
    convert(folder_of(name), tmp_path / "f32.gguf", "f32")
    quantize_model(tmp_path / "f32.gguf", tmp_path / "expected.gguf", type_)
    monkeypatch.setattr(conversion, "CHUNK_VALUES", 5000)
    convert(folder_of(name), tmp_path / "model.gguf", type_)
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def llama_cpp_logprobs(path, folder, prompts, n_ctx, n_vocab=SIZES["vocab_size"], lora=()):
    """Logarithms of the next token's probabilities after each prompt, in float32 throughout: (n_prompts, n_vocab).

    `lora` are paths of adapters and their scales.
    """
    params = xllamacpp.CommonParams()
    adapters = []
    for adapter_path, scale in lora:
        adapters.append(xllamacpp.CommonAdapterLoraInfo())
        adapters[-1].path, adapters[-1].scale = str(adapter_path), scale
    params.lora_adapters = adapters
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = n_ctx, 1, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    # Logprobs come only with text, and half a character isn't text: a letter is forced on it. They aren't changed by that.
    letter = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("a")
    table = np.full((len(prompts), n_vocab), np.nan)
    for row, prompt in zip(table, prompts, strict=True):
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": len(row), "logit_bias": [[letter, 1000.0]]}
        reply = server.handle_completions(request)
        for token in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return table


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, folder_of, tmp_path):
    """With YaRN, far beyond the original context: errors in its factors grow with the position."""
    lengths = [1, 20, 400] if "yarn" in name else [1, 20, 100]
    tokens = ids(lengths[-1])
    convert(folder_of(name), tmp_path / "model.gguf", "f32")
    got = llama_cpp_logprobs(tmp_path / "model.gguf", folder_of(name), [tokens[:n] for n in lengths], n_ctx=512)
    logits = transformers_logits(model_of(name), tokens)[[n - 1 for n in lengths]]
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.skipif(not (DEMO / "model.safetensors").is_file(), reason="without the demo model")
@pytest.mark.parametrize("type_", ["f16", "q8_0"])
def test_llama_cpp_agrees_on_the_demo_model(type_, tmp_path):
    convert(DEMO, tmp_path / "model.gguf", type_)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokens = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode((DEMO / "heldout.txt").read_text()).ids[:200]
    lengths = range(8, 201, 16)
    prompts = [tokens[:n] for n in lengths]
    got = llama_cpp_logprobs(tmp_path / "model.gguf", DEMO, prompts, 256, model.config.vocab_size)
    logits = transformers_logits(model, tokens)[[n - 1 for n in lengths]]
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()
    assert (np.exp(expected) * (expected - got)).sum(-1).mean() <= 2e-3


DEEPSEEK2 = {
    "block_count": 3,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "leading_dense_block_count": 1,
    "vocab_size": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 64 + 16,
    "attention.value_length": 64,
    "attention.key_length_mla": 32 + 16,
    "attention.value_length_mla": 64,
    "attention.kv_lora_rank": 64,
    "attention.q_lora_rank": 32,
    "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "rope.dimension_count": 16,
    "rope.freq_base": 10000.0,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 32,
}
DEEPSEEK2_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 32,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": np.float32(0.0707),
}
OTHERS = {
    "block_count": 3,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "vocab_size": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "rope.freq_base": 10000.0,
}
WIDE_HEADS = {"attention.key_length": 32, "attention.value_length": 32}
MANY_EXPERTS = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 32}
METADATA = {
    "deepseek2": (
        "deepseek2",
        DEEPSEEK2 | {"attention.q_lora_rank": 0, "expert_weights_scale": 1.0, "expert_gating_func": 1},
    ),
    "deepseek2 yarn": (
        "deepseek2",
        DEEPSEEK2
        | DEEPSEEK2_YARN
        | {"expert_weights_scale": 16.0, "expert_gating_func": 1, "expert_group_count": 1, "expert_group_used_count": 1},
    ),
    "deepseek3": (
        "deepseek2",
        DEEPSEEK2
        | {"expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2}
        | {"expert_group_count": 4, "expert_group_used_count": 2},
    ),
    "mixtral": (
        "llama",
        OTHERS
        | WIDE_HEADS
        | {"rope.dimension_count": 32, "rope.freq_base": 1e6, "expert_count": 4, "expert_used_count": 2}
        | {"attention.layer_norm_rms_epsilon": np.float32(1e-5)},
    ),
    "qwen2": ("qwen2", OTHERS),
    "qwen3": ("qwen3", OTHERS | WIDE_HEADS),
    "qwen2moe": ("qwen2moe", OTHERS | MANY_EXPERTS | {"expert_shared_feed_forward_length": 64}),
    "qwen3moe": ("qwen3moe", OTHERS | WIDE_HEADS | MANY_EXPERTS),
    "olmoe": (
        "olmoe",
        OTHERS
        | {"attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": np.float32(1e-5)}
        | {"expert_count": 8, "expert_used_count": 3},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_metadata_is_that_of_llama_cpps_converter(name, folder_of, tmp_path):
    """Keys and values as convert_hf_to_gguf.py of llama.cpp (October 2026) writes them.

    But for three: `vocab_size`, which it writes for some families alone; `q_lora_rank` 0, without which its reader takes
    no model that isn't of 26 or 27 layers; and `expert_gating_func`, which it takes from a key that transformers drops.
    """
    convert(folder_of(name), tmp_path / "model.gguf", "f32")
    fields = {key: field.contents() for key, field in written_fields(tmp_path / "model.gguf").items()}
    arch, expected = METADATA[name]
    assert fields.pop("general.architecture") == arch
    assert {key: value for key, value in fields.items() if key.startswith(f"{arch}.")} == {
        f"{arch}.{key}": value for key, value in expected.items()
    }


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_saved_as_in_memory_make_the_same_file(name, folder_of, tmp_path):
    fused = tmp_path / "checkpoint"
    model_of(name).save_pretrained(fused, save_original_format=False)
    save_tokenizer(fused)
    tensors = load_file(fused / "model.safetensors")
    assert any(tensor.endswith("experts.gate_up_proj") for tensor in tensors)
    convert(fused, tmp_path / "fused.gguf", "q8_0")
    convert(folder_of(name), tmp_path / "separate.gguf", "q8_0")
    fused_tensors, separate_tensors = (written_tensors(tmp_path / f"{form}.gguf") for form in ("fused", "separate"))
    assert fused_tensors.keys() == separate_tensors.keys()
    for tensor, values in separate_tensors.items():
        assert fused_tensors[tensor].data.tobytes() == values.data.tobytes(), tensor


def test_routers_stay_float32(folder_of, tmp_path):
    convert(folder_of("qwen2moe"), tmp_path / "model.gguf", "q8_0")
    types = {name: tensor.tensor_type.name for name, tensor in written_tensors(tmp_path / "model.gguf").items()}
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.ffn_gate_inp_shexp.weight"] == "F32"
    assert types["blk.0.ffn_gate_exps.weight"] == types["blk.0.ffn_gate_shexp.weight"] == "Q8_0"


def test_layers_that_predict_further_tokens_are_left_out(folder_of, damaged, tmp_path):
    folder = damaged("deepseek3")
    tensors = load_file(folder / "model.safetensors")
    further = {name.replace("layers.2.", "layers.3."): values for name, values in tensors.items() if "layers.2." in name}
    further["model.layers.3.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    save_file(tensors | further, folder / "model.safetensors")
    convert(folder, tmp_path / "more.gguf", "q8_0")
    convert(folder_of("deepseek3"), tmp_path / "model.gguf", "q8_0")
    assert written_floats(tmp_path / "more.gguf").keys() == written_floats(tmp_path / "model.gguf").keys()


@pytest.mark.parametrize("changes", [{"topk_method": "greedy"}, {"topk_group": 4}])
def test_groups_that_choose_nothing_are_written_as_one(changes, damaged, tmp_path):
    folder = damaged("deepseek3")
    edit_config(folder, **changes)
    if "topk_method" in changes:
        edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("correction_bias")])
    metadata = convert(folder, tmp_path / "model.gguf", "f32", dry_run=True).metadata
    assert metadata["deepseek2.expert_group_count"] == metadata["deepseek2.expert_group_used_count"] == 1


def test_config_can_name_the_scores_function(damaged, tmp_path):
    folder = damaged("deepseek2")
    edit_config(folder, scoring_func="sigmoid")
    metadata = convert(folder, tmp_path / "model.gguf", "f32", dry_run=True).metadata
    assert metadata["deepseek2.expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID


def test_config_of_older_transformers_is_read_alike(damaged, tmp_path):
    """rope_scaling and rope_theta, instead of rope_parameters."""
    folder = damaged("deepseek2 yarn")
    new = convert(folder, tmp_path / "new.gguf", "f32", dry_run=True).metadata
    scaling = {"type" if key == "rope_type" else key: value for key, value in YARN.items() if key != "rope_theta"}
    edit_config(folder, rope_parameters=None, rope_scaling=scaling, rope_theta=10000)
    assert convert(folder, tmp_path / "old.gguf", "f32", dry_run=True).metadata == new


def drop(name):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def cut(name):
    def edit(tensors):
        tensors[name] = tensors[name][:-1].copy()

    return lambda folder: edit_tensors(folder, edit)


EXPERT = "model.layers.1.mlp.experts.6.up_proj.weight"
KV_B = "model.layers.2.self_attn.kv_b_proj.weight"
DAMAGES = {
    "expert missing": (drop(EXPERT), r"layers\.1\.mlp\.experts\.up_proj\.weight of experts 0-5, 7; .* asks for 8, 0-7"),
    "expert too many": (lambda f: edit_config(f, n_routed_experts=6), r"of experts 0-7; .* asks for 6, 0-5"),
    "experts differ": (cut(EXPERT), r"layers\.1\.mlp\.experts\.up_proj\.weight is of different shapes"),
    "kv_b of another shape": (
        cut(KV_B),
        r"layers\.2\.self_attn\.kv_b_proj\.weight is \(383, 64\), .* asks for \(384, 64\)",
    ),
    "kv_b missing": (drop(KV_B), r"no tensor for blk\.2\.attn_k_b\.weight"),
    "negative": (
        lambda f: edit_config(f, first_k_dense_replace=-1),
        r"first_k_dense_replace must be an integer of at least 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_experts_or_attention_are_named(damage, damaged, tmp_path):
    folder = damaged("deepseek2")
    do_damage, message = DAMAGES[damage]
    do_damage(folder)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(folder, tmp_path / "model.gguf", "q8_0")
    assert "\n" not in str(caught.value)


def test_value_that_is_no_number_is_found_among_the_experts(damaged, tmp_path):
    folder = damaged("deepseek2")

    def spoil(tensors):
        tensors[EXPERT][3, 5] = np.nan

    edit_tensors(folder, spoil)
    with pytest.raises(ConversionError, match=r"blk\.1\.ffn_up_exps\.weight: value \[\d+, 5\] is nan"):
        convert(folder, tmp_path / "model.gguf", "q8_0")


UNSUPPORTED = [
    ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob true; known: false"),
    ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob false; known: true"),
    ("qwen3moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]; known: \[\]"),
    ("qwen2moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2; known: 1"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob true; known: false"),
    ("deepseek2", {"scoring_func": "softplus"}, "scoring_func 'softplus'; known: softmax, sigmoid"),
    ("deepseek2", {"topk_method": "random"}, "topk_method 'random'; known: greedy, group_limited_greedy, noaux_tc"),
    ("deepseek2", {"moe_layer_freq": 2}, "moe_layer_freq 2; known: 1"),
    ("deepseek2 yarn", {"rope_parameters": YARN | {"mscale": 1.0}}, "rope's magnitude is 1.08.*; known: 1"),
    ("deepseek2 yarn", {"rope_parameters": YARN | {"mscale": 0.0}}, "rope's magnitude is 1.36.*; known: 1"),
    ("deepseek2 yarn", {"rope_parameters": YARN | {"mscale": None, "mscale_all_dim": None}}, "rope's magnitude is 1.36"),
    ("deepseek3", {"rope_interleave": False}, "rope_interleave false; known: true"),
]


@pytest.mark.parametrize(("name", "changes", "message"), UNSUPPORTED)
def test_what_ggufs_readers_could_not_follow_is_refused(name, changes, message, damaged, tmp_path):
    folder = damaged(name)
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedError, match=message):
        convert(folder, tmp_path / "model.gguf", "q8_0")


@pytest.mark.parametrize("name", MODELS)
def test_tensor_names_are_ggufs(name, folder_of, tmp_path):
    plan = convert(folder_of(name), tmp_path / "model.gguf", "f32", dry_run=True)
    arch = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == METADATA[name][0])
    known = {gguf.TENSOR_NAMES[tensor].format(bid=i) for tensor in gguf.MODEL_TENSORS[arch] for i in range(3)}
    assert {tensor.name.rsplit(".", 1)[0] for tensor in plan.tensors} <= known
