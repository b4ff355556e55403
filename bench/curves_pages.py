"""What the pictures of the objectives show: curves sampled from the package's closed forms, and where they lie.

No formula stands here: surrogates and derivatives are ``hpo_fused.surrogate``'s, weights are ``BatchStatistics``'.
Every panel's place and range is fixed, so that a point of a curve has one known place in the picture, whatever draws
it (:meth:`Panel.place`).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hpo_fused.batch import BatchStatistics
from hpo_fused.objective import Clip, LogFidelity, Objective, TruncatedRatio
from hpo_fused.rows import TokenTerms
from hpo_fused.surrogate import log_fidelity_terms, token_loss

# Four colours that differ under every colour blindness (after Okabe and Ito), dark enough to be read as text.
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#C04A00", "#00785A", "#9B4F80", "#666666"

OLD_LOGPROB = -2.5  # of every drawn token; only TruncatedRatio's s depends on it
RATIOS = (0.4, 8.0)
RATIO_TICKS = (0.5, 0.8, 1.0, 1.25, 2.0, 3.0, 5.0, 8.0)
GSPO_RATIOS = (0.9990, 1.0012)
GSPO_TICKS = (0.9993, 0.9997, 1.0, 1.0004, 1.0008)
INTERVALS = 120
BALANCES = (0.03, 3.0)  # N⁺/N⁻
COUNTED = 1000  # negative responses of the batches that show α
STEP = 1e-7  # from either side of a bound, where a derivative jumps

# Points (1/72 inch); a picture is 768 CSS pixels wide.
WIDTH, LEFT, RIGHT, TOP, BOTTOM, GAP_X, GAP_Y = 576.0, 40.0, 12.0, 24.0, 36.0, 48.0, 46.0
AXIS_NAME = 14.0  # the height of an axis' name

GRPO, DAPO, GSPO = (Objective.preset(name) for name in ("grpo", "dapo", "gspo"))
SAPO, CISPO, MHPO, HPO, AHPO = (Objective.preset(name) for name in ("sapo", "cispo", "mhpo", "hpo", "ahpo"))
DELTA = Objective("token", Clip(0.2, 0.28, delta=4.0), None, "mean_length")
DUAL = Objective("token", Clip(0.2, 0.28, dual=3.0), None, "mean_length")
NO_HAZARD = Objective("token", LogFidelity(1.5, None), None, "response")
BOUNDED_BELOW = Objective("token", TruncatedRatio(high=5.0, low=0.8), None, "mean_length")


class Values(NamedTuple):
    """a·s(x, A) and what the token's A·∇log p is multiplied by, at each log-ratio."""

    surrogate: Tensor
    multiplier: Tensor


def evaluate(objective: Objective, x: Tensor, advantage: float, alpha: float = 1.0) -> Values:
    """The closed forms at log-ratios ``x``, for one advantage; ``alpha`` is the weight of negative ones.

    A sequence-level objective is evaluated on responses of one token, whose mean log-ratio is the token's.
    """
    advantages, old = torch.full_like(x, advantage), torch.full_like(x, OLD_LOGPROB)
    weights = torch.full_like(x, alpha if advantage < 0 else 1.0)
    terms = TokenTerms(advantages, weights, torch.zeros_like(x), old, None)
    out = token_loss(objective.lower(), terms, old + x, None)
    return Values(-out.losses, -out.logprob_coefficients / advantage)


def at_ratio(objective: Objective, ratio: float, advantage: float = 1.0, alpha: float = 1.0) -> tuple[float, float]:
    """:func:`evaluate` at one ratio, as numbers."""
    values = evaluate(objective, torch.tensor([ratio], dtype=torch.float64).log(), advantage, alpha)
    return float(values.surrogate), float(values.multiplier)


def peak(objective: Objective, advantage: float = 1.0, ratios: tuple[float, float] = RATIOS) -> tuple[float, float]:
    """The ratio where the multiplier is largest, to three digits after the point, and the multiplier there."""
    ratio = torch.arange(*ratios, 1e-4, dtype=torch.float64)
    multiplier = evaluate(objective, ratio.log(), advantage).multiplier
    best = int(multiplier.argmax())
    return round(float(ratio[best]), 3), float(multiplier[best])


def on_policy_hazard() -> float:
    """ζ of the preset mhpo at r = 1."""
    zero = torch.zeros(1, dtype=torch.float64)
    return float(log_fidelity_terms(zero, *MHPO.lower().parameters)[1])


def alpha_of(objective: Objective, positive: int, negative: int) -> float:
    """The weight of negative advantages in a batch of so many positive and negative responses."""
    return float(
        BatchStatistics(positive + negative, positive + negative, positive, negative).alpha(objective.weighting)
    )


def alpha_range(objective: Objective) -> tuple[float, float]:
    """The least and the greatest weight that a batch can give to negative advantages."""
    return alpha_of(objective, 0, 1), alpha_of(objective, 1, 0)


@dataclass(frozen=True)
class Label:
    """Text beside a curve, ``shift`` points away from its point at ratio ``at``; None: from its only point."""

    text: str
    at: float | None
    shift: tuple[float, float]
    align: Literal["left", "center", "right"] = "left"


@dataclass(frozen=True)
class Curve:
    """Points to join (``line``), to mark with dots (``dots``) or to join and mark with rings (``bar``)."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    colour: str
    labels: tuple[Label, ...] = ()
    width: float = 2.0
    dashed: bool = False
    style: Literal["line", "dots", "bar"] = "line"

    def point(self, ratio: float | None) -> tuple[float, float]:
        """The curve's point at a ratio, by linear interpolation; its first where None is given."""
        if ratio is None:
            return self.x[0], self.y[0]
        x = math.log(ratio)
        i = min(max(bisect.bisect_left(self.x, x), 1), len(self.x) - 1)
        x0, x1, y0, y1 = self.x[i - 1], self.x[i], self.y[i - 1], self.y[i]
        return x, y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Its box is left, bottom, width and height in points, counted from the page's lower left."""

    title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]
    x_label: str = ""
    one: float | None = 0.0  # where a hairline marks ratio 1, on the x axis
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The point of the page, from its lower left, where the picture shows (x, y)."""
        left, bottom, width, height = self.box
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return left + width * (x - x0) / (x1 - x0), bottom + height * (y - y0) / (y1 - y0)


@dataclass(frozen=True)
class Page:
    """One picture."""

    name: str
    summary: str
    height: float
    panels: tuple[Panel, ...]


def _page(name: str, summary: str, rows: Sequence[tuple[float, Sequence[Panel]]], left: float = LEFT) -> Page:
    """Rows of panels, each with its height, from the top; the panels of a row share its width."""
    gaps = [GAP_Y + (AXIS_NAME if any(panel.x_label for panel in row) else 0.0) for _, row in rows[:-1]]
    height = TOP + sum(height for height, _ in rows) + sum(gaps) + BOTTOM
    top, panels = height - TOP, []
    for (row_height, row), gap in zip(rows, [*gaps, 0.0], strict=True):
        start = left if len(row) == 1 else LEFT
        width = (WIDTH - start - RIGHT - GAP_X * (len(row) - 1)) / len(row)
        for column, panel in enumerate(row):
            box = (start + column * (width + GAP_X), top - row_height, width, row_height)
            panels.append(dataclasses.replace(panel, box=box))
        top -= row_height + gap
    return Page(name, summary, height, tuple(panels))


def _ticks(values: Iterable[float], log: bool = False) -> tuple[tuple[float, str], ...]:
    return tuple((math.log(v) if log else v, f"{v:g}".replace("-", "−")) for v in values)


def _grid(ratios: tuple[float, float], objective: Objective | None = None) -> Tensor:
    """Log-ratios to sample at: evenly, and on either side of every bound that the objective puts on the ratio."""
    low, high = map(math.log, ratios)
    x = set(torch.linspace(low, high, INTERVALS + 1, dtype=torch.float64).tolist())
    if objective is not None:
        spec = objective.lower()
        bounds = spec.parameters if spec.kind in ("clip", "truncated_ratio") else ()
        for bound in (math.log(b) for b in bounds if ratios[0] < b < ratios[1]):
            x |= {bound - STEP, bound + STEP}
    return torch.tensor(sorted(x), dtype=torch.float64)


def _ratio_panel(
    title: str,
    y_range: tuple[float, float],
    y_ticks: Iterable[float],
    curves: Sequence[Curve],
    last: bool = True,
    ratios: tuple[float, float] = RATIOS,
) -> Panel:
    """A panel over the importance ratio; ``last``: nothing stands below it, so it names its axis."""
    low, high = ratios
    ticks = _ticks((tick for tick in RATIO_TICKS if low <= tick <= high), log=True)
    name = "importance ratio r = exp(x)" if last else ""
    return Panel(title, (math.log(low), math.log(high)), y_range, ticks, _ticks(y_ticks), tuple(curves), name)


def _curve(
    name: str,
    objective: Objective,
    advantage: float,
    what: Literal["surrogate", "multiplier"],
    colour: str,
    *labels: Label,
    alpha: float = 1.0,
    ratios: tuple[float, float] = RATIOS,
    width: float = 2.0,
    dashed: bool = False,
) -> Curve:
    x = _grid(ratios, objective)
    y: Tensor = getattr(evaluate(objective, x, advantage, alpha), what)
    return Curve(name, tuple(x.tolist()), tuple(y.tolist()), colour, labels, width, dashed)


def _label(text: str, at: float, dx: float, dy: float, align: Literal["left", "center", "right"] = "left") -> Label:
    return Label(text, at, (dx, dy), align)


def clip() -> Page:
    """Hard bounds: the gradient is r inside and nothing outside, on the side that the advantage pushes to."""
    grpo_end, dapo_end = GRPO.lower().parameters[1], DAPO.lower().parameters[1]
    delta, dual = DELTA.lower().parameters[2], DUAL.lower().parameters[3]
    begin, end = GSPO.lower().parameters[:2]
    # Where curves coincide, a narrow one lies on a wide one.
    s_up = [
        _curve("dapo", DAPO, 1, "surrogate", VERMILLION, _label("dapo", 1.5, 0, 6), width=3.0),
        _curve("grpo", GRPO, 1, "surrogate", BLUE, _label("grpo", 1.5, 0, -12), width=1.2),
    ]
    s_down = [
        _curve("dual", DUAL, -1, "surrogate", PURPLE, _label(f"dual = {dual:g}", 7.9, 0, 5, "right"), width=4.2),
        _curve("delta", DELTA, -1, "surrogate", GREEN, _label(f"delta = {delta:g}", 7.9, 0, 3.5, "right"), width=2.6),
        _curve("grpo", GRPO, -1, "surrogate", BLUE, _label("grpo, dapo", 6.0, -6, -6, "right"), width=1.2),
    ]
    grpo_label = _label(f"grpo: up to {grpo_end:g}", grpo_end, -5, -24, "right")
    dapo_label = _label(f"dapo: up to {dapo_end:g}", dapo_end, 5, -4)
    dual_label = _label(f"dual = {dual:g}", dual, -5, -16, "right")
    delta_label = _label(f"delta = {delta:g}", 0.97 * delta, -5, 3, "right")
    m_up = [
        _curve("dapo", DAPO, 1, "multiplier", VERMILLION, dapo_label, width=3.0),
        _curve("grpo", GRPO, 1, "multiplier", BLUE, grpo_label, width=1.2),
    ]
    m_down = [
        _curve("dual", DUAL, -1, "multiplier", PURPLE, dual_label, width=4.2),
        _curve("delta", DELTA, -1, "multiplier", GREEN, delta_label, width=2.6),
        _curve("grpo", GRPO, -1, "multiplier", BLUE, _label("grpo, dapo: r", 6.5, -6, 4, "right"), width=1.2),
    ]
    low, high = GSPO_RATIOS
    tiny = [
        Panel(
            f"A {sign} 0: gspo's multiplier", (math.log(low), math.log(high)), (-0.1, 1.4),
            _ticks(GSPO_TICKS, log=True), _ticks((0, 1)),
            (_curve("gspo", GSPO, advantage, "multiplier", BLUE, label, ratios=GSPO_RATIOS),),
            "importance ratio of a response",
        )
        for sign, advantage, label in (
            (">", 1, _label(f"up to {end:g}", end, 6, -2)),
            ("<", -1, _label(f"from {begin:g}", begin, -6, -2, "right")),
        )
    ]  # fmt: skip
    surrogates = [
        _ratio_panel("Surrogate s(x, A = +1)", (0.2, 1.6), (0.5, 1, 1.5), s_up, last=False),
        _ratio_panel("Surrogate s(x, A = −1)", (-8.4, 0.4), (-8, -6, -4, -2, 0), s_down, last=False),
    ]
    multipliers = [
        _ratio_panel("A > 0: multiplier (ds/dx)/A", (-0.1, 1.5), (0, 0.5, 1, 1.5), m_up),
        _ratio_panel("A < 0: multiplier (ds/dx)/A", (-0.4, 8.4), (0, 1, 2, 4, 6, 8), m_down),
    ]
    title = "Clip: grpo, dapo, gspo, and the bounds delta and dual"
    return _page("clip", title, [(126, surrogates), (126, multipliers), (70, tiny)])


def log_fidelity() -> Page:
    """MHPO: a bounded log-ratio and a penalty that grows either way."""
    none_up, none_down = (
        _label(f"hazard=None, A = {one}", 2.2, -6, dy, "right") for one, dy in (("+1", 6), ("−1", -14))
    )
    mhpo_up, mhpo_down = (_label(f"mhpo, A = {one}", 7.9, 0, dy, "right") for one, dy in (("+1", 6), ("−1", -14)))
    s = [
        _curve("no hazard, A > 0", NO_HAZARD, 1, "surrogate", GREY, none_up, width=1.2),
        _curve("no hazard, A < 0", NO_HAZARD, -1, "surrogate", GREY, none_down, width=1.2, dashed=True),
        _curve("mhpo, A > 0", MHPO, 1, "surrogate", BLUE, mhpo_up),
        _curve("mhpo, A < 0", MHPO, -1, "surrogate", BLUE, mhpo_down, dashed=True),
    ]
    (r, top), (bare_r, bare_top) = peak(MHPO), peak(NO_HAZARD)
    bare = _label(f"hazard=None: {bare_top:.2f} at r = {bare_r:.2f}", bare_r, 0, 6, "center")
    on_policy = _label(f"{at_ratio(MHPO, 1.0)[1]:.5f} at r = 1", 1.0, 7, -14)
    highest = _label(f"mhpo: {top:.3f} at r = {r:.2f}", r, 0, 6, "center")
    multiplier = [
        _curve("no hazard", NO_HAZARD, 1, "multiplier", GREY, bare, width=1.2),
        _curve("mhpo", MHPO, 1, "multiplier", BLUE, highest, on_policy),
    ]
    x = _grid(RATIOS)
    points = tuple(x.tolist())
    c, k_pos, inverse_pos, k_neg, inverse_neg = parameters = MHPO.lower().parameters
    psi, zeta = log_fidelity_terms(x, *parameters)
    # A hazard of either direction alone: a reciprocal scale of 0 switches the other off, as hazard=None does both.
    _, rising = log_fidelity_terms(x, c, k_pos, inverse_pos, k_neg, 0.0)
    _, falling = log_fidelity_terms(x, c, k_pos, 0.0, k_neg, inverse_neg)
    at_one = _label(f"ζ = {on_policy_hazard():.5f} at r = 1", 1.0, 5, 26)
    bounded = [
        Curve("x", points, points, GREY, (_label("x = log r", 3.6, -6, 4, "right"),), 1.2),
        Curve("psi", points, tuple(psi.tolist()), BLUE, (_label(f"ψ, never beyond ±{c:g}", 7.9, 0, -32, "right"),)),
    ]
    up, down = _label("of upward shifts", 7.9, 0, -42, "right"), _label("of downward shifts", 2.0, 0, 5)
    hazards = [
        Curve("rising", points, tuple(rising.tolist()), VERMILLION, (up,), 1.2),
        Curve("falling", points, tuple(falling.tolist()), GREEN, (down,), 1.2),
        Curve("zeta", points, tuple(zeta.tolist()), BLUE, (at_one,)),
    ]
    objectives = [
        _ratio_panel("Surrogate s(x, A)", (-4.0, 4.0), (-3, -2, -1, 0, 1, 2, 3), s, last=False),
        _ratio_panel("Multiplier (ds/dx)/A, either sign", (-0.1, 1.9), (0, 0.5, 1, 1.5), multiplier, last=False),
    ]
    terms = [
        _ratio_panel("Bounded log-ratio ψ", (-1.2, 2.3), (-1, 0, 1, 2), bounded),
        _ratio_panel("Cumulative hazard ζ", (-0.2, 3.2), (0, 1, 2, 3), hazards),
    ]
    title = "LogFidelity: mhpo, with hazard and without, and its ψ and ζ"
    return _page("log_fidelity", title, [(150, objectives), (126, terms)])


def soft_gate() -> Page:
    """SAPO: a sigmoid of the ratio where the others clip."""
    r, top = peak(SAPO)
    s = [
        _curve("sapo, A > 0", SAPO, 1, "surrogate", BLUE, _label("A = +1", 3.0, 0, -16)),
        _curve("sapo, A < 0", SAPO, -1, "surrogate", VERMILLION, _label("A = −1", 3.0, 0, 8), dashed=True),
    ]
    highest, positive = _label(f"{top:.2f} at r = {r:.2f}", r, 0, 6, "center"), _label("A > 0", 2.9, 8, 0)
    negative = _label("A < 0", 2.9, -12, -8, "right")
    multiplier = [
        _curve("grpo, A > 0", GRPO, 1, "multiplier", GREY, _label("grpo, A > 0", 1.2, 5, -20), width=1.2),
        _curve("sapo, A > 0", SAPO, 1, "multiplier", BLUE, highest, positive),
        _curve("sapo, A < 0", SAPO, -1, "multiplier", VERMILLION, negative, dashed=True),
    ]
    panels = [
        _ratio_panel("Surrogate s(x, A)", (-4.3, 4.3), (-4, -2, 0, 2, 4), s),
        _ratio_panel("Multiplier (ds/dx)/A", (-0.1, 1.9), (0, 0.5, 1, 1.5), multiplier),
    ]
    return _page("soft_gate", "SoftGate: sapo", [(150, panels)])


def truncated_ratio() -> Page:
    """CISPO: the weight is bounded, the gradient never cut."""
    s = [
        _curve("cispo, A > 0", CISPO, 1, "surrogate", BLUE, _label("A = +1", 2.0, 0, 10)),
        _curve("cispo, A < 0", CISPO, -1, "surrogate", VERMILLION, _label("A = −1", 2.0, 0, -18), dashed=True),
    ]
    lowest, highest = BOUNDED_BELOW.lower().parameters
    multiplier = [
        _curve("low", BOUNDED_BELOW, 1, "multiplier", GREY, _label(f"with low={lowest:g}", 0.43, 0, 5), width=1.2),
        _curve("cispo", CISPO, 1, "multiplier", BLUE, _label(f"cispo: min(r, {highest:g})", 3.6, -7, 4, "right")),
    ]
    panels = [
        _ratio_panel(f"Surrogate s, where log p_old = −{-OLD_LOGPROB:g}", (-5.2, 5.2), (-4, -2, 0, 2, 4), s),
        _ratio_panel("Multiplier (ds/dx)/A, either sign", (-0.3, 5.8), (0, 1, 2, 3, 4, 5), multiplier),
    ]
    return _page("truncated_ratio", "TruncatedRatio: cispo", [(150, panels)])


def _alpha_curve(name: str, objective: Objective, colour: str, label: Label, width: float = 2.0) -> Curve:
    """α against N⁺/N⁻, from counts of responses."""
    low, high = map(math.log, BALANCES)
    steps = torch.linspace(low, high, INTERVALS + 1, dtype=torch.float64).exp().tolist()
    counts = sorted({round(COUNTED * step) for step in steps} | {COUNTED // 10, COUNTED})
    alpha = [alpha_of(objective, count, COUNTED) for count in counts]
    x = tuple(math.log(count / COUNTED) for count in counts)
    return Curve(name, x, tuple(alpha), colour, (label,), width)


def weighting() -> Page:
    """HPO and A-HPO: negative advantages weigh less, by a constant or by how rare success is."""
    near = (0.4, 2.5)
    negatives = [
        _curve(name, objective, -1, "multiplier", colour, label, alpha=alpha, ratios=near, width=width, dashed=dashed)
        for name, objective, colour, label, alpha, width, dashed in (
            ("grpo", GRPO, GREY, _label("grpo", 1.9, -8, 3, "right"), 1.0, 1.2, False),
            ("hpo", HPO, VERMILLION, _label("hpo", 1.9, -6, 3, "right"), alpha_range(HPO)[0], 2.0, False),
            ("ahpo, 1:3", AHPO, BLUE, _label("ahpo, 1:3", 2.46, 0, 4, "right"), alpha_of(AHPO, 1, 3), 2.0, False),
            ("ahpo, 0:3", AHPO, BLUE, _label("ahpo, 0:3", 2.46, 0, 3, "right"), alpha_of(AHPO, 0, 3), 2.0, True),
        )
    ]
    least = alpha_range(AHPO)[0]
    alphas = [
        _alpha_curve("grpo", GRPO, GREY, _label("no weighting: 1", 0.2, 0, 5, "center"), width=1.2),
        _alpha_curve("hpo", HPO, VERMILLION, _label(f"hpo: {alpha_range(HPO)[0]:g}", 0.1, 0, 5, "center")),
        _alpha_curve("ahpo", AHPO, BLUE, _label(f"ahpo: N⁺/N⁻,\nbetween {least:g} and 1", 0.45, 4, -34)),
    ]
    low, high = map(math.log, BALANCES)
    panels = [
        _ratio_panel(
            "A < 0: multiplier a·(ds/dx)/A, by N⁺:N⁻", (-0.15, 2.6), (0, 0.5, 1, 1.5, 2, 2.5), negatives, ratios=near
        ),
        Panel(
            "Weight α of negative advantages", (low, high), (0.0, 1.15),
            _ticks((0.05, 0.1, 0.25, 0.5, 1, 2), log=True), _ticks((0, 0.1, 0.25, 0.6, 1)), tuple(alphas),
            "N⁺/N⁻, responses with A > 0 to those with A < 0",
        ),
    ]  # fmt: skip
    return _page("weighting", "Hysteretic and AdaptiveHysteretic: hpo and ahpo", [(170, panels)])


def _on_policy_rows() -> list[Curve]:
    """Each preset's multipliers at r = 1: a bar for negative advantages, a dot for positive ones, the numbers."""
    presets = Objective.presets()
    rows = []
    for y, (name, objective) in zip(range(len(presets) - 1, -1, -1), presets.items(), strict=True):
        low, high = (at_ratio(objective, 1.0, -1.0, alpha)[1] for alpha in alpha_range(objective))
        positive = at_ratio(objective, 1.0)[1]
        negatives = f"{low:.3g} to {high:.3g}" if low != high else f"{low:.3g}"
        text = f"{positive:.3g}" if low == high == positive else f"{positive:.3g}, negatives {negatives}"
        rows.append(Curve(f"{name}, A < 0", (low, high), (y, y), VERMILLION, style="bar"))
        rows.append(Curve(f"{name}, A > 0", (positive,), (y,), BLUE, (Label(text, None, (9, -3.5)),), style="dots"))
    return rows


def overview() -> Page:
    """Every shaping over the ratio, and every preset at r = 1."""
    limited = [
        [
            _curve("cispo", CISPO, sign, "multiplier", PURPLE, cispo, width=3.4),
            _curve("sapo", SAPO, sign, "multiplier", GREEN, _label("sapo", 3.3, 6, 4)),
            _curve("mhpo", MHPO, sign, "multiplier", VERMILLION, _label("mhpo", 2.4, 0, 4, "center")),
            _curve("grpo", GRPO, sign, "multiplier", BLUE, grpo, width=1.2),
        ]
        for sign, cispo, grpo in (
            (1, _label("cispo", 2.3, -6, 4, "right"), _label("grpo", 1.2, 4, 2)),
            (-1, _label("cispo", 6.8, 0, -13, "center"), _label("grpo", 6.8, -6, 4, "right")),
        )
    ]
    shapings = [
        _ratio_panel("A > 0: multiplier (ds/dx)/A", (-0.3, 5.8), (0, 1, 2, 3, 4, 5), limited[0]),
        _ratio_panel("A < 0: multiplier (ds/dx)/A", (-0.4, 8.4), (0, 1, 2, 4, 6, 8), limited[1]),
    ]
    names = tuple(reversed(Objective.presets()))
    dots = Panel(
        "On-policy (r = 1): multiplier of positive (●) and negative (○) advantages",
        (0.0, 1.45), (-0.6, len(names) - 0.4), _ticks((0, 0.25, 0.5, 0.75, 1)), tuple(enumerate(names)),
        tuple(_on_policy_rows()), "times GRPO's gradient", one=1.0,
    )  # fmt: skip
    title = "every shaping over the ratio, every preset at r = 1"
    return _page("overview", title, [(165, shapings), (170, [dots])], left=66)


PAGES: dict[str, Callable[[], Page]] = {
    "overview": overview,
    "clip": clip,
    "log_fidelity": log_fidelity,
    "soft_gate": soft_gate,
    "truncated_ratio": truncated_ratio,
    "weighting": weighting,
}
