"""Servers under load: `ggpy serve`, llama.cpp's server (xllamacpp) and llama_cpp.server, in turn, with the same requests.

    python benchmarks/serving.py MODEL.gguf [--seconds 60] [--clients 32] [-t 2] [-r 2] [--engines ggpy,xllamacpp] [--rude]
    python benchmarks/serving.py MODEL.gguf --engines llama_cpp --python PYTHON   # one that has llama-cpp-python[server]

Each client asks, reads the stream to its end, and asks again: a common system prompt, one of six questions, an answer of
16, 64 or 128 tokens. `--rude` adds to it: clients that leave in the middle of an answer or read slowly, JSON that isn't
any, prompts too long, bodies of 100 MB; at last TERM while answers are under way, which must be finished.
Figures: tokens of whole answers per second, the time to the first token, the time between two, the memory of the server's
process after a quarter of the time and at the end, and what went wrong: answers refused or broken off, mistakes that went
through.
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

import httpx
import psutil

TOPICS = ("the sea", "prime numbers", "Paris", "how bread is made", "a lonely robot", "rain")
SYSTEM = "You are a helpful assistant who answers in plain words and keeps to the question. " * 6
LLAMA_CPP = """
import sys, time, xllamacpp
path, port, threads, clients = sys.argv[1], *map(int, sys.argv[2:])
p = xllamacpp.CommonParams()
p.model.path, p.hostnames, p.port = path, ["127.0.0.1"], port
p.n_parallel, p.n_ctx = clients, clients * 1024
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(p)
time.sleep(1e9)
"""


@dataclass
class Result:
    """What the clients of one server saw."""

    n_tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def line(self, seconds: float) -> str:
        """All of it in words."""
        first, between = (
            " / ".join(f"{quantile(x, q):.2f}" for q in (0.5, 0.95, 0.99)) for x in (self.first, self.between)
        )
        memory = f"{self.megabytes[len(self.megabytes) // 4]:.0f} → {self.megabytes[-1]:.0f} MB"
        words = [f"{self.n_tokens / seconds:7.1f} tokens/s", f"first {first} s", f"between {between} s", memory]
        return "  ".join([*words, f"{len(self.errors)} errors"])


def quantile(values: list[float], q: float) -> float:
    """Of no values: NaN."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


async def ask(client: httpx.AsyncClient, rng: random.Random, result: Result, rude: bool) -> None:
    """Asks once, and reads the answer; rude clients leave or dawdle now and then."""
    question = f"Tell me about {rng.choice(TOPICS)} in {rng.randint(2, 9)} sentences."
    body = {
        "model": "any",
        "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        "max_tokens": rng.choice([16, 64, 128]),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    leaves, dawdles = rude and rng.random() < 0.08, rude and rng.random() < 0.05
    last = time.perf_counter()
    times: list[float] = result.first
    n, whole = 0, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            result.errors.append(f"{response.status_code} {(await response.aread())[:200]!r}")
            return
        async for line in response.aiter_lines():
            whole = whole or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                result.errors.append(f"{event['error']}")
                return
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                now = time.perf_counter()
                times.append(now - last)
                last, times = now, result.between
                n += 1
                if leaves and n == 10:
                    return
                if dawdles:
                    await asyncio.sleep(0.2)
                    last = time.perf_counter()
    result.n_tokens += n
    if not whole:
        result.errors.append(f"broken off after {n} tokens")


async def polite(client: httpx.AsyncClient, seed: int, end: float, result: Result, rude: bool) -> None:
    rng = random.Random(seed)
    while time.perf_counter() < end:
        try:
            await ask(client, rng, result, rude)
        except httpx.HTTPError as error:
            result.errors.append(repr(error))


async def mistaken(client: httpx.AsyncClient, end: float, result: Result) -> None:
    """Asks what must be refused."""
    long = {"model": "any", "messages": [{"role": "user", "content": "word " * 20000}]}
    requests = (({"content": b"{"}, (400, 422)), ({"json": long}, (400,)), ({"content": b" " * (100 << 20)}, (400, 413)))
    while time.perf_counter() < end:
        for request, expected in requests:
            try:
                response = await client.post("/v1/chat/completions", **request)
                if response.status_code not in expected:
                    result.errors.append(f"{response.status_code} {response.text[:100]}")
            except httpx.HTTPError:
                pass  # cut off while it sends 100 MB
        await asyncio.sleep(3)


async def terminated(client: httpx.AsyncClient, process: psutil.Process, result: Result) -> None:
    """Ends the server while it answers: it must finish what it has begun, and be gone then."""
    last = Result()
    asked = [asyncio.ensure_future(ask(client, random.Random(i), last, False)) for i in range(4)]
    while not all(task.done() for task in asked) and len(last.first) < len(asked):
        await asyncio.sleep(0.01)
    process.terminate()
    ended = await asyncio.gather(*asked, return_exceptions=True)
    result.errors += [f"at the end: {fault}" for fault in [*last.errors, *filter(None, ended)]]
    for _ in range(600):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return
        await asyncio.sleep(0.1)
    result.errors.append("TERM didn't end it within a minute")


async def load(base: str, process: psutil.Process, options: argparse.Namespace) -> tuple[Result, float]:
    """All clients at once; what they saw, and the seconds."""
    result = Result()
    started = time.perf_counter()
    end = started + options.seconds

    async def watch() -> None:
        while time.perf_counter() < end:
            result.megabytes.append(process.memory_info().rss / 1e6)
            await asyncio.sleep(0.5)

    limits = httpx.Limits(max_connections=2 * options.clients)
    async with httpx.AsyncClient(base_url=base, timeout=600, limits=limits) as client:
        work = [polite(client, i, end, result, options.rude) for i in range(options.clients)]
        await asyncio.gather(*work, watch(), *([mistaken(client, end, result)] if options.rude else []))
        seconds = time.perf_counter() - started
        if options.rude:
            await terminated(client, process, result)
    return result, seconds


def command(engine: str, port: int, options: argparse.Namespace) -> list[str]:
    """What starts a server."""
    if engine == "ggpy":
        more = ["--max-queue", str(options.clients), "-c", "1024"]
        return [
            sys.executable,
            "-m",
            "ggpy",
            "serve",
            options.model,
            "-t",
            str(options.threads),
            "--port",
            str(port),
            *more,
        ]
    if engine == "xllamacpp":
        return [sys.executable, "-c", LLAMA_CPP, options.model, *map(str, (port, options.threads, options.clients))]
    more = ["--n_threads", str(options.threads), "--n_ctx", "1024", "--port", str(port)]
    return [options.python, "-m", "llama_cpp.server", "--model", options.model, *more]


def measure(engine: str, options: argparse.Namespace) -> tuple[Result, float]:
    """Starts a server, loads it, ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(engine, port, options), **quiet) as server:
        try:
            body = {"model": "any", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
            for _ in range(600):
                if server.poll() is not None:
                    raise SystemExit(f"{engine} ended with code {server.returncode}")
                try:
                    if httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
            return asyncio.run(load(base, psutil.Process(server.pid), options))
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=1)
    parser.add_argument("--engines", default="ggpy,xllamacpp")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rude", action="store_true")
    options = parser.parse_args()
    for _ in range(options.rounds):
        for engine in options.engines.split(","):
            result, seconds = measure(engine, options)
            print(f"{engine:10} {result.line(seconds)}", *result.errors[:3], flush=True)


if __name__ == "__main__":
    main()
