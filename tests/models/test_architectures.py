"""Every architecture against transformers: tiny random models of odd sizes, converted. One is a row of MODELS."""

import json

import numpy as np
import pytest
import torch
import transformers

import ggpy
from converters import convert
from tests.converters.test_families import llama_cpp_logprobs

from .checkpoints import converted, random_model, transformers_logits

N_VOCAB, N_TOKENS, N_CTX = 509, 90, 128
#: heads don't share the embedding, three share a head of keys; the window ends long before the text
SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 60,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
HEADS, NO_GROUPS = {"head_dim": 20}, {"num_key_value_heads": None}
WINDOW = {"sliding_window": 30}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BASE = {"rope_theta": 10000.0}
DEFAULT = {**BASE, "rope_type": "default"}
YARN = {**BASE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_parameters": {**BASE, "partial_rotary_factor": 0.4}}
LONG = {
    **BASE,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0],
}
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
DBRX = {
    "d_model": 60,
    "hidden_size": 60,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 60, "ffn_hidden_size": 28, "moe_num_experts": 5, "moe_top_k": 2},
}
FALCON = {"num_key_value_heads": None, "intermediate_size": None, "num_kv_heads": 2, "ffn_hidden_size": 70}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
GLM = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "n_shared_experts": 1}
MANY = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
GEMMA4 = {
    **WINDOW,
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
    "global_head_dim": 28,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": N_VOCAB,
}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 28}
ALPHA = {**BASE, "rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}
#: what released ones have beside
HUNYUAN = {
    "attention_head_dim": 20,
    "cla_share_factor": 2,
    "dense_list": [60, 0],
    "norm_type": "rms",
    "pool_type": "last",
    "use_cla": False,
    "use_rotary_pos_emb": True,
    "use_qk_norm": True,
    "org_vocab_size": 500,
    "im_start_id": 4,
}
AFMOE = {
    "head_dim": 24,  # of all heads together, values fill vectors: gates take nothing else
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_shared_experts": 2,
    "moe_intermediate_size": 28,
    "route_scale": 1.5,
    "mup_enabled": True,
}
MELLUM = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": {**YARN, "rope_theta": 90000.0}},
}


def like_llama(name):
    """A class that transformers has under Llama's name, under the name that checkpoints have."""
    config = getattr(transformers, f"{name}Config")
    return type(f"{name}ForCausalLM", (transformers.LlamaForCausalLM,), {"config_class": config})


#: GGUF's name and what is special: class without ForCausalLM, its configuration without Config, sizes
MODELS = {
    "llama, odd": ("Llama", "Llama", {**HEADS, **UNTIED}),
    "llama, tied, windows": ("Mistral", "Mistral", {**HEADS, **TIED, **WINDOW}),
    "gemma2": ("Gemma2", "Gemma2", {**HEADS, **WINDOW, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", "Gemma3Text", {**HEADS, **WINDOW, "num_hidden_layers": 7, "query_pre_attn_scalar": 20}),
    "gemma3, scaled, untied": (
        "Gemma3",
        "Gemma3Text",
        {
            **HEADS,
            **WINDOW,
            **UNTIED,
            "num_hidden_layers": 6,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            },
        },
    ),
    "gemma4": ("Gemma4", "Gemma4Text", {**HEADS, **GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    "gemma4, keys are values": (
        "Gemma4",
        "Gemma4Text",
        {**HEADS, **GEMMA4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 5.0},
    ),
    "gemma4, experts": (
        "Gemma4",
        "Gemma4Text",
        {
            **HEADS,
            **GEMMA4,
            **GEMMA4_EXPERTS,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "gpt-oss": ("GptOss", "GptOss", {**HEADS, **WINDOW, **EXPERTS, "rope_parameters": {**YARN, "truncate": False}}),
    "gpt-oss, default rope": ("GptOss", "GptOss", {**HEADS, **WINDOW, **EXPERTS, "rope_parameters": DEFAULT}),
    "mistral3": ("Ministral3", "Ministral3", {**HEADS, "rope_parameters": MINISTRAL}),
    "phi3": ("Phi3", "Phi3", {**WINDOW}),
    "phi3, short": ("Phi3", "Phi3", {**TIED, "rope_parameters": LONG, "original_max_position_embeddings": 200}),
    "phi3, long": ("Phi3", "Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "granite": (
        "Granite",
        "Granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "granite_swa": (
        "GraniteSWA",
        "GraniteSWA",
        {**HEADS, **WINDOW, "attention_multiplier": 0.2, "logits_scaling": 2.0, "layer_rope_theta": [0, 900.0, 0, 900.0]},
    ),
    "granite_swa, experts": ("GraniteMoeSWA", "GraniteMoeSWA", {**TIED, **WINDOW, **EXPERTS, "logits_scaling": 2.0}),
    "granitemoe": ("GraniteMoe", "GraniteMoe", {**TIED, **EXPERTS, "residual_multiplier": 0.7}),
    "smollm3": ("SmolLM3", "SmolLM3", {**TIED}),
    "olmo": ("Olmo", "Olmo", {**UNTIED}),
    "olmo, bounded": ("Olmo", "Olmo", {**TIED, "clip_qkv": 0.8}),
    "olmoe, bounded": (
        "Olmoe",
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": 0.8},
    ),
    "olmo2": ("Olmo2", "Olmo2", {}),
    "olmo2, windows": (
        "Olmo3",
        "Olmo3",
        {
            **WINDOW,
            "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": YARN},
        },
    ),
    "olmo2, windows, two bases": (
        "Olmo3",
        "Olmo3",
        {**WINDOW, "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": {**YARN, "rope_theta": 90000.0}}},
    ),
    "exaone4": ("Exaone4", "Exaone4", {**HEADS, **TIED, "sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "exaone4, windows": ("Exaone4", "Exaone4", {**HEADS, **WINDOW}),
    "hunyuan-dense, another base": ("HunYuanDenseV1", "HunYuanDenseV1", {**HEADS, **HUNYUAN, "rope_parameters": ALPHA}),
    "hunyuan-moe": (
        "HunYuanMoEV1",
        "HunYuanMoEV1",
        {**HEADS, **TIED, "num_experts": 5, "moe_topk": 2, "rope_parameters": ALPHA},
    ),
    "afmoe": ("Afmoe", "Afmoe", {**WINDOW, **UNTIED, **AFMOE}),
    "mellum": ("Mellum", "Mellum", {**HEADS, **UNTIED, **WINDOW, **MELLUM}),
    "mellum, one base": (
        "Mellum",
        "Mellum",
        {**HEADS, **UNTIED, **WINDOW, **MELLUM, "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": YARN}},
    ),
    "exaone": (like_llama("Exaone"), "Exaone", {**TIED, "rope_parameters": {**BASE, "rope_type": "linear", "factor": 4.0}}),
    "gemma": ("Gemma", "Gemma", {**HEADS}),
    "hunyuan-dense": ("HunYuanDenseV1", "HunYuanDenseV1", {**HEADS, **TIED}),
    "ernie4_5": ("Ernie4_5", "Ernie4_5", {**HEADS, **TIED, "use_bias": True}),
    "glm4": ("Glm4", "Glm4", {**HEADS}),
    "glm4moe": ("Glm4Moe", "Glm4Moe", {**HEADS, **GLM, "use_qk_norm": True, "routed_scaling_factor": 1.5}),
    "ernie4_5-moe": (
        "Ernie4_5_Moe",
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 28,
            "moe_num_shared_experts": 2,
            "moe_layer_interval": 2,
            "head_dim": 20,
        },
    ),
    "ernie4_5-moe, untied": (
        "Ernie4_5_Moe",
        "Ernie4_5_Moe",
        {**UNTIED, "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 28, "moe_layer_start_index": 2},
    ),
    "dots1": (
        "Dots1",
        "Dots1",
        {**GLM, **TIED, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "head_dim": 20},
    ),
    "dots1, no groups": ("Dots1", "Dots1", {**GLM, **UNTIED, "num_key_value_heads": 6, "n_group": 3, "topk_group": 2}),
    "exaone-moe": ("ExaoneMoe", "ExaoneMoe", {**HEADS, **WINDOW, **MANY, "num_shared_experts": 2}),
    "exaone-moe, groups": (
        "ExaoneMoe",
        "ExaoneMoe",
        {**HEADS, **MANY, **TIED, "sliding_window": 30, "n_group": 3, "topk_group": 2, "norm_topk_prob": False},
    ),
    "minimax-m2": (
        "MiniMaxM2",
        "MiniMaxM2",
        {**HEADS, **EXPERTS, "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.4}},
    ),
    "deepseek2, GLM-4.7-Flash": (
        "Glm4MoeLite",
        "Glm4MoeLite",
        {
            **GLM,
            **NO_GROUPS,
            "num_key_value_heads": 6,
            "kv_lora_rank": 48,
            "q_lora_rank": 44,
            "qk_nope_head_dim": 20,
            "qk_rope_head_dim": 16,
            "v_head_dim": 28,
        },
    ),
    "seed_oss": ("SeedOss", "SeedOss", {**HEADS}),
    "arcee": ("Arcee", "Arcee", {**HEADS}),
    "nemotron": ("Nemotron", "Nemotron", {**HEADS}),
    "llama, InternLM 3": (like_llama("InternLM3"), "InternLM3", {**HEADS, "attention_bias": True, "mlp_bias": True}),
    "jais2": ("Jais2", "Jais2", {**HEADS}),
    "starcoder2": ("Starcoder2", "Starcoder2", {**TIED, **WINDOW}),
    "command-r": ("Cohere", "Cohere", {"logit_scale": 0.3}),
    "command-r, norms of each head": ("Cohere", "Cohere", {"use_qk_norm": True, "logit_scale": 0.3, "hidden_size": 24}),
    "cohere2": ("Cohere2", "Cohere2", {**HEADS, **WINDOW, "logit_scale": 0.3}),
    "stablelm": ("StableLm", "StableLm", {**PARTIAL, "use_qkv_bias": True}),
    "stablelm, parallel, norms of each head": (
        "StableLm",
        "StableLm",
        {**PARTIAL, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "falcon": ("Falcon", "Falcon", {**FALCON, "multi_query": True}),
    "falcon, a key for each head": (
        "Falcon",
        "Falcon",
        {**FALCON, **UNTIED, "num_kv_heads": None, "multi_query": False, "bias": True},
    ),
    "falcon, newer": ("Falcon", "Falcon", {**FALCON, "new_decoder_architecture": True}),
    "falcon, newer, one norm": (
        "Falcon",
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "gptneox": ("GPTNeoX", "GPTNeoX", {**PARTIAL, **NO_GROUPS}),
    "gptneox, in turn": ("GPTNeoX", "GPTNeoX", {**PARTIAL, **NO_GROUPS, "use_parallel_residual": False}),
    "gpt2": ("GPT2LMHeadModel", "GPT2", {**NO_GROUPS, "n_inner": 70}),
    "phi2": ("Phi", "Phi", {**PARTIAL}),
    "dbrx": ("Dbrx", "Dbrx", DBRX),
}


def tokens_of(n, seed):
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


def made(name, **more):
    """The model in transformers."""
    cls, config, changes = MODELS[name]
    changes = changes | more
    config = getattr(transformers, f"{config}Config")(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    if isinstance(cls, str):
        cls = getattr(transformers, cls, None) or getattr(transformers, f"{cls}ForCausalLM")
    model = random_model(cls, config)
    for key, buffer in model.named_buffers():
        if key.endswith(("layer_scalar", "e_score_correction_bias")):
            buffer.normal_(1.0, 0.2)
    return model


def test_minicpm_is_granite_by_other_names(tmp_path):
    """transformers doesn't have it, but Granite with its factors."""
    factors = {"embedding_multiplier": 3.0, "logits_scaling": 60 / 25, "residual_multiplier": 1.4 / 4**0.5}
    config = transformers.GraniteConfig(**{**SIZES, **factors, "attention_multiplier": 10**-0.5})
    model, tokens = random_model(transformers.GraniteForCausalLM, config), tokens_of(N_TOKENS, 0)
    converted(tmp_path, model)
    path = tmp_path / "checkpoint" / "config.json"
    values = json.loads(path.read_text())
    for key in (*factors, "attention_multiplier", "mlp_bias"):
        del values[key]
    values |= {"architectures": ["MiniCPMForCausalLM"], "scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 25}
    path.write_text(json.dumps(values))
    convert(path.parent, tmp_path / "minicpm.gguf", "f32")
    with ggpy.load(tmp_path / "minicpm.gguf", n_ctx=N_CTX, kv_type="f32", n_threads=2) as ours:
        logits = ours.logits(tokens)
    assert np.abs(logits - transformers_logits(model, tokens)).max() <= 2e-3
    theirs = llama_cpp_logprobs(tmp_path / "minicpm.gguf", path.parent, [tokens], n_ctx=256, n_vocab=N_VOCAB)[0]
    assert np.ptp(logits) > 1
    assert (np.exp(theirs) * (theirs - log_softmax(logits[-1]))).sum() <= 1e-3


def log_softmax(logits):
    x = logits.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path, name):
    model, tokens = made(name), tokens_of(N_TOKENS, 0)
    expected = transformers_logits(model, tokens)
    assert np.ptp(expected) > 1
    with ggpy.load(converted(tmp_path, model), n_ctx=N_CTX, kv_type="f32", n_threads=2) as ours:
        at_once = ours.logits(tokens)
        assert np.abs(at_once - expected).max() <= 2e-3
        # In pieces, then one by one; from the beginning and past the window: the same bits.
        with ours.new_sequence() as sequence:
            stops = [1, 2, 40, 67, *range(68, N_TOKENS + 1)]
            for start, stop in zip([0, *stops], stops, strict=False):
                np.testing.assert_array_equal(sequence.extend(tokens[start:stop]), at_once[stop - 1])
        # Several at once.
        prompts = [tokens[:50], tokens[:7], tokens_of(33, 1)]
        alone = [ours.generate(prompt, max_tokens=5, temperature=0).run().ids for prompt in prompts]
        assert sorted(result.ids for result in ours.generate_batch(prompts, max_tokens=5, temperature=0)) == sorted(alone)


#: those whose odd sizes llama.cpp takes, and whose windows and frequencies it doesn't compute in another way
IN_LLAMA_CPP = (
    *("llama, odd", "gemma3", "gpt-oss, default rope", "mistral3", "phi3, long", "granite", "smollm3", "olmo2, windows"),
    *("hunyuan-dense", "glm4", "command-r", "stablelm", "gptneox", "gpt2", "phi2"),
    *("granite_swa", "granite_swa, experts", "command-r, norms of each head", "stablelm, parallel, norms of each head"),
    *("falcon", "falcon, newer", "falcon, newer, one norm", "gemma", "exaone", "mellum, one base"),
    *("afmoe", "llama, InternLM 3", "jais2", "olmo", "olmo, bounded", "dbrx"),
    *("hunyuan-dense, another base", "hunyuan-moe"),
    *("gemma4, keys are values", "gemma4, experts", "granitemoe", "glm4moe", "ernie4_5-moe, untied"),
    *("dots1, no groups", "exaone-moe", "minimax-m2", "deepseek2, GLM-4.7-Flash"),
)


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_computes_the_same_from_the_file(tmp_path, name):
    more = {"num_hidden_layers": 64} if name == "command-r, norms of each head" else {}  # where llama.cpp looks for them
    path, tokens = converted(tmp_path, made(name, **more)), tokens_of(N_TOKENS, 0)
    lengths = [5, N_TOKENS]
    prompts = [tokens[:n] for n in lengths]
    theirs = llama_cpp_logprobs(path, tmp_path / "checkpoint", prompts, n_ctx=256, n_vocab=N_VOCAB)
    with ggpy.load(path, n_ctx=N_CTX, kv_type="f32", n_threads=2) as model:
        logits = model.logits(tokens)[[n - 1 for n in lengths]]
    ours = log_softmax(logits)
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).max() <= 1e-3


def test_a_second_base_that_llama_cpp_does_not_read_is_said(tmp_path):
    for name in ("olmo2, windows", "olmo2, windows, two bases"):
        folder = tmp_path / name
        folder.mkdir()
        converted(folder, made(name))
        plan = convert(folder / "checkpoint", tmp_path / "out.gguf", "f32", dry_run=True)
        assert any("llama.cpp doesn't read" in note for note in plan.notes) is ("two bases" in name)


@pytest.mark.parametrize(("name", "most"), {"granitemoe": 1e-3, "glm4moe": 1e-3, "gemma4, experts": 0.1}.items())
def test_mixtures_in_f16_equal_transformers_with_such_weights(tmp_path, name, most):
    """llama.cpp rounds activations to float16 before it multiplies with such weights, too. That alone is its distance:
    large where attention's scores aren't scaled down, as in Gemma 4, and where a rounded score chooses another expert."""
    model, tokens = made(name), tokens_of(N_TOKENS, 0)
    path = converted(tmp_path, model, "f16")
    theirs = llama_cpp_logprobs(path, tmp_path / "checkpoint", [tokens[:n] for n in (20, N_TOKENS)], 256, N_VOCAB)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim > 1 and not key.endswith(("gate.weight", "router.weight", "router.proj.weight")):
                p.copy_(p.half())
    expected = transformers_logits(model, tokens)
    with ggpy.load(path, n_ctx=N_CTX, kv_type="f32", n_threads=2) as ours:
        assert np.abs(ours.logits(tokens) - expected).max() <= 2e-3
    truth = torch.log_softmax(torch.tensor(expected[[19, N_TOKENS - 1]]), -1).numpy()
    assert 0 < (np.exp(truth) * (truth - theirs)).sum(-1).mean() <= most
