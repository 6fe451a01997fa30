"""`ggpy error`: what quantization did to each tensor."""

import json as json_format
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..errors import Error
from .common import conversion_progress, find_model, write_output

if TYPE_CHECKING:
    from rich.table import Table

    from ..measure.weights import TensorError, WeightError


def error(
    model_a: Annotated[str, typer.Argument(help="The better model.", metavar="MODEL_A")],
    model_b: Annotated[str, typer.Argument(help="The model to look at, such as its quantization.", metavar="MODEL_B")],
    n: Annotated[int, typer.Option("-n", "--worst", min=1, help="Tensors to list, the worst first.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="As JSON: all tensors, and experts apart.")] = False,
    png: Annotated[Path | None, typer.Option("--png", help="Write a heat map.")] = None,
) -> None:
    """Compare the weights of two files of one model: relative RMSE and signal to noise, the worst tensors first."""
    from ..file import GGUFFile, folder_of
    from ..measure.weights import together, weight_errors

    if png is not None:
        folder_of(png)
    with GGUFFile(find_model(model_a, "f32")) as a, GGUFFile(find_model(model_b)) as b:
        with conversion_progress() as progress:
            errors = weight_errors(a, b, progress)
        paths = str(a.path), str(b.path)
    worst = sorted(errors, key=lambda e: -e.relative_rmse)
    layers = together((e for e in errors if e.layer is not None), lambda e: e.layer)
    kinds = together(errors, lambda e: e.kind)
    (whole,) = together(errors, lambda e: None).values()
    if png is not None:
        heat_map(errors, png)
    if json:
        groups = {"layers": layers, "kinds": kinds}
        facts: dict[str, Any] = {"a": paths[0], "b": paths[1], "all": _numbers(whole)}
        facts |= {name: {str(k): _numbers(e) for k, e in group.items()} for name, group in groups.items()}
        print(json_format.dumps({**facts, "tensors": [_tensor(e) for e in worst]}, indent=1))
        return
    _print(paths, worst[:n], layers, kinds, whole)


def _numbers(e: "WeightError") -> dict[str, Any]:
    snr = None if math.isinf(e.snr) else e.snr
    return {"relative_rmse": e.relative_rmse, "snr_db": snr, "n_values": e.n_values}


def _tensor(e: "TensorError") -> dict[str, Any]:
    from ..measure.weights import relative_rmse

    facts = {"name": e.name, "type_a": e.type_a, "type_b": e.type_b, **_numbers(e)}
    if len(e.signal) > 1:
        facts["matrices"] = relative_rmse(e.signal, e.noise).tolist()
    return facts


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    return table


def _cells(e: "WeightError") -> tuple[str, str]:
    return f"{e.relative_rmse:.5f}", "equal" if math.isinf(e.snr) else f"{e.snr:.1f} dB"


def _print(
    paths: tuple[str, str],
    worst: "list[TensorError]",
    layers: "dict[object, WeightError]",
    kinds: "dict[object, WeightError]",
    whole: "WeightError",
) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..measure.weights import relative_rmse

    console = Console()
    print(f"{paths[1]} against {paths[0]}")
    table = _table("tensor", "type", "relative RMSE", "SNR", "worst matrix")
    for e in worst:
        single = relative_rmse(e.signal, e.noise)
        apart = f"{single.argmax()}: {single.max():.5f}" if len(single) > 1 else ""
        table.add_row(Text(e.name), f"{e.type_a} → {e.type_b}", *_cells(e), apart)
    console.print(table)
    for title, groups in (("kind", kinds), ("layer", layers)):
        table = _table(title, "relative RMSE", "SNR", "values")
        for name, group in sorted(groups.items(), key=lambda item: -item[1].relative_rmse):
            table.add_row(Text(str(name)), *_cells(group), f"{group.n_values:,}")
        console.print()
        console.print(table)
    print(f"\nall: {', '.join(_cells(whole))}")


def heat_map(errors: "list[TensorError]", path: Path) -> None:
    """Writes the signal to noise of layers and kinds as a picture; a second part has experts.

    Raises
    ------
    Error
        matplotlib isn't installed, or no layer has two dimensions.
    """
    from ..measure.weights import relative_rmse

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("a heat map needs matplotlib: pip install 'ggpy[bench]'") from None
    shown = [e for e in errors if e.layer is not None and e.type_b != "F32"] or [e for e in errors if e.layer is not None]
    if not shown:
        raise Error("no tensors of layers to draw")
    layers, kinds = sorted({e.layer for e in shown}), list(dict.fromkeys(e.kind for e in shown))  # type: ignore[type-var]
    experts = [e for e in shown if e.kind.endswith("_exps")]
    n_most = max((len(e.signal) for e in experts), default=0)
    widths = [max(4.0, 0.5 * len(kinds) + 2), *([max(4.0, 0.12 * n_most + 1)] if experts else [])]
    figure = Figure(figsize=(sum(widths), max(3.0, 0.2 * len(layers) + 1.8)), layout="constrained")
    parts = np.atleast_1d(figure.subplots(1, len(widths), width_ratios=widths))
    values = np.full((len(layers), len(kinds)), np.nan)
    for e in shown:
        values[layers.index(e.layer), kinds.index(e.kind)] = e.snr if math.isfinite(e.snr) else np.nan
    images = [parts[0].imshow(values, aspect="auto", cmap="magma")]
    parts[0].set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
    parts[0].set_title("signal to noise, dB (blank: equal, or no such tensor)")
    if experts:
        sums = np.zeros((2, len(layers), n_most))
        for e in experts:
            sums[:, layers.index(e.layer), : len(e.signal)] += e.signal, e.noise
        rmse = relative_rmse(*sums)
        with np.errstate(divide="ignore"):
            values = np.where((sums[0] > 0) & (rmse > 0), -20 * np.log10(rmse), np.nan)
        images.append(parts[1].imshow(values, aspect="auto", cmap="magma"))
        parts[1].set_xlabel("expert")
        parts[1].set_title("each expert, dB")
    for part, image in zip(parts, images, strict=True):
        part.set_yticks(range(len(layers)), [str(i) for i in layers])
        figure.colorbar(image, ax=part)
    parts[0].set_ylabel("layer")
    write_output(path, lambda file: figure.savefig(file, format="png", dpi=150))
