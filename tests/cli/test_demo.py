"""`ggpy demo`, with the checkpoint that ships or, where that isn't complete, with a tiny random one."""

import re
from pathlib import Path

import pytest

import ggpy
from ggpy.cli import demo
from ggpy.kernels import build
from ggpy.measure.perplexity import chunks_of, measure_perplexity
from tests.models.checkpoints import converted
from tests.models.test_moe import made

from .test_cli import call

SHIPPED = Path(ggpy.__file__).parent / "demo_model"
TEXT = "".join(f"And the {i} men of the land came unto the king, and the king said unto {i} men. " for i in range(30))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    converted(folder, made("V2-Lite"))
    (folder / "checkpoint" / "heldout.txt").write_text(TEXT)
    return folder / "checkpoint"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of models for each test; kernels stay compiled."""
    kernels = build.cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kernels").symlink_to(kernels)
    monkeypatch.setenv("GGPY_CACHE", str(tmp_path))
    return tmp_path / "models"


def rows(out):
    """type -> size in MB, perplexity, prompt and decode rates."""
    found = re.findall(r"^(q\d_0) +([\d.]+) MB +([\d.]+) +(\d+) +(\d+)$", out, re.M)
    return {kind: [float(n) for n in numbers] for kind, *numbers in found}


def test_demo_converts_runs_and_measures_both_types(tiny, capsys, monkeypatch, own_cache):
    monkeypatch.setattr(demo, "files", lambda package: tiny)
    code, out, err = call(capsys, "demo")
    assert code == 0 and err.count("converting") == 2
    models = {kind: next(own_cache.glob(f"*-{kind}-*.gguf")) for kind in ("q8_0", "q4_0")}
    table = rows(out)
    assert list(table) == list(models)
    for kind, (size, perplexity, prompt, decode) in table.items():
        assert size == pytest.approx(models[kind].stat().st_size / 1e6, abs=0.05) and min(prompt, decode) > 0
        with ggpy.load(models[kind]) as model:
            chunks = chunks_of(model.tokenize(TEXT, special=False), 256, 7)
            assert perplexity == pytest.approx(measure_perplexity(model, chunks).value, abs=0.01)
            text = "".join(model.generate("And it came to pass", max_tokens=72, temperature=0.7, seed=0))
        assert f"{kind}: And it came to pass{text}" in out
    assert len(re.findall(r"^layer   \d \|.{31}\|$", out, re.M)) == 2
    assert f"ggpy run {models['q8_0']}" in out
    code, _, err = call(capsys, "demo")
    assert code == 0 and "converting" not in err


def test_smollm2_is_named_where_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_SMOLLM2", ("no_such_package_at_all", "x.gguf"))
    assert demo._smollm2() is None
    monkeypatch.setattr(demo, "_SMOLLM2", ("ggpy", "__main__.py"))
    assert demo._smollm2() == Path(ggpy.__file__).parent / "__main__.py"


def test_an_installation_without_the_checkpoint_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    code, _, err = call(capsys, "demo")
    assert code == 1 and "the demo's checkpoint is missing" in err


@pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the checkpoint isn't there")
def test_the_shipped_checkpoint_foresees_its_held_out_text(capsys):
    code, out, _ = call(capsys, "demo")
    table = rows(out)
    # 2048 would be no knowledge at all. Eight bits lose nothing that one can see, four a little.
    assert code == 0 and 5 < table["q8_0"][1] < 120
    assert table["q4_0"][1] == pytest.approx(table["q8_0"][1], rel=0.1)
    assert table["q4_0"][0] < 0.7 * table["q8_0"][0]
