"""Embeddings and hidden states against transformers' and llama.cpp's; the same bits in any company."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import ggpy
from tests.models.checkpoints import converted, ids, random_model
from tests.models.test_llama import SIZES, SMOLLM2, rewritten
from tests.models.test_moe import made

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = (40, 1, 90, 64, 7, 128)
TEXTS = [ids(n, seed=n) for n in LENGTHS]


def tiny(name):
    if name == "deepseek2":
        return made("V2-Lite")
    cls, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[name]
    return random_model(cls, config(**SIZES, head_dim=32))


@pytest.fixture(scope="module", params=["llama", "qwen3", "deepseek2"])
def pair(request, tmp_path_factory):
    """A file, and transformers' hidden states (n_layer + 1, n_tokens, n_embd) of each text."""
    model = tiny(request.param)
    with torch.no_grad():
        states = [model(torch.tensor([t]), output_hidden_states=True).hidden_states for t in TEXTS]
    return converted(tmp_path_factory.mktemp(request.param), model), [torch.cat(s).numpy() for s in states]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("llama"), tiny("llama"))


def pooled(states, pooling):
    last = states[-1]
    return {"mean": last.mean(0), "cls": last[0], "last": last[-1]}[pooling]


def test_hidden_states_equal_transformers(pair):
    path, expected = pair
    with ggpy.load(path, n_ctx=128, n_batch=50, kv_type="f32", n_threads=2) as model:
        for text, states in zip(TEXTS, expected, strict=True):
            got = model.hidden_states(text)
            assert got.dtype == np.float32 and np.abs(got - states).max() <= 1e-3
            np.testing.assert_array_equal(model.hidden_states(text, layers=[-1, 1]), got[[-1, 1]])
    assert np.ptp(expected[0]) > 1


def test_embeddings_equal_transformers(pair):
    path, expected = pair
    with ggpy.load(path, n_ctx=128, n_batch=50, kv_type="f32", n_threads=2) as model:
        for pooling in ("mean", "cls", "last"):
            wanted = np.stack([pooled(states, pooling) for states in expected])
            got = model.embed(TEXTS, pooling=pooling, normalize=False)
            assert got.dtype == np.float32 and np.abs(got - wanted).max() <= 1e-3
            wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
            assert np.abs(model.embed(TEXTS, pooling=pooling) - wanted).max() <= 1e-4
        tokens = model.embed(TEXTS, pooling="none", normalize=False)
        assert all(np.abs(t - states[-1]).max() <= 1e-3 for t, states in zip(tokens, expected, strict=True))


def test_texts_give_the_same_bits_in_any_company(llama):
    alone: dict = {}
    for n_batch in (512, 33, 1):
        with ggpy.load(llama, n_ctx=128, n_batch=n_batch, n_threads=2) as model:
            for pooling in ("mean", "cls", "last"):
                one = np.concatenate([model.embed([t], pooling=pooling) for t in TEXTS])
                np.testing.assert_array_equal(one, alone.setdefault(pooling, one))
                np.testing.assert_array_equal(one, model.embed(TEXTS, pooling=pooling))
                np.testing.assert_array_equal(one[::-1], model.embed(TEXTS[::-1], pooling=pooling))
            assert model._runner.pages.n_free == model._runner.pages.n_pages


def test_texts_and_generations_go_on_together(llama):
    with ggpy.load(llama, n_ctx=128) as model:
        vectors = model.embed(TEXTS)
        expected = "".join(model.generate(ids(5), max_tokens=100, temperature=1, seed=3))
        found: list[str] = []
        thread = threading.Thread(
            target=lambda: found.extend(
                "".join(model.generate(ids(5), max_tokens=100, temperature=1, seed=3)) for _ in range(3)
            )
        )
        thread.start()
        while thread.is_alive():
            np.testing.assert_array_equal(model.embed(TEXTS), vectors)
        thread.join()
        assert found == [expected] * 3


def test_few_pages_are_enough(llama):
    with ggpy.load(llama, n_ctx=128, kv_type="f32") as model:
        page = model.kv_bytes // 512
    with ggpy.load(llama, n_ctx=128, kv_type="f32", kv_memory=2 * page) as model:
        few = model.embed(TEXTS)
        held = model.new_sequence()
        held.extend(ids(100))
        with pytest.raises(ggpy.ContextFullError, match="kv_memory"):
            model.embed(TEXTS)
        held.close()
        np.testing.assert_array_equal(few, model.embed(TEXTS))


def test_files_say_how_to_pool_and_what_ends_a_text(llama, tmp_path):
    with ggpy.load(llama, n_ctx=64) as model:
        text = "The quick brown fox"
        tokens = model.tokenize(text)
        last, mean = (model.embed([tokens], pooling=p) for p in ("last", "mean"))
        np.testing.assert_array_equal(model.embed([text]), last)
        eos = model.tokenizer.eos
        with_eos = model.embed([[*tokens, eos]])
    for number, expected in ((1, mean), (3, last)):
        path = rewritten(llama, tmp_path / f"{number}.gguf", add=lambda w, n=number: w.add_uint32("llama.pooling_type", n))
        with ggpy.load(path, n_ctx=64) as model:
            np.testing.assert_array_equal(model.embed([text]), expected)
    with ggpy.load(rewritten(llama, tmp_path / "eos.gguf", add=lambda w: w.add_add_eos_token(True)), n_ctx=64) as model:
        np.testing.assert_array_equal(model.embed([text]), with_eos)
    path = rewritten(llama, tmp_path / "bad.gguf", add=lambda w: w.add_uint32("llama.pooling_type", 9))
    with ggpy.load(path, n_ctx=64) as model, pytest.raises(ggpy.GGUFError, match=r"pooling_type: 9"):
        model.embed([text])


def test_what_cannot_be_embedded_is_refused(llama):
    with ggpy.load(llama, n_ctx=32) as model:
        assert model.embed([]).shape == (0, 64) and model.embed([], pooling="none") == []
        for texts, message in [
            ("a text", r"embed\(\[text\]\)"),
            ([ids(3), ids(33)], r"texts\[1\] is too large: 33 tokens, the context holds 32"),
            ([ids(3), []], r"texts\[1\] has no tokens"),
            ([[512]], "token 512"),
            ([1, 2], "text or token ids"),
        ]:
            with pytest.raises(ggpy.Error, match=message):
                model.embed(texts)
        with pytest.raises(ggpy.Error, match="pooling 'max'; there are none, mean"):
            model.embed([ids(3)], pooling="max")
        with pytest.raises(ggpy.Error, match="layer 4; there are 0 to 3"):
            model.hidden_states(ids(3), layers=[4])
        with pytest.raises(ggpy.ContextFullError):
            model.hidden_states(ids(33))


def test_hooks_change_embeddings_and_may_wait_for_logits(llama):
    with ggpy.load(llama, n_ctx=32) as model:
        before = model.embed([ids(8)])
        with model.hooked({"logits": lambda name, value: None, "blk.1.out": lambda name, value: value * 0}):
            assert not np.array_equal(model.embed([ids(8)]), before)
            assert not model.hidden_states(ids(8))[2].any()
        np.testing.assert_array_equal(model.embed([ids(8)]), before)
        with model.hooked({"blk.9.out": lambda name, value: None}), pytest.raises(ggpy.GraphError, match=r"blk\.9\.out"):
            model.embed([ids(8)])


def llama_cpp_embeddings(path, texts, pooling, n_ctx=512):
    """Those of llama.cpp, (n_texts, n_embd), of length 1."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(path), n_ctx, 1, 0
    params.embedding, params.pooling_type = True, getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling}")
    found = xllamacpp.Server(params).handle_embeddings({"input": texts})["data"]
    return np.array([one["embedding"] for one in found])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_llama_cpp(llama, tmp_path, pooling):
    texts = ["The quick brown fox jumps", "over", "isn't it? the lazy dog"]
    paths = [(llama, 0.9999)]
    if SMOLLM2 is not None:
        paths.append((shutil.copy(Path(SMOLLM2.origin).parent / SMOLLM2_FILE, tmp_path), 0.99))
    for path, nearest in paths:
        expected = llama_cpp_embeddings(path, texts, pooling.upper())
        with ggpy.load(path, n_ctx=128) as model:
            assert (model.embed(texts, pooling=pooling) * expected).sum(1).min() > nearest
