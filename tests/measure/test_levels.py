"""Comparisons of levels: measured as one by one, resumed, reported."""

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggpy
from ggpy.errors import Error, GGUFError, UnsupportedError
from ggpy.measure.levels import Comparison, Level, _run, compare_levels
from ggpy.measure.logits_file import LogitsFile
from ggpy.measure.perplexity import chunks_of, measure_perplexity
from ggpy.measure.report import csv_text, markdown, page, plot, write_reports
from ggpy.quantization import ImportanceMatrix, quantize_model, write_imatrix

from .conftest import TEXT

TYPES = ("q8_0", "q4_0")
OPTIONS = {"n_ctx": 64, "n_chunks": 3, "n_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("levels")


@pytest.fixture(scope="module")
def comparison(files, folder):
    return compare_levels(files[0], "tiny", TYPES, TEXT, folder, **OPTIONS)


def test_levels_are_what_measuring_one_by_one_gives(comparison, files, folder, tmp_path):
    names = [level.type for level in comparison.levels]
    assert names == ["base F32", "Q8_0", "Q4_0"]
    base = comparison.levels[0]
    assert base.kl is None and base.top1 is None and base.bits_per_weight == 32
    with ggpy.load(files[0], n_ctx=512, n_threads=1) as model:
        chunks = chunks_of(model.tokenize(TEXT.read_text(encoding="utf-8"), special=False), 64, 3)
        result = measure_perplexity(model, chunks, save=tmp_path / "base")
    assert base.perplexity == pytest.approx(result.value, rel=1e-6)
    for level in comparison.levels[1:]:
        assert level.path == str(folder / f"tiny-{level.type.lower()}.gguf")
        with ggpy.load(level.path, n_ctx=512, n_threads=1) as model, LogitsFile(tmp_path / "base") as opened:
            expected = measure_perplexity(model, chunks, base=opened)
            n_values = sum(t.dequantize().size for t in model.file.tensors.values())
        assert level.perplexity == pytest.approx(expected.value, rel=1e-6)
        assert level.kl == pytest.approx(expected.divergence.kl.mean(), rel=1e-5)
        assert level.top1 == expected.divergence.same_top.mean()
        assert level.n_bytes == (folder / f"tiny-{level.type.lower()}.gguf").stat().st_size
        assert 0.7 * level.n_bytes < level.bits_per_weight * n_values / 8 < level.n_bytes
        assert level.prompt_rate > 0 and level.decode_rate > 0
        assert level.peak_bytes is None or level.peak_bytes > level.n_bytes
    assert comparison.levels[1].kl < comparison.levels[2].kl
    assert not list(folder.glob("*.logits"))


def states(files, folder, types=TYPES, **changes):
    """What a further run measures: its levels, in order."""
    seen = []
    compare_levels(files[0], "tiny", types, TEXT, folder, **{**OPTIONS, **changes}, progress=lambda t, s: seen.append(t))
    return list(dict.fromkeys(seen))


def test_what_was_measured_is_not_measured_again(comparison, files, folder):
    assert states(files, folder) == []
    assert compare_levels(files[0], "tiny", TYPES, TEXT, folder, **OPTIONS) == comparison


def test_a_stopped_run_goes_on_where_it_was(files, tmp_path):
    def stop_at(where):
        def stop(level, state):
            if level == where and "perplexity" in state:
                raise KeyboardInterrupt

        return stop

    with pytest.raises(KeyboardInterrupt):
        compare_levels(files[0], "tiny", TYPES, TEXT, tmp_path, **{**OPTIONS, "n_chunks": 40}, progress=stop_at("base"))
    # The base's logits may be whole already when the interrupt comes; nothing is half-made.
    assert {p.name for p in tmp_path.iterdir()} <= {"tiny-base.logits"}
    with pytest.raises(KeyboardInterrupt):
        compare_levels(files[0], "tiny", TYPES, TEXT, tmp_path, **OPTIONS, progress=stop_at("Q4_0"))
    assert states(files, tmp_path) == ["Q4_0"]
    assert states(files, tmp_path) == []
    (tmp_path / "tiny-q8_0.json").write_text("{")
    assert states(files, tmp_path) == ["base", "Q8_0"]
    assert states(files, tmp_path, n_chunks=2) == ["base", "Q8_0", "Q4_0"]


def test_unknown_types_are_refused_before_anything_is_done(files, tmp_path):
    with pytest.raises(UnsupportedError, match="Q4_K_M"):
        compare_levels(files[0], "tiny", ["q8_0", "q9"], TEXT, tmp_path / "new", **OPTIONS)
    with pytest.raises(Error, match="no file types"):
        compare_levels(files[0], "tiny", [], TEXT, tmp_path / "new", **OPTIONS)
    with pytest.raises(OSError, match="nowhere"):
        compare_levels(files[0], "tiny", ["q8_0"], tmp_path / "nowhere", tmp_path / "new", **OPTIONS)
    assert not (tmp_path / "new").exists()


def imatrix(files, path, seed=0):
    """An importance matrix of the model, written to `path`: some columns matter much more than others."""
    rng = np.random.default_rng(seed)
    with ggpy.GGUFFile(files[0]) as file:
        shapes = {name: t.shape for name, t in file.tensors.items() if name.startswith("blk.") and len(t.shape) == 2}
    sums = {name: rng.lognormal(0, 3, (1, shape[1])).astype(np.float32) for name, shape in shapes.items()}
    write_imatrix(path, ImportanceMatrix(sums, {name: np.ones(1, np.float32) for name in sums}, ["x"], 1, 64))
    return path


def test_levels_are_quantized_with_the_importance_matrix(comparison, files, folder, tmp_path):
    path = imatrix(files, tmp_path / "i.gguf")
    weighted = compare_levels(files[0], "tiny", TYPES, TEXT, tmp_path, imatrix=path, **OPTIONS)
    quantize_model(files[0], tmp_path / "alone.gguf", "q4_0", imatrix=path)
    made = (tmp_path / "tiny-q4_0.gguf").read_bytes()
    assert made == (tmp_path / "alone.gguf").read_bytes() and made != (folder / "tiny-q4_0.gguf").read_bytes()
    kl, plain = weighted.levels[2].kl, comparison.levels[2].kl
    assert kl > 0 and kl != plain
    assert weighted.settings["imatrix"] == str(path) and comparison.settings["imatrix"] is None
    assert weighted.levels[0].perplexity == comparison.levels[0].perplexity
    # With other importance, or none, levels are measured again; the base too, for what they are compared with.
    assert states(files, tmp_path, imatrix=path) == []
    assert states(files, tmp_path, imatrix=imatrix(files, path, seed=1)) == ["base", "Q8_0", "Q4_0"]
    assert states(files, tmp_path) == ["base", "Q8_0", "Q4_0"]


def test_reports_name_the_importance_matrix(comparison):
    weighted = Comparison("tiny", comparison.settings | {"imatrix": "folder/<i>.gguf"}, comparison.levels)
    assert "with <i>.gguf" in markdown(weighted) and "importance matrix folder/<i>.gguf" in markdown(weighted)
    assert "with &lt;i&gt;.gguf" in page(weighted, b"")
    assert "importance" not in markdown(comparison) and "importance" not in page(comparison, b"")


def test_importance_of_another_model_is_refused_before_anything_is_done(files, tmp_path):
    def refused(message, imatrix, error=Error):
        with pytest.raises(error, match=message):
            compare_levels(files[0], "tiny", TYPES, TEXT, tmp_path / "new", imatrix=imatrix, **OPTIONS)
        assert not (tmp_path / "new").exists()

    other = tmp_path / "other.gguf"
    write_imatrix(other, ImportanceMatrix({"layers.0.q": np.ones((1, 64))}, {"layers.0.q": np.ones(1)}))
    refused("other.gguf: .*another model", other)
    refused("not an importance matrix", files[0], error=GGUFError)
    refused("No such file", tmp_path / "none.gguf", error=GGUFError)


def test_errors_of_the_measuring_process_are_told(tmp_path):
    options = {"path": str(tmp_path / "none.gguf"), "n_ctx": 64, "n_threads": 1}
    with pytest.raises(Error, match=r"none\.gguf"):
        _run(options, lambda state: None)
    with pytest.raises(Error, match=r"none\.gguf: the process that measured it ended with code 1"):
        _run({**options, "unknown": 1}, lambda state: None)


def level(type, n_bytes, kl):
    return Level(type, "", n_bytes, 4.5, 10.0, 0.1, kl, 0.01, 0.2, 0.3, 0.9, 0.01, 100.0, 10.0, None)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=8))
def test_the_front_has_what_no_other_beats(sizes):
    levels = [level(str(i), n, float(kl)) for i, (n, kl) in enumerate(sizes)]
    front = Comparison("", {}, (level("base", 9, None), *levels)).front
    for x in levels:
        better = [y for y in levels if y.n_bytes <= x.n_bytes and y.kl <= x.kl]
        assert (x.type in front) == all((y.n_bytes, y.kl) == (x.n_bytes, x.kl) for y in better)
    assert not levels or front


def test_reports_hold_the_numbers(comparison, tmp_path):
    paths = write_reports(comparison, tmp_path)
    assert [p.name for p in paths] == [f"tiny-levels.{e}" for e in ("json", "csv", "md", "png", "html")]
    stored = json.loads(paths[0].read_text())
    assert stored["levels"][1]["kl"] == comparison.levels[1].kl and stored["settings"]["n_ctx"] == 64
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert [r["type"] for r in rows] == [x.type for x in comparison.levels]
    assert rows[0]["kl"] == "" and float(rows[2]["kl"]) == comparison.levels[2].kl
    assert {r["type"] for r in rows if r["on_front"] == "True"} == comparison.front
    lines = [line for line in markdown(comparison).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(rows)
    assert f"{comparison.levels[1].perplexity:.3f} ± " in lines[3]


def test_the_page_holds_the_plot_and_escapes_names(comparison):
    image = plot(comparison)
    assert image.startswith(b"\x89PNG")
    text = page(Comparison("<b>&", comparison.settings, comparison.levels), image)
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(data) == image
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text
    assert text.count("<tr") == 1 + len(comparison.levels)
