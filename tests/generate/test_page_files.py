"""Keys, values and states in files: found again by their tokens, with the same bits, within a budget."""

import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import ggpy
from ggpy.errors import Error
from ggpy.kernels.table import SLAB
from tests.models.checkpoints import converted, ids, random_model

from .test_states import COMMON, KINDS

PROMPT = ids(1300)
HOW = {"max_tokens": 8, "temperature": 0, "logprobs": 0}


@pytest.fixture(scope="module", params=["llama", *KINDS])
def path(request, tmp_path_factory):
    cls, config, changes = KINDS.get(request.param, (LlamaForCausalLM, LlamaConfig, {}))
    return converted(tmp_path_factory.mktemp("pages"), random_model(cls, config(**{**COMMON, **changes})))


@pytest.fixture
def load(path):
    def load(folder=None, n_bytes=1 << 30, **options):
        model = ggpy.load(path, n_ctx=2048, n_threads=1, **options)
        opened.append(model)
        if folder is not None:
            model.keep_cache(folder, n_bytes)
        return model

    opened = []
    yield load
    for model in opened:
        model.close()


def said(model, prompt):
    """What a generation says, and how much of its prompt was known."""
    generation = model.generate(prompt, **HOW).run()
    return [(p.token, p.logprob) for p in generation.pieces], generation.n_reused


def n_free(model):
    """Pages that nobody needs."""
    return model._runner.pages.n_free + model._runner.prefixes.n_unused()


def test_a_prompt_is_found_again_with_the_same_bits(load, tmp_path):
    with load(tmp_path) as model:
        expected, n_known = said(model, PROMPT)
        has_states = model._runner.has_states
    assert n_known == 0
    # Models with states go on from a snapshot: there is one at a prompt's last page.
    with load(tmp_path) as model:
        free = n_free(model)
        assert said(model, PROMPT) == (expected, 1300 // SLAB * SLAB - (SLAB if has_states and 1300 % SLAB < 8 else 0))
        assert n_free(model) == free
        # One that begins alike takes what is alike.
        other = [*PROMPT[:700], *ids(100)]
        got, n_known = said(model, other)
        assert n_known >= 512
    with load() as model:
        assert said(model, other)[0] == got


def test_what_memory_has_no_room_for_is_in_files(load, tmp_path):
    with load(tmp_path) as model:
        pages = model._runner.pages
        room = 34 * pages.n_bytes // pages.n_pages + 8 * pages.states.n_bytes // max(pages.states.n_slots, 1)
        expected, _ = said(model, PROMPT)
    with load(tmp_path, kv_memory=room) as model:
        for _ in range(3):
            for prompt in (PROMPT, PROMPT[::-1], PROMPT[1:]):
                got, n_known = said(model, prompt)
                if prompt is PROMPT:
                    assert got == expected and n_known > 1200


def test_damaged_files_are_removed_and_told(load, tmp_path, caplog):
    with load(tmp_path) as model:
        expected, _ = said(model, PROMPT)
    files = sorted(tmp_path.iterdir())
    for i, file in enumerate(files):
        data = bytearray(file.read_bytes())
        if i % 3 == 0:
            data[-5] ^= 1
        file.write_bytes(data[: len(data) // 2] if i % 3 == 1 else b"" if i % 3 == 2 else data)
    with load(tmp_path) as model:
        assert said(model, PROMPT) == (expected, 0)
    assert "damaged, and removed" in caplog.text
    with load(tmp_path) as model:
        assert said(model, PROMPT)[1] > 1200 or model._runner.has_states


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
def test_what_is_no_file_is_not_read(load, tmp_path):
    """A pipe would be waited for."""
    with load(tmp_path) as model:
        expected, _ = said(model, PROMPT)
    kinds = [os.mkfifo, os.mkdir, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to(file.name)]
    for make in kinds:
        for file in tmp_path.iterdir():
            file.rmdir() if file.is_dir() else file.unlink()
            make(file)
        with load(tmp_path) as model:
            assert said(model, PROMPT) == (expected, 0), make


def test_files_keep_to_their_budget_and_the_latest_stay(load, tmp_path):
    with load(tmp_path) as model:
        said(model, PROMPT)
    most = sum(file.stat().st_size for file in tmp_path.glob("*-*"))
    (tmp_path / "notes.txt").write_text("not ours")
    for round in range(3):
        with load(tmp_path, most * 3 // 2) as model:
            said(model, ids(1300 + 64 * (round + 2))[64 * (round + 2) :])
        assert sum(file.stat().st_size for file in tmp_path.glob("*-*")) <= most * 3 // 2
    with load(tmp_path, most * 3 // 2) as model:
        assert said(model, ids(1300 + 64 * 4)[64 * 4 :])[1] > 1200
    with load(tmp_path, 0) as model:
        said(model, PROMPT)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("path", ["llama"], indirect=True)
def test_a_process_that_is_killed_has_kept_what_it_had_written(path, load, tmp_path):
    code = f"""
import ggpy
model = ggpy.load({str(path)!r}, n_ctx=2048, n_threads=1)
model.keep_cache({str(tmp_path)!r})
model.generate({PROMPT}, max_tokens=8, temperature=0).run()
print("done", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "done\n"
        for _ in range(500):
            if len(list(tmp_path.glob("*.page"))) == 1300 // SLAB:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    with load(tmp_path) as model:
        assert said(model, PROMPT)[1] >= 1024


def test_a_folder_that_cannot_be_made_is_told(load, tmp_path):
    (tmp_path / "file").write_text("x")
    with load() as model, pytest.raises(Error, match="file"):
        model.keep_cache(tmp_path / "file")


def test_a_folder_that_goes_away_takes_nothing_with_it(load, tmp_path):
    with load() as model:
        model.keep_cache(tmp_path / "pages")
        (tmp_path / "pages").rmdir()
        said(model, PROMPT[:200])
        (tmp_path / "pages").mkdir()
        said(model, ids(200, seed=1))
    assert list((tmp_path / "pages").iterdir())
