"""Types that files have for weights other than matrices."""

import gguf
import numpy as np
import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

import ggpy
from ggpy.errors import UnsupportedError

from .checkpoints import converted, ids, random_model
from .test_llama import SIZES


def rewritten(source, out, change, arrays=()):
    """A copy of a GGUF file; `change(name, values)` gives the values and the type to write, `arrays` are keys whose number
    is repeated for each of three layers."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            if key in arrays:
                writer.add_array(key, [field.contents()] * 3)
                continue
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        values, kind = change(tensor.name, tensor.data)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory):
    model = random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES))
    return converted(tmp_path_factory.mktemp("qwen2"), model)


def logits(path):
    with ggpy.load(path, n_ctx=64, kv_type="f32", n_threads=1) as model:
        return model.logits(ids(20))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_norms_and_biases_of_fewer_bits_are_widened(kind, with_biases, tmp_path):
    wanted = gguf.GGMLQuantizationType[kind]

    def narrow(name, values):
        return (gguf.quants.quantize(values, wanted), wanted) if values.ndim == 1 else (values, None)

    def rounded(name, values):
        return gguf.quants.dequantize(*narrow(name, values)) if values.ndim == 1 else values, None

    found = logits(rewritten(with_biases, tmp_path / "narrow.gguf", narrow))
    np.testing.assert_array_equal(found, logits(rewritten(with_biases, tmp_path / "rounded.gguf", rounded)))


def test_a_type_that_can_only_be_listed_is_named_with_the_file(with_biases, tmp_path):
    nvfp4 = gguf.GGMLQuantizationType.NVFP4

    def change(name, values):
        if name != "blk.1.ffn_gate.weight":
            return values, None
        return np.zeros((values.shape[0], values.shape[1] // 64 * 36), np.uint8), nvfp4

    path = rewritten(with_biases, tmp_path / "model.gguf", change)
    with pytest.raises(UnsupportedError, match=r"model\.gguf: tensor blk\.1\.ffn_gate\.weight is NVFP4"):
        logits(path)


def test_arrays_of_equal_numbers_are_that_number(with_biases, tmp_path):
    keys = ("qwen2.attention.head_count_kv", "qwen2.feed_forward_length")
    path = rewritten(with_biases, tmp_path / "model.gguf", lambda name, values: (values, None), keys)
    np.testing.assert_array_equal(logits(path), logits(with_biases))
