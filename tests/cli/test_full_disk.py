"""Every command that writes, where files can't grow beyond some kilobytes: one line that names the file, nothing left."""

import pytest

from tests.cli.test_streams import ggpy, model  # noqa: F401

resource = pytest.importorskip("resource", reason="Windows has no limits of file sizes")

#: command, its arguments but for the file it writes, and that file's name
COMMANDS = {
    "convert": (["{checkpoint}", "-o"], "new.gguf"),
    "quantize": (["{model}", "{new}", "Q8_0"], "new.gguf"),
    "imatrix": (["{model}", "{text}", "-o"], "new.gguf"),
    "perplexity": (["{model}", "{text}", "-c", "64", "--save-logits"], "base.bin"),
    "experts": (["{model}", "--text", "{text}", "--trace"], "trace.npy"),
    "experts --png": (["{model}", "--text", "{text}", "--png"], "map.png"),
    "error": (["{model}", "{model}", "--png"], "map.png"),
    "run": (["{model}", "-p", "hello " * 40, "-n", "2", "--prompt-cache"], "cache.ggpy"),
    "compare": (["{model}", "--types", "q8_0", "--text", "{text}", "-c", "64", "--out"], ""),
}


def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full_is_a_line_and_nothing_is_left(command, model, tmp_path):  # noqa: F811
    given, name = COMMANDS[command]
    if "png" in command or command == "error":
        pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("hello world and all the others " * 60)
    folder = tmp_path / "out"
    folder.mkdir()
    names = {"checkpoint": model.parent / "checkpoint", "model": model, "text": text, "new": folder / name}
    arguments = [each.format(**names) if each.startswith("{") else each for each in given]
    if "{new}" not in given:
        arguments.append(folder / name)
    done = ggpy(command.split()[0], *arguments, preexec_fn=limit)
    said = done.stderr.decode().replace("\r", "\n").strip().splitlines()
    assert done.returncode == 1, (done, said)
    assert "Traceback" not in done.stderr.decode(), said
    assert said[-1].startswith(f"ggpy: {folder}"), said
    assert "can't be written: " in said[-1], said
    assert not [path for path in folder.rglob("*") if path.is_file()]
