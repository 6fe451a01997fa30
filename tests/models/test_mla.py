"""Latent attention: the absorbed and the naive form, from files with attn_kv_b and from files with its parts."""

from pathlib import Path

import gguf
import numpy as np
import pytest

import ggpy
from converters import convert
from ggpy.file import GGUFFile

from .checkpoints import N_TOKENS, converted, ids, transformers_logits
from .test_moe import made

DEMO = Path(ggpy.__file__).parent / "demo_model"


def joined(path, out):
    """Writes a file as older converters did: attn_kv_b instead of attn_k_b and attn_v_b, no lengths for those."""
    with GGUFFile(path) as file:
        writer = gguf.GGUFWriter(out, "deepseek2")
        reader = gguf.GGUFReader(path)
        arch = "deepseek2.attention"
        lengths = {f"{arch}.{kind}_length": file.metadata[f"{arch}.{kind}_length_mla"] for kind in ("key", "value")}
        for key, field in reader.fields.items():
            if key.endswith("_mla") or key.startswith("GGUF.") or key == "general.architecture":
                continue
            if key == f"{arch}.head_count_kv":
                writer.add_uint32(key, file.metadata[f"{arch}.head_count"])
            elif key in lengths:
                writer.add_uint32(key, lengths[key])
            else:
                kind = field.types[0]
                sub_type = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, sub_type)
        for name, tensor in file.tensors.items():
            if name.endswith("attn_k_b.weight"):
                keys = tensor.dequantize().transpose(0, 2, 1)  # (n_head, n_nope, n_latent)
                values = file.tensors[name.replace("k_b", "v_b")].dequantize()
                both = np.concatenate([keys, values], 1)
                writer.add_tensor(name.replace("k_b", "kv_b"), both.reshape(-1, both.shape[2]))
            elif not name.endswith("attn_v_b.weight"):
                kind = gguf.GGMLQuantizationType[tensor.type]
                data = np.ascontiguousarray(tensor.data)
                writer.add_tensor(name, data.view(np.float32) if tensor.type == "F32" else data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


@pytest.fixture(scope="module", params=["V2-Lite", "V2-Lite, yarn", "V3"])
def model(request, tmp_path_factory):
    """A model's files, split and joined, and transformers' logits."""
    folder = tmp_path_factory.mktemp("mla")
    # Values of another length than any part of the keys.
    model, tokens = made(request.param, v_head_dim=64), ids()
    split = converted(folder, model)
    return {"split": split, "joined": joined(split, folder / "joined.gguf")}, transformers_logits(model, tokens)


@pytest.mark.parametrize("layout", ["split", "joined"])
@pytest.mark.parametrize("mla", ["absorbed", "naive"])
def test_both_forms_from_both_layouts_equal_transformers(model, layout, mla):
    paths, expected = model
    with ggpy.load(paths[layout], n_ctx=N_TOKENS, kv_type="f32", n_threads=2, mla=mla) as ours:
        assert any(t.op == {"absorbed": "ATTENTION_LATENT", "naive": "ATTENTION"}[mla] for t in ours.graph())
        assert np.abs(ours.logits(ids()) - expected).max() <= 2e-3
        with ours.new_sequence() as sequence:
            one_by_one = np.stack([sequence.extend([t]) for t in ids()])
    assert np.abs(one_by_one - expected).max() <= 2e-3


def test_caches_hold_what_the_form_says(model):
    paths, _ = model
    for mla, n in (("absorbed", 32 + 16), ("naive", 4 * (32 + 16 + 64))):
        with ggpy.load(paths["split"], n_ctx=256, mla=mla) as ours:
            ours.logits(ids(4))
            assert ours.kv_bytes == 32768 * 3 * n * 2  # tokens, 3 layers of float16


def test_quantized_files_are_as_close_to_the_truth_in_both_forms(tmp_path):
    model = made("V2-Lite")
    path, expected = converted(tmp_path, model, "q8_0"), transformers_logits(model, ids())
    truth = np.exp(expected - np.logaddexp.reduce(expected, -1, keepdims=True))
    divergence = {}
    for mla in ("absorbed", "naive"):
        with ggpy.load(path, n_ctx=N_TOKENS, kv_type="f32", mla=mla) as ours:
            logits = ours.logits(ids())
        log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
        divergence[mla] = (truth * (np.log(truth) - log_p)).sum(-1).mean()
    assert divergence["naive"] < 1.5 * divergence["absorbed"] < 0.05


@pytest.mark.parametrize("mla", ["absorbed", "naive"])
def test_q8_0_caches_take_half_the_memory_and_change_little(tmp_path, mla):
    path = tmp_path / "demo.gguf"
    convert(DEMO, path, "f32")
    logs, sizes = {}, {}
    for kv_type in ("f32", "f16", "q8_0"):
        with ggpy.load(path, n_ctx=512, kv_type=kv_type, mla=mla) as ours:
            logits = ours.logits(ours.tokenize((DEMO / "heldout.txt").read_text())[:400])
            sizes[kv_type] = ours.kv_bytes
        logs[kv_type] = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    divergence = {t: (np.exp(logs["f32"]) * (logs["f32"] - logs[t])).sum(-1).mean() for t in ("f16", "q8_0")}
    assert divergence["f16"] < 1e-6 < divergence["q8_0"] < 5e-4
    assert sizes["q8_0"] == sizes["f16"] * 8.5 / 16 == sizes["f32"] * 8.5 / 32


def test_other_forms_are_refused(tmp_path):
    with pytest.raises(ggpy.UnsupportedError, match="'sparse'; there are absorbed, naive"):
        ggpy.load(converted(tmp_path, made("V2-Lite")), mla="sparse")
