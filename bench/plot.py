"""Pictures of a result from logits: time over a copy's, peak memory, and errors, for each shape and provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from .accuracy import error
from .cases import Case
from .check import OWN_LOGPROB_LIMIT
from .labels import number
from .linear.plot import memory_panel
from .plot_style import (
    INK,
    LEGEND,
    MUTED,
    SURFACE,
    PlotUnavailable,
    colour,
    frame,
    pyplot,
    save,
    size,
)
from .report import environment_line
from .results import COPY, MemoryRow, Result, Row, by_case, quantiles

MIB = 1 << 20
SLOT, TOP, MARGINS, WIDTH, LINES_HEIGHT = 0.27, 0.5, 1.4, 7.4, 4.5  # inches
BAR = 0.7  # of a slot
WIDE = 8.0  # largest over smallest value from which a scale is logarithmic
SMALLEST = 1e-9  # errors below are drawn here


class _Panel(NamedTuple):
    """Draws into a figure's axes; ``slots`` high, or 0 for lines, with ``below`` more slots for a legend."""

    draw: Callable[[Any, Any], object]
    slots: int = 0
    below: int = 0


class _Slot(NamedTuple):
    """A line of a bar chart: a case's name, or one of its rows."""

    at: int
    title: str
    row: Row | None


def _titles(result: Result) -> dict[Case, str]:
    """The shape, what sets a case apart from a training step in bfloat16, and what else the cases differ in."""
    cases = list(dict.fromkeys(row.case for row in result.rows))
    sizes, objectives = {case.tokens for case in cases}, {case.objective for case in cases}

    def words(case: Case) -> Iterator[str]:
        yield case.shape.name
        if len(sizes) > 1:
            yield f"{case.tokens} tokens"
        if case.dtype != "bf16":
            yield case.dtype
        if len(objectives) > 1:
            yield case.objective
        if case.inactive:
            yield f"{case.inactive:.0%} inactive"
        if case.ragged:
            yield "ragged"
        if case.op == "logprobs":
            yield "log-probabilities"
        if case.mode != "both":
            yield f"{case.mode} alone"

    return {case: ", ".join(words(case)) for case in cases}


def _slots(result: Result, keep: Callable[[Row], bool]) -> list[_Slot]:
    """From the top down; cases without a row to keep are left out."""
    names = _titles(result)
    found: list[_Slot] = []
    for case, rows in by_case(result.rows):
        kept = [row for row in rows if keep(row)]
        if kept:
            found.append(_Slot(-len(found), names[case], None))
            for row in kept:
                found.append(_Slot(-len(found), row.provider, row))
    return found


def _lay_out(axes: Any, slots: Sequence[_Slot]) -> None:
    """Names at the left: each provider beside its bar, each case above its own."""
    rows = [slot for slot in slots if slot.row is not None]
    axes.set_yticks([slot.at for slot in rows], [slot.title for slot in rows])
    for label, slot in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colour(slot.title))
        label.set_fontweight("bold" if slot.row is not None and slot.row.is_ours else "normal")
    for slot in slots:
        if slot.row is None:
            axes.text(
                0.004, slot.at - 0.08, slot.title, transform=axes.get_yaxis_transform(), fontsize=9.5, color=INK,
                fontweight="bold", va="center", ha="left", bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.set_ylim(slots[-1].at - 0.7, 0.7)


def _bars(
    axes: Any, slots: Sequence[_Slot], values: dict[int, float], text: Callable[[float], str], *, binary: bool = False,
    least: float = math.inf, most: float = 0.0,
) -> None:  # fmt: skip
    """A bar for each value; up to ``most`` at least; logarithmic where they differ much, then with ``least`` in sight
    and, if ``binary``, with ticks at powers of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    largest, smallest = max(*values.values(), most), min(values.values())
    if largest > WIDE * smallest > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(smallest / 2, least / 1.15), largest * 2.2)
        subs = (1.0,) if binary or largest > 300 * smallest else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(base=2 if binary else 10, subs=subs, numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, largest * 1.17)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    for slot in slots:
        if slot.row is not None and slot.at in values:
            axes.barh(slot.at, values[slot.at], BAR, color=colour(slot.title), zorder=3)


def _beside(axes: Any, at: int, value: float, text: str) -> None:
    axes.annotate(
        text, (value, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
    )  # fmt: skip


def _over_copy(row: Row, rows: Sequence[Row]) -> tuple[float, float, float] | None:
    """Quantiles of this row's time over the copy's, within rounds."""
    copy = next((one.samples_s for one in rows if one.provider == COPY), [])
    ratios = [a / b for a, b in zip(row.samples_s, copy, strict=False)]
    return quantiles(ratios) if ratios else None


def _times(result: Result) -> Iterator[_Panel]:
    spread = {
        id(row): found
        for _, rows in by_case(result.rows)
        for row in rows
        if row.median_s is not None and row.provider != COPY and (found := _over_copy(row, rows)) is not None
    }
    slots = _slots(result, lambda row: id(row) in spread)
    if not slots:
        return

    def draw(figure: Any, axes: Any) -> None:
        frame(axes, "Time ÷ the time to copy the logits", "median; whiskers: 20–80 % of rounds", grid="x")
        found = {slot.at: spread[id(slot.row)] for slot in slots if slot.row is not None}
        medians = {at: middle for at, (_, middle, _) in found.items()}
        most = max(high for _, _, high in found.values())
        _bars(axes, slots, medians, lambda value: f"{value:g}×", least=1, most=most)
        for at, (low, middle, high) in found.items():
            axes.plot((low, high), (at, at), color=INK, linewidth=1.2, zorder=4)
            _beside(axes, at, max(high, middle), f"{number(middle)}×")
        if axes.get_xlim()[0] < 1 < axes.get_xlim()[1]:
            axes.axvline(1, color=MUTED, linewidth=1.2, zorder=2)
        _lay_out(axes, slots)

    yield _Panel(draw, len(slots))


def _peaks(result: Result) -> Iterator[_Panel]:
    slots = _slots(result, lambda row: row.peak_extra_bytes is not None and not row.is_copy)
    if not slots:
        return

    def draw(figure: Any, axes: Any) -> None:
        frame(axes, "Peak memory beyond the inputs", "lines: the gradient alone", grid="x")
        rows = {slot.at: slot.row for slot in slots if slot.row is not None}
        peaks = {at: max((row.peak_extra_bytes or 0) / MIB, 1e-3) for at, row in rows.items()}
        _bars(axes, slots, peaks, lambda value: size(float(f"{value:.4g}")), binary=True)
        for at, row in rows.items():
            if row.gradient_bytes:
                where = row.gradient_bytes / MIB
                axes.plot((where, where), (at - 0.5, at + 0.5), color=INK, linewidth=1.4, zorder=4)
            _beside(axes, at, peaks[at], f"{number(peaks[at])} MiB")
        _lay_out(axes, slots)

    yield _Panel(draw, len(slots))


def _against_tokens(result: Result) -> Iterator[_Panel]:
    """A panel for each series of memory rows."""
    for _, group in groupby(result.memory, key=lambda row: replace(row.case, responses=0, length=0)):
        rows: list[MemoryRow] = [row for row in group if row.peak_extra_bytes is not None]
        if len({row.case.tokens for row in rows}) > 1:
            yield _Panel(partial(memory_panel, rows=rows))


def _errors(result: Result) -> Iterator[_Panel]:
    slots = _slots(result, lambda row: row.errors is not None)
    if not slots:
        return

    def draw(figure: Any, axes: Any) -> None:
        frame(axes, "Error against float64", "further left is better", grid="x")
        axes.set_xscale("log")
        kinds = {"log p, absolute": ("o", 6.0), "gradient, relative to its row": ("D", 5.5)}
        lowest, highest = 1.0, SMALLEST
        for slot in slots:
            if slot.row is None or slot.row.errors is None:
                continue
            errors = slot.row.errors
            columns = [one for one in (errors.target, errors.others) if one is not None]
            rounding = max((one.rounding for one in columns), default=None)
            values = (errors.logprob, max((one.worst for one in columns), default=None))
            if rounding:
                lowest, highest = min(lowest, rounding), max(highest, rounding)
                axes.plot((rounding,) * 2, (slot.at - 0.42, slot.at + 0.42), color=MUTED, linewidth=1.6, zorder=3)
            for value, (marker, width) in zip(values, kinds.values(), strict=True):
                if value is not None and value == value:
                    shown = max(value, SMALLEST)
                    lowest, highest = min(lowest, shown), max(highest, shown)
                    axes.plot(shown, slot.at, marker, color=colour(slot.title), markersize=width, zorder=4)
        axes.axvline(OWN_LOGPROB_LIMIT, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        axes.set_xlim(min(lowest, OWN_LOGPROB_LIMIT) / 4, highest * 4)
        handles = [
            *(axes.plot([], [], marker, color=MUTED, markersize=width, label=name)[0]
              for name, (marker, width) in kinds.items()),
            axes.plot([], [], "|", color=MUTED, markersize=11, markeredgewidth=1.6,
                      label="what rounding the exact gradient makes of it")[0],
            axes.plot([], [], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2,
                      label=f"hpo_fused's limit for log p, {error(OWN_LOGPROB_LIMIT)}")[0],
        ]  # fmt: skip
        below = -0.5 / (SLOT * len(slots))  # clear of the axis' label
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.02, below), ncols=2, **LEGEND)
        _lay_out(axes, slots)

    yield _Panel(draw, len(slots), below=3)


PICTURES: dict[str, Callable[[Result], Iterator[_Panel]]] = {
    "time": _times,
    "memory": _peaks,
    "memory-tokens": _against_tokens,
    "accuracy": _errors,
}


def draw_figure(result: Result, output: Path, pictures: Sequence[str] = tuple(PICTURES)) -> None:
    """Write those of ``PICTURES`` that the result has something for, side by side in one file.

    Raises:
        PlotUnavailable: no matplotlib, nothing in the result to draw, or a format that there is not.
    """
    plots = pyplot()
    panels = [panel for name in pictures for panel in PICTURES[name](result)]
    if not panels:
        raise PlotUnavailable("the result holds neither times nor memory nor errors")
    slots = max(panel.slots + panel.below for panel in panels)
    height = max(SLOT * slots + MARGINS, 0.0 if all(panel.slots for panel in panels) else LINES_HEIGHT)
    figure = plots.figure(figsize=(WIDTH * len(panels), height), facecolor=SURFACE)

    def draw() -> None:
        for index, panel in enumerate(panels):
            # Bars are as thick in every panel; what is shorter than the others hangs from the top.
            inches = SLOT * panel.slots or height - MARGINS
            left, right = (0.22, 0.95) if panel.slots else (0.13, 0.76)
            bottom = 1 - (TOP + inches) / height
            box = ((index + left) / len(panels), bottom, (right - left) / len(panels), inches / height)
            panel.draw(figure, figure.add_axes(box))

    save(figure, output, draw, environment_line(result))
