"""What is wrong or dangerous in a file is found, and what isn't is left alone."""

import json

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ggpy.cli import main
from ggpy.generate.lint import lint
from tests.file.edit import Edited
from tests.models.checkpoints import converted, random_model
from tests.models.test_llama import SIZES


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file, in Q8_0."""
    return converted(tmp_path_factory.mktemp("lint"), random_model(LlamaForCausalLM, LlamaConfig(**SIZES)), "q8_0")


def edited(sound, tmp_path, change):
    """What is found in a changed file."""
    model = Edited.read(sound.read_bytes())
    change(model)
    path = tmp_path / "changed.gguf"
    path.write_bytes(model.bytes())
    return lint(path)


def tokens_of(sound):
    from ggpy import GGUFFile

    with GGUFFile(sound) as file:
        return file.metadata["tokenizer.ggml.tokens"].tolist()


def test_sound_files_have_no_errors_or_warnings(sound):
    found = lint(sound)
    assert [f.level for f in found] == ["note"] and "tensors whole" in found[0].text
    assert [f for f in lint(_demo()) if f.level != "note"] == []


def _demo():
    from ggpy.hub import model_file

    return model_file("demo")


def _set(key, kind, value):
    return lambda model: model.set(key, kind, value)


def _drop(*keys):
    def change(model):
        for key in keys:
            (model.keys if key in model.keys else model.tensors).pop(key)

    return change


def _poke(name, at, piece):
    def change(model):
        stored = model.tensors[name]
        stored.data = stored.data[:at] + piece + stored.data[at + len(piece) :]

    return change


def _overlap(model):
    names = list(model.tensors)
    model.tensors[names[3]].offset = 0


NAN16 = np.float16("nan").tobytes()


@pytest.mark.parametrize(
    ("change", "level", "place", "text"),
    [
        (_set("general.architecture", "string", "whale"), "error", "general.architecture", "none that ggpy has"),
        (_drop("general.architecture"), "error", "general.architecture", "is missing"),
        (_drop("blk.1.ffn_up.weight"), "error", "model", "blk.1.ffn_up.weight is missing"),
        (_set("llama.attention.head_count", "uint32", 3), "error", "model", "heads"),
        (_set("llama.atention.scale", "float32", 2.0), "note", "llama.atention.scale", "doesn't know"),
        (_overlap, "error", "", "its data overlap those of"),
        (_drop("tokenizer.ggml.tokens"), "error", "tokenizer.ggml.tokens", "is missing"),
        (_set("tokenizer.ggml.eos_token_id", "uint32", 70000), "error", "tokenizer.ggml.eos_token_id", "70000 is no token"),
        (_drop("tokenizer.ggml.eos_token_id"), "warning", "tokenizer.ggml.eos_token_id", "no token ends a text"),
        (_drop("tokenizer.ggml.pre"), "warning", "tokenizer.ggml.pre", "is missing"),
        (_set("tokenizer.ggml.pre", "string", "whale"), "error", "tokenizer", "whale"),
        (
            _set("tokenizer.ggml.token_type", "int32", [1, 2, 3]),
            "error",
            "tokenizer.ggml.token_type",
            "isn't a number for each",
        ),
        (_set("tokenizer.chat_template", "string", "{% if"), "error", "tokenizer.chat_template", "can't be read"),
        (
            _set("tokenizer.chat_template", "string", "{{ messages.x.y.z }}"),
            "warning",
            "tokenizer.chat_template",
            "a message",
        ),
        (_poke("blk.0.ffn_up.weight", 0, NAN16), "error", "blk.0.ffn_up.weight", "32 of 6144 values aren't finite"),
        (_poke("output_norm.weight", 8, b"\0\0\x80\x7f"), "error", "output_norm.weight", "1 of 64 values aren't finite"),
    ],
)
def test_what_is_wrong_is_found(sound, tmp_path, change, level, place, text):
    found = edited(sound, tmp_path, change)
    assert any((f.level, text in f.text) == (level, True) and f.place.startswith(place) for f in found), found


def test_tokens_that_are_there_twice_or_missing_are_found(sound, tmp_path):
    tokens = tokens_of(sound)
    twice = [tokens[40], *tokens[1:]]
    (found,) = [f for f in edited(sound, tmp_path, _set("tokenizer.ggml.tokens", "string", twice)) if "twice" in f.text]
    assert found.level == "error" and repr(tokens[40]) in found.text and found.llama_cpp == "takes the last of them"
    fewer = edited(sound, tmp_path, _set("tokenizer.ggml.tokens", "string", tokens[:-12]))
    assert any("500 tokens, and 512 embeddings" in f.text and f.level == "note" for f in fewer)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ ''.__class__.__mro__ }}", "reaches for .__class__"),
        ("{{ messages['__init__'] }}", "reaches for ['__init__']"),
        ("{{ messages|attr('x') }}", "filter attr"),
        ("{{ cycler.__init__.__globals__ }}", "uses cycler"),
        ("{% include 'x' %}", "include of other files"),
        ("{{ 'a' * 10000000 }}", "a number like 10000000"),
        ("{{ 2 ** 99 }}", "a power"),
        ("Hello\u202e", "can't be seen: '\\u202e'"),
    ],
)
def test_templates_that_reach_beyond_are_shown(sound, tmp_path, source, text):
    found = edited(sound, tmp_path, _set("tokenizer.chat_template", "string", source))
    assert any(text in str(f) for f in found if f.place == "tokenizer.chat_template"), found


def test_an_end_of_turn_that_the_file_does_not_name_is_found(sound, tmp_path):
    tokens = tokens_of(sound)

    def change(model):
        _set("tokenizer.ggml.tokens", "string", [*tokens[:-1], "<|eot_id|>"])(model)
        _set("tokenizer.chat_template", "string", "{{ messages[0].content }}<|eot_id|>")(model)
        _set("tokenizer.ggml.eos_token_id", "uint32", 2)(model)

    found = [f for f in edited(sound, tmp_path, change) if f.place == "tokenizer.ggml.eot_token_id"]
    assert [f.level for f in found] == ["warning"] and "'<|eot_id|>'" in found[0].text


def test_samples_are_said_and_a_hole_in_them_found(tmp_path):
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "intermediate_size": 8192})
    path = converted(tmp_path, random_model(LlamaForCausalLM, config))
    (note,) = [f for f in lint(path) if f.place == "weights"]
    assert "of the others at rows from all parts" in note.text
    model = Edited.read(path.read_bytes())
    model.tensors["blk.0.ffn_up.weight"].data = b"\xff" * len(model.tensors["blk.0.ffn_up.weight"].data)
    path.write_bytes(model.bytes())
    assert any(f.place == "blk.0.ffn_up.weight" and "in a sample of its rows" in f.text for f in lint(path))


def test_the_command_ends_with_1_where_there_are_errors(sound, tmp_path, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["inspect", "--lint", *map(str, arguments)])
        return caught.value.code or 0, capsys.readouterr().out

    assert call(sound)[0] == 0
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(sound.read_bytes()[:2000])
    code, out = call(bad)
    assert code == 1 and out.startswith("error: file: ") and out.strip().endswith("1 error, 0 warnings")
    code, out = call(bad, "--json")
    assert code == 1 and json.loads(out)[0]["level"] == "error"
