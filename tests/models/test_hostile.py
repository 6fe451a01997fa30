"""Models whose metadata and weights are meant to do harm, and runs of all architectures that watch their memory."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType

import ggpy
from ggpy.errors import Error
from tests.file.edit import Edited
from tests.fuzz.seeds import of_all_types
from tests.graph import guards

from .checkpoints import converted, ids, save_tokenizer
from .test_architectures import made as decoder
from .test_encoder import checkpoint as encoder
from .test_moe import made
from .test_states import made as with_states

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """The bytes of a small DeepSeek-V3: sigmoid routing, bias, groups of experts."""
    return converted(tmp_path_factory.mktemp("v3"), made("V3")).read_bytes()


@pytest.fixture(scope="module")
def yarn(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("yarn"), made("V2-Lite, yarn")).read_bytes()


def run(path, kv_type="f32", **options):
    """Logits of a full run and of one token."""
    with ggpy.load(path, n_ctx=64, n_threads=2, n_batch=16, kv_type=kv_type, **options) as model:
        return model.logits(ids(17))


@pytest.mark.parametrize(
    ("key", "kind", "value", "problem"),
    [
        ("attention.layer_norm_rms_epsilon", "float64", 1e300, "no number for a model"),
        ("expert_weights_scale", "float32", NAN, "no number for a model"),
        ("rope.dimension_count", "uint32", 2**30, "of a"),
        ("block_count", "uint32", 2**31 - 1, "layers of"),
        ("attention.key_length_mla", "uint32", 2**30, "expected"),
        ("expert_group_count", "uint32", 3, "8 experts in 3 groups"),
        ("expert_group_count", "uint32", 2**31, "groups"),
        ("expert_group_used_count", "uint32", 0, "too few in the groups"),
        ("expert_used_count", "uint32", 9, "9 of 8 experts"),
        ("expert_count", "uint32", 2**31, "shape"),
        ("rope.freq_base", "float32", 0.0, "isn't above 0"),
        ("rope.freq_base", "float32", 1.0, "turns nothing"),
        ("rope.scaling.factor", "float32", 0.0, "isn't above 0"),
        ("rope.scaling.factor", "float32", -1.0, "isn't above 0"),
        ("rope.scaling.yarn_beta_fast", "float32", 0.0, "isn't above 0"),
        ("rope.scaling.yarn_beta_slow", "float32", NAN, "no number for a model"),
        ("rope.scaling.original_context_length", "uint32", 0, "isn't above 0"),
        ("rope.scaling.attn_factor", "float32", INF, "no number for a model"),
    ],
)
def test_numbers_out_of_range_are_one_line_with_the_file(tmp_path, v3, yarn, key, kind, value, problem):
    model = Edited.read(yarn if "scaling" in key else v3)
    model.set(f"deepseek2.{key}", kind, value)
    path = tmp_path / "model.gguf"
    path.write_bytes(model.bytes())
    with pytest.raises(Error, match=problem) as caught:
        run(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("make", "name", "key", "value"),
    [
        (decoder, "granite", "granite.logit_scale", 1e-45),
        (made, "V2-Lite, yarn", "deepseek2.rope.scaling.yarn_log_multiplier", 1e30),
    ],
)
def test_numbers_that_give_others_out_of_range_are_one_line_with_the_file(tmp_path, make, name, key, value):
    path = converted(tmp_path, make(name))
    model = Edited.read(path.read_bytes())
    model.set(key, "float32", value)
    path.write_bytes(model.bytes())
    with pytest.raises(Error, match=r"f32\.gguf: by the metadata (logit_)?scale is .*, which is no number for a model$"):
        ggpy.load(path)


def test_more_groups_used_than_there_are_is_all_of_them(tmp_path, v3):
    model = Edited.read(v3)
    path = tmp_path / "model.gguf"
    results = []
    for n in (4, 5, 2**30):
        model.set("deepseek2.expert_group_used_count", "uint32", n)
        path.write_bytes(model.bytes())
        results.append(run(path))
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


@pytest.mark.parametrize("value", [NAN, -INF, -3.4e38])
def test_a_bias_that_rules_all_experts_out_writes_within_bounds(tmp_path, v3, value):
    model = Edited.read(v3)
    for name in model.tensors:
        if "exp_probs_b" in name:
            model.fill(name, value)
    path = tmp_path / "model.gguf"
    path.write_bytes(model.bytes())
    with guards.guarded():
        try:
            first = run(path)
        except Error as error:
            assert "aren't finite" in str(error)
        else:
            assert np.isfinite(first).all() and first.tobytes() == run(path).tobytes()


@pytest.mark.parametrize("tensor", ["blk.1.ffn_gate_inp.weight", "blk.0.attn_norm.weight", "output.weight"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_damaged_weights_give_an_error_instead_of_text(tmp_path, v3, tensor, value):
    model = Edited.read(v3)
    model.fill(tensor, value, slice(0, 64))
    path = tmp_path / "model.gguf"
    path.write_bytes(model.bytes())
    message = rf"{path.name}: the model's values aren't finite: the file is damaged$"
    with ggpy.load(path, n_ctx=64, n_threads=2, kv_type="f32") as opened:
        for use in (
            lambda: opened.generate([1, 2, 3], max_tokens=2).run(),
            lambda: opened.logits([1, 2, 3]),
            lambda: list(opened.generate_batch([[1], [2]], max_tokens=1)),
        ):
            with pytest.raises(Error, match=message):
                use()
        with opened.hooked({"logits": lambda name, value: np.zeros_like(value)}):
            assert np.isfinite(opened.logits([1, 2, 3])).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (made, "V3"),
        (decoder, "gpt-oss"),
        (decoder, "gemma4, experts"),
        (with_states, "granitehybrid"),
        (with_states, "qwen35"),
    ],
)
def test_no_step_hides_a_weight_of_nan(tmp_path, simd_form, make, name):
    """Neither bounds and maxima, which take the other of two values, nor rounding to integers, which knows no NaN."""
    path = converted(tmp_path, make(name), "q8_0")
    sound = path.read_bytes()
    for i, (tensor, t) in enumerate(Edited.read(sound).tensors.items()):
        if not tensor.startswith(("blk.1.", "output")):
            continue
        model = Edited.read(sound)
        if t.type_id == GGMLQuantizationType.F32:
            model.fill(tensor, NAN, slice(0, t.dims[0]))
        else:  # the first block's scale
            model.tensors[tensor].data = np.float16(NAN).tobytes() + t.data[2:]
        path.write_bytes(model.bytes())
        with pytest.raises(Error, match="aren't finite"):
            run(path, kv_type=("f16", "q8_0")[i % 2])


def test_positions_are_counted_in_the_checkpoint(tmp_path):
    """As many as config.json says would take all memory."""
    encoder(tmp_path, "xlm-roberta")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**31 - 1}))
    with pytest.raises(Error, match=r"position_embeddings\.weight is \(\d+, \d+\), config\.json asks for \(214748364\d, "):
        ggpy.convert(tmp_path, tmp_path / "out.gguf", "f32")


@pytest.mark.parametrize("name", ["V3", "V2", "mixtral", "qwen2moe", "qwen2"])
def test_every_step_writes_what_is_its_own(tmp_path, simd_form, name):
    """The same bits as without guards: nothing beyond a buffer is read, either."""
    path = converted(tmp_path, made(name), "q8_0" if name == "mixtral" else "f32")
    for kv_type in ("f16", "q8_0"):
        plain = run(path, kv_type=kv_type)
        with guards.guarded():
            assert run(path, kv_type=kv_type).tobytes() == plain.tobytes()


@pytest.mark.parametrize("name", ["gemma2", "gemma4, experts", "gpt-oss", "gpt2", "cohere2"])
def test_every_step_of_other_decoders_writes_what_is_its_own(tmp_path, name):
    path = converted(tmp_path, decoder(name))
    plain = run(path, kv_type="f16")
    with guards.guarded():
        assert run(path, kv_type="f16").tobytes() == plain.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="pages that can't be read, as Linux makes them")
def test_no_kernel_reads_beyond_a_weight(tmp_path):
    """Of any type; of mixtures, states and encoders, too, behind each of whose buffers is a guard."""
    paths = []
    for name, make in (("V3", made), ("qwen3next", with_states), ("nemotron_h_moe, groups, latent", with_states)):
        (tmp_path / name).mkdir()
        paths.append(converted(tmp_path / name, make(name)))
    encoder(tmp_path / "bert", "bert")
    ggpy.convert(tmp_path / "bert", tmp_path / "bert.gguf", "f32")
    (tmp_path / "wide").mkdir()
    for i, content in enumerate(of_all_types(tmp_path / "wide")):
        paths.append(tmp_path / f"wide-{i}.gguf")
        paths[-1].write_bytes(content)
    for where, given, ends in (
        ("front", paths[-2:], 0),
        ("back", [*paths, tmp_path / "bert.gguf"], 0),
        ("short", paths[:1], -signal.SIGSEGV),
    ):
        command = [sys.executable, "-m", "tests.graph.walls", where, *map(str, given)]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == ends, found.stderr


def test_guards_find_what_is_out_of_bounds(tmp_path, monkeypatch):
    path = converted(tmp_path, made("qwen2"))
    with guards.guarded(), ggpy.load(path, n_ctx=64, n_threads=2, n_batch=16) as model:
        monkeypatch.setattr(guards, "GUARD", guards.GUARD + 64)  # as if all buffers ended earlier
        with pytest.raises(guards.OutOfBoundsError):
            model.logits(ids(17))


@pytest.mark.parametrize(
    ("make", "name", "key", "values"),
    [
        (with_states, "granitehybrid", "layer_types", (3, [[]] * 4)),
        (with_states, "lfm2moe", "layer_types", (3, [[]] * 3)),
        (with_states, "lfm2moe", "full_attn_idxs", (3, "0")),
        (with_states, "nemotron_h", "layers_block_type", (3, [[]])),
        (with_states, "qwen35", "layer_types", (3, [{}] * 4)),
        (decoder, "afmoe", "layer_types", (3, "sliding_attention")),
        (decoder, "minimax-m2", "attn_type_list", (3, [[]])),
        (decoder, "exaone-moe", "is_moe_layer", (3, {"a": 1})),
        (decoder, "phi3, long", "original_max_position_embeddings", (1,)),
        (decoder, "hunyuan-dense, another base", "rope_parameters", ({"rope_type": "dynamic", "alpha": -1.0},)),
        (decoder, "hunyuan-dense, another base", "head_dim", (2,)),
    ],
)
def test_settings_that_cannot_be_computed_with_are_refused(tmp_path, make, name, key, values):
    """A number has no items, a list is no key of a table, the logarithm of 1 divides nothing."""
    make(name).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("layer_types" if key == "full_attn_idxs" else "", None)
    for value in values:
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(Error, match=r"config\.json") as caught:
            ggpy.convert(tmp_path, tmp_path / "out.gguf", "f32")
        assert "\n" not in str(caught.value)
