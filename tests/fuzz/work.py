"""The processes that try files, and what came of them."""

import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

SECONDS = 60
MOST_MEMORY = 100 << 20  # beside twice the file: what a model's arena, pages and tokenizer take


class UncompiledError(Exception):
    """A changed type needs a kernel that would take longer to compile than a file may take."""


def work(seeds):
    """A process: takes kinds and numbers, and answers each with what came of it."""
    import logging

    from ggpy import cpus
    from ggpy.errors import Error
    from ggpy.generate import templates
    from ggpy.kernels import build

    from .kinds import KINDS

    def not_now(names, progress=None):
        if any(build._read_object(name) is None for name in names):
            raise UncompiledError

    build.load(["run_team"])  # LLVM's library is no file's memory
    build.compile_missing = not_now
    templates.MOST_SECONDS = 0
    cpus._allowed = lambda: {0}  # else tiny files are shared out to threads
    warnings.simplefilter("ignore")
    logging.disable()
    sys.stdout.reconfigure(errors="backslashreplace")
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number, folder = line.rstrip("\n").split(" ", 2)
        before, what = _memory(reset=True), "ran"
        try:
            KINDS[kind](random.Random(int(number)), seeds, Path(folder))
        except UncompiledError:
            what = "uncompiled"
        except Error as error:
            what = "refused"
            if len(str(error)) > 1000 or "\n" in str(error):
                what = "message"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # panics of Rust aren't Exceptions
            frames = traceback.extract_tb(error.__traceback__)
            inner = [f for f in frames if "ggpy" in f.filename or "converters" in f.filename] or frames
            where = f"{Path(inner[-1].filename).name}:{inner[-1].lineno}"
            what = " ".join(f"exception {type(error).__name__} in {where}: {error}"[:200].split())
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        used = max(0, _memory() - before)
        if used > 2 * size + MOST_MEMORY:
            what = f"memory {used >> 20} MB for {size >> 10} KB, {what}"
        print(f"{used >> 20} {what}", flush=True)


def _memory(reset=False):
    """The most memory of this process since it was reset, or what it holds now, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmRSS" if reset else "VmHWM"
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


class Worker:
    """A process that does `work`."""

    def __init__(self, seeds):
        command = [sys.executable, "-m", "tests.fuzz", "--work", str(seeds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, kind, number, folder):
        """Megabytes that a file took, which is made in a folder, and what came of it; a process that has ended or hangs
        is over."""
        try:
            self._process.stdin.write(f"{kind} {number} {folder}\n")
            if not select.select([self._process.stdout], [], [], SECONDS)[0]:
                self._process.kill()
                return 0, "hung"
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            return 0, f"signal {-self._process.wait()}"
        megabytes, what = answer.rstrip("\n").split(" ", 1)
        return int(megabytes), what

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class Campaign:
    """Files tried, one after the other; those that fail are kept in a folder, if one is named.

    Attributes
    ----------
    counts : Counter
        How many ran, were refused, and so on.
    failures : dict
        What happened, by number.
    megabytes, seconds : float
        The most that one file took.
    """

    def __init__(self, kind, numbers, seeds, say=lambda text: None, keep=None):
        worker, self.counts, self.failures = Worker(seeds), Counter(), {}
        self.megabytes, self.seconds = 0, 0.0
        for number in numbers:
            started = time.time()
            folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            megabytes, what = worker.ask(kind, number, folder)
            self.seconds, self.megabytes = max(self.seconds, time.time() - started), max(self.megabytes, megabytes)
            self.counts[what.split()[0]] += 1
            if what not in ("ran", "refused", "uncompiled"):
                self.failures[number] = what
                say(f"{kind} {number}: {what}")
                if keep is not None:
                    with suppress(shutil.Error):  # pipes aren't copied
                        shutil.copytree(folder, keep / f"{kind}-{number}", symlinks=True)
            shutil.rmtree(folder, ignore_errors=True)
            if what.startswith(("hung", "signal")):
                worker = Worker(seeds)
        worker.close()

    def __str__(self):
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.most_common())
        return f"{self.counts.total()} tried: {counts}; at most {self.megabytes} MB and {self.seconds:.1f} s a file"
