"""Pictures of a result: time over the limit's, and peak memory against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import labels
from .results import Result, Row
from .tables import MIB

BAR = 0.8  # height of a case's bars together


def _figure(count: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    return {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(row.provider for row in rows))}


def _times(rows: Sequence[Row]) -> Any:
    """Horizontal bars, a group for each case."""
    names = labels(row.case for row in rows)
    cases, colours = list(names), _colours(rows)
    figure, (axes,) = _figure(1, 1.2 + 0.16 * len(rows) + 0.25 * len(cases))
    for index, case in enumerate(cases):
        group = [row for row in rows if row.case == case]
        for place, row in enumerate(group):
            y = index + BAR * ((place + 0.5) / len(group) - 0.5)
            axes.barh(y, row.over_limit, BAR / len(group), color=colours[row.provider])
    axes.set_yticks(range(len(cases)), [names[case].replace(" ", "\n", 1) for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time ÷ limit (a copy of the logits, or the bare GEMMs)")
    handles = [axes.barh(0, 0, color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _memory(rows: Sequence[Row]) -> Any:
    """Lines, a pair of axes for each operation and shape."""
    names = labels((row.case for row in rows), without=("tokens",))
    groups, colours = list(dict.fromkeys(names[row.case] for row in rows)), _colours(rows)
    figure, every = _figure(len(groups), 4.0)
    for title, axes in zip(groups, every, strict=True):
        for provider, colour in colours.items():
            found = [row for row in rows if names[row.case] == title and row.provider == provider]
            peaks = [(row.peak_bytes or 0) / MIB for row in found]
            axes.plot([row.case.tokens for row in found], peaks, "o-", color=colour, markersize=3)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory beyond the inputs, MiB")
        axes.set_title(title.replace(" ", "\n", 1), fontsize=8)
    handles = [every[0].plot([], [], "o-", color=colour, label=name)[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def draw(result: Result, folder: Path) -> list[str]:
    """Write time.png and memory.png to ``folder`` as far as there is something to draw; their names.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    timed = [row for row in result.rows if row.over_limit is not None and not row.limit]
    peaks = [row for row in result.rows if row.peak_bytes is not None]
    names = labels((row.case for row in peaks), without=("tokens",))
    sizes: dict[str, set[int]] = {}
    for row in peaks:
        sizes.setdefault(names[row.case], set()).add(row.case.tokens)
    several = [row for row in peaks if len(sizes[names[row.case]]) > 1]
    written = []
    for name, rows, make in (("time.png", timed, _times), ("memory.png", several, _memory)):
        if rows:
            make(rows).savefig(folder / name, dpi=110)
            written.append(name)
    return written
