"""Importance matrices against the inputs that PyTorch's modules see, and against what quantizers take."""

import ctypes
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ggpy
from ggpy.errors import Error
from ggpy.measure.importance import _Collector, measure_importance
from ggpy.measure.perplexity import chunks_of
from ggpy.quantization import quantize_model
from ggpy.quantization.imatrix import read_imatrix, write_imatrix
from tests.models.checkpoints import converted, ids, random_model
from tests.models.test_llama import SIZES
from tests.models.test_moe import made

PARTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def chunks():
    return chunks_of(ids(150), 64)


@pytest.fixture(scope="module")
def matrix(model, chunks):
    return measure_importance(model, chunks, "some text")


def test_sums_are_those_of_the_inputs_of_torchs_modules(matrix, chunks):
    torch_model = random_model(LlamaForCausalLM, LlamaConfig(**SIZES))  # the one of the fixture
    expected = {}

    def see(name):
        def hook(module, inputs):
            expected[name] = expected.get(name, 0) + inputs[0].double().square().sum((0, 1)).numpy()

        return hook

    for name, module in torch_model.named_modules():
        found = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)", name)
        if found and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(see(f"blk.{found[1]}.{PARTS[found[2]]}.weight"))
    with torch.no_grad():
        torch_model(torch.tensor(chunks.astype(np.int64)))
    assert set(matrix.sums) == set(expected)
    for name, sums in expected.items():
        np.testing.assert_allclose(matrix.sums[name], sums[None], rtol=2e-2, atol=1e-3 * sums.mean())
        assert matrix.counts[name].tolist() == [chunks.size]
    assert (matrix.n_chunks, matrix.chunk_size, matrix.datasets) == (2, 64, ["some text"])


@pytest.mark.parametrize("name", ["V2-Lite", "mixtral", "qwen2moe"])
def test_experts_are_counted_by_their_tokens(tmp_path, name, chunks):
    with ggpy.load(converted(tmp_path, made(name)), n_ctx=64, n_threads=2) as model:
        route = next(t for t in model.graph() if t.op == "ROUTE")
        products = [t for t in model.graph() if t.op == "MUL_MAT_ID" and t.inputs[2].name == route.name]
        users = {t.inputs[0].name: t.inputs[1].name for t in products}
        seen = {}
        for node in {route.name, *users.values()}:
            model.hooks[node] = lambda name, value: seen.setdefault(name, []).append(value.copy())
        for chunk in chunks:
            model.new_sequence().extend(chunk.tolist())
        model.hooks.clear()
        matrix = measure_importance(model, chunks)
        assert model.hooks == {}
    experts = np.concatenate(seen[route.name])[..., 0].astype(int)
    assert len(users) == 3
    for weight, source in users.items():
        x = np.concatenate(seen[source]).astype(np.float64)
        expected, counts = np.zeros(matrix.sums[weight].shape), np.zeros(len(matrix.counts[weight]))
        for token in range(len(experts)):
            for slot, expert in enumerate(experts[token]):
                row = x[token] if x.ndim == 2 else x[token, slot]
                expected[expert] += row**2
                counts[expert] += 1
        np.testing.assert_array_equal(matrix.counts[weight], counts)
        np.testing.assert_allclose(matrix.sums[weight], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["V2-Lite", "V3", "mixtral", "qwen2moe", "qwen3", "olmoe"])
def test_every_quantized_matrix_of_the_layers_has_an_entry(tmp_path, name, chunks):
    path, out = converted(tmp_path, made(name)), tmp_path / "imatrix.gguf"
    with ggpy.load(path, n_ctx=64, n_threads=2) as model:
        write_imatrix(out, measure_importance(model, chunks))
    plan = quantize_model(path, tmp_path / "q.gguf", "q4_0", imatrix=out, dry_run=True)
    assert all(not name.startswith("blk.") for name in plan.without_importance)
    assert any(step.new_type == "Q4_0" for step in plan.steps)


def test_attn_kv_b_in_one_piece_meets_the_latent_vectors(tmp_path, chunks):
    """As older files of DeepSeek-V2 have it."""
    seen = []
    with ggpy.load(converted(tmp_path, made("V2-Lite")), n_ctx=64, n_threads=2) as model:
        collector = _Collector(model.graph(), frozenset({"blk.1.attn_kv_b.weight"}))
        (node,) = collector.nodes
        model.hooks[node] = lambda name, value: (seen.append(value.copy()), collector.see(name, value))[1]
        model.new_sequence().extend(chunks[0].tolist())
    assert node == "blk.1.attn_kv_a_norm" and seen[0].shape == (64, 32)
    sums, counts = collector.result()
    np.testing.assert_allclose(sums["blk.1.attn_kv_b.weight"], np.square(seen[0]).sum(0)[None], rtol=1e-5)
    assert counts["blk.1.attn_kv_b.weight"].tolist() == [64]


def test_activations_that_are_no_numbers_are_refused(model, chunks):
    model.hooks["embd"] = lambda name, value: value * np.nan
    try:
        with pytest.raises(Error, match=r"blk\.0\..* aren't finite"):
            measure_importance(model, chunks[:1])
        assert list(model.hooks) == ["embd"]
    finally:
        model.hooks.clear()


def test_llama_cpps_quantizer_takes_it_and_gives_our_files_types(tmp_path, files, matrix):
    llama_cpp = pytest.importorskip("llama_cpp")
    write_imatrix(tmp_path / "imatrix.gguf", matrix)
    read = read_imatrix(tmp_path / "imatrix.gguf")
    entries = {name: read.weights(name).ravel() for name in read.sums}
    data = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
    for entry, (name, values) in zip(data, entries.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    results = []
    for imatrix in (None, data):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 1
        if imatrix is not None:
            params.imatrix = imatrix
        out = tmp_path / f"{len(results)}.gguf"
        assert llama_cpp.llama_model_quantize(str(files[0]).encode(), str(out).encode(), params) == 0
        with ggpy.GGUFFile(out) as file:
            results.append({n: (t.type, t.data.copy()) for n, t in file.tensors.items()})
    name = "blk.1.ffn_down.weight"
    assert results[0][name][0] == results[1][name][0] == "Q4_0"
    assert (results[0][name][1] != results[1][name][1]).any()
