"""What a model takes is said before it takes it, and what takes less."""

import json
import subprocess
import sys

import pytest
from transformers import OlmoeConfig, OlmoeForCausalLM

import ggpy
from ggpy.cli import main
from ggpy.cli.memory import memory_warning
from tests.hub.conftest import hub  # noqa: F401
from tests.models.checkpoints import converted, random_model

_CONTEXT = 1024
_RUN = f"""
import sys, ggpy
with ggpy.load(sys.argv[1], n_ctx={_CONTEXT}, kv_type=sys.argv[2]) as model:
    estimate = model.memory_use().total
    ids = [i * 7919 % model.architecture.n_vocab for i in range({_CONTEXT - 8})]
    "".join(model.generate(ids, max_tokens=8, temperature=0))
    path, taken, code = "", 0, 0
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0]:
            path = words[-1]
        elif words[0] == "Rss:":
            taken += int(words[1]) << 10
            code += (int(words[1]) << 10) * (".so" in path)
    print(estimate, taken, code)
"""
#: Bytes of libraries' code that the estimate has in it. How many of their pages a system maps at once differs by far.
_CODE = 66 << 20


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of 65 MB in float32, with much room for keys and values."""
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_experts=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts_per_tok=4,
        max_position_embeddings=8192,
        pad_token_id=None,
        eos_token_id=None,
    )
    return converted(tmp_path_factory.mktemp("memory"), random_model(OlmoeForCausalLM, config))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_the_estimate_is_within_a_tenth_of_what_is_taken(mixture, kv_type):
    with ggpy.load(mixture, n_ctx=_CONTEXT, kv_type=kv_type) as model:  # compiles kernels, which takes memory of its own
        model.logits([1])
    done = subprocess.run([sys.executable, "-c", _RUN, mixture, kv_type], capture_output=True, text=True, check=True)
    estimate, taken, code = map(int, done.stdout.split())
    print(kv_type, estimate, taken, code)
    assert abs(estimate - (taken - code + _CODE)) < 0.1 * estimate


def test_parts_are_what_the_file_and_the_context_say(mixture):
    with ggpy.load(mixture, n_ctx=1024) as model:
        use = model.memory_use()
        read = [t for name, t in model.file.tensors.items() if name != "token_embd.weight"]  # of which rows are read
        assert use.weights == sum(t.n_bytes for t in read)
        assert use.cache == 1024 * 4 * 2 * 256 * 2  # layers, keys and values, n_embd, bytes
        assert 0.5 < model.memory_use("q8_0").cache / use.cache < 0.6
        assert use.with_context(2048).cache == 2 * use.cache
        assert use.states == use.made == 0


def test_too_large_a_model_is_said_with_what_would_fit(mixture, hub):  # noqa: F811
    hub.add("a/b", {"b-Q8_0.gguf": b"8" * 1000, "b-Q2_K.gguf": b"2" * 100, "b-F32.gguf": mixture.read_bytes()})
    with ggpy.load("a/b:F32", n_ctx=8192) as model:
        use = model.memory_use()
        needed = use.total - use.process
        assert memory_warning("a/b:F32", model, needed) is None and memory_warning("a/b:F32", model, None) is None
        words = memory_warning("a/b:F32", model, needed - use.cache // 4)
        assert f"takes about {needed / 1e6:,.1f} MB" in words
        assert "-c 6144, --kv-type q8_0, --ram-budget " in words and words.endswith("a/b:Q8_0 (0.0 MB) would fit")
        assert "--kv-type" not in memory_warning("a/b:F32", model, needed - use.cache)
        assert "no smaller context" in memory_warning("a/b:F32", model, 1000)


def test_inspect_and_run_show_it(mixture, capsys):
    for arguments in (["inspect", str(mixture)], ["run", str(mixture), "-p", "the", "-n", "1", "-v", "-c", "64"]):
        with pytest.raises(SystemExit):
            main(arguments)
        out = capsys.readouterr()
        assert "memory: about " in out.out + out.err
    with pytest.raises(SystemExit):
        main(["inspect", "--json", str(mixture)])
    assert json.loads(capsys.readouterr().out)["memory"]["n_ctx"] == 8192
