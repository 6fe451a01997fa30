"""Comparisons of levels for people: table, Markdown, CSV, a plot, an HTML page."""

import base64
import csv
import html
import io
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import Error
from ..file import writing_aside
from .levels import COLUMNS, Comparison, Level


def _with_error(value: float | None, error: float | None, form: str) -> str:
    return "–" if value is None or error is None else f"{value:{form}} ± {error:{form}}"


def _plain(value: float | None, form: str, factor: float = 1.0) -> str:
    return "–" if value is None else f"{value * factor:{form}}"


#: columns of the table: title, and the text of a level
_TABLE: tuple[tuple[str, Callable[[Level], str]], ...] = (
    ("type", lambda x: x.type),
    ("MB", lambda x: _plain(x.n_bytes, ",.1f", 1e-6)),
    ("bits/weight", lambda x: _plain(x.bits_per_weight, ".2f")),
    ("perplexity", lambda x: _with_error(x.perplexity, x.perplexity_error, ".3f")),
    ("KL mean", lambda x: _with_error(x.kl, x.kl_error, ".5f")),
    ("KL 99 %", lambda x: _plain(x.kl_99, ".4f")),
    ("same top token, %", lambda x: _with_error(x.top1 and 100 * x.top1, x.top1_error and 100 * x.top1_error, ".2f")),
    ("prompt tok/s", lambda x: _plain(x.prompt_rate, ".1f")),
    ("decode tok/s", lambda x: _plain(x.decode_rate, ".1f")),
    ("peak MB", lambda x: _plain(x.peak_bytes, ",.0f", 1e-6)),
)
_FRONT = "front"


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Titles and rows as text; the last column marks what lies on the Pareto front of size and divergence."""
    front = comparison.front
    rows = [[text(x) for _, text in _TABLE] + ["●" if x.type in front else ""] for x in comparison.levels]
    return [title for title, _ in _TABLE] + [_FRONT], rows


def title(comparison: Comparison) -> str:
    """What stands over all of it."""
    imatrix = comparison.settings["imatrix"]
    return f"{comparison.name}: levels of quantization" + (f", with {Path(imatrix).name}" if imatrix else "")


def _facts(comparison: Comparison) -> str:
    s = comparison.settings
    chunks = "all" if s["n_chunks"] is None else f"at most {s['n_chunks']}"
    threads = "one for each core" if s["n_threads"] is None else str(s["n_threads"])
    matrix = f"Quantized with the importance matrix {s['imatrix']}. " if s["imatrix"] else ""
    return (
        f"{matrix}Text: {Path(s['text']).name}, {chunks} chunks of {s['n_ctx']} tokens, of which the second half counts. "
        f"Speed: a prompt of {s['n_prompt']} tokens, {s['n_decode']} tokens decoded after it; threads: {threads}. "
        "KL: divergence from the base in nats. Front: no other level is smaller and closer to the base."
    )


def markdown(comparison: Comparison) -> str:
    """The table in Markdown."""
    titles, rows = table(comparison)
    rule = ["---"] + ["---:"] * (len(titles) - 1)
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)]
    return f"# {title(comparison)}\n\n" + "\n".join(lines) + f"\n\n{_facts(comparison)}\n"


def csv_text(comparison: Comparison) -> str:
    """All numbers, a line a level; sizes in bytes, shares as such."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*COLUMNS, "on_front"))
    for row in comparison.as_dict()["levels"]:
        writer.writerow(["" if value is None else value for value in row.values()])
    return out.getvalue()


def plot(comparison: Comparison) -> bytes:
    """Divergence against size and against speed, with the Pareto front, as PNG.

    Raises
    ------
    Error
        matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("a plot needs matplotlib: pip install 'ggpy[bench]'") from None
    front = comparison.front
    levels = sorted((x for x in comparison.levels if x.kl is not None), key=lambda x: x.n_bytes)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title(comparison))
    parts = figure.subplots(1, 2, sharey=True)
    measures: tuple[tuple[str, Callable[[Level], float]], ...] = (
        ("file size, MB", lambda x: x.n_bytes / 1e6),
        ("decode, tokens per second", lambda x: x.decode_rate),
    )
    for part, (label, measure) in zip(parts, measures, strict=True):
        for x in levels:
            colour = "tab:red" if x.type in front else "tab:gray"
            part.errorbar(measure(x), x.kl, yerr=x.kl_error, fmt="o", color=colour, capsize=3)
            part.annotate(x.type, (measure(x), x.kl), xytext=(5, 4), textcoords="offset points", fontsize=8)
        part.set_xlabel(label)
        part.set_yscale("log")
        part.margins(x=0.14)  # room for the names
        part.grid(alpha=0.3, which="both")
    best = [x for x in levels if x.type in front]
    parts[0].plot([x.n_bytes / 1e6 for x in best], [x.kl for x in best], color="tab:red", lw=1, label="Pareto front")
    parts[0].legend()
    parts[0].set_ylabel("mean KL divergence, nats")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}td{{white-space:nowrap}}tr.front{{background:#fdecea}}img{{max-width:100%}}</style>
<h1>{title}</h1>
<table><tr>{head}</tr>
{rows}
</table>
<p>{facts}</p>
<img alt="Divergence against size and speed" src="data:image/png;base64,{image}">
</html>
"""


def page(comparison: Comparison, image: bytes) -> str:
    """An HTML page with the table and the plot, that needs no other file."""
    titles, rows = table(comparison)
    lines = [
        f'<tr class="{_FRONT if row[-1] else ""}">' + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in rows
    ]
    return _PAGE.format(
        title=html.escape(title(comparison)),
        head="".join(f"<th>{html.escape(t)}</th>" for t in titles),
        rows="\n".join(lines),
        facts=html.escape(_facts(comparison)),
        image=base64.b64encode(image).decode(),
    )


def write_reports(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes NAME-levels.json, .csv, .md, .png and .html; the last two if matplotlib is installed."""
    contents: dict[str, bytes] = {
        "json": (json.dumps(comparison.as_dict(), indent=1) + "\n").encode(),
        "csv": csv_text(comparison).encode(),
        "md": markdown(comparison).encode(),
    }
    try:
        contents["png"] = plot(comparison)
        contents["html"] = page(comparison, contents["png"]).encode()
    except Error:
        pass  # without matplotlib the numbers are all there is
    paths = []
    for ending, content in contents.items():
        path = folder / f"{comparison.name}-levels.{ending}"
        with writing_aside(path) as aside:
            aside.write_bytes(content)
        paths.append(path)
    return paths
