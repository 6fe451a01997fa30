"""Every architecture against transformers: tiny random models of odd sizes, converted. One is a row of MODELS."""

import numpy as np
import pytest
import transformers

import ggpy

from .checkpoints import converted, random_model, transformers_logits

N_VOCAB, N_TOKENS = 509, 90
#: heads don't share the embedding, three share a head of keys; the window ends long before the text
SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
WINDOW = {"sliding_window": 30}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
#: class without ForCausalLM, its configuration without Config, sizes
MODELS = {
    "gemma2": ("Gemma2", "Gemma2", {**WINDOW, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", "Gemma3Text", {**WINDOW, "num_hidden_layers": 7}),
    "gemma3, scaled": (
        "Gemma3",
        "Gemma3Text",
        {
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
}


def tokens_of(n, seed):
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


def made(name):
    """The model in transformers."""
    cls, config, changes = MODELS[name]
    config = getattr(transformers, f"{config}Config")(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    return random_model(getattr(transformers, f"{cls}ForCausalLM"), config)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path, name):
    model, tokens = made(name), tokens_of(N_TOKENS, 0)
    expected = transformers_logits(model, tokens)
    assert np.ptp(expected) > 1
    with ggpy.load(converted(tmp_path, model), n_ctx=256, kv_type="f32", n_threads=2) as ours:
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
        assert [result.ids for result in ours.generate_batch(prompts, max_tokens=5, temperature=0)] == alone
