"""Models of the hub: fetched once, checked, continued, found again without it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from transformers import LlamaConfig, LlamaForCausalLM

import ggpy
from ggpy.cli import main
from ggpy.errors import ConversionError, Error
from ggpy.hub import find, model_file
from ggpy.hub.kept import kept_models
from tests.models.checkpoints import converted, random_model
from tests.models.test_llama import SIZES

from .stand_in import digest_of

LARGE = np.random.default_rng(0).bytes(24_000_000)  # more than huggingface_hub reads at once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and its conversion, f32.gguf."""
    folder = tmp_path_factory.mktemp("hub")
    converted(folder, random_model(LlamaForCausalLM, LlamaConfig(**SIZES)))
    return folder


@pytest.fixture
def files(folder):
    """The checkpoint's files."""
    return {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}


def call(capfd, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    out = capfd.readouterr()
    return caught.value.code or 0, out.out, out.err


def refused(name, **options):
    with pytest.raises(Error) as caught:
        find(name, **options)
    return str(caught.value)


def test_a_gguf_repository_is_run_by_its_name(hub, folder, capfd, monkeypatch):
    hub.add("a/b", {"b-F32.gguf": (folder / "f32.gguf").read_bytes(), "b-Q8_0.gguf": b"no model"})
    for name in ("a/b:F32", "a/b/b-F32.gguf", "hf.co/a/b:f32", f"{hub.url}/a/b/blob/main/b-F32.gguf"):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        code, out, err = call(capfd, "run", name, "-p", "the", "-n", 3, "--temp", 0, "-t", 1)
        assert code == 0, err
    assert hub.gets("cdn") == [None]  # fetched once, then found
    with ggpy.load(folder / "f32.gguf") as model:
        assert "".join(model.generate("the", max_tokens=3, temperature=0)) + "\n" == out
    assert call(capfd, "inspect", "a/b")[0] == 1  # Q8_0 is nearer to Q4_K_M


def test_what_others_fetched_is_found_and_what_is_fetched_others_find(hub):
    hub.add("a/b", {"b-Q4_K_M.gguf": b"GGUF", "b-Q8_0.gguf": b"GGUF 8"})
    path = Path(hf_hub_download("a/b", "b-Q4_K_M.gguf"))
    asked = len(hub.asked)
    assert find("a/b").path == path and len(hub.asked) == asked
    own = find("a/b:Q8_0").path
    assert own == Path(hf_hub_download("a/b", "b-Q8_0.gguf", local_files_only=True))
    (repo,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert {f.file_name for r in repo.revisions for f in r.files} == {"b-Q4_K_M.gguf", "b-Q8_0.gguf"}


def test_a_cut_connection_is_continued_in_the_same_call(hub):
    hub.add("a/b", {"b-Q8_0.gguf": LARGE})
    hub.cuts = [15_000_000]
    path = find("a/b").path
    assert path.read_bytes() == LARGE
    first, second = hub.gets("cdn")
    assert first is None and int(second.removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_process_leaves_what_the_next_one_continues(hub, environment, how, capfd):
    hub.add("a/b", {"b-Q8_0.gguf": LARGE})
    hub.cuts, hub.stall = [21_500_000], True
    process = subprocess.Popen(
        [sys.executable, "-m", "ggpy", "pull", "a/b"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    part = Path(constants.HF_HUB_CACHE, "models--a--b", "blobs", f"{digest_of('.gguf', LARGE)}.incomplete")
    started = time.monotonic()
    while not (part.exists() and part.stat().st_size >= 20_000_000):
        assert time.monotonic() < started + 60 and process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL) and "Traceback" not in err
    hub.stall = False
    (left,) = kept_models()
    assert (left.name, left.kind) == ("a/b:unfinished", "unfinished")
    code, out, _ = call(capfd, "pull", "a/b")
    assert code == 0 and Path(out.strip()).read_bytes() == LARGE
    assert hub.gets("cdn") == [None, f"bytes={left.n_bytes}-"]
    assert [m.kind for m in kept_models()] == ["hub"]


def test_damage_is_found_by_the_digest_and_nothing_is_left_of_it(hub):
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF" * 100})
    hub.damage = {"b-Q8_0.gguf"}
    assert "a/b: b-Q8_0.gguf: damaged: its digest is" in refused("a/b")
    assert kept_models() == []
    hub.damage = set()
    assert find("a/b").path.read_bytes() == b"GGUF" * 100


def test_what_others_fetched_is_compared_with_its_digest_once(hub):
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF" * 100})
    hub.damage = {"b-Q8_0.gguf"}
    path = Path(hf_hub_download("a/b", "b-Q8_0.gguf"))
    assert "damaged" in refused("a/b:Q8_0")
    path.resolve().write_bytes(b"GGUF" * 100)
    assert find("a/b:Q8_0").path == path


def test_parts_are_fetched_together_and_a_missing_one_alone(hub):
    names = [f"Q4_K_M/b-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.add("a/b", {name: name.encode() for name in names} | {"mmproj-F16.gguf": b"x", "b-imatrix.gguf": b"x"})
    first = find("a/b").path
    assert first.parent.name == "Q4_K_M" and [p.name for p in sorted(first.parent.iterdir())] == [n[7:] for n in names]
    os.unlink(first.with_name(names[1][7:]))
    assert find("a/b").path == first and len(hub.gets("cdn")) == 3  # the blob is still there
    assert [m.name for m in kept_models()] == ["a/b:Q4_K_M"]


def test_two_processes_share_one_download(hub, environment):
    hub.add("a/b", {"b-Q8_0.gguf": LARGE})
    command = [sys.executable, "-m", "ggpy", "pull", "a/b"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] and Path(results[0][0].decode().strip()).read_bytes() == LARGE
    assert hub.gets("cdn") == [None]


def test_gated_and_private_repositories_say_what_to_do(hub, monkeypatch):
    hub.add("a/gated", {"b-Q8_0.gguf": b"GGUF"})
    hub.add("a/private", {"b-Q8_0.gguf": b"GGUF"})
    hub.tokens = {"a/gated": "right", "a/private": "right"}
    hub.private = {"a/private"}
    assert "gated: ask for access at https://huggingface.co/a/gated, then set HF_TOKEN" in refused("a/gated")
    assert "no such repository; if it is private, set HF_TOKEN" in refused("a/private")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "gated: ask for access" in refused("a/gated")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert find("a/gated").path.exists() and find("a/private").path.exists()


def test_what_is_not_there_is_one_line_with_what_is(hub):
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF", "b-Q2_K.gguf": b"GGUF"})
    hub.add("a/c", {"README.md": b"x", "config.json": b"{}"})
    assert refused("a/b:Q5_K_M") == "a/b: no GGUF file of type Q5_K_M; there are Q2_K, Q8_0"
    assert refused("a/b/x.gguf") == "a/b: no file x.gguf; there are b-Q2_K.gguf, b-Q8_0.gguf"
    assert refused("a/none").startswith("a/none: the hub has no such repository")
    assert refused("a/b@v9") == "a/b: no revision 'v9'; there are main"
    assert refused("a/c") == "a/c: neither GGUF files nor a checkpoint among README.md, config.json"
    assert "no such file or folder" in refused("nothing-here")


def test_without_the_hub_what_is_here_is_used(hub, monkeypatch):
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF", "b-Q2_K.gguf": b"GGUF"})
    path = find("a/b:Q8_0").path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find("a/b:Q8_0").path == path
    assert find("a/b").path == path  # the usual type would be asked for
    assert refused("a/b:Q2_K") == "a/b: not here, and HF_HUB_OFFLINE is set; here are Q8_0"
    assert refused("a/c") == "a/c: not here, and HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert find("a/b").path == path
    assert refused("a/c").startswith("a/c: the hub doesn't give it: ")


def test_pull_fetches_what_is_new(hub, capfd):
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF old"})
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF two"}, "v2")
    old = find("a/b:Q8_0").path
    hub.add("a/b", {"b-Q8_0.gguf": b"GGUF new"})
    assert find("a/b:Q8_0").path == old
    code, out, _ = call(capfd, "pull", "a/b:Q8_0")
    assert code == 0 and Path(out.strip()).read_bytes() == b"GGUF new"
    assert find("a/b:Q8_0").path.read_bytes() == b"GGUF new"
    assert find("a/b@v2:Q8_0").path.read_bytes() == b"GGUF two"


def test_a_checkpoint_repository_is_converted_once(hub, folder, files, capfd):
    hub.add("a/b", {**files, "other/tf_model.h5": b"x", "original/model.pth": b"x"})
    path = model_file("a/b:F32")
    assert path.read_bytes() != b"" and not hub.gets("h5") and not hub.gets("pth")
    asked = len(hub.asked)
    assert model_file("a/b:f32") == path and len(hub.asked) == asked
    with ggpy.load("a/b:F32") as model, ggpy.load(folder / "f32.gguf") as own:
        assert model.metadata["general.name"] == "a/b"
        np.testing.assert_array_equal(model.logits([3, 4]), own.logits([3, 4]))
    code, out, err = call(capfd, "pull", "a/b:F32")  # nothing new
    assert code == 0 and Path(out.strip()) == path and "converting" not in err
    hub.add("a/b", {**files, "README.md": b"new"})
    code, out, err = call(capfd, "pull", "a/b:F32")
    assert code == 0 and "converting a/b:F32 to F32, once" in err
    assert model_file("a/b:F32") == Path(out.strip()) != path
    with pytest.raises(ConversionError, match="not a checkpoint's repository, but GGUF files already"):
        hub.add("a/g", {"g-F32.gguf": b"GGUF"})
        ggpy.convert("a/g", folder / "never.gguf", "f32")
    assert ggpy.convert("a/b", folder / "never.gguf", "f32", dry_run=True).metadata["general.name"] == "a/b"


def test_a_damaged_checkpoint_is_not_converted(hub, files):
    hub.add("a/b", files)
    hub.damage = {"model.safetensors"}
    assert "model.safetensors: damaged" in refused("a/b")


def test_a_type_without_a_file_is_converted_where_there_is_a_checkpoint(hub, files):
    hub.add("a/b", {**files, "b-Q2_K.gguf": b"GGUF"})
    assert find("a/b").path.read_bytes() == b"GGUF"
    assert find("a/b:F32").checkpoint is not None
    assert "a/b: no GGUF file of type Q9_X" in refused("a/b:Q9_X")
    hub.add("a/c", files)
    assert "Q9_X" in refused("a/c:Q9_X") and hub.gets("a/c/resolve") == []


def test_folders_are_taken_as_repositories_are(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GGPY_CACHE", str(tmp_path / "cache"))
    for type in ("Q2_K", "Q4_K_M", "F16"):
        (tmp_path / f"m-{type}.gguf").write_bytes(b"GGUF")
    assert find(tmp_path).path == tmp_path / "m-Q4_K_M.gguf"
    assert find(f"{tmp_path}:q2_k").path == tmp_path / "m-Q2_K.gguf"
    assert find(tmp_path, "f16").path == tmp_path / "m-F16.gguf"
    assert find(f"{folder / 'checkpoint'}:q4_0").type == "q4_0"
    assert "no GGUF file of type q8_0; there are Q2_K" in refused(f"{tmp_path}:q8_0")
    (tmp_path / "empty").mkdir()
    assert "neither GGUF files nor config.json" in refused(tmp_path / "empty")
    assert "has the type that it has" in refused(f"{folder / 'f32.gguf'}:q8_0")


def test_list_and_rm(hub, folder, files, capfd):
    hub.add("a/b", {"b-Q4_K_M.gguf": b"GGUF", "b-Q8_0.gguf": b"GGUF", "one.gguf": b"1", "two.gguf": b"2"})
    hub.add("a/ckpt", files)
    for name in ("a/b", "a/b:Q8_0", "a/b/one.gguf", "a/b/two.gguf"):
        find(name)
    model_file("a/ckpt:f16")
    model_file(f"{folder / 'checkpoint'}:f16")
    names = ["a/b/one.gguf", "a/b/two.gguf", "a/b:Q4_K_M", "a/b:Q8_0", "a/ckpt:F16", "checkpoint:F16"]
    assert [m["name"] for m in json.loads(call(capfd, "list", "--json")[1])] == names
    code, out, _ = call(capfd, "list")
    assert code == 0 and "a/ckpt:F16" in out and "converted" in out and "now" in out
    code, _, err = call(capfd, "rm", "a/b:Q4_K_M")
    assert code == 1 and "--yes removes without asking" in err and len(kept_models()) == 6
    code, _, err = call(capfd, "rm", "a/x")
    assert code == 1 and "a/x: no such model here; there are a/b/one.gguf" in err
    code, _, err = call(capfd, "rm", "--yes", "a/b:Q4_K_M", "checkpoint", "a/b/two.gguf")
    assert code == 0 and "removed" in err
    assert [m.name for m in kept_models()] == ["a/b/one.gguf", "a/b:Q8_0", "a/ckpt:F16"]
    assert find("a/b:Q8_0").path.read_bytes() == b"GGUF"  # its blob was the other's, too
    assert call(capfd, "rm", "-y", "a/b", "a/b/one.gguf")[0] == 0
    assert [m.name for m in kept_models()] == ["a/ckpt:F16"]
    assert not Path(constants.HF_HUB_CACHE, "models--a--b").exists()


def test_rm_asks_in_a_terminal(hub, capfd, monkeypatch):
    hub.add("a/b", {"b-Q4_K_M.gguf": b"GGUF"})
    find("a/b")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, left in (("n", 1), ("y", 0)):
        monkeypatch.setattr("typer.confirm", lambda question, err, answer=answer: answer == "y")
        assert call(capfd, "rm", "a/b")[0] == (1 if left else 0)
        assert len(kept_models()) == left
