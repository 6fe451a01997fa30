"""`ggpy perplexity`: how well a model foresees a text, and how far it is from a better one."""

import json as json_format
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Error
from .common import MODEL_HELP, KVType, open_model

if TYPE_CHECKING:
    from ..measure.perplexity import Perplexity

#: what is printed of a divergence: name, words, format
_MEASURES = (
    ("base_perplexity", "perplexity of the base", "{:.4f}"),
    ("perplexity_ratio", "ratio to the base", "{:.5f}"),
    ("kl_mean", "KL divergence, mean", "{:.6f}"),
    ("kl_median", "               median", "{:.6f}"),
    ("kl_99", "               99 %", "{:.6f}"),
    ("kl_max", "               largest", "{:.6f}"),
    ("top1_agreement", "same likeliest token", "{:.3%}"),
    ("p_change_mean", "change of p, mean", "{:.3%}"),
    ("p_change_rms", "             RMS", "{:.3%}"),
)


def perplexity(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    text: Annotated[Path | None, typer.Argument(help="The text; not needed with --kl-base.", metavar="[TEXT]")] = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=4, help="Tokens of a chunk.")] = 512,
    n: Annotated[int | None, typer.Option("-n", "--chunks", min=1, help="Chunks at most; default: all.")] = None,
    save_logits: Annotated[
        Path | None, typer.Option("--save-logits", help="Save the log-probabilities, as a base for others.")
    ] = None,
    kl_base: Annotated[
        Path | None, typer.Option("--kl-base", help="Compare with these log-probabilities, of the same text.")
    ] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
    kv_type: KVType = "f16",
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure perplexity as llama-perplexity does, and the divergence from a base."""
    from ..file import read_text
    from ..measure.logits_file import LogitsFile
    from ..measure.perplexity import chunks_of, measure_perplexity

    with ExitStack() as stack:
        base = stack.enter_context(LogitsFile(kl_base)) if kl_base is not None else None
        if text is None and base is None:
            raise Error("name a text to measure, or --kl-base")
        n_ctx = ctx if base is None else base.tokens.shape[1]
        opened = stack.enter_context(open_model(model, n_ctx, threads, kv_type=kv_type))
        chunks = base.tokens[:n] if base is not None else None
        if text is not None:
            ids = opened.tokenize(read_text(text), special=False)
            chunks = chunks_of(ids, n_ctx, n if chunks is None else len(chunks))
        assert chunks is not None
        progress = stack.enter_context(running_line(len(chunks)))
        result = measure_perplexity(opened, chunks, save=save_logits, base=base, progress=progress)
        path = str(opened.file.path)
    if json:
        print(json_format.dumps({"model": path, **_without_nan(result.summary())}, indent=1))
        return
    print(f"{path}: {len(result.nll)} tokens in {result.n_chunks} chunks of {result.n_ctx}")
    print(f"{'perplexity':<24}{result.value:.4f} ± {result.error:.4f}")
    measured = result.summary()
    for name, words, form in _MEASURES if result.divergence else ():
        value, error = measured[name]
        print(f"{words:<24}{form.format(value)}" + ("" if math.isnan(error) else f" ± {form.format(error)}"))


def _without_nan(measured: dict[str, Any]) -> dict[str, Any]:
    """Values and errors as JSON can have them."""

    def plain(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        return {"value": value[0], "error": None if math.isnan(value[1]) else value[1]}

    return {name: plain(value) for name, value in measured.items()}


@contextmanager
def running_line(n_chunks: int) -> Iterator:
    """A line on stderr with the measures so far, rewritten after each chunk; on no terminal, nothing."""
    started = time.perf_counter()
    on_terminal = sys.stderr.isatty()

    def progress(sofar: "Perplexity") -> None:
        if not on_terminal:
            return
        seconds = (time.perf_counter() - started) / sofar.n_chunks
        left = round(seconds * (n_chunks - sofar.n_chunks))
        kl = f"  KL {sofar.divergence.kl.mean():.5f}" if sofar.divergence else ""
        line = f"[{sofar.n_chunks}/{n_chunks}] perplexity {sofar.value:.3f} ± {sofar.error:.3f}{kl}"
        times = f"  {seconds:.1f} s a chunk, {left // 60}:{left % 60:02} left"
        print(f"\r\x1b[K{line}{times}", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if on_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
