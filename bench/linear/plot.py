"""Pictures of a result: peak memory against the number of tokens, and time against the share of inactive rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpo_fused.bench.plot_style import (
    LEGEND,
    MUTED,
    SURFACE,
    PlotUnavailable,
    colour,
    frame,
    plain_number,
    pyplot,
    save,
    size,
)
from hpo_fused.bench.report import environment_line
from hpo_fused.bench.results import MemoryRow

from .cases import LinearCase
from .memory import TOKENS
from .results import LinearResult, LinearRow

MIB, GIB = 1 << 20, 1 << 30
GAP = 13.0  # points between labels
DASHES = (0, (4, 3))


class _Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]  # x, y
    dashed: bool = False
    spread: Sequence[tuple[float, float]] | None = None  # y's 20% and 80% quantiles


def _memory_lines(rows: Sequence[MemoryRow]) -> list[_Line]:
    lines = []
    for name in dict.fromkeys(row.provider for row in rows):
        mine = [row for row in rows if row.provider == name]
        measured = [(row.case.tokens, row.peak_extra_bytes / MIB) for row in mine if row.peak_extra_bytes is not None]
        if measured:
            lines.append(_Line(name, measured))
        predicted = [(row.case.tokens, row.prediction.peak / MIB) for row in mine if row.prediction is not None]
        if predicted:
            lines.append(_Line(f"{name} predicted", predicted, dashed=True))
    return lines


def _time_lines(rows: Sequence[LinearRow]) -> list[_Line]:
    """Against the share of inactive rows; who computes them all takes the same time at each."""
    shares = sorted({row.case.inactive_share for row in rows})
    lines = []
    for name in dict.fromkeys(row.provider for row in rows):
        mine = [row for row in rows if row.provider == name and row.median_s is not None]
        points = [(100 * row.case.inactive_share, (row.median_s or 0) * 1e3) for row in mine]
        spread = [((row.q20_s or 0) * 1e3, (row.q80_s or 0) * 1e3) for row in mine]
        if len(points) == 1 and len(shares) > 1:
            points = [(100 * share, points[0][1]) for share in (shares[0], shares[-1])]
            lines.append(_Line(name, points, dashed=True))
        elif points:
            lines.append(_Line(name, points, spread=spread))
    return lines


def _spread_of(line: _Line) -> list[float]:
    return [high for _, high in line.spread or ()]


def _draw(axes: Any, line: _Line) -> None:
    shade = colour(line.name)
    xs, ys = zip(*line.points, strict=True)
    markers = 0 if line.dashed else 5
    axes.plot(
        xs, ys, color=shade, linewidth=1.4 if line.dashed else 2, linestyle=DASHES if line.dashed else "-",
        marker="o", markersize=markers, alpha=0.9 if line.dashed else 1, zorder=4 if line.name == "hpo_fused" else 3,
    )  # fmt: skip
    if line.spread:
        low, high = zip(*line.spread, strict=True)
        axes.fill_between(xs, low, high, color=shade, alpha=0.15, linewidth=0, zorder=2)


def _label_ends(figure: Any, axes: Any, lines: Sequence[_Line]) -> None:
    """A name at the right of each line, moved apart where they would touch; a short line's at its own end."""
    figure.canvas.draw()
    scale = 72 / figure.dpi
    right = max(x for line in lines for x, _ in line.points)
    texts = [line for line in lines if not (line.dashed and line.name.endswith("predicted"))]
    bottom = axes.transAxes.transform((0, 0))[1] * scale + GAP / 2  # clear of the axis
    below = None
    for line in sorted(texts, key=lambda line: line.points[-1][1]):
        x, y = line.points[-1]
        at = axes.transData.transform((x, y))[1] * scale
        shift = 0.0
        if x == right:
            lowest = bottom if below is None else below + GAP
            shift = max(lowest - at, 0.0)
            below = at + shift
        axes.annotate(
            line.name, (x, y), xytext=(7, shift), textcoords="offset points", va="center", ha="left",
            color=colour(line.name), fontsize=9.5, fontweight="bold" if line.name == "hpo_fused" else "normal",
            annotation_clip=False,
        )  # fmt: skip


def memory_panel(figure: Any, axes: Any, rows: Sequence[MemoryRow]) -> None:
    """Lines of peak memory against tokens, for rows of one shape, of logits or of a head."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines = _memory_lines(rows)
    case = rows[0].case
    hidden = f"H {case.shape.hidden}, " if isinstance(case, LinearCase) else ""
    sizes = f"{hidden}V {case.shape.vocabulary}"
    frame(
        axes,
        "Peak memory beyond the inputs",
        f"tokens ({sizes}, {case.dtype})",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for line in lines:
        _draw(axes, line)
    xs = sorted({x for line in lines for x, _ in line.points})
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.xaxis.set_minor_locator(NullLocator())
    ys = [y for line in lines for _, y in line.points]
    ticks = [2.0**power for power in range(-4, 24) if min(ys) / 2 < 2.0**power < max(ys) * 2]
    axes.set_ylim(min(ys) / 1.3, max(ys) * 1.3)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if min(ys) / 1.3 <= tick <= max(ys) * 1.3]))
    axes.yaxis.set_major_formatter(FuncFormatter(size))
    axes.yaxis.set_minor_locator(NullLocator())
    _label_ends(figure, axes, lines)
    predicted = next((line for line in lines if line.name.endswith("predicted")), None)
    if predicted is not None:
        axes.plot([], [], color=colour(predicted.name), linestyle=DASHES, label="hpo_fused.linear_memory's prediction")
        axes.legend(loc="upper left", borderaxespad=0.2, **LEGEND)


def _time_panel(figure: Any, axes: Any, rows: Sequence[LinearRow]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    lines = _time_lines(rows)
    case = rows[0].case
    frame(
        axes, "Time of loss and both gradients, ms",
        f"% of rows without a learning signal ({case.tokens} tokens, H {case.shape.hidden}, V {case.shape.vocabulary})",
    )  # fmt: skip
    for line in lines:
        _draw(axes, line)
    highest = max(max([y for _, y in line.points] + _spread_of(line)) for line in lines)
    axes.set_ylim(0, 1.2 * highest)  # room for the legend
    if any(line.dashed for line in lines):
        axes.plot([], [], color=MUTED, linestyle=DASHES, label="measured at the first share; the same at all")
        axes.legend(loc="upper right", **LEGEND)
    axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in lines for x, _ in line.points})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}%"))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
    _label_ends(figure, axes, lines)


def draw_figure(result: LinearResult, output: Path) -> None:
    """Write the picture, in the format that the name ends with.

    Raises:
        PlotUnavailable: no matplotlib, nothing in the result to draw, or a format that there is not.
    """
    plots = pyplot()
    memory = [row for row in result.of_series(TOKENS) if row.peak_extra_bytes is not None or row.prediction is not None]
    timed = [row for row in result.rows if row.median_s is not None]
    panels: list[tuple[Any, Any]] = []
    if memory:
        panels.append((memory_panel, memory))
    if timed:
        panels.append((_time_panel, timed))
    if not panels:
        raise PlotUnavailable("the result holds neither times nor memory")
    figure, axes = plots.subplots(1, len(panels), figsize=(6.6 * len(panels), 4.5), facecolor=SURFACE, squeeze=False)

    def draw() -> None:
        # Room for the names right of each panel, before they are placed.
        figure.subplots_adjust(
            left=0.09 / len(panels) + 0.01, right=1 - 0.24 / len(panels), wspace=0.56, top=0.88, bottom=0.2
        )
        for (panel, rows), one in zip(panels, axes[0], strict=True):
            panel(figure, one, rows)

    save(figure, output, draw, environment_line(result))
