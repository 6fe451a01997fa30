"""`ggpy graph`, `experts` and `profile`: what they print and write."""

import json

import numpy as np
import pytest

import ggpy
from ggpy.cli.common import byte_count
from ggpy.cli.experts import picture
from ggpy.generate.experts import expert_use, simulate_cache
from tests.models.checkpoints import converted
from tests.models.test_moe import made

from .test_cli import call

TEXT = "The hand of the king is upon the people, and the people are upon the hand of the king. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """moe/f32.gguf, dense/f32.gguf and text.txt."""
    folder = tmp_path_factory.mktemp("inside")
    for name, kind in (("moe", "V2-Lite"), ("dense", "qwen3")):
        (folder / name).mkdir()
        converted(folder / name, made(kind))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def use(folder):
    with ggpy.load(folder / "moe" / "f32.gguf") as model:
        return expert_use(model, model.tokenize(TEXT, special=False))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("format, begins", [("text", "node "), ("mermaid", "flowchart TD"), ("dot", "digraph model {")])
def test_graph_prints_one_layer_or_all(folder, capsys, format, begins):
    code, out, _ = call(capsys, "graph", folder / "moe" / "f32.gguf", "--layer", 1, "--format", format)
    assert code == 0 and out.startswith(begins) and "blk.1.route" in out and "blk.2.route" not in out
    code, out, _ = call(capsys, "graph", folder / "moe" / "f32.gguf", "--format", format, "-n", 7)
    assert code == 0 and "blk.2.route" in out and "7×3×2" in out and "logits" in out


def test_graph_sets_a_dense_layer_beside_one_with_experts(folder, capsys):
    files = [folder / name / "f32.gguf" for name in ("dense", "moe")]
    code, out, _ = call(capsys, "graph", files[0], "--compare", files[1])
    rows = {r[1].strip(): [c.strip() for c in r[2:4]] for r in (line.split("│") for line in out.splitlines()) if len(r) > 3}
    assert code == 0 and out.startswith("layer 2")
    assert rows["ffn_gate"][0].startswith("MUL_MAT 1×96") and rows["ffn_gate"][1] == ""
    assert rows["route"] == ["", "ROUTE 1×3×2"]
    assert rows["attn_output"][0] and rows["attn_output"][1]
    with ggpy.load(files[1]) as model:
        stored = sum(t.n_bytes for name, t in model.file.tensors.items() if name.startswith("blk.2."))
    assert f"{files[1]}: {stored / 1e3:.3g} kB of weights" in out


def test_graph_refuses_what_is_not_there(folder, capsys):
    for more, message in ((["--layer", 3], "no layer 3; the last is 2"), (["--format", "svg"], "text, mermaid, dot")):
        code, out, err = call(capsys, "graph", folder / "moe" / "f32.gguf", *more)
        assert code == 1 and out == "" and message in err


def test_experts_prints_a_row_for_each_layer_and_the_picture(folder, capsys, use):
    code, out, _ = call(capsys, "experts", folder / "moe" / "f32.gguf", "--text", folder / "text.txt")
    assert code == 0 and picture(use) in out and f"{len(use.trace)} tokens, 3 of 8 experts" in out
    for row in use.table():
        assert f"{row['cv']:.3f}" in out and f"{row['most_used']} ({row['most_share']:.1%})" in out


def test_experts_as_json_with_trace_and_simulated_caches(folder, capsys, use, tmp_path):
    saved = tmp_path / "trace.npy"
    options = ["--text", folder / "text.txt", "--trace", saved, "--json", "--simulate-cache"]
    code, out, _ = call(capsys, "experts", folder / "moe" / "f32.gguf", *options)
    facts = json.loads(out)
    assert code == 0 and facts["counts"] == use.counts.tolist() and facts["layers"] == use.table()
    assert facts["n_tokens"] == len(use.trace)
    np.testing.assert_array_equal(np.load(saved), use.trace)
    assert [c["n_slots"] for c in facts["caches"]] == [1, 4, 8, 12]
    assert facts["caches"][2]["hit_rate"]["lru"] == simulate_cache(use.trace, 8, "lru")


def test_experts_takes_so_many_tokens(folder, capsys):
    code, out, _ = call(capsys, "experts", folder / "moe" / "f32.gguf", "--text", folder / "text.txt", "-n", 5, "--json")
    assert code == 0 and np.sum(json.loads(out)["counts"], 1).tolist() == [15, 15]


def test_heat_map_is_a_picture_with_as_many_colours_as_counts(folder, capsys, use, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    png = tmp_path / "use.png"
    code, _, _ = call(capsys, "experts", folder / "moe" / "f32.gguf", "--text", folder / "text.txt", "--png", png)
    pixels = image.imread(png)
    assert code == 0 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > len(np.unique(use.counts))


def test_experts_of_a_dense_model_or_an_empty_text_is_an_error(folder, capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    cases = [("dense", folder / "text.txt", "the model has no experts"), ("moe", tmp_path / "empty.txt", "no text")]
    for name, text, message in cases:
        code, out, err = call(capsys, "experts", folder / name / "f32.gguf", "--text", text)
        assert code == 1 and out == "" and message in err


def test_profile_accounts_for_all_of_a_run(folder, capsys):
    path = folder / "moe" / "f32.gguf"
    sums = []
    for more in ([], ["--by-layer"]):
        code, out, _ = call(capsys, "profile", path, "-p", 16, "-d", 4, "-r", 2, "-t", 1, "--json", *more)
        facts = json.loads(out)
        assert code == 0 and (facts["tokens"], facts["depth"], facts["threads"]) == (16, 4, 1)
        assert sum(r["seconds"] for r in facts["rows"]) == pytest.approx(facts["seconds"], rel=1e-6)
        sums.append([sum(r[k] for r in facts["rows"]) for k in ("steps", "bytes", "operations")])
    assert sums[0] == sums[1]
    with ggpy.load(path) as model:
        matrices = [t for t in model.file.tensors.values() if len(t.shape) > 1 and t.name != "token_embd.weight"]
    assert sums[0][1] == sum(t.n_bytes for t in matrices)


def test_profile_prints_a_row_for_each_layer(folder, capsys):
    code, out, _ = call(capsys, "profile", folder / "moe" / "f32.gguf", "-d", 0, "-r", 1, "--by-layer")
    assert code == 0 and all(f"layer {i} " in out for i in range(3)) and "tok/s" in out


def test_run_and_bench_take_a_ram_budget(folder, capsys):
    path, dense = (folder / name / "f32.gguf" for name in ("moe", "dense"))
    code, out, err = call(
        capsys, "run", path, "-p", "the hand", "-n", 8, "--temp", 0, "-c", 64, "-v", "--ram-budget", "0.5G"
    )
    assert code == 0 and "GB in memory" in err
    assert out == call(capsys, "run", path, "-p", "the hand", "-n", 8, "--temp", 0, "-c", 64)[1]
    code, out, _ = call(capsys, "bench", path, "-p", 8, "-n", 2, "-r", 1, "--ram-budget", "512 MiB", "--json")
    assert code == 0 and json.loads(out)["tokens_per_second"]
    cases = [(path, "6 apples", "is no size"), (path, "1M", "are needed"), (dense, "1T", "models with experts")]
    for file, budget, message in cases:
        code, _, err = call(capsys, "run", file, "-p", "x", "--ram-budget", budget)
        assert code == 1 and message in err


@pytest.mark.parametrize(
    "text, n", [("6G", 6 << 30), ("512M", 512 << 20), ("1.5 KiB", 1536), ("100000", 100000), ("2tb", 2 << 40)]
)
def test_sizes_as_people_write_them(text, n):
    assert byte_count(text) == n


def test_run_takes_a_number_of_experts_and_a_form_of_attention(folder, capsys):
    path = folder / "moe" / "f32.gguf"
    arguments = ("run", path, "-p", "the hand", "-n", 16, "--temp", 0, "-c", 64, "--kv-type", "f32")
    _, out, _ = call(capsys, *arguments)
    assert call(capsys, *arguments, "--n-expert-used", 3) == (0, out, "")
    code, other, _ = call(capsys, *arguments, "--n-expert-used", 1)
    assert code == 0 and other != out
    code, _, err = call(capsys, *arguments, "--n-expert-used", 9)
    assert code == 1 and "9 of 8 experts" in err
    assert call(capsys, *arguments, "--mla", "naive")[:2] == (0, out)
    code, _, err = call(capsys, *arguments, "--mla", "sparse")
    assert code == 1 and "there are absorbed, naive" in err
