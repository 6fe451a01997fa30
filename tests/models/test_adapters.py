"""LoRA adapters that a model runs with, against PEFT's merged models and llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
import transformers

import ggpy
from converters import convert
from ggpy.errors import Error, GGUFError, UnsupportedError
from ggpy.models.adapters import path_and_scale
from tests.cli.test_cli import call
from tests.converters.conftest import N_VOCAB, save_tokenizer
from tests.converters.test_families import llama_cpp_logprobs
from tests.converters.test_lora import LINEAR, adapted

from .checkpoints import converted, ids, random_model, transformers_logits

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 60,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
#: rows in another order, biases, one matrix for gate and up, one for queries, keys and values
MODELS = {
    "Llama": ({"head_dim": 20}, LINEAR),
    "Qwen2": ({}, LINEAR),
    "Phi3": ({}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "GPTNeoX": ({"num_key_value_heads": None}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
}
TOKENS = ids(40)


def saved(folder, cls, type="f32"):
    """A random checkpoint and its GGUF file."""
    config = getattr(transformers, f"{cls}Config")(**SIZES | MODELS[cls][0])
    random_model(getattr(transformers, f"{cls}ForCausalLM"), config).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    convert(folder / "base", folder / "model.gguf", type)
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint's GGUF file, and beside it a PEFT adapter and the logits with it."""
    folder = tmp_path_factory.mktemp("llama")
    saved(folder, "Llama")
    model = adapted(folder / "base", folder / "adapter", target_modules=[*LINEAR, "lm_head"], r=5).eval()
    return folder, transformers_logits(model, TOKENS)


@pytest.mark.parametrize("cls", MODELS)
def test_a_peft_folder_gives_pefts_logits(cls, tmp_path):
    path = saved(tmp_path, cls)
    model = adapted(tmp_path / "base", tmp_path / "adapter", target_modules=MODELS[cls][1], use_rslora=True).eval()
    expected = transformers_logits(model, TOKENS)
    plain = transformers_logits(model.unload(), TOKENS)
    assert np.abs(expected - plain).max() > 0.3
    with ggpy.load(path, kv_type="f32", lora=[tmp_path / "adapter"]) as ours:
        got = ours.logits(TOKENS)
        assert np.abs(got - expected).max() <= 2e-3
        with ours.new_sequence() as sequence:  # the same bits however a prompt is cut
            for start, stop in ((0, 1), (1, 20), (20, 21), (21, 40)):
                np.testing.assert_array_equal(sequence.extend(TOKENS[start:stop]), got[stop - 1])


def write_adapter(path, pairs, alpha=7.0, arch="llama", kind="adapter", what="lora"):
    """As llama.cpp's convert_lora_to_gguf.py writes it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", what)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        for end, values in (("lora_a", a), ("lora_b", b)):
            if values is not None:
                writer.add_tensor(f"{name}.{end}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_pairs(dtype=np.float32, rank=4):
    random = np.random.default_rng(0)
    sizes = {"attn_q": (120, 60), "attn_v": (40, 60), "attn_output": (60, 120), "ffn_down": (60, 72)}
    names = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in sizes.items()}
    names["output.weight"] = (N_VOCAB, 60)
    return {
        name: (
            random.normal(0, 0.1, (rank, n_in)).astype(dtype),
            random.normal(0, 0.3, (n_out, rank)).astype(dtype),
        )
        for name, (n_out, n_in) in names.items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_llama_cpp_computes_the_same_with_an_adapters_file(dtype, llama, tmp_path):
    folder, scale, lengths = llama[0], 0.6, [3, 40]
    adapter = write_adapter(tmp_path / "adapter.gguf", random_pairs(dtype))
    prompts = [TOKENS[:n] for n in lengths]
    theirs = llama_cpp_logprobs(folder / "model.gguf", folder / "base", prompts, 64, lora=[(adapter, scale)])
    ours = []
    for given in ([], [f"{adapter}:{scale}"]):
        with ggpy.load(folder / "model.gguf", kv_type="f32", lora=given) as model:
            logits = torch.tensor(model.logits(TOKENS)[[n - 1 for n in lengths]])
        ours.append(torch.log_softmax(logits, -1).numpy())
    # Activations that it multiplies with float16 are rounded to that.
    np.testing.assert_allclose(ours[1], theirs, atol=2e-3 if dtype == np.float32 else 2e-2)
    assert np.abs(ours[0] - theirs).max() > 0.5


def test_adapters_are_added_up_with_their_scales(llama, tmp_path):
    """Twice half an adapter, the one as PEFT saves it, the other as a file."""
    folder, expected = llama
    adapter = write_adapter(tmp_path / "none.gguf", random_pairs())
    given = [f"{folder / 'adapter'}:0.5", f"{adapter}:0", f"{folder / 'adapter'}:0.5"]
    with ggpy.load(folder / "model.gguf", kv_type="f32", lora=given) as model:
        assert np.abs(model.logits(TOKENS) - expected).max() <= 2e-3


def test_quantized_models_take_adapters_too(llama, tmp_path):
    folder, expected = llama
    convert(folder / "base", tmp_path / "model.gguf", "q8_0")
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32", lora=[folder / "adapter"]) as model:
        error = np.abs(model.logits(TOKENS) - expected).std()
    with ggpy.load(tmp_path / "model.gguf", kv_type="f32") as model:
        assert error < 0.1 * np.abs(model.logits(TOKENS) - expected).std()


def test_what_was_computed_with_an_adapter_is_not_taken_without_it(llama, tmp_path):
    folder = llama[0]
    with ggpy.load(folder / "model.gguf", lora=[folder / "adapter"]) as model:
        model.logits(TOKENS)
        model.save_cache(tmp_path / "cache", TOKENS)
    with ggpy.load(folder / "model.gguf") as model, pytest.raises(Error, match="of another model"):
        model.load_cache(tmp_path / "cache")


PAIRS = random_pairs()
Q = "blk.0.attn_q.weight"
REFUSED = {
    "a model": ({}, {"kind": "model"}, "not a LoRA adapter"),
    "a control vector": ({}, {"what": "control"}, "not a LoRA adapter"),
    "another architecture": ({}, {"arch": "qwen2"}, "an adapter of architecture 'qwen2'"),
    "half a pair": ({Q: (PAIRS[Q][0], None)}, {}, "only one of .lora_a and .lora_b"),
    "another shape": ({Q: (PAIRS[Q][0][:, 1:], PAIRS[Q][1])}, {}, r"attn_q.weight is \(120, 60\)"),
    "two ranks": ({Q: (PAIRS[Q][0][1:], PAIRS[Q][1])}, {}, "its adapter's matrices are"),
    "another model": ({"blk.7.attn_q.weight": PAIRS[Q]}, {}, "has no blk.7.attn_q.weight"),
    "the embedding": ({"token_embd.weight": PAIRS[Q]}, {}, "token_embd.weight can't be adapted while running"),
    "NaN": ({Q: (PAIRS[Q][0] * np.float32("nan"), PAIRS[Q][1])}, {}, "NaN or infinities"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_dont_fit_are_refused(case, llama, tmp_path):
    pairs, how, message = REFUSED[case]
    path = write_adapter(tmp_path / "adapter.gguf", pairs, **how)
    with pytest.raises(Error, match=message):
        ggpy.load(llama[0] / "model.gguf", lora=[path])


def test_what_can_only_be_merged_is_refused(llama, tmp_path):
    adapted(llama[0] / "base", tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UnsupportedError, match="can't be adapted while running; merge it at conversion"):
        ggpy.load(llama[0] / "model.gguf", lora=[tmp_path / "adapter"])
    with pytest.raises(GGUFError, match="No such file"):
        ggpy.load(llama[0] / "model.gguf", lora=[tmp_path / "none.gguf"])


def test_an_adapter_of_a_matrix_that_isnt_multiplied_is_refused(tmp_path):
    """A short convolution's weights."""
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 4}
    config = transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention"])
    path = converted(tmp_path, random_model(transformers.Lfm2ForCausalLM, config))
    with ggpy.GGUFFile(path) as file:
        n_out, n_in = file.tensors["blk.0.shortconv.conv.weight"].shape
    pair = np.zeros((2, n_in), np.float32), np.zeros((n_out, 2), np.float32)
    adapter = write_adapter(tmp_path / "adapter.gguf", {"blk.0.shortconv.conv.weight": pair}, arch="lfm2")
    with pytest.raises(UnsupportedError, match=r"shortconv\.conv\.weight can't be adapted while running"):
        ggpy.load(path, lora=[adapter])


def test_paths_and_scales(tmp_path):
    (tmp_path / "a:0.5").mkdir()
    assert path_and_scale(tmp_path / "a:0.5") == (tmp_path / "a:0.5", 1.0)
    assert path_and_scale(f"{tmp_path}:-0.25") == (tmp_path, -0.25)
    assert path_and_scale("c:/adapter")[1] == 1.0
    with pytest.raises(Error, match="a scale of inf"):
        path_and_scale("adapter:inf")


def test_several_stages_take_no_adapters(llama):
    with pytest.raises(UnsupportedError, match="adapters aren't shared by several stages"):
        ggpy.load(llama[0] / "model.gguf", lora=[llama[0] / "adapter"], stages=2)


def test_the_command_line_takes_adapters(llama, tmp_path, capsys):
    """While running and at conversion: the same text."""
    folder, adapter, merged = llama[0], str(llama[0] / "adapter"), str(tmp_path / "merged.gguf")
    _, _, err = call(capsys, "convert", folder / "base", "-o", merged, "--type", "f32", "--lora", adapter)
    assert "merged, times 1" in err
    how = ("-p", "the", "-n", 12, "--temp", 0, "--kv-type", "f32")
    given = ([merged], [folder / "model.gguf", "--lora", adapter], [folder / "model.gguf"])
    results = [call(capsys, "run", *arguments, *how) for arguments in given]
    assert [code for code, _, _ in results] == [0, 0, 0]
    assert results[0][1] == results[1][1] != results[2][1]
