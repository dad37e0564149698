"""Benchmarks as plots and as one HTML page that asks nothing of any other file or host."""

import base64
import datetime
import html
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.workbench import bench
from jaxops.workbench.call import Problem
from jaxops.workbench.measurement import Benchmark

# Ink, grid and background of a plot, by the reader's colour scheme; the series' colours are told apart by most eyes and
# have contrast on both backgrounds.
_SCHEMES = {"light": ("#1c2127", "#d5d9de", "#ffffff"), "dark": ("#e4e7eb", "#3b424b", "#14181d")}
_COLOURS = ("#2f7fd0", "#d9772b", "#2f9e6b", "#b758a8", "#8a8f98", "#b59a1c")
_MARKERS = "osD^vP"


def check(folder: pathlib.Path) -> None:
    """Makes `folder`. Raises `Problem` if nothing can be written there, or if matplotlib is not installed."""
    _matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"--report must be a folder that can be made, got {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise Problem(f"--report must be a folder that can be written, got {folder}")


def write(
    folder: pathlib.Path,
    benchmarks: Sequence[Benchmark],
    versions: Mapping[str, str],
    scale: str = "",
    sizes: Sequence[int] = (),
) -> pathlib.Path:
    """Writes `roofline.png`, with `scale` also `scaling.png`, and `report.html`, whose path is returned.

    scale, sizes: the name of the dimension that varies and its values, one benchmark for each (and each target).

    Raises `Problem` as `check` does.
    """
    check(folder)
    figures = []
    for name, title, draw in (
        ("roofline", "How near to the roofline", lambda colours: roofline(benchmarks, colours)),
        ("scaling", f"How the time grows with {scale}", lambda colours: scaling(benchmarks, scale, sizes, colours)),
    ):
        if name == "scaling" and not (scale and any(row.seconds for one in benchmarks for row in one.rows)):
            continue
        images = {scheme: _png(draw(colours)) for scheme, colours in _SCHEMES.items()}
        (folder / f"{name}.png").write_bytes(images["light"])
        figures.append((title, images))
    page = folder / "report.html"
    page.write_text(_page(benchmarks, figures, versions), encoding="utf-8")
    return page


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise Problem("plots need matplotlib: pip install 'jaxops[cli]'") from error
    return matplotlib


def _axes(colours: tuple[str, str, str], height: float = 4.6) -> tuple[Any, Any]:
    ink, grid, ground = colours
    figure = _matplotlib().figure.Figure(figsize=(8.4, height), dpi=150, layout="constrained", facecolor=ground)
    axes = figure.add_subplot(facecolor=ground)
    axes.grid(True, which="major", color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_color(ink)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _logarithmic(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times every power of ten, as plain numbers."""
    ticker = _matplotlib().ticker
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _label(axes: Any, ink: str, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=ink, fontsize=11)
    axes.set_xlabel(x, color=ink, fontsize=10)
    axes.set_ylabel(y, color=ink, fontsize=10)


def _legend(figure: Any, axes: Any, ink: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=ink, fontsize=9)


def _series(benchmarks: Sequence[Benchmark]) -> dict[tuple[str, str], tuple[str, str, str]]:
    """(where, variant) → its label, colour and marker. Where all are at one place the label does not say it."""
    places = list(dict.fromkeys(one.where for one in benchmarks))
    names = list(dict.fromkeys(row.variant for one in benchmarks for row in one.rows if row.seconds))
    return {
        (place, name): (
            name if len(places) == 1 else f"{name}, {place}",
            _COLOURS[i % len(_COLOURS)],
            _MARKERS[j % len(_MARKERS)],
        )
        for i, name in enumerate(names)
        for j, place in enumerate(places)
    }


def _said(benchmarks: Sequence[Benchmark]) -> str:
    return "modelled" if any(one.modelled for one in benchmarks) else "measured"


def roofline(benchmarks: Sequence[Benchmark], colours: tuple[str, str, str] = _SCHEMES["light"]) -> Any:
    """A matplotlib figure: TFLOP/s over FLOP per byte, below the roof; GB/s as bars where there are no products."""
    if not any(one.cost.flops and one.peak.flops for one in benchmarks):
        return _bandwidth(benchmarks, colours)
    ink, _, _ = colours
    figure, axes = _axes(colours)
    series = _series(benchmarks)
    intensities = [one.cost.flops / one.cost.bytes for one in benchmarks if one.cost.flops]
    roofs = {one.where: (one.peak.flops / 1e12, one.peak.bandwidth / 1e12) for one in benchmarks if one.peak.flops}
    ridges = [flat / slope for flat, slope in roofs.values()]
    low, high = min(*intensities, *ridges) / 8, max(*intensities, *ridges) * 8
    for place, (flat, slope) in roofs.items():
        axes.plot([low, flat / slope, high], [low * slope, flat, flat], color=ink, linewidth=1.4)
        notes = [(f"{flat:.3g} TFLOP/s" + (f" ({place})" if len(roofs) > 1 else ""), (high, flat), (0, 4), "right")]
        if len(roofs) == 1:
            notes.append((f"{1e3 * slope:.3g} GB/s", (low, low * slope), (10, 0), "left"))
        for words, at, offset, side in notes:
            axes.annotate(words, at, offset, textcoords="offset points", ha=side, color=ink, fontsize=9)
    seen = set()
    for one in benchmarks:
        for row in one.rows:
            figures = one.figures(row)
            if figures.tflops is None:
                continue
            label, colour, marker = series[one.where, row.variant]
            axes.plot(
                one.cost.flops / one.cost.bytes,
                figures.tflops,
                marker,
                color=colour,
                markersize=7,
                label=None if label in seen else label,
            )
            seen.add(label)
    axes.set_xscale("log")
    _logarithmic(axes.xaxis)
    axes.set_yscale("log")
    _logarithmic(axes.yaxis)
    axes.set_xlim(low, high)
    title = f"{benchmarks[0].question.operator}, {benchmarks[0].question.dtype}: roofline ({_said(benchmarks)})"
    _label(axes, ink, title, "FLOP per byte that has to move", f"TFLOP/s, {_said(benchmarks)}")
    _legend(figure, axes, ink)
    return figure


def _bandwidth(benchmarks: Sequence[Benchmark], colours: tuple[str, str, str]) -> Any:
    """Bars of GB/s beside the peak: the roofline of what multiplies no matrices."""
    ink, _, _ = colours
    bars = [(one, row) for one in benchmarks for row in one.rows if row.seconds]
    figure, axes = _axes(colours, max(2.2, 1.2 + 0.36 * len(bars)))
    series = _series(benchmarks)
    places = {one.where for one in benchmarks}
    names = []
    for i, (one, row) in enumerate(bars):
        label, colour, _ = series[one.where, row.variant]
        figures = one.figures(row)
        axes.barh(i, figures.gbytes, color=colour, height=0.62)
        percent = "" if figures.percent is None else f"  {figures.gbytes:.3g} ({figures.percent:.0f} %)"
        axes.annotate(percent, (figures.gbytes, i), va="center", color=ink, fontsize=9)
        axes.plot([one.peak.bandwidth / 1e9] * 2, [i - 0.45, i + 0.45], color=ink, linewidth=1.6)
        shape = "" if len(benchmarks) == len(places) else f"{one.question.operands[0].partition('=')[2]}  "
        names.append(shape + label)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    most = max([one.figures(row).gbytes or 0 for one, row in bars] + [one.peak.bandwidth / 1e9 for one in benchmarks])
    axes.set_xlim(0, 1.22 * most)
    title = f"{benchmarks[0].question.operator}, {benchmarks[0].question.dtype}: bytes that have to move, over time"
    _label(axes, ink, title, f"GB/s, {_said(benchmarks)}; the upright line is the peak", "")
    return figure


def scaling(
    benchmarks: Sequence[Benchmark], scale: str, sizes: Sequence[int], colours: tuple[str, str, str] = _SCHEMES["light"]
) -> Any:
    """A matplotlib figure: the time of each variant over the size of one dimension, half of the rounds in its shade."""
    ink, _, _ = colours
    figure, axes = _axes(colours)
    each = len(benchmarks) // len(sizes)
    for (place, name), (label, colour, marker) in _series(benchmarks).items():
        points = {
            sizes[i // each]: row.spread
            for i, one in enumerate(benchmarks)
            for row in one.rows
            if one.where == place and row.variant == name and row.spread
        }
        if not points:
            continue
        xs, spreads = list(points), list(points.values())
        axes.plot(xs, [1e3 * spread.median for spread in spreads], marker, linestyle="-", color=colour, label=label)
        lower, upper = zip(*(spread.quartiles for spread in spreads), strict=True)
        axes.fill_between(xs, [1e3 * s for s in lower], [1e3 * s for s in upper], color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_yscale("log")
    _logarithmic(axes.yaxis)
    said = _said(benchmarks)
    title = f"{benchmarks[0].question.operator}, {benchmarks[0].question.dtype}: time over {scale} ({said})"
    _label(axes, ink, title, scale, f"ms, {said}" + ("" if said == "modelled" else ", median and quartiles"))
    _legend(figure, axes, ink)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# ---- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5b646e; --line: #d5d9de; --ground: #fff; --warn: #9a5b00;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa3ad; --line: #3b424b; --ground: #14181d;
  --warn: #e0a040; --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.2rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.8rem 0 .4rem; font-weight: 600; overflow-wrap: anywhere; }
p, ul { margin: .5rem 0; } .soft { color: var(--soft); } .modelled { color: var(--warn); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
td.wrong { color: var(--bad); text-align: left; white-space: normal; } td.absent { color: var(--soft); text-align: left;
  white-space: normal; }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
code { font-size: .92em; }
"""


def _page(
    benchmarks: Sequence[Benchmark], figures: Sequence[tuple[str, Mapping[str, bytes]]], versions: Mapping[str, str]
) -> str:
    first = benchmarks[0]
    modelled = any(one.modelled for one in benchmarks)
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    places = ", ".join(dict.fromkeys(one.where for one in benchmarks))
    said = (
        '<p class="modelled">All times are modelled from the compilers’ schedules. No hardware measured them.</p>'
        if modelled
        else "<p>All times are measured. Every variant was compared with float64 before it was timed.</p>"
    )
    body = [
        f"<h1>{html.escape(first.question.operator)}</h1>",
        f'<p class="soft">{html.escape(places)} · {when} · '
        + html.escape(", ".join(f"{name} {version}" for name, version in versions.items()))
        + "</p>",
        said,
    ]
    for title, images in figures:
        urls = {scheme: "data:image/png;base64," + base64.b64encode(image).decode() for scheme, image in images.items()}
        body.append(
            f"<h2>{html.escape(title)}</h2>\n<picture>"
            f'<source media="(prefers-color-scheme: dark)" srcset="{urls["dark"]}">'
            f'<img alt="{html.escape(title)}: the figures are in the tables below" src="{urls["light"]}"></picture>'
        )
    body.append("<h2>Figures</h2>")
    for one in benchmarks:
        body += _table(one)
    body.append(
        "<h2>How to read this</h2>\n<ul>" + "".join(f"<li>{line}</li>" for line in _reading(modelled)) + "</ul>"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(first.question.operator)}: benchmark</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(one: Benchmark) -> list[str]:
    columns, lines = bench.cells(one)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    rows = []
    for row, cells in zip(one.rows, lines, strict=True):
        if row.seconds is None:
            kind = "absent" if row.status == "absent" else "wrong"
            said = html.escape(f"{row.status}: {row.reason}")
            cell = f'<td class="{kind}" colspan="{len(columns) - 1}">{said}</td>'
            rows.append(f"<tr><td>{html.escape(row.variant)}</td>{cell}</tr>")
        else:
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    place = f"{one.where}, modelled" if one.modelled else one.where
    return [
        f"<h3>{html.escape(str(one.question))}<br><span class='soft'>{html.escape(place)}</span></h3>",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>',
        f'<p class="soft">{html.escape(" ".join(bench.least_and_peak(one)))}</p>',
    ]


def _reading(modelled: bool) -> list[str]:
    """Sentences, in HTML."""
    from jaxops.workbench.measurement import BLIND

    lines = [
        "<b>time</b> is that of the row over that of the first row.",
        "<b>TFLOP/s</b> and <b>GB/s</b> are those of the least that has to be computed and moved: each operand read "
        "and each result written once, products 2·m·n·k. A variant that computes or moves more than that shows less.",
        "<b>% of peak</b> is of the roofline: the time in which the device, at its peak, could do that least.",
        "<b>temp</b> is the memory that XLA allocates beside operands and results.",
    ]
    if modelled:
        return [*lines, html.escape(BLIND)]
    return [
        *lines,
        "Variants take turns in a rotating order, each right after an untimed call of itself. Only ratios within one "
        "run mean anything: other programs slow a machine down.",
        "A peak that was measured here was measured in the same run. Arrays that fit a cache move faster than the "
        "memory the peak was measured on, and may exceed 100 %.",
        "<b>error</b> is relative to float64. What is ours may have twice the error of the plain form; a wrong result "
        "is not timed.",
    ]
