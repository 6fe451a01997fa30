"""Encodings, closed streams, terminals and signals."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.file.edit import Edited
from tests.models.checkpoints import converted
from tests.models.test_moe import made

RED = "\x1b[31m"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A mixture of experts with a name and a chat template that have more than ASCII and something for terminals."""
    path = converted(tmp_path_factory.mktemp("streams"), made("mixtral"))
    edited = Edited.read(path.read_bytes())
    edited.set("general.name", "string", f"Größe ☃ {RED}red" + "x" * 5000)
    edited.set("general.tags", "string", ["[/bold]", RED])
    path.write_bytes(edited.bytes())
    return path


def ggpy(*arguments, **options):
    """A command's end: its bytes on both streams."""
    env = {**os.environ, **options.pop("env", {})}
    command = [sys.executable, "-m", "ggpy", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", ""])
def test_output_fits_every_encoding(model, tmp_path, encoding):
    (tmp_path / "text.txt").write_text("hello world " * 50)
    env = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (
        ["inspect", model],
        ["graph", model, "--layer", 1],
        ["experts", model, "--text", tmp_path / "text.txt", "-n", 64],
        ["error", model, model],
        ["run", model, "-p", "hello", "-n", 4, "--chat"],
    ):
        done = ggpy(*command, env=env)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, (command, done.stderr)
        text = done.stdout.decode(encoding or "utf-8")
        if command[0] == "inspect":
            assert ("Größe ☃" in text) == (encoding == "")
            assert "\x1b" not in text and max(map(len, text.splitlines())) < 500


def test_json_is_ascii_and_whole(model):
    done = ggpy("inspect", "--json", model)
    assert json.loads(done.stdout.decode("ascii"))["metadata"]["general.name"].startswith(f"Größe ☃ {RED}")


def test_input_is_utf_8_with_its_line_ends(model, tmp_path):
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    source = "import sys; from ggpy.cli.streams import prepared; from ggpy.file import read_text\n"
    source += "with prepared(): print(ascii(read_text('-')))"
    done = subprocess.run(
        [sys.executable, "-c", source], input="é\r\n☃\r".encode(), env={**os.environ, **env}, capture_output=True
    )
    assert done.stdout.decode().strip() == ascii("é\r\n☃\r"), done.stderr
    done = ggpy("run", model, "-n", 1, input=b"\xe9t\xe9")
    assert done.returncode == 1
    assert done.stderr == b"ggpy: standard input: isn't text in UTF-8: invalid continuation byte at byte 0\n"
    assert ggpy("run", model, "-p", "-", "-n", 1, input="été".encode()).returncode == 0


def test_closed_streams_are_said_in_a_line(model):
    run = f"{sys.executable} -m ggpy run {model} -n 1"
    for shell, code, words in (
        (f"{run} <&-", 1, "ggpy: standard input is closed, and no text is given otherwise\n"),
        (f"{run} -p x <&- >&-", 0, ""),
        (f"{run} -p x 2>&- >/dev/null", 0, ""),
    ):
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, words)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/tty", "pipe"])
def test_what_is_no_regular_file_is_refused(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / path
    if not path.exists():
        pytest.skip("not here")
    for command in (["inspect", path], ["run", path, "-p", "x"], ["quantize", path, tmp_path / "out.gguf", "q8_0"]):
        done = ggpy(*command)
        assert done.returncode == 1 and b"not a regular file" in done.stderr, (command, done.stderr)


def test_a_models_text_gives_a_terminal_no_orders(model):
    source = (
        "import sys; from unittest import mock; from ggpy.cli import main\n"
        "from ggpy.generate.generation import Generation\n"
        f"with mock.patch.object(Generation, '__iter__', lambda self: iter([{RED!r} + 'a\\n'])): main(sys.argv[1:])"
    )
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", source, "run", str(model), "-p", "x"]
    assert subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert os.read(master, 1000).decode().startswith(r"\x1b[31ma")
    piped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert piped.stdout.startswith(RED)  # whoever reads a pipe gets what the model wrote
    os.close(master)
    os.close(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_no_half_file(tmp_path, number):
    source = (
        "import sys, time; from ggpy import cli; from ggpy.file import writing_aside\n"
        "def work(arguments):\n"
        "    with writing_aside(arguments[0]) as aside:\n"
        "        aside.write_bytes(b'half'); print('written', flush=True); time.sleep(60)\n"
        "cli._app = work; cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(30) == 128 + number and process.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []
