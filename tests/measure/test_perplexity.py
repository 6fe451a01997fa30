"""Perplexity and divergence against a plain computation on all logits, and against llama.cpp."""

import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import ggpy
from converters import convert
from ggpy.errors import Error
from ggpy.measure.logits_file import LogitsFile, counted
from ggpy.measure.perplexity import Perplexity, chunks_of, measure_perplexity, with_bos
from tests.models.checkpoints import ids

DEMO = Path(ggpy.__file__).parent / "demo_model"
N_CTX = 64


@pytest.fixture(scope="module")
def chunks():
    return chunks_of(ids(200), N_CTX)


@pytest.fixture(scope="module")
def base(model, chunks, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.bin"
    measure_perplexity(model, chunks, save=path)
    return path


def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain(model, chunks):
    """Log-probabilities of the counted tokens, and the tokens that came."""
    half = chunks.shape[1] // 2
    rows = [log_softmax(model.logits(with_bos(model, c)))[half:-1] for c in chunks]
    return np.concatenate(rows), chunks[:, half + 1 :].ravel()


@pytest.mark.parametrize("n_ctx", [4, 63, 64])
def test_perplexity_is_that_of_all_logits(model, n_ctx):
    chunks = chunks_of(ids(200), n_ctx)[:5]
    logs, targets = plain(model, chunks)
    nll = -logs[np.arange(len(targets)), targets]
    seen = []
    result = measure_perplexity(model, chunks, progress=seen.append)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-5, atol=1e-5)
    assert math.isclose(result.value, np.exp(nll.mean()), rel_tol=1e-5)
    assert math.isclose(result.error, result.value * nll.std(ddof=1) / math.sqrt(len(nll)), rel_tol=1e-4)
    assert [s.n_chunks for s in seen] == list(range(1, len(chunks) + 1)) and seen[-1].value == result.value


def test_divergence_is_that_of_all_logits(model, coarse_model, chunks, base):
    p, targets = plain(model, chunks)
    q, _ = plain(coarse_model, chunks)
    with LogitsFile(base) as opened:
        result = measure_perplexity(coarse_model, chunks, base=opened)
    kl = (np.exp(p) * (p - q)).sum(-1)
    step = 16 / 65535  # of the base's file, at most
    np.testing.assert_allclose(result.divergence.kl, kl, atol=step)
    measured = result.summary()
    assert math.isclose(measured["kl_mean"][0], kl.mean(), abs_tol=step / 4) and kl.mean() > step
    assert math.isclose(measured["kl_median"][0], np.median(kl), abs_tol=step)
    assert math.isclose(measured["kl_max"][0], kl.max(), abs_tol=step)
    assert measured["top1_agreement"][0] == (p.argmax(-1) == q.argmax(-1)).mean()
    rows = np.arange(len(targets))
    change = np.exp(q[rows, targets]) - np.exp(p[rows, targets])
    assert math.isclose(measured["p_change_mean"][0], change.mean(), abs_tol=step)
    assert math.isclose(measured["p_change_rms"][0], np.sqrt((change**2).mean()), abs_tol=step)
    assert math.isclose(measured["base_perplexity"][0], np.exp(-p[rows, targets].mean()), rel_tol=step)


def test_the_base_diverges_from_itself_by_its_rounding_alone(model, chunks, base):
    with LogitsFile(base) as opened:
        result = measure_perplexity(model, chunks, base=opened)
    assert np.abs(result.divergence.kl).max() < 16 / 65535
    assert result.divergence.same_top.mean() > 0.99
    assert math.isclose(result.summary()["perplexity_ratio"][0], 1, abs_tol=1e-4)


def test_the_file_has_the_layout_of_llama_perplexity(model, chunks, base):
    data = base.read_bytes()
    n_vocab = model.architecture.n_vocab
    assert data[:8] == b"_logits_" and struct.unpack_from("<3i", data, 8) == (N_CTX, n_vocab, len(chunks))
    at = 20 + 4 * chunks.size
    assert (np.frombuffer(data[20:at], "<i4") == chunks.ravel()).all()
    rows = np.frombuffer(data[at:], np.uint8).reshape(len(chunks) * (N_CTX - 1 - N_CTX // 2), -1)
    assert rows.shape[1] == 2 * (2 * ((n_vocab + 1) // 2) + 4)
    scale, least = rows[:, :8].copy().view("<f4").T
    got = rows[:, 8:].copy().view("<u2")[:, :n_vocab] * scale[:, None] + least[:, None]
    expected, _ = plain(model, chunks)
    expected = np.maximum(expected, expected.max(-1, keepdims=True) - 16)
    assert (np.abs(got - expected) <= scale[:, None] / 2 + 1e-5).all()


def test_a_row_of_equal_logits_is_kept(tmp_path):
    from ggpy.measure.logits_file import LogitsWriter

    path = tmp_path / "base.bin"
    with open(path, "wb") as file:
        writer = LogitsWriter(file, np.zeros((1, 4), np.int32), 5)  # 5: rows have one level more
        writer.write(np.full((1, 5), 2.5, np.float32), np.array([2.5 + math.log(5)]))
    with LogitsFile(path) as opened:
        got, top = opened.read(counted(4))
    np.testing.assert_allclose(got, -math.log(5), rtol=1e-6)
    assert top.tolist() == [0]


def test_bad_bases_are_refused(model, chunks, base, tmp_path):
    cut, other = tmp_path / "cut", tmp_path / "other"
    other.write_bytes(b"GGUF" + base.read_bytes())
    with pytest.raises(Error, match="not a file of log-prob"):
        LogitsFile(other)
    for vocabulary in (2**31 - 1, 2**28, -1, 0):
        changed = bytearray(base.read_bytes())
        changed[12:16] = struct.pack("<i", vocabulary)
        cut.write_bytes(changed)
        with pytest.raises(Error, match="damaged or cut off"):
            LogitsFile(cut)
    for size in (9, 25, base.stat().st_size - 1):
        cut.write_bytes(base.read_bytes()[:size])
        with pytest.raises(Error, match="damaged or cut off"):
            LogitsFile(cut)
    with LogitsFile(base) as opened, pytest.raises(Error, match="another text"):
        measure_perplexity(model, chunks + 1, base=opened)
    changed = bytearray(base.read_bytes())
    changed[12:16] = struct.pack("<i", 511)  # rows keep their size
    other.write_bytes(changed)
    with LogitsFile(other) as opened, pytest.raises(Error, match="vocabulary of 511"):
        measure_perplexity(model, chunks, base=opened)


@pytest.mark.parametrize("damage", [b"\xff" * 8, struct.pack("<2f", 1, 0), struct.pack("<2f", -1, 0), b"\0\0\x80\x7f" * 2])
@pytest.mark.parametrize("row", [0, -1])
def test_values_that_are_no_log_probabilities_are_refused(model, chunks, base, tmp_path, damage, row):
    content = bytearray(base.read_bytes())
    row_bytes = 8 + 2 * 512
    at = 20 + 4 * chunks.size if row == 0 else len(content) - row_bytes
    content[at : at + 8] = damage
    other = tmp_path / "other"
    other.write_bytes(content)
    with LogitsFile(other) as opened, pytest.raises(Error, match=r"other: damaged: there are log-prob"):
        measure_perplexity(model, chunks, base=opened)


def test_an_interrupted_run_leaves_no_base(model, chunks, tmp_path):
    def stop(sofar):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(model, chunks, save=tmp_path / "base.bin", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_the_run(model, chunks, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(Error, match=r"base\.bin: needs .* kB, the disk has 1 kB left"):
        measure_perplexity(model, chunks, save=tmp_path / "base.bin", progress=lambda sofar: pytest.fail("it ran"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(model, chunks, value):
    model.hooks["output_norm"] = lambda name, x: np.full_like(x, value)
    try:
        with pytest.raises(Error, match="aren't finite, in chunk 0"):
            measure_perplexity(model, chunks)
    finally:
        model.hooks.clear()


def test_a_hopeless_model_has_an_infinite_perplexity():
    assert Perplexity(np.full(5, 800.0), 1, 12).value == math.inf


def test_short_texts_and_chunks_are_refused(model):
    with pytest.raises(Error, match="63 tokens, too few for one chunk of 64"):
        chunks_of(ids(63), 64)
    with pytest.raises(Error, match="at least 3"):
        measure_perplexity(model, chunks_of(ids(64), 2))


def test_chunks_begin_with_bos_where_the_model_wants_it(model, monkeypatch):
    chunk = np.array([7, 8, 9, 10], np.int32)
    monkeypatch.setattr(model.tokenizer, "add_bos", True)
    assert with_bos(model, chunk) == [model.tokenizer.bos, 8, 9, 10]
    monkeypatch.setattr(model.tokenizer, "add_bos", False)
    assert with_bos(model, chunk) == [7, 8, 9, 10]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model as f32, and four chunks of text that it was not trained on."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(DEMO, path, "f32")
    with ggpy.load(path, n_ctx=256, kv_type="f32", n_threads=2) as model:
        text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
        chunks = chunks_of(model.tokenize(text, special=False), 256, 4)
        yield path, chunks, measure_perplexity(model, chunks)


def perplexity_of(logits, chunks):
    """From the logits of each chunk."""
    nll = []
    for rows, chunk in zip(logits, chunks, strict=True):
        half = len(chunk) // 2
        nll.append(-log_softmax(rows[half:-1])[np.arange(len(chunk) - 1 - half), chunk[half + 1 :]])
    return np.exp(np.mean(nll))


def test_perplexity_of_a_trained_model_is_that_of_transformers_logits(demo):
    _, chunks, got = demo
    tokens = chunks.astype(np.int64)
    bos = json.loads((DEMO / "config.json").read_text())["bos_token_id"]
    tokens[:, 0] = bos
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    assert math.isclose(got.value, perplexity_of(logits, chunks), rel_tol=1e-3)
    assert got.value < 60


def test_perplexity_of_a_trained_model_is_that_of_llama_cpps_logits(demo):
    llama_cpp = pytest.importorskip("llama_cpp")
    path, chunks, got = demo
    theirs = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, logits_all=True, n_threads=1, verbose=False)
    logits = []
    for chunk in chunks:
        theirs.reset()
        theirs.eval([theirs.token_bos(), *chunk[1:].tolist()])
        logits.append(theirs.scores[:256].copy())
    assert math.isclose(got.value, perplexity_of(logits, chunks), rel_tol=0.01)
