"""Draw docs/two_numbers.png: the way of a call from its arguments and logits to loss and gradient."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from PIL import Image

INK, QUIET = "#1f2328", "#59636e"
DATA, STEP, NUMBERS = "#ffffff", "#ddf4ff", "#fff8c5"


def box(axes: Axes, x: float, y: float, width: float, title: str, detail: str, color: str) -> None:
    """A rounded box around (x, y) with a title and a line or two below it."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.55), width, 1.1, boxstyle="round,pad=0,rounding_size=0.12", facecolor=color,
            edgecolor=INK, linewidth=0.9,
        )
    )  # fmt: skip
    axes.text(x, y + 0.26, title, ha="center", va="center", fontsize=10, fontweight="bold", color=INK)
    axes.text(x, y - 0.2, detail, ha="center", va="center", fontsize=7.6, color=QUIET, linespacing=1.25)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    """An arrow, and its label in the middle above it."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x, y + 0.14, label, ha="center", va="bottom", fontsize=9, color=INK)


def draw(path: Path) -> None:
    """Write the picture."""
    figure = pyplot.figure(figsize=(10, 3.7), facecolor="#f6f8fa")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 15), ylim=(0, 5.55))
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch(
            (2.55, 0.62), 9.9, 1.9, boxstyle="round,pad=0,rounding_size=0.15", facecolor="none", edgecolor=QUIET,
            linestyle=(0, (4, 3)), linewidth=0.9,
        )
    )  # fmt: skip
    axes.text(
        7.5, 0.34, "one launch for a token-level objective: loss and gradient, row by row; no [tokens, vocabulary] "
        "temporary", ha="center", va="center", fontsize=8, color=QUIET,
    )  # fmt: skip

    y = 1.6
    box(axes, 1.2, y, 1.9, "logits", "[tokens, V]", DATA)
    box(axes, 3.9, y, 2.1, "sweep 1", "softmax statistics\nread from memory", STEP)
    box(axes, 7.5, y, 2.5, "surrogate", "clip, log-fidelity, gate, …\n+ KL − entropy", STEP)
    box(axes, 11.1, y, 2.3, "sweep 2", "c (δ − p) + h p (E z − z)\nmostly from the cache", STEP)
    box(axes, 13.8, y, 1.9, "gradient", "[tokens, V]\nwritten once", DATA)
    arrow(axes, (2.15, y), (2.85, y))
    arrow(axes, (4.95, y), (6.25, y), "log p, H")
    arrow(axes, (8.75, y), (9.95, y), "c, h")
    arrow(axes, (12.25, y), (12.85, y))
    axes.text(9.33, y - 0.36, "∂loss/∂log p\n∂loss/∂H", ha="center", va="center", fontsize=7.6, color=QUIET)

    y = 4.55
    box(
        axes,
        2.25,
        y,
        4.0,
        "arguments",
        "tokens, mask, advantages, old and reference\nlog p, weights, objective, batch totals",
        DATA,
    )
    box(axes, 7.5, y, 2.5, "token_terms", "two small launches,\nonce per call", STEP)
    box(
        axes,
        12.6,
        y,
        4.2,
        "per-token terms",
        "A, three weights, old and reference log p,\nsampled id or masked or skipped",
        NUMBERS,
    )
    arrow(axes, (4.25, y), (6.25, y))
    arrow(axes, (8.75, y), (10.5, y))
    # From the terms down to the surrogate.
    axes.plot([12.6, 12.6, 7.5], [4.0, 3.15, 3.15], color=INK, linewidth=1.1, solid_joinstyle="round")
    arrow(axes, (7.5, 3.15), (7.5, 2.15))
    axes.text(10.05, 3.29, "all that a row has to know of batch and objective", ha="center", fontsize=8, color=QUIET)
    axes.text(5.6, 3.15, "loss", ha="center", va="center", fontsize=9, color=INK)
    arrow(axes, (6.9, 2.15), (5.75, 3.02))
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=180)
        Image.open(drawn).quantize(48).save(path, optimize=True)  # a third of the size
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("two_numbers.png"))
