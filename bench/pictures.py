"""Pictures of a result: time over the limit's, and peak memory against tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import labels
from .results import Result, Row, against_tokens
from .tables import MIB

BAR = 0.8  # height of a case's bars together


def _figure(count: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _legend(figure: Any, axes: Any, colours: dict[str, str]) -> Any:
    """The figure, with a legend above it."""
    handles = [axes.plot([], [], "o-", color=colour, label=name)[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(names))}


def _times(rows: Sequence[Row]) -> Any:
    """Horizontal bars, a group for each case."""
    names = labels(row.case for row in rows)
    cases, colours = list(names), _colours(row.provider for row in rows)
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
    return _legend(figure, axes, colours)


def _memory(peaks: dict[tuple[str, str], dict[int, int]]) -> Any:
    """Lines, a pair of axes for each operation and shape."""
    titles, colours = list(dict.fromkeys(title for title, _ in peaks)), _colours(provider for _, provider in peaks)
    figure, every = _figure(len(titles), 4.0)
    for (title, provider), found in peaks.items():
        axes = every[titles.index(title)]
        axes.plot([*found], [size / MIB for size in found.values()], "o-", color=colours[provider], markersize=3)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory beyond the inputs, MiB")
        axes.set_title(title.replace(" ", "\n", 1), fontsize=8)
    return _legend(figure, every[0], colours)


def draw(result: Result, folder: Path) -> list[str]:
    """Write time.png and memory.png to ``folder`` as far as there is something to draw; their names."""
    timed = [row for row in result.rows if row.over_limit is not None and not row.limit]
    peaks = against_tokens(result.rows)
    figures = {"time.png": timed and _times(timed), "memory.png": peaks and _memory(peaks)}
    drawn = {name: figure for name, figure in figures.items() if figure}
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=80)
    return list(drawn)
