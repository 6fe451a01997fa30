"""The commands that measure, as a user meets them."""

import json

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ggpy.quantization.imatrix import read_imatrix
from tests.models.checkpoints import converted, random_model
from tests.models.test_llama import SIZES
from tests.models.test_moe import made

from .test_cli import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """f32.gguf, q8_0.gguf of one model, and a text."""
    folder = tmp_path_factory.mktemp("measure")
    model = random_model(LlamaForCausalLM, LlamaConfig(**SIZES))
    converted(folder, model)
    converted(folder, model, "q8_0")
    (folder / "text.txt").write_text("In the beginning was the Word, and the Word was with God. " * 12)
    return folder


def test_perplexity_and_divergence_from_a_saved_base(folder, capsys):
    arguments = ("-c", 32, "-n", 3, "-t", 1)
    code, out, _ = call(
        capsys, "perplexity", folder / "f32.gguf", folder / "text.txt", *arguments, "--save-logits", folder / "base"
    )
    assert code == 0 and "45 tokens in 3 chunks of 32" in out and "±" in out
    for text in ((), (folder / "text.txt",)):
        code, out, _ = call(
            capsys, "perplexity", folder / "q8_0.gguf", *text, "--kl-base", folder / "base", "--json", "-t", 1
        )
        facts = json.loads(out)
        assert code == 0 and facts["n_chunks"] == 3 and facts["n_ctx"] == 32
        assert 0 < facts["kl_mean"]["value"] < 0.1 and facts["kl_max"]["error"] is None
        assert facts["top1_agreement"]["value"] > 0.8
        assert facts["perplexity"]["value"] == pytest.approx(facts["base_perplexity"]["value"], rel=0.1)
    code, out, _ = call(capsys, "perplexity", folder / "q8_0.gguf", "--kl-base", folder / "base", "-n", 1, "-t", 1)
    assert code == 0 and "15 tokens in 1 chunks" in out and "same likeliest token" in out


def test_perplexity_refuses_in_one_line(folder, capsys, tmp_path):
    code, _, err = call(capsys, "perplexity", folder / "f32.gguf")
    assert code == 1 and "name a text" in err
    (tmp_path / "short").write_text("the hand")
    code, _, err = call(capsys, "perplexity", folder / "f32.gguf", tmp_path / "short")
    assert code == 1 and "too few for one chunk of 512" in err
    code, _, err = call(capsys, "perplexity", folder / "f32.gguf", "--kl-base", tmp_path / "short")
    assert code == 1 and "not a file of log-probabilities" in err and err.count("\n") == 1


def test_imatrix_writes_what_quantize_takes(folder, capsys, tmp_path):
    out = tmp_path / "imatrix.gguf"
    code, printed, _ = call(
        capsys, "imatrix", folder / "f32.gguf", folder / "text.txt", "-o", out, "-n", 100, "-c", 32, "-t", 1
    )
    assert code == 0 and "96 tokens in 3 chunks" in printed
    matrix = read_imatrix(out)
    assert matrix.counts["blk.0.attn_q.weight"].tolist() == [96] and matrix.n_chunks == 3
    assert matrix.datasets == [str(folder / "text.txt")]
    plain, weighted = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert call(capsys, "quantize", folder / "f32.gguf", plain, "q4_0")[0] == 0
    assert call(capsys, "quantize", folder / "f32.gguf", weighted, "q4_0", "--imatrix", out)[0] == 0
    assert plain.read_bytes() != weighted.read_bytes()


def test_imatrix_tells_of_experts_that_no_token_chose(capsys, tmp_path, folder):
    path, out = converted(tmp_path, made("V2-Lite")), tmp_path / "imatrix.gguf"  # 3 of 8 experts for each of 2 tokens
    code, _, err = call(capsys, "imatrix", path, folder / "text.txt", "-o", out, "-n", 2, "-c", 2, "-t", 1)
    unseen = sum(int((c == 0).sum()) for c in read_imatrix(out).counts.values())
    assert code == 0 and unseen >= 2 * 2 * 3 and f"{unseen} experts' matrices" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("perplexity", "{f}/f32.gguf", "{text}"),
        ("imatrix", "{f}/f32.gguf", "{text}", "-o", "{t}/i.gguf"),
        ("compare", "{f}/f32.gguf", "--text", "{text}", "--types", "q4_0", "--out", "{t}/levels"),
        ("quantize", "{f}/f32.gguf", "{t}/q.gguf", "--target-size", "1M", "--text", "{text}"),
        ("experts", "{f}/f32.gguf", "--text", "{text}"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(folder, capsys, tmp_path, arguments):
    text = tmp_path / "latin-1.txt"
    text.write_bytes("Er las die Sätze".encode("latin-1"))
    arguments = [a.format(f=folder, t=tmp_path, text=text) for a in arguments]
    for content, message in ((True, "isn't text in UTF-8: invalid continuation byte at byte 12"), (False, "No such file")):
        if not content:
            text.unlink()
        code, _, err = call(capsys, *arguments)
        assert code == 1 and err.strip().splitlines()[-1].startswith(f"ggpy: {text}: {message}")
        assert [p.name for p in tmp_path.iterdir()] == [text.name] * content


def test_imatrix_needs_the_folder_before_it_runs(folder, capsys, tmp_path):
    code, _, err = call(capsys, "imatrix", folder / "f32.gguf", folder / "text.txt", "-o", tmp_path / "no" / "i.gguf")
    assert code == 1 and "there is no folder" in err


def test_error_lists_the_worst_tensors_first(folder, capsys, tmp_path):
    arguments = ("error", folder / "f32.gguf", folder / "q8_0.gguf")
    code, out, _ = call(capsys, *arguments, "--json")
    facts = json.loads(out)
    errors = [t["relative_rmse"] for t in facts["tensors"]]
    assert code == 0 and errors == sorted(errors, reverse=True) and 0 < errors[0] < 0.02 and errors[-1] == 0
    assert set(facts["layers"]) == {"0", "1", "2"} and "ffn_down" in facts["kinds"]
    assert facts["all"]["snr_db"] == pytest.approx(-20 * np.log10(facts["all"]["relative_rmse"]))
    code, out, _ = call(capsys, *arguments, "-n", 2, "--png", tmp_path / "heat.png")
    assert code == 0 and facts["tensors"][0]["name"] in out and facts["tensors"][2]["name"] not in out
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = call(capsys, *arguments, "--png", tmp_path / "no" / "heat.png")
    assert code == 1 and "there is no folder" in err and not out


def test_error_draws_experts_apart(capsys, tmp_path):
    path, out = converted(tmp_path, made("V2-Lite")), tmp_path / "q4.gguf"
    assert call(capsys, "quantize", path, out, "q4_0", "-t", 1)[0] == 0
    code, printed, _ = call(capsys, "error", path, out, "--json", "--png", tmp_path / "heat.png")
    experts = [t for t in json.loads(printed)["tensors"] if "_exps" in t["name"]]
    assert code == 0 and experts and all(len(t["matrices"]) == 8 for t in experts)
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_compare_measures_levels_of_a_checkpoint(folder, capsys, tmp_path, monkeypatch):
    from ggpy.kernels import build

    kernels = build.cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("GGPY_CACHE", str(tmp_path / "cache"))
    arguments = ("compare", folder / "checkpoint", "--text", folder / "text.txt", "--types", "q8_0, q4_0")
    options = ("-c", 32, "-n", 2, "-t", 1, "--out", tmp_path / "levels")
    code, out, _ = call(capsys, *arguments, *options)
    assert code == 0 and "base F16" in out and "Q8_0" in out and "Q4_0" in out
    code, out, _ = call(capsys, *arguments, *options, "--json")
    levels = json.loads(out)["levels"]
    assert code == 0 and [x["type"] for x in levels] == ["base F16", "Q8_0", "Q4_0"] and levels[1]["on_front"]
    assert {p.suffix for p in (tmp_path / "levels").glob("*-levels.*")} == {".json", ".csv", ".md", ".png", ".html"}
    code, _, err = call(capsys, *arguments, *options, "--imatrix", folder / "f32.gguf")
    assert code == 1 and err.startswith("ggpy: ") and "not an importance matrix" in err and err.count("\n") == 1
