"""Speed and memory of a running model."""

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generate.model import Model


def tokens_per_second(model: "Model", n_prompt: int, n_decode: int, repeat: int = 3) -> tuple[float, float]:
    """Rates of a prompt of n_prompt tokens, and of decoding n_decode after it; medians after a run that warms up."""
    ids = [(7919 * i + 13) % model.architecture.n_vocab for i in range(n_prompt + n_decode)]  # any tokens do
    rates: list[tuple[float, float]] = []
    for _ in range(repeat + 1):
        with model.new_sequence() as sequence:
            started = time.perf_counter()
            sequence.extend(ids[:n_prompt])
            between = time.perf_counter()
            for token in ids[n_prompt:]:
                sequence.extend([token])
            rates.append((n_prompt / (between - started), n_decode / (time.perf_counter() - between)))
    prompt, decode = (statistics.median(r) for r in zip(*rates[1:], strict=True))
    return prompt, decode


def peak_memory() -> int | None:
    """The most memory that this process has held so far, in bytes, mapped files included; None where that isn't known."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's number may be the parent's
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
