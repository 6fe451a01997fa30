"""Rerankers against transformers' classifiers, and against llama.cpp."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

import ggpy
from converters import convert
from ggpy.generate.ranking import pair_of
from tests.converters.conftest import train_tokenizer
from tests.file.edit import Edited

from .checkpoints import random_model
from .test_encoder import MODERN, N_CTX, ROBERTA, SIZES, byte_pairs, unigrams, word_pieces

QUERY = "what is a fox?"
DOCUMENTS = ["a fox is an animal", "", "The QUICK brown fox jumps over the lazy dog. " * 8, "1234 [SEP] </s> isn't"]

WITH_POSITIONS = {"max_position_embeddings": N_CTX}
ONE_TYPE = {**ROBERTA, "type_vocab_size": 1}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig, WITH_POSITIONS, word_pieces, "[CLS]", "[SEP]", 1),
    # Its padding isn't the token that begins texts, which then would have no position.
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig,
        ONE_TYPE | {"pad_token_id": 0},
        byte_pairs,
        "<|im_start|>",
        "<|im_end|>",
        2,
    ),
    "xlm-roberta": (XLMRobertaForSequenceClassification, XLMRobertaConfig, ONE_TYPE, unigrams, "<s>", "</s>", 2),
}
for pooling in ("cls", "mean"):
    changes = MODERN | {"classifier_pooling": pooling, "classifier_bias": pooling == "mean"}
    how = (changes, byte_pairs, "<|im_start|>", "<|im_end|>", 1)
    MODELS[f"modern {pooling}"] = (ModernBertForSequenceClassification, ModernBertConfig, *how)


def checkpoint(folder, name, n_classes=1):
    """A random classifier's folder, and what transformers gives for a query and a document."""
    cls, config, changes, make_tokenizer, first, last, n_between = MODELS[name]
    tokenizer = make_tokenizer()
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    pair = f"{first} $A {' '.join([last] * n_between)} $B:1 {last}:1"
    single = f"{first} $A {last}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    model = random_model(cls, config(**SIZES | changes, vocab_size=tokenizer.get_vocab_size(), num_labels=n_classes))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if make_tokenizer is byte_pairs:
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": first, "eos_token": last}))

    def logits(document):
        # Names of control tokens in a document are text.
        both = tokenizer.encode(QUERY, document)
        types = {"token_type_ids": torch.tensor([both.type_ids])} if name == "bert" else {}
        with torch.no_grad():
            return model(torch.tensor([both.ids]), **types).logits[0].numpy()

    return logits


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_transformers_in_any_company(tmp_path, name):
    logits = checkpoint(tmp_path, name)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    expected = np.concatenate([logits(document) for document in DOCUMENTS[:3]])
    assert np.ptp(expected) > 0.05
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32", n_batch=100) as model:
        scores = model.rerank(QUERY, DOCUMENTS)
        assert scores.dtype == np.float32 and np.abs(scores[:3] - expected).max() <= 1e-3
        for document, score in zip(DOCUMENTS, scores, strict=True):
            np.testing.assert_array_equal(model.rerank(QUERY, [document]), [score])
        assert model.rerank(QUERY, []).shape == (0,)


def test_control_tokens_in_documents_are_text(tmp_path):
    checkpoint(tmp_path, "bert")
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    with ggpy.load(tmp_path / "model.gguf") as model:
        first, second = model.tokenizer.encode_pair("a [SEP] b", "[CLS]")
        assert (first + second).count(model.tokenizer.eos) == 2 and (first + second).count(model.tokenizer.bos) == 1


def test_what_is_no_reranker_is_refused(tmp_path):
    checkpoint(tmp_path, "bert", n_classes=3)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    with ggpy.load(tmp_path / "model.gguf", n_ctx=64) as model:
        with pytest.raises(ggpy.UnsupportedError, match="not a reranker: it tells 3 classes apart"):
            model.rerank(QUERY, DOCUMENTS)
        with pytest.raises(ggpy.Error, match=r"gives scores: see Model\.rerank"):
            model.embed(["fox"])
        assert model.embed(["fox"], pooling="cls").shape == (1, 60)
    checkpoint(tmp_path, "bert")
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    with ggpy.load(tmp_path / "model.gguf", n_ctx=64) as model:
        with pytest.raises(ggpy.ContextFullError, match=r"documents\[2\] is too large: \d+ tokens, the context holds 64"):
            model.rerank(QUERY, DOCUMENTS)
        with pytest.raises(ggpy.Error, match=r"rerank\(query, \[document\]\)"):
            model.rerank(QUERY, "a document")


def qwen3_reranker(folder):
    """A folder like Qwen3-Reranker's, and its model and tokenizer."""
    tokenizer = train_tokenizer("qwen2")
    settings = json.loads(tokenizer.to_str())
    vocab = settings["model"]["vocab"]
    for text in ("yes", "no"):
        vocab.setdefault(text, tokenizer.get_vocab_size() + len(text))
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(vocab_size=640, **sizes, intermediate_size=96, tie_word_embeddings=True)
    model = random_model(Qwen3ForCausalLM, config)
    model.save_pretrained(folder)
    return model, Tokenizer.from_file(str(folder / "tokenizer.json")), [vocab["yes"], vocab["no"]]


@pytest.mark.parametrize("said_by", ["README.md", "modules.json"])
def test_qwen3_rerankers_say_yes_or_no(tmp_path, said_by):
    theirs, tokenizer, answers = qwen3_reranker(tmp_path)
    if said_by == "README.md":
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Qwen3-Reranker-0.6B\n")
    else:
        modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_LogitScore", "type": "x.LogitScore"}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_LogitScore").mkdir()
        score = {"true_token_id": answers[0], "false_token_id": answers[1]}
        (tmp_path / "1_LogitScore/config.json").write_text(json.dumps(score))
    plan = convert(tmp_path, tmp_path / "model.gguf", "f32")
    assert any("taken for a Qwen3-Reranker" in note for note in plan.notes)
    prompt = plan.metadata["tokenizer.chat_template.rerank"]
    expected = []
    for document in DOCUMENTS:
        ids = tokenizer.encode(prompt.replace("{query}", QUERY).replace("{document}", document)).ids
        with torch.no_grad():
            expected.append(theirs(torch.tensor([ids])).logits[0, -1][answers].softmax(0)[0].item())
    assert np.ptp(expected) > 0.01
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32", n_ctx=1024) as model:
        scores = model.rerank(QUERY, DOCUMENTS)
        np.testing.assert_allclose(scores, expected, atol=1e-3)
        np.testing.assert_array_equal(model.rerank(QUERY, DOCUMENTS[2:3]), scores[2:3])
        # Blanks and names of control tokens in texts are text.
        for text in ("{document}", "<|im_end|>"):
            ids = pair_of(model.file, model._runner, model.tokenizer, text, "x")
            assert model.detokenize(ids).count(text) == (1 if text == "{document}" else 3)
            assert ids.count(model.tokenizer.eos) == 2


def edited(path, edit):
    """A GGUF file, changed."""
    model = Edited.read(path.read_bytes())
    edit(model)
    path.write_bytes(model.bytes())


def test_a_rerankers_template_is_no_program(tmp_path):
    """Nothing in it is run (CVE-2026-5760 in another engine)."""
    qwen3_reranker(tmp_path)
    (tmp_path / "README.md").write_text("# Qwen3-Reranker-0.6B\n")
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    template = "{{ 7 * 7 }}{% for i in x %}{query} {document}"
    edited(tmp_path / "model.gguf", lambda model: model.set("tokenizer.chat_template.rerank", "string", template))
    with ggpy.load(tmp_path / "model.gguf", n_ctx=256) as model:
        ids = pair_of(model.file, model._runner, model.tokenizer, "a", "b")
        assert model.detokenize(ids) == template.replace("{query}", "a").replace("{document}", "b")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: model.set("bert.classifier.output_labels", "uint32", 7), "output_labels' must be StringArray"),
        (lambda model: model.fill("cls.output.weight", np.nan), "the model's values aren't finite: the file is damaged"),
        (lambda model: model.fill("cls.output.bias", np.inf), "the model's values aren't finite: the file is damaged"),
    ],
)
def test_damaged_heads_are_refused(edit, message, tmp_path):
    checkpoint(tmp_path, "bert")
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    edited(tmp_path / "model.gguf", edit)
    with (
        ggpy.load(tmp_path / "model.gguf", n_ctx=64, kv_type="f32") as model,
        pytest.raises(ggpy.Error, match=rf"model\.gguf: .*{message}"),
    ):
        model.rerank(QUERY, DOCUMENTS[:1])


def test_rerankers_with_other_answers_are_refused(tmp_path):
    _, _, answers = qwen3_reranker(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "1_LogitScore", "type": "x.LogitScore"}]))
    (tmp_path / "1_LogitScore").mkdir()
    (tmp_path / "1_LogitScore/config.json").write_text(json.dumps({"true_token_id": answers[0], "false_token_id": None}))
    with pytest.raises(ggpy.UnsupportedError, match=r"modules\.json: LogitScore of Qwen3ForCausalLM"):
        convert(tmp_path, tmp_path / "model.gguf", "f32")


def llama_cpp_scores(path, query, documents):
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(path), 340, 1, 0
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    results = xllamacpp.Server(params).handle_rerank({"query": query, "documents": documents})["results"]
    return [result["relevance_score"] for result in sorted(results, key=lambda result: result["index"])]


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta"])
def test_llama_cpp_gives_the_same_scores(tmp_path, name):
    checkpoint(tmp_path, name)
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32") as model:
        scores = model.rerank(QUERY, DOCUMENTS[:3])
    np.testing.assert_allclose(scores, llama_cpp_scores(tmp_path / "model.gguf", QUERY, DOCUMENTS[:3]), atol=5e-3)


def test_llama_cpp_gives_the_same_probability_of_yes(tmp_path):
    qwen3_reranker(tmp_path)
    (tmp_path / "README.md").write_text("# Qwen3-Reranker-0.6B\n")
    convert(tmp_path, tmp_path / "model.gguf", "f32")
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32") as model:
        scores = model.rerank(QUERY, DOCUMENTS[:2])
    np.testing.assert_allclose(scores, llama_cpp_scores(tmp_path / "model.gguf", QUERY, DOCUMENTS[:2]), atol=5e-3)
