"""Choosing types: against all mixes where they are few, and against the fixed mixes on a trained model."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggpy
from converters import convert
from ggpy.errors import Error
from ggpy.file import GGUFFile
from ggpy.kernels.table import FLOAT, QUANTIZED
from ggpy.measure.choose import CANDIDATES, Option, cheapest, quantize_to_target
from ggpy.measure.logits_file import LogitsFile
from ggpy.measure.perplexity import chunks_of, measure_perplexity
from ggpy.quantization import ImportanceMatrix, quantize_model, write_imatrix
from tests.cli.test_cli import call

from .conftest import TEXT

DEMO = Path(ggpy.__file__).parent / "demo_model"
BELOW_Q4_0 = 10_000

OPTIONS = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=4)
TENSORS = st.lists(OPTIONS, min_size=1, max_size=5)


def named(tensors):
    return {str(i): [Option(f"T{j}", n, kl) for j, (n, kl) in enumerate(of)] for i, of in enumerate(tensors)}


def total(mix):
    return sum(o.n_bytes for o in mix), sum(o.kl for o in mix)


@given(TENSORS, st.floats(0, 1))
def test_no_mix_of_the_size_is_better_by_more_than_one_tensors_step(tensors, share):
    options = named(tensors)
    mixes = [total(mix) for mix in itertools.product(*options.values())]
    least, most = min(n for n, _ in mixes), max(n for n, _ in mixes)
    size = least + share * (most - least)
    n, kl = total(cheapest(options, n_bytes=size).values())
    best = min(kl for n, kl in mixes if n <= size)
    step = max(o.kl for of in options.values() for o in of)
    assert n <= size and best - 1e-9 <= kl <= best + step


@given(TENSORS, st.floats(0, 3))
def test_the_mix_for_a_divergence_has_it(tensors, target):
    options = named(tensors)
    mixes = [total(mix) for mix in itertools.product(*options.values())]
    n, kl = total(cheapest(options, kl=target).values())
    within = [n for n, kl in mixes if kl <= target]
    if within:
        step = max(o.n_bytes for of in options.values() for o in of)
        # Both bounds by the same rounding of sums.
        least = min(n for n, kl in mixes if kl <= target + 1e-9)
        assert kl <= target + 1e-9 and least <= n <= min(within) + step
    else:
        assert math.isclose(kl, min(kl for _, kl in mixes), abs_tol=1e-9)


@settings(max_examples=50)
@given(TENSORS)
def test_more_bytes_never_diverge_more(tensors):
    options = named(tensors)
    found = [total(cheapest(options, n_bytes=n).values())[1] for n in range(0, 260, 20)]
    hulls_last = sum(min(o.kl for o in of) for of in options.values())
    assert math.isclose(found[-1], hulls_last, abs_tol=1e-9)


def test_what_has_no_kernels_is_no_candidate():
    assert set(CANDIDATES) <= {*QUANTIZED, *FLOAT} and {"Q2_K", "Q4_K", "Q8_0", "F16"} <= set(CANDIDATES)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """For the tiny model: two chunks and a bit."""
    path = tmp_path_factory.mktemp("choose") / "text.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:2500], encoding="utf-8")
    return path


def q8_0_bytes(files):
    return files[1].stat().st_size


@pytest.fixture(scope="module")
def by_size(files, text, tmp_path_factory):
    """The tiny model for three sizes: share of Q8_0's -> (target, choice)."""
    folder = tmp_path_factory.mktemp("sizes")
    found = {}
    for share in (0.65, 0.8, 1.1):
        size = int(share * q8_0_bytes(files))
        found[share] = size, quantize_to_target(files[0], folder / f"{share}.gguf", text, size=size, n_threads=2)
    assert len(list(folder.iterdir())) == len(found), "nothing else stays"
    return found


def test_files_have_the_size_and_not_much_less(by_size):
    for size, choice in by_size.values():
        assert choice.n_bytes == choice.plan.path.stat().st_size
        assert 0.96 * size < choice.n_bytes <= size


def test_larger_files_diverge_less(by_size):
    kl = [choice.kl for _, choice in by_size.values()]
    assert kl == sorted(kl, reverse=True) and kl[0] > 2 * kl[-1]
    expected = [choice.expected_kl for _, choice in by_size.values()]
    assert expected == sorted(expected, reverse=True)


def test_chosen_files_run_and_tell_their_most_used_type(by_size):
    for _, choice in by_size.values():
        with ggpy.load(choice.plan.path, n_ctx=32, n_threads=1) as model:
            assert model.logits([1, 2, 3]).shape == (3, 512)
            used = {t.type: t.n_bytes for t in model.file.tensors.values()}
        assert set(used) <= {*CANDIDATES, "F32"} and len(used) > 2


@pytest.mark.parametrize("target", [0.02, 0.002])
def test_a_divergence_is_met_as_measured(files, text, tmp_path, target):
    choice = quantize_to_target(files[0], tmp_path / "out.gguf", text, kl=target, n_threads=2)
    assert target / 3 < choice.kl <= target
    assert choice.n_bytes < files[0].stat().st_size / 2


def test_impossible_targets_are_refused(files, text, tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(Error, match=r"0\.0 MB are too few: its tensors have 0\.\d MB at least"):
        quantize_to_target(files[0], out, text, size=BELOW_Q4_0, n_threads=2)
    with pytest.raises(Error, match="no mix of types was found with a divergence of 1e-12; the best has"):
        quantize_to_target(files[0], out, text, kl=1e-12, n_threads=2)
    with pytest.raises(Error, match="is the model that is to be quantized"):
        quantize_to_target(files[0], files[0], text, size=q8_0_bytes(files), n_threads=2)
    other = tmp_path / "other.gguf"
    write_imatrix(other, ImportanceMatrix({"layers.0.q": np.ones((1, 64))}, {"layers.0.q": np.ones(1)}))
    with pytest.raises(Error, match=r"other.gguf: the importance matrix of another model"):
        quantize_to_target(files[0], out, text, size=q8_0_bytes(files), imatrix=other, n_threads=2)
    other.unlink()
    short = tmp_path / "short.txt"
    short.write_text("the hand")
    with pytest.raises(Error, match="too few for one chunk of 256"):
        quantize_to_target(files[0], out, short, kl=0.1, n_threads=2)
    short.unlink()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="either"):
        quantize_to_target(files[0], out, text)


@pytest.mark.parametrize("at", ["copying", "importance", "token_embd.weight", "measuring the result"])
def test_an_interrupted_choice_leaves_nothing(files, text, tmp_path, at):
    def stop(done, total, what):
        if what == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        size = q8_0_bytes(files)
        quantize_to_target(files[0], tmp_path / "out.gguf", text, size=size, n_threads=2, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_command(files, text, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    size = int(0.9 * q8_0_bytes(files))
    target = ("--target-size", size, "--text", text, "-t", 2)
    code, printed, _ = call(
        capsys, "quantize", files[0], out, *target, "--tensor-type", "attn_v=q8_0", "--tensor-type", "^output=f16"
    )
    assert code == 0 and "KL divergence on" in printed and "±" in printed
    assert out.stat().st_size <= size
    with GGUFFile(out) as file:
        types = {name: t.type for name, t in file.tensors.items()}
    assert {t for name, t in types.items() if "attn_v" in name} == {"Q8_0"} and types["output.weight"] == "F16"
    before = out.read_bytes()
    code, printed, _ = call(capsys, "quantize", files[0], out, *target, "--dry-run")
    assert code == 0 and "ffn_down" in printed and out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a type, or --target-size"),
        (("q4_0", "--target-kl", 0.1), "name a type, or --target-size"),
        (("--target-kl", 0.1), "targets need --text"),
        (("--target-size", "many", "--text", TEXT), "'many' is no size"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, files, tmp_path, capsys):
    code, _, err = call(capsys, "quantize", files[0], tmp_path / "out.gguf", *arguments)
    assert code == 1 and message in err and err.count("\n") == 1


def test_a_trained_model_diverges_less_than_with_the_mix_of_its_size(tmp_path):
    """Calibrated on the end of a text, measured on its beginning."""
    source, calibration = tmp_path / "demo.gguf", tmp_path / "calibration.txt"
    convert(DEMO, source, "f32")
    words = TEXT.read_text(encoding="utf-8")
    calibration.write_text(words[len(words) // 2 :], encoding="utf-8")
    with ggpy.load(source, n_ctx=256, n_threads=2) as model:
        chunks = chunks_of(model.tokenize(words[: len(words) // 2], special=False), 256, 4)
        measure_perplexity(model, chunks, save=tmp_path / "base")
    mixed, chosen = tmp_path / "mixed.gguf", tmp_path / "chosen.gguf"
    quantize_model(source, mixed, "Q4_K_M", n_threads=2)
    quantize_to_target(source, chosen, calibration, size=mixed.stat().st_size, n_threads=2)
    kl = []
    for path in (mixed, chosen):
        with ggpy.load(path, n_ctx=256, n_threads=2) as model, LogitsFile(tmp_path / "base") as base:
            kl.append(measure_perplexity(model, chunks, base=base).divergence.kl.mean())
    assert chosen.stat().st_size <= mixed.stat().st_size
    assert kl[1] < 0.7 * kl[0]
