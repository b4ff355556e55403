"""Draws a page of curves with matplotlib; the same bytes whatever the user's own settings are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves_pages import GREY, WIDTH, Curve, Page, Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
INK = "#222222"
HAIRLINE = "#BBBBBB"
SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],  # the font that matplotlib brings along
    "font.size": 9.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "hpo_fused",
    "path.simplify": False,  # every sampled point arrives in the file
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib's defaults and the settings above, instead of what a matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def draw(page: Page) -> Figure:
    """The page as a figure; within :func:`settings`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, page.height / 72), facecolor="white")
    for index, panel in enumerate(page.panels):
        left, bottom, width, height = panel.box
        axes = figure.add_axes((left / WIDTH, bottom / page.height, width / WIDTH, height / page.height))
        _draw_panel(axes, panel, index)
    return figure


def _draw_panel(axes: Any, panel: Panel, index: int) -> None:
    axes.set_xlim(*panel.x_range)
    axes.set_ylim(*panel.y_range)
    axes.set_xticks([at for at, _ in panel.x_ticks], [text for _, text in panel.x_ticks])
    axes.set_yticks([at for at, _ in panel.y_ticks], [text for _, text in panel.y_ticks])
    axes.tick_params(axis="both", pad=2.5)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=7)
    axes.set_xlabel(panel.x_label, labelpad=2, color=INK)
    if panel.one is not None:
        axes.axvline(panel.one, color=HAIRLINE, linewidth=0.8, zorder=0)
    if panel.y_range[0] < 0 and any(at == 0 and text == "0" for at, text in panel.y_ticks):
        axes.axhline(0, color=HAIRLINE, linewidth=0.8, zorder=0)
    for number, curve in enumerate(panel.curves):
        _draw_curve(axes, curve, f"curve-{index}-{number}")
        for label in curve.labels:
            axes.annotate(
                label.text, curve.point(label.at), label.shift,
                textcoords="offset points", ha=label.align, va="baseline", linespacing=1.15, zorder=1,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                color=INK if curve.style == "dots" else curve.colour,
            )  # fmt: skip


def _draw_curve(axes: Any, curve: Curve, name: str) -> None:
    style = {"color": curve.colour, "linewidth": curve.width, "gid": name}
    if curve.style == "line":
        style |= {"linestyle": (0, (4, 1.8)) if curve.dashed else "solid", "solid_joinstyle": "round"}
    elif curve.style == "bar":
        style |= {"marker": "o", "markersize": 8, "markerfacecolor": "white", "markeredgewidth": 1.4, "clip_on": False}
    else:
        style |= {"marker": "o", "markersize": 5, "linestyle": "none", "markeredgewidth": 0, "clip_on": False}
    axes.plot(curve.x, curve.y, **style)


def write(page: Page, folder: Path, format: str) -> Path:
    """Draw the page into ``folder``, as ``<name>.<format>``.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / f"{page.name}.{format}"
    with settings():
        if format == "svg":
            path.write_text(svg(page), encoding="utf-8")
        else:
            draw(page).savefig(path, format=format, dpi=200, metadata={"Title": page.summary})
    return path


def svg(page: Page) -> str:
    """The page as SVG without a date, to a hundredth of a point; within :func:`settings`."""
    file = StringIO()
    draw(page).savefig(file, format="svg", metadata={"Date": None, "Title": page.summary})

    def rounded(attribute: re.Match[str]) -> str:
        text = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])
        return re.sub(r"\s+", " ", text)

    return re.sub(r'\b(?:d|x|y)="[^"]*"|translate\([^)]*\)', rounded, file.getvalue())
