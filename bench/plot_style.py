"""How every picture of the benchmark looks, and how it becomes a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

INK, MUTED, GRID, SURFACE = "#0b0b0b", "#6f6e69", "#e4e3df", "#fcfcfb"
# One colour for each provider, in every picture.
COLOURS = {
    "hpo_fused": "#2a78d6",
    "eager": "#c43a39",
    "compile": "#c9730a",
    "linear_cross_entropy": "#1a8f68",
    "gemms": "#52514e",
    "copy": "#52514e",
    "copy_new": "#8d8b85",
    "trl": "#4a3aa7",
    "liger": "#c2588a",
    "cce": "#8a6d1d",
}
OTHERS = ("#4a3aa7", "#c2588a", "#8a6d1d")
LEGEND: dict[str, Any] = {
    "frameon": True, "framealpha": 1, "facecolor": SURFACE, "edgecolor": "none", "fontsize": 9, "labelcolor": MUTED,
    "handlelength": 2.4,
}  # fmt: skip
DPI = 160


class PlotUnavailable(Exception):
    """Nothing to draw, or nothing to draw with; the message says which."""


def pyplot() -> Any:
    """Matplotlib's, set up for files.

    Raises:
        PlotUnavailable: no matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise PlotUnavailable("needs matplotlib: pip install 'hpo-fused[bench]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hpo-fused"  # the same picture gives the same file
    from matplotlib import pyplot

    return pyplot


def colour(name: str) -> str:
    """Of a provider, whatever its variant."""
    base = name.partition(" ")[0]
    return COLOURS.get(base) or COLOURS.get(base.partition(":")[0]) or OTHERS[sum(map(ord, base)) % len(OTHERS)]


def plain_number(value: float, _: object = None) -> str:
    """A tick's number."""
    return f"{value:g}" if value < 1e6 else f"{value:.0f}"


def size(value: float, _: object = None) -> str:
    """A number of MiB."""
    return f"{value:g} MiB" if value < 1024 else f"{value / 1024:g} GiB"


def frame(axes: Any, title: str, below: str, grid: str = "y") -> None:
    """Title, label and grid of a panel."""
    axes.set_facecolor(SURFACE)
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=12, fontweight="bold")
    axes.set_xlabel(below, color=MUTED, fontsize=9.5)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, which="both")


def save(figure: Any, output: Path, draw: Callable[[], object], below: str) -> None:
    """Draw into ``figure``, with a line ``below``, and write it in the format that the name ends with.

    Raises:
        PlotUnavailable: a format that there is not.
    """
    try:
        draw()
        figure.text(0.01, 0.025, below, color=MUTED, fontsize=8)
        metadata = {"Date": None} if output.suffix == ".svg" else None
        figure.savefig(output, dpi=DPI, facecolor=SURFACE, metadata=metadata)
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        raise PlotUnavailable(str(error).splitlines()[0]) from error
    finally:
        pyplot().close(figure)
