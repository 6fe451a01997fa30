"""The same tasks of EleutherAI's harness (`pip install 'lm_eval[api]'`) with transformers, ggpy, and `ggpy serve`.

    python benchmarks/harness.py MODEL.gguf CHECKPOINT [--limit 10] [--tasks ggpy_facts,…] [--backends hf,ggpy,http]

The tasks are those of `benchmarks/harness`, which need no download; `--tasks` takes the harness's own, too. Each row is a
metric of a task with all backends; below, how far log-likelihoods are from the first backend's, and how many texts differ.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import lm_eval
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import ggpy.measure.lm_eval  # noqa: F401 — so that the harness knows ggpy

TASKS = "ggpy_facts,ggpy_verses,ggpy_perplexity,ggpy_going_on"


@contextmanager
def serving(model: str, n_ctx: int) -> Iterator[str]:
    """The address of a server with a model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "ggpy", "serve", model, "--port", str(port), "-c", str(n_ctx), "--max-queue", "64"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            server.terminate()


def results(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the harness finds with a backend."""
    how = {"tasks": options.tasks.split(","), "limit": options.limit, "bootstrap_iters": 0}
    others = not all(task.startswith("ggpy_") for task in how["tasks"])  # reading the harness's own tasks takes a minute
    how["task_manager"] = TaskManager(include_path=str(Path(__file__).parent / "harness"), include_defaults=others)
    if backend == "hf":
        arguments = f"pretrained={options.checkpoint},dtype=float32,max_length={options.ctx}"
        return lm_eval.simple_evaluate("hf", model_args=arguments, device="cpu", batch_size=1, **how)
    if backend == "ggpy":
        return lm_eval.simple_evaluate("ggpy", model_args=f"path={options.model},n_ctx={options.ctx}", **how)
    with serving(options.model, options.ctx) as url:
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
        bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # the harness leaves it out unless it is told
        arguments = f"model=any,base_url={url},tokenizer={options.checkpoint},add_bos_token={bos}"
        arguments += f",num_concurrent=8,max_length={options.ctx}"
        return lm_eval.simple_evaluate("local-completions", model_args=arguments, batch_size=1, **how)


def said(sample: dict[str, Any]) -> list[Any]:
    """A sample's log-likelihoods, or its text."""
    answers = [response[0] for response in sample["resps"]]
    return [answer[0] if isinstance(answer, tuple | list) else answer for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("checkpoint")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--backends", default="hf,ggpy,http")
    options = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    backends = options.backends.split(",")
    found = {backend: results(backend, options) for backend in backends}
    first = found[backends[0]]
    print(f"{'':32}", *(f"{backend:>10}" for backend in backends))
    for task, metrics in first["results"].items():
        for metric in (name for name, value in metrics.items() if "," in name and isinstance(value, float)):
            if "stderr" not in metric:
                values = [found[backend]["results"][task][metric] for backend in backends]
                print(f"{task} {metric.split(',')[0]:{31 - len(task)}}", *(f"{value:10.4f}" for value in values))
    for backend in backends[1:]:
        for task, samples in first["samples"].items():
            others = found[backend]["samples"][task]
            pairs = [pair for a, b in zip(samples, others, strict=True) for pair in zip(said(a), said(b), strict=True)]
            numbers = [abs(a - b) for a, b in pairs if isinstance(a, float)]
            if numbers:
                print(f"{backend} {task}: {len(numbers)} log-likelihoods, at most {max(numbers):.4f} from {backends[0]}'s")
            else:
                print(f"{backend} {task}: {sum(a != b for a, b in pairs)} of {len(pairs)} texts differ")


if __name__ == "__main__":
    main()
