"""Files are whole or not there."""

import os
import stat
import subprocess
import sys

import pytest

from ggpy.errors import Error
from ggpy.file import GGUFFile, writing_aside

from .make import gguf


def test_the_file_appears_when_all_is_written(tmp_path):
    path = tmp_path / "out.gguf"
    with writing_aside(path) as aside:
        assert aside.parent == path.parent
        aside.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_file_is_replaced_in_one_step_while_it_is_mapped(tmp_path):
    path = tmp_path / "out.gguf"
    path.write_bytes(gguf(version=2))
    old = GGUFFile(path)
    with writing_aside(str(path)) as aside:
        aside.write_bytes(gguf())
        assert GGUFFile(path).version == 2
    assert (old.version, GGUFFile(path).version) == (2, 3)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written", [False, True])
def test_after_an_exception_nothing_is_left_and_the_older_file_stays(tmp_path, exception, written):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    with pytest.raises(exception), writing_aside(path) as aside:
        if written:
            aside.write_bytes(b"half")
        raise exception
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(Error, match="nothing was written"), writing_aside(tmp_path / "out.gguf"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_contents_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    steps = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source, target):
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with writing_aside(tmp_path / "out.gguf") as aside:
        aside.write_bytes(b"new")
    assert steps == ["file", "rename", "folder"] if os.name == "posix" else ["file", "rename"]


def test_two_writers_of_one_file_do_not_share_a_place(tmp_path):
    with writing_aside(tmp_path / "out") as first, writing_aside(tmp_path / "out") as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "out").read_bytes() == b"first"


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model").write_bytes(b"old")
    link = tmp_path / "link"
    try:
        link.symlink_to(tmp_path / "there" / "model")
    except OSError:
        pytest.skip("no symbolic links here")
    with writing_aside(link) as aside:
        aside.write_bytes(b"new")
    assert link.is_symlink()
    assert (tmp_path / "there" / "model").read_bytes() == b"new"


@pytest.mark.parametrize("path", ["missing/out.gguf", ".", os.devnull])
def test_places_that_cannot_take_a_file_are_refused_before_anything_is_written(tmp_path, path):
    with pytest.raises(Error), writing_aside(tmp_path / path):
        raise AssertionError("the block was entered")


WRITE_AND_WAIT = """
import sys
from ggpy.file import writing_aside
with writing_aside(sys.argv[1]) as aside:
    aside.write_bytes(b"half")
    print("written", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_what_a_killed_process_left_goes_with_the_next_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "out [x].gguf"
    writers = []
    for _ in range(2):
        command = [sys.executable, "-c", WRITE_AND_WAIT, str(path)]
        writers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert writers[-1].stdout.readline() == b"written\n"
    (tmp_path / ".out [x].gguf.1234abcd.part.txt").touch()  # of others
    (tmp_path / ".out x.gguf.1234abcd.part").touch()
    (tmp_path / ".out [x].gguf.1234abcd.part").symlink_to(tmp_path / ".out x.gguf.1234abcd.part")
    killed, living = writers
    killed.kill()
    killed.wait()
    with writing_aside(path) as aside:
        aside.write_bytes(b"whole")
        assert len([p for p in tmp_path.iterdir() if not p.is_symlink()]) == 4
    assert path.read_bytes() == b"whole"
    living.communicate()
    assert path.read_bytes() == b"half" and living.returncode == 0
    assert len(list(tmp_path.iterdir())) == 4
    killed.stdout.close()
    killed.stdin.close()
