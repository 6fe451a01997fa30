"""What Prometheus is told."""

import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .answers import Answer, Usage

#: the same numbers as llama.cpp's server counts them, under its names
_LLAMA_CPP = {
    "prompt_tokens": "Tokens of prompts that were computed.",
    "prompt_tokens_cached": "Tokens of prompts that weren't computed again.",
    "prompt_seconds": "Time for prompts.",
    "tokens_predicted": "Tokens generated.",
    "tokens_predicted_seconds": "Time for them.",
}
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The numbers of a server.

    Attributes
    ----------
    headers : dict of str to str
        That go with them.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        how: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("ggpy_requests", "Requests, by path and status.", ["path", "status"], **how)
        self._seconds = Histogram("ggpy_request_seconds", "Time of a request.", ["path"], buckets=_SECONDS, **how)
        self._prompt = Counter("ggpy_prompt_tokens", "Tokens of prompts.", **how)
        self._cached = Counter("ggpy_cached_tokens", "Of them, those that weren't computed again.", **how)
        self._completion = Counter("ggpy_completion_tokens", "Tokens generated.", **how)
        self._first = Histogram("ggpy_prompt_seconds", "Time from a prompt's start to a token.", buckets=_SECONDS, **how)
        self._each = Histogram("ggpy_token_seconds", "Mean time between an answer's tokens.", buckets=_SECONDS[:7], **how)
        self.answers = Gauge("ggpy_answers", "Answers that are wanted, at work or waiting.", **how)
        self._llama_cpp = [Counter(f"llamacpp:{name}", words, **how) for name, words in _LLAMA_CPP.items()]
        kind = "text/plain; version=0.0.4; charset=utf-8"
        self.headers = {"Content-Type": kind, "Process-Start-Time-Unix": f"{time.time():.0f}"}

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answered(self, usage: Usage, answers: Sequence[Answer]) -> None:
        """Counts what a request took."""
        self._prompt.inc(usage.prompt)
        self._cached.inc(usage.cached)
        self._completion.inc(usage.completion)
        generations = [answer.generation for answer in answers]
        seconds = sum(g.prompt_seconds for g in generations), sum(g.decode_seconds for g in generations)
        theirs = usage.prompt - usage.cached, usage.cached, seconds[0], usage.completion, seconds[1]
        for counter, n in zip(self._llama_cpp, theirs, strict=True):
            counter.inc(n)
        for generation in generations:
            if generation.prompt_seconds:
                self._first.observe(generation.prompt_seconds)
            if generation.decode_rate:
                self._each.observe(1 / generation.decode_rate)

    def text(self) -> bytes:
        """All numbers, in Prometheus' form."""
        return generate_latest(self._registry)
