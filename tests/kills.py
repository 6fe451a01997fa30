"""Every command that writes, ended by SIGKILL at random moments, and run twice at the same time.

    python -m tests.kills --runs 20 convert quantize compare

After each kill no file under its final name is half, no process goes on, and the same command run again gives what an
undisturbed one gives, bit for bit where nothing measures time, with no other file beside it. Half of the kills come at any
moment, half once the command has begun to write. Then two processes write the same at once: one whole file, and either may
refuse with a line. Moments are random, which is why `--seed` doesn't repeat them exactly.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SECONDS = 300  # what nothing here takes
_GRACE = 5.0  # seconds in which processes that a killed one had started end
_MARK = "GGPY_TESTS_KILLS"

STATE = """
import sys, ggpy
with ggpy.load(sys.argv[1], n_ctx=512) as model, model.new_sequence() as sequence:
    sequence.extend([3 + i % 400 for i in range(500)])
    sequence.save(sys.argv[2])
"""
#: what is run after `python`, in the folder that it writes to
COMMANDS = {
    "convert": "-m ggpy convert {seeds}/checkpoint -o model.gguf --type f16",
    "quantize": "-m ggpy quantize {seeds}/model.gguf model.gguf q4_k",
    "compare": "-m ggpy compare {seeds}/model.gguf --types q8_0,q4_0 --text {seeds}/text -c 64 -n 2 --out .",
    "imatrix": "-m ggpy imatrix {seeds}/model.gguf {seeds}/text -c 128 -o matrix.gguf",
    "perplexity": "-m ggpy perplexity {seeds}/model.gguf {seeds}/text -c 64 --save-logits base.logits",
    "experts": "-m ggpy experts {seeds}/model.gguf --text {seeds}/text --trace trace.npy",
    "error": "-m ggpy error {seeds}/model.gguf {seeds}/model.gguf --png map.png",
    "cache": f"-m ggpy run {{seeds}}/model.gguf -p '{'the other hand ' * 60}' -n 2 --seed 1 --prompt-cache cache",
    "state": "{seeds}/state.py {seeds}/model.gguf state",
    "batch": "-m ggpy batch {seeds}/model.gguf {seeds}/rows.jsonl --ordered -c 128 -o answers.jsonl",
}
#: what a measurement of time or memory writes
_MEASURED = ("prompt_rate", "decode_rate", "peak_bytes", "base")


def said(path):
    """What a file says: its bytes, but for times, and for the order in which safetensors has its metadata."""
    content = path.read_bytes()
    if path.name in ("cache", "state"):
        n = int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8 : 8 + n]), sort_keys=True), content[8 + n :]
    if path.suffix == ".json":
        return json.dumps(without_times(json.loads(content)))
    return content


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in _MEASURED}
    return [without_times(v) for v in value] if isinstance(value, list) else value


#: reports that hold times in other forms, and a file that is removed in the end
_ONLY_THERE = (".csv", ".md", ".png", ".html", ".logits")


def wrong(out, whole, name, ended):
    """What is wrong with the files of a folder, beside those of an undisturbed run; `ended`: all must be there."""
    found = {path.name: path for path in out.iterdir()}
    visible = {n for n in found if not n.startswith(".")}
    if ended and set(found) != set(whole):
        return f"files {sorted(found)} for {sorted(whole)}"
    for each in sorted(visible):
        if name == "compare" and each.endswith(_ONLY_THERE):
            if not found[each].stat().st_size:
                return f"{each} is empty"
        elif name == "batch" and not ended:
            if not said(whole[each]).startswith(said(found[each]).rpartition(b"\n")[0]):
                return f"{each} has wrong lines"
        elif each not in whole or said(found[each]) != said(whole[each]):
            return f"{each} differs from the undisturbed run's"
    return None


class Place:
    """Where a command is run."""

    def __init__(self, seeds, folder, name):
        self.seeds, self.name, self.folder = seeds, name, folder
        self.whole, self.seconds, self.first = None, 0.0, 0.0
        done, self.seconds, self.first = self._timed(folder / "whole")
        assert done.returncode == 0, (name, done.stderr)
        self.whole = {path.name: path for path in (folder / "whole").iterdir()}

    def start(self, out, **options):
        """The command, writing to a folder."""
        out.mkdir(exist_ok=True)
        command = shlex.split(COMMANDS[self.name].replace("{seeds}", str(self.seeds)))
        env = {**os.environ, _MARK: str(out)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, *command], cwd=out, env=env, text=True, **(pipes | options))

    def run(self, out):
        return finished(self.start(out))

    def _timed(self, out):
        """Runs undisturbed; how long that takes, and when the first file is there."""
        began = time.perf_counter()
        process = self.start(out)
        first = None
        while process.poll() is None:
            if first is None and any(out.iterdir()):
                first = time.perf_counter() - began
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        return finished(process), seconds, seconds if first is None else first

    def kill(self, rng, number):
        """Kills the command at some moment; what is wrong then or after the next run, and whether it was killed."""
        out = self.folder / f"killed-{number}"
        began = time.perf_counter()
        process = self.start(out, stderr=subprocess.DEVNULL)
        moment = rng.uniform(0, self.seconds)
        if number % 2:
            while process.poll() is None and not any(out.iterdir()):
                time.sleep(0.0005)
            moment = time.perf_counter() - began + rng.uniform(0, self.seconds - self.first)
        while process.poll() is None and time.perf_counter() - began < moment:
            time.sleep(0.0005)
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        left = [path.name for path in out.iterdir() if path.name.startswith(".")]
        bad = wrong(out, self.whole, self.name, ended=False)
        if bad is None and still_alive(out):
            bad = f"processes go on: {still_alive(out)}"
        if bad is None:
            again = self.run(out)
            bad = wrong(out, self.whole, self.name, ended=True)
            if again.returncode:
                bad = f"run again: {again.returncode}, {again.stderr}"
        return bad, killed, bool(left)

    def twice(self, rng, number):
        """Two processes at once; what is wrong, and how they ended."""
        out = self.folder / f"twice-{number}"
        processes = [self.start(out)]
        time.sleep(rng.choice([0, 0, rng.uniform(0, self.seconds)]))
        processes.append(self.start(out))
        ends = [finished(process) for process in processes]
        bad = None
        for end in ends:
            lines = [line for line in end.stderr.replace("\r", "\n").splitlines() if line.startswith("ggpy: ")]
            if end.returncode not in (0, 1) or "Traceback" in end.stderr or (end.returncode and len(lines) != 1):
                bad = f"ended with {end.returncode}: {end.stderr}"
        codes = sorted(end.returncode for end in ends)
        if bad is None and codes[0]:
            bad = f"both refused: {[end.stderr for end in ends]}"
        return bad or wrong(out, self.whole, self.name, ended=True), codes


def finished(process):
    """A process's end, which comes."""
    try:
        _, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, "", errors or "")


def still_alive(out):
    """Command lines of processes that a command had started, which don't end by themselves."""
    mark, until = f"{_MARK}={out}".encode(), time.monotonic() + _GRACE
    while True:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.02)


def make_seeds(folder, width=64):
    """A mixture of experts, as a checkpoint and a file, a text, and prompts."""
    source = f"from pathlib import Path; from tests.kills import _make; _make(Path({str(folder)!r}), {width})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", source], check=True)


def _make(folder, width):
    from tests.models.checkpoints import converted
    from tests.models.test_moe import made

    model = made("mixtral", hidden_size=width, intermediate_size=2 * width)
    converted(folder, model).rename(folder / "model.gguf")
    (folder / "text").write_text("the other hand and the other brother stand there " * 40)
    (folder / "state.py").write_text(STATE)
    rows = [{"id": str(i), "prompt": f"the {i} other", "max_tokens": 20, "temperature": 0} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def campaign(name, seeds, folder, runs, rng, say=print):
    """Kills a command and runs it twice; the failures, and what was counted."""
    folder.mkdir()
    place, counts, failures = Place(seeds, folder, name), Counter(), []
    for number in range(runs):
        bad, killed, left = place.kill(rng, number)
        counts["killed"] += killed
        counts["leftovers"] += left
        if bad:
            failures.append(f"{name}, kill {number}: {bad}")
            say(failures[-1])
    for number in range(max(1, runs // 4)):
        bad, codes = place.twice(rng, number)
        counts[f"two at once: {codes}"] += 1
        if bad:
            failures.append(f"{name}, two at once {number}: {bad}")
            say(failures[-1])
    say(f"{name}: {runs} tried ({place.seconds:.1f} s a run, writing from {place.first:.1f} s): {dict(counts)}")
    return failures, counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=512, help="of the model: 512 is 80 MB")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        make_seeds(seeds, options.width)
        for name in options.commands:
            rng = random.Random(f"{options.seed} {name}")
            failures, _ = campaign(
                name, seeds, Path(folder) / name, options.runs, rng, lambda line: print(line, flush=True)
            )
            failed += len(failures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
