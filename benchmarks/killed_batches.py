"""Batches ended by SIGKILL at random moments and begun again, compared byte by byte with a run that nobody disturbed.

    python benchmarks/killed_batches.py MODEL.gguf [-n 2000] [-g 24] [-t 2] [--kills 5] [--out out.jsonl] [--embed …]

Other options go to `ggpy batch`. `--out` ends in .jsonl or .parquet; rows come from such a file, too.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from many_prompts import prompts


def written(path: Path, texts: list[str]) -> None:
    rows = [{"id": i, "prompt": text} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def n_written(path: Path) -> int:
    """How many results there are; Parquet is made of lines in the end."""
    lines = path.with_name(path.name + ".partial") if path.suffix == ".parquet" else path
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("-g", "--generate", type=int, default=24)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--out", default="out.jsonl")
    a, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, whole, out = (Path(folder) / f"{name}-{a.out}" for name in ("rows", "whole", "killed"))
        written(rows, prompts(a.n))
        command = [sys.executable, "-m", "ggpy", "batch", a.model, str(rows), "--ordered", "-t", str(a.threads)]
        command += ["-c", "1024", "-n", str(a.generate), *others]
        started = time.perf_counter()
        subprocess.run([*command, "-o", str(whole)], check=True)
        print(f"undisturbed: {time.perf_counter() - started:.0f} s, {whole.stat().st_size:,} bytes", flush=True)
        at_random = random.Random(0)
        moments = sorted(at_random.uniform(0, 1) for _ in range(a.kills))
        for moment in moments:
            process = subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.DEVNULL)
            while process.poll() is None and n_written(out) < moment * a.n:
                time.sleep(at_random.uniform(0.001, 0.02))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                sys.exit(f"it had ended before, with {process.returncode}")
            print(f"killed after {n_written(out)} rows", flush=True)
        subprocess.run([*command, "-o", str(out)], check=True)
        same = whole.read_bytes() == out.read_bytes()
        print("the same bytes" if same else "OTHER BYTES", flush=True)
        sys.exit(not same)


if __name__ == "__main__":
    main()
