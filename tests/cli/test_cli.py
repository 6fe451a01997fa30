"""The commands as a user meets them."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ggpy.cli import main
from tests.models.checkpoints import converted, random_model
from tests.models.test_llama import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and its conversion, f32.gguf."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "empty").mkdir()
    converted(folder, random_model(LlamaForCausalLM, LlamaConfig(**SIZES)))
    return folder


def call(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return caught.value.code or 0, out.out, out.err


def test_run_streams_the_text_that_the_api_gives(folder, capsys):
    import ggpy

    code, out, err = call(capsys, "run", folder / "f32.gguf", "-p", "the hand", "-n", 8, "--temp", 0, "-v", "-t", 1)
    assert code == 0
    with ggpy.load(folder / "f32.gguf") as model:
        assert out == "".join(model.generate("the hand", max_tokens=8, temperature=0)) + "\n"
    assert "decode" in err and "tok/s" in err


def test_run_guesses_tokens_and_says_how_many_were_right(folder, capsys):
    path = folder / "f32.gguf"
    arguments = ["run", path, "-p", "the hand", "-n", 40, "-t", 1, "--logit-bias", "70=1000"]
    _, expected, plain = call(capsys, *arguments, "-v")
    assert "guesses" not in plain
    code, out, err = call(capsys, *arguments, "-v", "--lookup")
    assert code == 0 and out == expected and "% right" in err
    code, out, _ = call(capsys, *arguments, "--draft", path)
    assert code == 0 and out == expected
    code, _, err = call(capsys, *arguments, "--draft", "demo")
    assert code == 1 and "not the vocabulary of" in err.splitlines()[-1]


def test_run_has_a_flag_for_each_sampling_option(folder, capsys):
    import ggpy
    from ggpy.generate.options import option_table

    flags = {
        "logit-bias": ["3=-inf", "5=2.5"],
        "dry-sequence-breakers": ["x", "\n"],
        "mirostat": [0],
        "seed": [5],
        "temperature": [1.5],
        "top-p": [0.9],
    }
    arguments, options = [], {"logit_bias": {3: -float("inf"), 5: 2.5}, "dry_sequence_breakers": ["x", "\n"]}
    for name, (kind, option) in option_table().items():
        flag = name.replace("_", "-")
        given = flags.get(flag) or [2 if kind is int else 0.75 if option.allowed(0.75) else 1.25]
        for value in given:
            arguments += [f"--{flag}", value]
        options.setdefault(name, given[0])
    code, out, _ = call(capsys, "run", folder / "f32.gguf", "-p", "the hand", "-n", 8, *arguments)
    assert code == 0
    with ggpy.load(folder / "f32.gguf") as model:
        assert out == "".join(model.generate("the hand", max_tokens=8, **options)) + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-p", 1.5], "'--top-p': top_p must be a number from 0 to 1; got 1.5"),
        (["--temp", "nan"], "temperature must be a number, 0 or more; got nan"),
        (["--mirostat", 1], "mirostat must be 0 (off) or 2; got 1"),
        (["--logit-bias", "5:1"], "is written as ID=NUMBER"),
        (["--logit-bias", "5=nan"], "logit_bias must be token ids"),
        (["-n", -2], "equal to -1"),
    ],
)
def test_run_names_a_sampling_option_out_of_range_before_it_loads(flags, words, capsys):
    code, _, err = call(capsys, "run", "no.gguf", "-p", "x", *flags)
    assert code == 2 and words in " ".join(err.replace("│", " ").split())


def test_run_takes_none_for_no_sequence_breakers_and_zero_for_top_p(folder, capsys):
    flags = ["--dry-multiplier", 1, "--dry-sequence-breakers", "none", "--top-p", 0]
    code, out, _ = call(capsys, "run", folder / "f32.gguf", "-p", "the hand", "-n", 8, *flags)
    assert code == 0 and out


def test_run_takes_a_checkpoint_converts_it_once_and_caches_it(folder, capsys, monkeypatch, tmp_path):
    from ggpy.kernels import build

    kernels = build.cache_dir() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kernels").symlink_to(kernels)
    monkeypatch.setenv("GGPY_CACHE", str(tmp_path))
    first = call(capsys, "run", folder / "checkpoint", "-p", "the hand", "-n", 4, "--temp", 0)
    second = call(capsys, "run", folder / "checkpoint", "-p", "the hand", "-n", 4, "--temp", 0)
    assert first[0] == second[0] == 0 and first[1] == second[1]
    assert "converting" in first[2] and "converting" not in second[2]


def test_chat_goes_through_the_template(folder, capsys):
    code, out, _ = call(capsys, "run", folder / "f32.gguf", "--chat", "-p", "hello", "-n", 4, "--temp", 0)
    assert code == 0 and out.endswith("\n")


def test_a_prompt_cache_changes_no_text(folder, capsys, tmp_path):
    flags = ["-p", "the hand of the law", "-n", 8, "--temp", 0, "-v", "--prompt-cache", tmp_path / "cache"]
    first, second = (call(capsys, "run", folder / "f32.gguf", *flags) for _ in range(2))
    assert first[:2] == second[:2] and first[0] == 0
    assert "reused         0 tokens" in first[2] and "reused         0 tokens" not in second[2]
    before = (tmp_path / "cache").read_bytes()
    code, out, err = call(capsys, "run", folder / "f32.gguf", *flags, "--kv-type", "f32")
    assert (code, out) == (1, "") and "a sequence of another model, or of this one with other options" in err
    assert (tmp_path / "cache").read_bytes() == before
    code, _, err = call(capsys, "run", folder / "f32.gguf", *flags[:-1], tmp_path / "none" / "cache")
    assert code == 1 and "there is no folder" in err


def test_inspect_prints_metadata_and_tensors(folder, capsys):
    code, out, _ = call(capsys, "inspect", folder / "f32.gguf")
    assert code == 0 and "general.architecture" in out and "blk.2.ffn_down.weight" in out
    code, out, _ = call(capsys, "inspect", "--json", folder / "f32.gguf")
    facts = json.loads(out)
    assert facts["metadata"]["llama.block_count"] == 3
    assert {"name": "token_embd.weight", "type": "F32", "shape": [512, 64]}.items() <= facts["tensors"][0].items()


def test_bench_gives_medians_as_json(folder, capsys):
    code, out, _ = call(capsys, "bench", folder / "f32.gguf", "-p", 16, "-n", 4, "-r", 2, "-t", 1, "--json")
    tests = json.loads(out)["tokens_per_second"]
    assert code == 0 and [t["test"] for t in tests] == ["prompt 16", "decode 4"]
    assert all(0 < t["min"] <= t["median"] <= t["max"] for t in tests)


def test_convert_writes_and_dry_run_does_not(folder, capsys, tmp_path):
    out = tmp_path / "new.gguf"
    code, printed, _ = call(capsys, "convert", folder / "checkpoint", "-o", out, "--type", "q8_0", "--dry-run")
    assert code == 0 and not out.exists() and "blk.0.attn_q.weight" in printed and "Q8_0" in printed
    code, _, _ = call(capsys, "convert", folder / "checkpoint", "-o", out, "--type", "q8_0")
    assert code == 0 and out.exists() and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("type", ["Q8_0", "F16", "bf16", "q4_k_m", "Q4_K_M"])
def test_convert_takes_types_in_any_case(folder, capsys, tmp_path, type):
    out = tmp_path / "new.gguf"
    code, printed, err = call(capsys, "convert", folder / "checkpoint", "-o", out, "--type", type, "--dry-run")
    assert (code, err) == (0, "") and "blk.0.attn_q.weight" in printed and not out.exists()
    code, printed, _ = call(capsys, "convert", folder / "checkpoint", "-o", out, "--type", type)
    assert code == 0 and "new.gguf" in printed and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "{folder}/missing.gguf", "-p", "x"], "missing.gguf: no such file"),
        (["run", "{folder}/checkpoint/config.json", "-p", "x"], "config.json"),
        (["inspect", "{folder}/checkpoint/config.json"], "config.json"),
        (["run", "{folder}/empty", "-p", "x"], "neither GGUF files nor config.json"),
        (["run", "{folder}/f32.gguf", "-p", "the " * 600, "-c", "32"], "the context holds 32"),
        (["run", "{folder}/f32.gguf", "-p", ""], "the prompt is empty"),
        (["run", "{folder}/f32.gguf", "-p", "x", "--kv-type", "f8"], "there are F16, Q8_0, F32"),
        (["convert", "{folder}/checkpoint", "-o", "{folder}/x.gguf", "--type", "q9"], "q9"),
        (["convert", "{folder}/nowhere", "-o", "{folder}/x.gguf"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(folder, capsys, arguments, message):
    code, _, err = call(capsys, *[a.format(folder=folder) for a in arguments])
    assert code == 1
    lines = [line for line in err.strip().splitlines() if not line.startswith("compiling")]
    assert len(lines) == 1 and lines[0].startswith("ggpy: ") and message in lines[0]


def test_debug_shows_the_traceback(folder, capsys):
    from ggpy import GGUFError

    with pytest.raises(GGUFError):
        main(["--debug", "inspect", str(folder / "checkpoint" / "config.json")])


def test_starting_imports_nothing_heavy(folder):
    code = (
        "import sys; from ggpy.cli import main\n"
        f"try: main(['run', {str(folder / 'f32.gguf')!r}, '-p', 'the', '-n', '2', '--temp', '0'])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'numba', 'gguf', 'torch', 'transformers', 'converters', 'huggingface_hub', 'jinja2', 'prompt_toolkit'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_output_that_nobody_reads_is_no_error(folder):
    command = f"{sys.executable} -m ggpy inspect {folder / 'f32.gguf'} --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_run_keeps_to_a_schema_a_grammar_or_an_expression(folder, tmp_path, capsys):
    schema = '{"type": "object", "properties": {"a": {"enum": ["é", 2]}}, "required": ["a"], "additionalProperties": false}'
    grammar = 'root ::= "yes" | "no"'
    run = ("run", folder / "f32.gguf", "-p", "the hand", "-n", 60, "--temp", 2)
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "grammar.gbnf").write_text(grammar)
    for given in (schema, tmp_path / "schema.json"):
        code, out, _ = call(capsys, *run, "--json-schema", given)
        assert code == 0 and json.loads(out)["a"] in ("é", 2)
    for given in (grammar, tmp_path / "grammar.gbnf"):
        code, out, _ = call(capsys, *run, "--grammar", given)
        assert code == 0 and out in ("yes\n", "no\n")
    code, out, _ = call(capsys, *run, "--regex", "[0-9]{3}")
    assert code == 0 and len(out) == 4 and out.strip().isdecimal()
    code, _, err = call(capsys, *run, "--json-schema", tmp_path / "none.json")
    assert code == 1 and "none.json' is not JSON: Expecting value" in err
