"""`ggpy experts`: which experts a text uses."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Error
from .common import MODEL_HELP, open_model, write_output

if TYPE_CHECKING:
    from ..generate.experts import ExpertUse

_SHADES = " ░▒▓█"


def experts(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    text: Annotated[Path, typer.Option("--text", help="The text to run.")],
    n: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens of it at most.")] = 2048,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    png: Annotated[Path | None, typer.Option("--png", help="Write a heat map.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Save the trace (npy: tokens, layers, experts).")] = None,
    simulate_cache: Annotated[
        bool, typer.Option("--simulate-cache", help="Replay the trace against cache sizes and policies.")
    ] = False,
    threads: Annotated[int | None, typer.Option("-t", "--threads", min=1, help="Default: physical cores.")] = None,
) -> None:
    """Show how often each expert of each layer is chosen, and how balanced that is."""
    from ..file import folder_of, read_text
    from ..generate.experts import expert_use

    for path in filter(None, (trace, png)):
        folder_of(path)
    with open_model(model, None, threads) as opened:
        ids = opened.tokenize(read_text(text), special=False)[:n]
        if not ids:
            raise Error(f"{text}: no text")
        use = expert_use(opened, ids)
    if trace is not None:
        import numpy as np

        write_output(trace, lambda file: np.save(file, use.trace))
    if png is not None:
        heat_map(use, png)
    caches = _simulate(use) if simulate_cache else []
    if json:
        facts = {"n_tokens": len(ids), "layers": use.table(), "counts": use.counts.tolist(), "caches": caches}
        print(json_format.dumps(facts, indent=1))
        return
    _print(use, len(ids))
    for row in caches:
        rates = ", ".join(f"{policy} {rate:.1%}" for policy, rate in row["hit_rate"].items())
        print(f"cache of {row['share']:>4.0%} of the experts ({row['n_slots']}): {rates}")


def _print(use: "ExpertUse", n_tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{n_tokens} tokens, {use.trace.shape[2]} of {use.counts.shape[1]} experts each", box=None)
    for name in ("layer", "CV", "entropy", "aux loss", "confidence", "most used", "least used", "unused"):
        table.add_column(name, justify="right")
    for r in use.table():
        most, least = (f"{r[f'{k}_used']} ({r[f'{k}_share']:.1%})" for k in ("most", "least"))
        numbers = (f"{r['cv']:.3f}", f"{r['entropy']:.3f}", f"{r['aux_loss']:.3f}", f"{r['confidence']:.3f}")
        table.add_row(str(r["layer"]), *numbers, most, least, str(r["unused"]))
    Console().print(table)
    print(picture(use))


def picture(use: "ExpertUse") -> str:
    """The use of experts as shaded cells, a line a layer; a full cell is twice the even share or more."""
    width, gap = (3, " ") if use.counts.shape[1] <= 16 else (1, "")
    lines = [f"each expert's share of the choices: {_SHADES[1]} half of even, {_SHADES[2]} even, {_SHADES[4]} twice"]
    for layer, counts in zip(use.layers, use.counts, strict=True):
        cells = gap.join(width * _SHADES[min(int(2 * share + 0.5), 4)] for share in counts / counts.mean())
        lines.append(f"layer {layer:>3} |{cells}|")
    return "\n".join(lines)


def heat_map(use: "ExpertUse", path: Path) -> None:
    """Writes the shares as a picture.

    Raises
    ------
    Error
        matplotlib isn't installed.
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("a heat map needs matplotlib: pip install 'ggpy[bench]'") from None
    n_layers, n_expert = use.counts.shape
    figure = Figure(figsize=(max(5.0, 0.16 * n_expert + 2), max(2.5, 0.22 * n_layers + 1.4)), layout="constrained")
    axes = figure.subplots()
    shares = use.counts / use.counts.sum(1, keepdims=True) * n_expert
    # White is even, whatever the greatest share: blue is less, red is more.
    image = axes.imshow(shares, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, max(2, shares.max())))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(n_layers), [str(i) for i in use.layers])
    axes.set_title("How often each expert is chosen")
    figure.colorbar(image, ax=axes, label="share / even share")
    write_output(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _simulate(use: "ExpertUse") -> list[dict[str, Any]]:
    from ..generate.experts import simulate_cache

    n_all = use.counts.size
    rows = []
    for share in (0.1, 0.25, 0.5, 0.75):
        n_slots = max(1, int(share * n_all))
        rates = {p: simulate_cache(use.trace, n_slots, p) for p in ("lru", "lfu", "best")}
        rows.append({"share": share, "n_slots": n_slots, "hit_rate": rates})
    return rows
