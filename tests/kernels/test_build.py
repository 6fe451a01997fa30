"""Compiling: worker processes that print, don't start or die, full disks, and how many work at once."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ggpy.errors import Error
from ggpy.kernels import build
from ggpy.kernels.table import KERNELS

SMALL = ["end_team", "run_tape", "wait_for_work"]  # take a moment to compile


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of kernels."""
    monkeypatch.setenv("GGPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def python_path(tmp_path, monkeypatch):
    """A folder whose modules worker processes find before others."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose kernels' keys are asked for."""
    shutil.copytree(build._PACKAGE.parent, tmp_path / "ggpy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "ggpy" / "kernels")
    build._key.cache_clear()
    yield tmp_path / "ggpy"
    build._key.cache_clear()


@pytest.mark.parametrize(
    "edited, compiled_anew",
    [
        ("kernels/moe.py", {"moe"}),
        ("kernels/attention.py", {"attention", "latent"}),
        ("quant/grids.py", {"get_rows", "matmul_int8"}),
        ("simd/vector.py", {row.module for row in KERNELS.values()}),
        ("generate/model.py", set()),
    ],
)
def test_an_edit_compiles_what_it_reaches(package, edited, compiled_anew):
    modules = sorted({row.module for row in KERNELS.values()})
    before = {module: build._key(module) for module in modules}
    with (package / edited).open("a") as file:
        file.write("# edited\n")
    for cached in (build._key, build._source):
        cached.cache_clear()
    assert {module for module in modules if build._key(module) != before[module]} == compiled_anew


def left(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "noise",
    [
        "print('hello from', __name__)",
        "import sys; sys.stdout.write('no end of line'); sys.stderr.write('a warning')",
        "import sys; sys.stdout.buffer.write(bytes(range(256)) * 1000)",
        "import atexit; atexit.register(lambda: print('x' * 1_000_000))",
        "print('end_team')",
    ],
)
def test_a_python_that_prints_at_its_start_compiles(cache, python_path, noise):
    (python_path / "sitecustomize.py").write_text(noise)
    source = "from ggpy.kernels import build; assert build.compile_missing(['end_team', 'run_tape']) == 2"
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert left(cache) == ["end_team.o", "run_tape.o"]


def test_numbas_settings_dont_reach_the_cache(cache, tmp_path, monkeypatch):
    """Neither those of the environment nor those of a file in the folder where Python is started."""
    build.compile_missing(["run_tape"])
    plain = build._read_object("run_tape")
    (object_file,) = cache.rglob("*.o")
    object_file.unlink()
    monkeypatch.setenv("NUMBA_OPT", "0")
    monkeypatch.setenv("NUMBA_DEBUG", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".numba_config.yaml").write_text("opt: '0'\n")
    monkeypatch.setenv("GGPY_CACHE", "cache")  # the same folder
    build.compile_missing(["run_tape"])
    assert object_file.exists()
    again = build._read_object("run_tape")
    assert len(plain[1]) == len(again[1])


def test_a_worker_that_dies_gives_its_own_message(cache, python_path):
    (python_path / "numba.py").write_text("raise ImportError('numba is broken here')\n")
    with pytest.raises(Error, match=r"^kernel \w+ did not compile: ImportError: numba is broken here$"):
        build.compile_missing(SMALL)


def test_a_worker_that_ends_without_a_word_is_no_success(cache, python_path):
    (python_path / "numba.py").write_text(
        "import os, sys; print('compiled', flush=True); print('', file=sys.stderr); os._exit(7)"
    )
    with pytest.raises(Error, match="its process ended with code 7"):
        build.compile_missing(SMALL)


@pytest.mark.parametrize("python", ["/nowhere/python", ""])
def test_a_python_that_isnt_there_is_named(cache, monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(Error, match="can't be compiled"):
        build.compile_missing(SMALL)


def test_an_error_of_the_progress_function_comes_through(cache):
    def progress(done, total, name):
        if done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build.compile_missing(["end_team"], progress)


@pytest.mark.parametrize(("cpus", "expected"), [(1, 1), (2, 2), (64, 3)])
def test_no_more_processes_than_processors(cache, monkeypatch, cpus, expected):
    started = []

    class Counted(build._Worker):
        def __init__(self):
            super().__init__()
            started.append(self)

    monkeypatch.setattr(build, "_Worker", Counted)
    monkeypatch.setattr(build, "usable_cpus", lambda: cpus)
    assert build.compile_missing(SMALL) == len(SMALL)
    assert 1 <= len(started) <= expected
    assert left(cache) == [f"{name}.o" for name in sorted(SMALL)]


@pytest.mark.skipif(sys.platform == "win32", reason="limits as POSIX has them")
def test_a_full_disk_leaves_nothing_behind(cache):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="large"):
            build._write_object("run_tape", "symbol", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(cache) == []
    build._write_object("run_tape", "symbol", bytes(5000))
    assert build._read_object("run_tape") == ("symbol", bytes(5000))


# Where object files lie: what is there is run.

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes as POSIX has them")


@POSIX
def test_the_cache_is_this_users_alone_whatever_the_umask(cache):
    before = os.umask(0)
    try:
        build._write_object("run_tape", "symbol", b"code")
    finally:
        os.umask(before)
    folders = [cache, cache / "kernels", *(cache / "kernels").iterdir()]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.rglob("*.o")} == {0o600}


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_code_that_others_may_write_is_not_run(cache, mode):
    build._write_object("run_tape", "symbol", b"code")
    (path,) = cache.rglob("*.o")
    path.chmod(mode)
    with pytest.raises(Error, match=r"run_tape\.o: others may write it, whose code won't be run"):
        build.load(["run_tape"])


@POSIX
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root gives files away")
def test_code_of_another_user_is_not_run_and_roots_is(cache, monkeypatch):
    build._write_object("run_tape", "symbol", b"code")
    (path,) = cache.rglob("*.o")
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    assert build._read_object("run_tape") == ("symbol", b"code")
    os.chown(path, 4321, -1)
    with pytest.raises(Error, match="belongs to user 4321"):
        build._read_object("run_tape")


@POSIX
def test_a_folder_that_others_may_write_gets_no_code(cache):
    folder = build._object_path("run_tape").parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(Error, match="others may write it"):
        build._write_object("run_tape", "symbol", b"code")
    assert left(cache) == []


@POSIX
def test_nothing_is_written_through_a_link(cache, tmp_path):
    build._write_object("run_tape", "symbol", b"code")
    (path,) = cache.rglob("*.o")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path.unlink()
    path.symlink_to(precious)
    path.with_suffix(f".{os.getpid()}.tmp").symlink_to(precious)
    build._write_object("run_tape", "symbol", b"other")
    assert precious.read_text() == "precious" and not path.is_symlink()


@pytest.mark.skipif(sys.platform != "linux", reason="the folders of Linux")
@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null", None])
def test_without_a_home_a_temporary_folder_serves_and_a_word_names_the_other_way(monkeypatch, tmp_path, caplog, home):
    for name in ("GGPY_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is None:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build._cache_dir.cache_clear()
    with caplog.at_level(logging.WARNING):
        folder = build.cache_dir()
        assert build.cache_dir() == folder == tmp_path / f"ggpy-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(caplog.records) == 1 and "GGPY_CACHE names another" in caplog.text
    build._write_object("run_tape", "symbol", b"code")
    folder.chmod(0o777)  # as if somebody else had made it
    build._cache_dir.cache_clear()
    with pytest.raises(Error, match="others may write it"):
        build.cache_dir()
    build._cache_dir.cache_clear()
