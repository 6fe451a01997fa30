"""Which quantization should I run? Quantizes a model in several ways and measures each in a process of its own.

What is measured is saved level by level, so that a run that was stopped goes on where it was.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import Error
from ..file import GGUFFile, read_text, writing_aside
from ..generate.model import Model
from ..quantization import quantize_model
from ..quantization.mixes import file_type
from .logits_file import LogitsFile
from .perplexity import Perplexity, chunks_of, measure_perplexity
from .speed import peak_memory, tokens_per_second

#: the levels that most files in the wild have
TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
_PROMPT, _DECODE = 256, 32
_FORMAT = 1
#: seconds that a process has to end when interrupted
_PATIENCE = 20

#: told of the level and of what is done with it
Progress = Callable[[str, str], None]


@dataclass(frozen=True)
class Level:
    """What was measured of one file. Errors are standard errors; what compares with the base is None for the base.

    Attributes
    ----------
    type : str
        The file type, or "base F16" and the like.
    path : str
    n_bytes : int
        The file's size.
    bits_per_weight : float
    perplexity, perplexity_error : float
    kl, kl_error, kl_99, kl_max : float
        Kullback-Leibler divergence from the base in nats: mean, its error, 99 % quantile, maximum.
    top1, top1_error : float
        Share of tokens for which the base finds the same token likeliest.
    prompt_rate, decode_rate : float
        Tokens per second.
    peak_bytes : int or None
        The most memory held while these were measured, the mapped file included.
    """

    type: str
    path: str
    n_bytes: int
    bits_per_weight: float
    perplexity: float
    perplexity_error: float
    kl: float | None
    kl_error: float | None
    kl_99: float | None
    kl_max: float | None
    top1: float | None
    top1_error: float | None
    prompt_rate: float
    decode_rate: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """All levels of a model.

    Attributes
    ----------
    name : str
    settings : dict
        What was measured on: text, imatrix, n_ctx, n_chunks, n_threads and so on.
    levels : tuple of Level
        The base first.
    """

    name: str
    settings: dict[str, Any]
    levels: tuple[Level, ...]

    @property
    def front(self) -> frozenset[str]:
        """The types that no other beats in both size and divergence."""
        measured = [(x.type, x.n_bytes, x.kl) for x in self.levels if x.kl is not None]
        return frozenset(
            name
            for name, size, kl in measured
            if not any(s <= size and k <= kl and (s, k) != (size, kl) for _, s, k in measured)
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(x), "on_front": x.type in self.front} for x in self.levels]
        return {"model": self.name, "settings": self.settings, "levels": rows}


def compare_levels(
    base: str | Path,
    name: str,
    types: Sequence[str],
    text: str | Path,
    folder: str | Path,
    *,
    imatrix: str | Path | None = None,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Quantizes a model in several ways and measures each.

    Parameters
    ----------
    base : str or Path
        The model, a GGUF file of 16 or 32 bits.
    name : str
        What to call it; file names begin with that.
    types : sequence of str
        File types as `quantize_model` takes them.
    text : str or Path
        UTF-8, of at least one chunk.
    folder : str or Path
        Gets the quantized files and the results, one JSON file each. Results that are there and were measured in the same
        way are taken as they are.
    imatrix : str or Path, optional
        An importance matrix of this model, to quantize all levels with.
    n_ctx, n_chunks : int, int or None
        Of perplexity; see `measure_perplexity`.
    n_threads : int, optional
    progress : callable, optional

    Raises
    ------
    UnsupportedError
        A type that isn't known, or has no encoder.
    GGUFError
        The model or the importance matrix is damaged.
    Error
        The importance matrix is another model's, a type needs one, or the text isn't UTF-8: nothing was done then. Or a
        measurement failed; what was measured before is kept.
    """
    types = list(dict.fromkeys(file_type(t) for t in types))
    if not types:
        raise Error("no file types to compare; such are q8_0, q4_k_m")
    base, folder = Path(base), Path(folder)
    tell = progress or (lambda level, state: None)
    files = {t: folder / f"{name}-{t.lower()}.gguf" for t in types}
    for t, path in files.items():
        quantize_model(base, path, t, imatrix=imatrix, dry_run=True)  # what can't be made is refused before the first level
    read_text(text)
    state = base.stat()
    settings = {
        "format": _FORMAT,
        "base": [str(base.resolve()), state.st_size, state.st_mtime_ns],
        "text": str(text),
        "text_sha256": _sha256(text),
        "n_ctx": n_ctx,
        "n_chunks": n_chunks,
        "n_threads": n_threads,
        "n_prompt": _PROMPT,
        "n_decode": _DECODE,
    }
    used = {"imatrix": imatrix and str(imatrix), "imatrix_sha256": imatrix and _sha256(imatrix)}
    folder.mkdir(parents=True, exist_ok=True)
    of = {"base": settings} | dict.fromkeys(types, settings | used)
    results = {t: folder / f"{name}-{t.lower()}.json" for t in of}
    found = {t: level for t, path in results.items() if (level := _read_result(path, of[t])) is not None}
    logits = folder / f"{name}-base.logits"
    options = {"n_ctx": n_ctx, "n_threads": n_threads}
    missing = [t for t in types if t not in found]
    if "base" not in found or (missing and not logits.exists()):
        results["base"].unlink(missing_ok=True)  # never beside log-probabilities of another text
        row = {**options, "path": str(base), "text": str(text), "n_chunks": n_chunks, "save": str(logits)}
        with GGUFFile(base) as file:
            most = _most_used_type(file)
        found["base"] = replace(_run(row, lambda s: tell("base", s)), type=f"base {most}")
        _write_result(results["base"], found["base"], of["base"])
    for t in missing:

        def quantizing(done: int, total: int, tensor: str, t: str = t) -> None:
            tell(t, f"quantizing {done / max(total, 1):.0%}")

        quantize_model(base, files[t], t, imatrix=imatrix, n_threads=n_threads, progress=quantizing)
        row = {**options, "path": str(files[t]), "base": str(logits)}
        found[t] = replace(_run(row, lambda s, t=t: tell(t, s)), type=t)  # type: ignore[misc]
        _write_result(results[t], found[t], of[t])
    logits.unlink(missing_ok=True)
    return Comparison(name, settings | used, tuple(found[t] for t in of))


def _sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _most_used_type(file: GGUFFile) -> str:
    sizes: dict[str, int] = {}
    for t in file.tensors.values():
        sizes[t.type] = sizes.get(t.type, 0) + t.n_bytes
    return max(sizes, key=sizes.__getitem__)


def _read_result(path: Path, settings: dict[str, Any]) -> Level | None:
    try:
        stored = json.loads(path.read_text())
        if stored["settings"] == settings:
            return Level(**stored["level"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or of another version: it is measured again
    return None


def _write_result(path: Path, level: Level, settings: dict[str, Any]) -> None:
    with writing_aside(path) as aside:
        aside.write_text(json.dumps({"settings": settings, "level": asdict(level)}, indent=1))


# In a process of its own, so that its memory is the model's


def _run(options: dict[str, Any], tell: Callable[[str], None]) -> Level:
    """Measures a file in a child process, which writes a line of JSON whenever there is something to tell."""
    command = [sys.executable, "-c", "from ggpy.measure.levels import child; child()", json.dumps(options)]
    # Not in the terminal's process group: an interrupt reaches it from here alone, so that it can remove what it began.
    pipe: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "encoding": "utf-8",
        "start_new_session": True,
    }
    with subprocess.Popen(command, **pipe) as process:
        assert process.stdout is not None
        message: dict[str, Any] = {}
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "state" in message:
                    tell(message["state"])
        except BaseException:
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if "error" in message:
        raise Error(message["error"])
    if process.returncode or "level" not in message:
        raise Error(f"{options['path']}: the process that measured it ended with code {process.returncode}")
    return Level(**message["level"])


def child() -> None:
    """What the process does."""

    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(1)  # who asked was killed; what was begun here is removed by the next

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        say(level=asdict(measure_level(**json.loads(sys.argv[1]), tell=lambda s: say(state=s))))
    except KeyboardInterrupt:
        sys.exit(130)
    except (Error, OSError, MemoryError) as error:
        say(error=str(error) or type(error).__name__)


def measure_level(
    path: str,
    n_ctx: int,
    n_threads: int | None,
    tell: Callable[[str], None],
    *,
    text: str | None = None,
    n_chunks: int | None = None,
    save: str | None = None,
    base: str | None = None,
) -> Level:
    """Measures one file: speed, memory, and perplexity on a text, or on a base's text and against it."""
    tell("loading")

    def compiling(done: int, total: int, kernel: str) -> None:
        tell(f"compiling kernels {done}/{total}")

    with ExitStack() as stack:
        model = stack.enter_context(
            Model(path, n_ctx=max(n_ctx, _PROMPT + _DECODE), n_threads=n_threads, progress=compiling)
        )
        tell("speed")
        prompt_rate, decode_rate = tokens_per_second(model, _PROMPT, _DECODE)
        peak = peak_memory()
        opened = None if base is None else stack.enter_context(LogitsFile(base))
        if opened is not None:
            chunks = opened.tokens
        else:
            assert text is not None
            ids = model.tokenize(read_text(text), special=False)
            chunks = chunks_of(ids, n_ctx, n_chunks)

        def running(sofar: Perplexity) -> None:
            tell(f"perplexity {sofar.value:.3f} ± {sofar.error:.3f}, {sofar.n_chunks}/{len(chunks)}")

        result = measure_perplexity(model, chunks, save=save, base=opened, progress=running)
        tensors = model.file.tensors.values()
        n_values = sum(math.prod(t.shape) for t in tensors)
        measured = {} if result.divergence is None else result.divergence.summary()
        nothing = (None, None)
        kl, kl_error = measured.get("kl_mean", nothing)
        top1, top1_error = measured.get("top1_agreement", nothing)
        return Level(
            type="",
            path=path,
            n_bytes=sum(p.stat().st_size for p in {t.path for t in tensors}),
            bits_per_weight=8 * sum(t.n_bytes for t in tensors) / n_values,
            perplexity=result.value,
            perplexity_error=result.error,
            kl=kl,
            kl_error=kl_error,
            kl_99=measured.get("kl_99", nothing)[0],
            kl_max=measured.get("kl_max", nothing)[0],
            top1=top1,
            top1_error=top1_error,
            prompt_rate=prompt_rate,
            decode_rate=decode_rate,
            peak_bytes=peak,
        )


#: names of the columns of a table of levels
COLUMNS = tuple(f.name for f in fields(Level))
