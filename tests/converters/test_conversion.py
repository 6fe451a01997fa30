"""Whole conversions, against transformers, llama.cpp and gguf."""

import errno
import json
import shutil
from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from converters import conversion, convert
from ggpy.errors import ConversionError, Error, UnsupportedError
from ggpy.file import GGUFFile
from ggpy.quantization import FILE_TYPES, quantize_model

from .conftest import CHAT_TEMPLATE, N_VOCAB, save_llama


def written_tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def written_floats(path):
    return {name: gguf.quants.dequantize(t.data, t.tensor_type) for name, t in written_tensors(path).items()}


def written_fields(path):
    return {name: field for name, field in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


def interleaved(weight, n_head):
    """Rows i and i + half of each head become rows 2 i and 2 i + 1."""
    result = np.empty_like(weight)
    head_dim = weight.shape[0] // n_head
    half = head_dim // 2
    for head in range(n_head):
        start = head * head_dim
        result[start : start + head_dim : 2] = weight[start : start + half]
        result[start + 1 : start + head_dim : 2] = weight[start + half : start + head_dim]
    return result


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def expected_tensors(folder):
    """What GGUF should hold, by way of transformers' own loading."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    expected = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        expected["output.weight"] = state["lm_head.weight"]
    for i in range(model.config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            for kind in ("weight", "bias"):
                if (weight := state.get(f"model.layers.{i}.{theirs}.{kind}")) is None:
                    continue
                if ours == "attn_q":
                    weight = interleaved(weight, model.config.num_attention_heads)
                if ours == "attn_k":
                    weight = interleaved(weight, model.config.num_key_value_heads)
                expected[f"blk.{i}.{ours}.{kind}"] = weight
    return expected


def assert_f32_file_holds(path, folder):
    written, expected = written_floats(path), expected_tensors(folder)
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(written[name], values, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_f32_file_holds_the_checkpoints_values_with_q_and_k_interleaved(family, request, tmp_path):
    folder = request.getfixturevalue(f"{family}_folder")
    convert(folder, tmp_path / "model.gguf", "f32")
    assert_f32_file_holds(tmp_path / "model.gguf", folder)


def test_biases_are_written_as_f32_with_q_and_k_interleaved(tmp_path):
    folder = save_llama(tmp_path / "llama", attention_bias=True, mlp_bias=True, num_hidden_layers=1)
    convert(folder, tmp_path / "model.gguf", "q8_0")
    written = written_tensors(tmp_path / "model.gguf")
    biases = {name: values for name, values in expected_tensors(folder).items() if name.endswith(".bias")}
    assert len(biases) == 7
    for name, values in biases.items():
        assert written[name].tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(written[name].data, values)


def test_float16_checkpoint_is_kept_exactly_by_f16(tmp_path):
    folder = save_llama(tmp_path / "llama", dtype=torch.float16, num_hidden_layers=1)
    convert(folder, tmp_path / "model.gguf", "f16")
    assert_f32_file_holds(tmp_path / "model.gguf", folder)


def test_llama_cpp_computes_what_transformers_does(mistral_folder, tmp_path):
    convert(mistral_folder, tmp_path / "model.gguf", "f32")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "model.gguf")
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 64, False, 1
    ids = [0, 5, 100, 300, 33]
    request = {"prompt": ids, "max_tokens": 6, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    reply = xllamacpp.Server(params).handle_completions(request)
    steps = reply["choices"][0]["logprobs"]["content"]
    assert len(steps) == 6

    model = AutoModelForCausalLM.from_pretrained(mistral_folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids + [step["id"] for step in steps]])).logits[0, len(ids) - 1 :]
    logprobs = torch.log_softmax(logits, -1)
    assert float(logprobs.std()) > 0.5
    for step, expected in zip(steps, logprobs, strict=False):
        for token in step["top_logprobs"]:
            # llama.cpp keeps keys and values in float16
            assert token["logprob"] == pytest.approx(float(expected[token["id"]]), abs=0.02)


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0", "q4_0"])
def test_weights_are_encoded_as_by_gguf_quants(type_, mistral_folder, tmp_path):
    convert(mistral_folder, tmp_path / "model.gguf", type_)
    floats = expected_tensors(mistral_folder)
    for name, tensor in written_tensors(tmp_path / "model.gguf").items():
        wanted = gguf.GGMLQuantizationType[type_.upper()]
        if floats[name].ndim == 1:
            wanted = gguf.GGMLQuantizationType.F32
        elif type_ == "q4_0" and name == "output.weight":
            wanted = gguf.GGMLQuantizationType.Q8_0
        assert tensor.tensor_type == wanted, name
        expected = gguf.quants.quantize(floats[name], wanted)
        assert tensor.data.tobytes() == expected.tobytes(), name


def test_tied_embeddings_get_the_output_matrixs_type(llama_folder, tmp_path):
    convert(llama_folder, tmp_path / "model.gguf", "q4_0")
    written = written_tensors(tmp_path / "model.gguf")
    assert "output.weight" not in written
    assert written["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert written["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0


def test_output_matrix_stored_beside_tied_embeddings_is_left_out(damaged_folder, tmp_path):
    path = damaged_folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    convert(damaged_folder, tmp_path / "model.gguf", "q8_0")
    assert "output.weight" not in written_tensors(tmp_path / "model.gguf")


def test_rows_that_no_block_divides_become_f16(tmp_path):
    folder = save_llama(tmp_path / "llama", hidden_size=48, num_hidden_layers=1)
    convert(folder, tmp_path / "model.gguf", "q8_0")
    types = {name: tensor.tensor_type.name for name, tensor in written_tensors(tmp_path / "model.gguf").items()}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q8_0"  # rows of 96
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_metadata_is_that_of_llama_cpps_converter(damaged_folder, tmp_path):
    """Keys, types and values as convert_hf_to_gguf.py of llama.cpp (October 2026) writes them."""
    convert(damaged_folder, tmp_path / "model.gguf", "q8_0")
    fields = written_fields(tmp_path / "model.gguf")
    scalars = {
        "general.architecture": ("STRING", "llama"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", "Checkpoint"),
        "general.size_label": ("STRING", "95K"),
        "general.file_type": ("UINT32", 7),
        "general.quantization_version": ("UINT32", 2),
        "llama.block_count": ("UINT32", 2),
        "llama.context_length": ("UINT32", 256),
        "llama.embedding_length": ("UINT32", 64),
        "llama.feed_forward_length": ("UINT32", 96),
        "llama.attention.head_count": ("UINT32", 4),
        "llama.attention.head_count_kv": ("UINT32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", float(np.float32(1e-6))),
        "llama.attention.key_length": ("UINT32", 16),
        "llama.attention.value_length": ("UINT32", 16),
        "llama.rope.dimension_count": ("UINT32", 16),
        "llama.rope.freq_base": ("FLOAT32", 10000.0),
        "llama.vocab_size": ("UINT32", N_VOCAB),
        "tokenizer.ggml.model": ("STRING", "gpt2"),
        "tokenizer.ggml.pre": ("STRING", "smollm"),
        "tokenizer.ggml.bos_token_id": ("UINT32", 0),
        "tokenizer.ggml.eos_token_id": ("UINT32", 2),
        "tokenizer.ggml.unknown_token_id": ("UINT32", 0),
        "tokenizer.ggml.add_bos_token": ("BOOL", False),
        "tokenizer.chat_template": ("STRING", CHAT_TEMPLATE),
    }
    arrays = {"tokens": "STRING", "token_type": "INT32", "merges": "STRING"}
    assert fields.keys() == scalars.keys() | {f"tokenizer.ggml.{name}" for name in arrays}
    for key, (type_, value) in scalars.items():
        assert (fields[key].types[0].name, fields[key].contents()) == (type_, value), key
    for name, type_ in arrays.items():
        assert [t.name for t in fields[f"tokenizer.ggml.{name}"].types] == ["ARRAY", type_]


def test_ggpy_reads_what_was_written(mistral_folder, tmp_path):
    plan = convert(mistral_folder, tmp_path / "model.gguf", "q8_0")
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert {name: (t.shape, t.type, t.n_bytes) for name, t in file.tensors.items()} == {
            t.name: (t.shape, t.type, t.n_bytes) for t in plan.tensors
        }
        assert set(file.metadata) == set(plan.metadata)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama3_rope_factors_turn_plain_frequencies_into_transformers_ones(tmp_path):
    folder = save_llama(tmp_path / "llama", num_hidden_layers=1, head_dim=64, rope_parameters=LLAMA3_ROPE)
    convert(folder, tmp_path / "model.gguf", "q8_0")
    factors = written_tensors(tmp_path / "model.gguf")["rope_freqs.weight"].data
    scaled = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq.numpy()
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    assert factors.dtype == np.float32 and factors.shape == (32,)
    np.testing.assert_allclose(plain / factors, scaled, rtol=2e-6)
    blended = (factors > 1) & (factors < 8)
    assert factors[0] == 1 and factors[-1] == 8 and blended.any()


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5000.0}, {"freq_base": 5000.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"scaling.type": "linear", "scaling.factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 64,
                "scaling.yarn_beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_scaling_is_written(rope, expected, damaged_folder, tmp_path):
    # rope_scaling and rope_theta: how config.json said it before transformers 5
    for values in (
        {"rope_parameters": {"rope_theta": 10000.0} | rope},
        {"rope_parameters": None, "rope_scaling": rope, "rope_theta": rope.get("rope_theta", 10000.0)},
    ):
        edit_config(damaged_folder, **values)
        metadata = convert(damaged_folder, tmp_path / "model.gguf", "f32", dry_run=True).metadata
        written = {key.removeprefix("llama.rope."): value for key, value in metadata.items() if ".rope." in key}
        assert written == {"dimension_count": 16, "freq_base": 10000.0} | expected


def test_plan_of_a_dry_run_is_what_a_conversion_writes(llama_folder, tmp_path):
    plan = convert(llama_folder, tmp_path / "model.gguf", "q4_0", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert plan == convert(llama_folder, tmp_path / "model.gguf", "q4_0")
    written = written_tensors(tmp_path / "model.gguf")
    assert [(t.name, t.type, t.n_bytes) for t in plan.tensors] == [
        (name, t.tensor_type.name, t.n_bytes) for name, t in written.items()
    ]
    assert plan.n_bytes == sum(int(t.n_bytes) for t in written.values())
    assert plan.n_parameters == sum(int(t.n_elements) for t in written.values())
    sources = {t.name: t.sources for t in plan.tensors}
    assert sources["blk.1.ffn_up.weight"] == ("model.layers.1.mlp.up_proj.weight",)


def test_small_chunks_give_the_same_file(mistral_folder, tmp_path, monkeypatch):
    convert(mistral_folder, tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr(conversion, "CHUNK_VALUES", 700)
    done = []
    convert(mistral_folder, tmp_path / "chunks.gguf", "q8_0", progress=lambda *call: done.append(call))
    assert (tmp_path / "chunks.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    sizes = [size for size, _, _ in done]
    assert len(done) > 100 and sizes == sorted(sizes)
    assert {total for _, total, _ in done} == {sizes[-1]}
    assert done[0][2] == "token_embd.weight"


def test_file_that_is_there_is_replaced(llama_folder, tmp_path):
    (tmp_path / "model.gguf").write_text("old")
    convert(llama_folder, tmp_path / "model.gguf", "q8_0")
    assert "token_embd.weight" in written_tensors(tmp_path / "model.gguf")


def test_interruption_leaves_nothing_and_says_so(llama_folder, tmp_path):
    def interrupt(done, total, name):
        if name == "blk.1.attn_q.weight":
            raise KeyboardInterrupt

    (tmp_path / "model.gguf").write_text("old")
    with pytest.raises(ConversionError, match=r"model\.gguf: interrupted at [1-9]\d %"):
        convert(llama_folder, tmp_path / "model.gguf", "q8_0", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "old"


def test_full_disk_leaves_nothing_and_says_so(llama_folder, tmp_path):
    def fill(done, total, name):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConversionError, match=r"model\.gguf: no space left"):
        convert(llama_folder, tmp_path / "model.gguf", "q8_0", progress=fill)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_seen_beforehand(llama_folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1_000_000, 950_000, 50_000))
    with pytest.raises(ConversionError, match=r"model\.gguf: needs .* kB, the disk has .* kB left"):
        convert(llama_folder, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_of_the_output_is_named(llama_folder, tmp_path):
    with pytest.raises(ConversionError, match="nowhere"):
        convert(llama_folder, tmp_path / "nowhere" / "model.gguf", "q8_0")


def edit_config(folder, **changes):
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    for key, value in changes.items():
        if value is None:
            del values[key]
    path.write_text(json.dumps(values))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def set_value(name, value):
    def edit(tensors):
        tensors[name].reshape(-1)[5] = value

    return edit


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not a JSON file"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: not a JSON object"),
    "no architecture": (lambda f: edit_config(f, architectures=[]), r"config\.json: names no architecture"),
    "no size": (lambda f: edit_config(f, hidden_size=None), r"config\.json: hidden_size .* not null"),
    "size no number": (lambda f: edit_config(f, hidden_size="64"), r"hidden_size must be a positive integer"),
    "epsilon no number": (lambda f: edit_config(f, rms_norm_eps=True), r"rms_norm_eps must be a number"),
    "heads don't divide": (
        lambda f: edit_config(f, head_dim=None, num_attention_heads=5),
        r"hidden_size 64 can't be shared by 5 heads",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"neither tokenizer\.json nor tokenizer\.model"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json: not a tokenizer"),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        r"no tensor for blk\.1\.ffn_up\.weight",
    ),
    "tensor too many": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update(spare=np.zeros(3, np.float32))),
        r"tensor spare has no place in a LlamaForCausalLM",
    ),
    "bias too many": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update({"model.norm.bias": np.zeros(64, np.float32)})),
        r"tensor model\.norm\.bias has no place",
    ),
    "wrong shape": (
        lambda f: edit_config(f, intermediate_size=128),
        r"tensor model\.layers\.0\.mlp\.\w+\.weight is \(.*\), config\.json asks for \(.*128.*\)",
    ),
    "more tokens than rows": (lambda f: edit_config(f, vocab_size=400), r"is \(512, 64\), .* asks for \(400, 64\)"),
    "NaN": (
        lambda f: edit_tensors(f, set_value("model.layers.1.self_attn.q_proj.weight", np.nan)),
        r"model\.layers\.1\.self_attn\.q_proj\.weight: value \[0, 5\] is nan",
    ),
    "infinity": (
        lambda f: edit_tensors(f, set_value("model.norm.weight", -np.inf)),
        r"model\.norm\.weight: value \[0, 5\] is -inf",
    ),
    "too large for f16 scales": (
        lambda f: edit_tensors(f, set_value("model.embed_tokens.weight", -1e7)),
        r"model\.embed_tokens\.weight: values up to 1e\+07 don't fit Q8_0",
    ),
    "bad rope": (
        lambda f: edit_config(f, rope_parameters=LLAMA3_ROPE | {"high_freq_factor": 1.0}),
        r"low_freq_factor < high_freq_factor",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_in_one_line_and_leaves_nothing(damage, damaged_folder, tmp_path):
    do_damage, message = DAMAGES[damage]
    do_damage(damaged_folder)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(damaged_folder, tmp_path / "model.gguf", "q8_0")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


UNSUPPORTED = {
    "architecture": ({"architectures": ["BloomForCausalLM"]}, "known: LlamaForCausalLM, MistralForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'; known: 'silu'"),
    "rope": (
        {"rope_parameters": {"rope_type": "longrope"}},
        "rope_type 'longrope'; known: default, linear, dynamic, llama3, yarn",
    ),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_checkpoint_is_refused_with_what_is_known(what, damaged_folder, tmp_path):
    changes, message = UNSUPPORTED[what]
    edit_config(damaged_folder, **changes)
    with pytest.raises(UnsupportedError, match=message):
        convert(damaged_folder, tmp_path / "model.gguf", "q8_0")


@pytest.mark.parametrize("name", ["q5", "copy"])
def test_unknown_type_is_refused_with_those_known(name, llama_folder, tmp_path):
    with pytest.raises(UnsupportedError, match=f"'{name}'; known are F32, F16, BF16, .*Q4_K_M, [^C]*$"):
        convert(llama_folder, tmp_path / "model.gguf", name)


def test_q2_k_s_is_refused_without_an_importance_matrix(wide_folder, tmp_path):
    with pytest.raises(Error, match=r"blk\.0\.attn_\w\.weight: Q2_K_S is useless without an importance matrix"):
        convert(wide_folder, tmp_path / "model.gguf", "q2_k_s")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """Rows that blocks of 256 divide."""
    folder = tmp_path_factory.mktemp("wide")
    return save_llama(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=8, dtype=torch.bfloat16)


@pytest.mark.parametrize("type_", [name for name in FILE_TYPES if name != "Q2_K_S"])
def test_every_type_is_what_quantizing_an_f32_conversion_gives(type_, wide_folder, tmp_path):
    """In bytes, and with no more disk than the result takes."""
    convert(wide_folder, tmp_path / "f32.gguf", "f32")
    quantize_model(tmp_path / "f32.gguf", tmp_path / "expected.gguf", type_)
    most = 0

    def progress(done, total, name):
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "out").iterdir()))

    (tmp_path / "out").mkdir()
    plan = convert(wide_folder, tmp_path / "out" / "model.gguf", type_.lower(), progress=progress)
    written = (tmp_path / "out" / "model.gguf").read_bytes()
    assert plan.type == type_
    assert written == (tmp_path / "expected.gguf").read_bytes()
    assert 0 < most <= len(written)


@pytest.mark.parametrize("damage", ["missing", "without its tensor"])
def test_damaged_shard_is_named(damage, mistral_folder, tmp_path):
    folder = shutil.copytree(mistral_folder, tmp_path / "checkpoint")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        tensors = sorted(folder.glob("model-*.safetensors"))[0]
        shutil.copy(tensors, shard)
    with pytest.raises(ConversionError, match=shard.name):
        convert(folder, tmp_path / "model.gguf", "q8_0")


def test_index_can_name_files_of_the_folder_alone(mistral_folder, tmp_path):
    folder = shutil.copytree(mistral_folder, tmp_path / "checkpoint")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"'\.\./elsewhere\.safetensors' is not a file of this folder"):
        convert(folder, tmp_path / "model.gguf", "q8_0")


def test_files_are_called_what_they_are(llama_folder, tmp_path):
    with pytest.raises(ConversionError, match="but a file; name its folder"):
        convert(llama_folder / "model.safetensors", tmp_path / "model.gguf", "q8_0")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ConversionError, match="but a GGUF file already; 'ggpy quantize'"):
        convert(tmp_path / "old.gguf", tmp_path / "model.gguf", "q8_0")


@pytest.mark.parametrize("source", ["nothing", "./some/model", "a/b/c", "/some/model"])
def test_missing_folder_is_not_looked_for_at_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.setattr("ggpy.hub.download.list_remote", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="no such folder, nor a name"):
        convert(source, tmp_path / "model.gguf", "q8_0")
