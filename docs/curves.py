"""Draws the pictures of docs/objectives.md into docs/curves: ``python docs/curves.py`` (needs matplotlib).

Every curve is what ``hpo_fused.logprob_policy_loss`` computes for responses of one token: s is the loss, and the
multiplier a·(ds/dlog p)/A its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus

import hpo_fused as hf

FOLDER = Path(__file__).parent / "curves"
OLD_LOGPROB = -2.5  # of every token; the s of TruncatedRatio, GammaGate and DRO depend on it
RATIOS = torch.linspace(math.log(0.4), math.log(8.0), 97).exp()
FINE = torch.linspace(math.log(0.4), math.log(8.0), 769).exp()  # where the curve jumps
TICKS = (0.5, 0.8, 1.0, 1.25, 2.0, 3.0, 5.0, 8.0)
Curve = tuple[str, hf.Objective, float]  # label, objective, advantage


def preset(name: str, **overrides: Any) -> hf.Objective:
    """A preset whose normaliser is 1 for a single token, so that the loss is the token's."""
    return hf.Objective.preset(name, normalization="response", **overrides)


def balance(positive: int, negative: int) -> hf.BatchStatistics:
    """Statistics of a batch with so many positive and negative responses of one token."""
    signs = torch.tensor([1.0] * positive + [-1.0] * negative)
    return hf.BatchStatistics.from_batch(signs, torch.ones(len(signs), 1))


def evaluate(
    objective: hf.Objective, ratio: float, advantage: float, counts: tuple[int, int] = (1, 0)
) -> tuple[float, float]:
    """a·s(x, A) and the multiplier a·(ds/dlog p)/A at one ratio, in a batch with these counts of responses."""
    logprobs = torch.full((1, 1), OLD_LOGPROB + math.log(ratio), requires_grad=True)
    old = torch.full((1, 1), OLD_LOGPROB)
    loss = hf.logprob_policy_loss(
        logprobs, torch.tensor([advantage]), old_logprobs=old, objective=objective, statistics=balance(*counts),
        backend="torch",
    ).loss * sum(counts)  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return -loss.item(), -gradient.item() / advantage


def divergence(kind: Any, d: float, ratio: float) -> tuple[float, float]:
    """Value and slope by log p of a KL estimate at d = log p_ref - log p, where the token's ratio is ``ratio``."""
    objective = hf.Objective("token", hf.Clip(), None, "response", kl_coef=1.0, kl=kind)
    logprobs = torch.full((1, 1), OLD_LOGPROB, requires_grad=True)
    loss = hf.logprob_policy_loss(
        logprobs, torch.zeros(1), old_logprobs=logprobs.detach() - math.log(ratio),
        ref_logprobs=logprobs.detach() + d, objective=objective, backend="torch",
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item()


def ratio_axis(axes: Any, title: str, ticks: Sequence[float] = TICKS) -> None:
    """A logarithmic axis of importance ratios, and a legend."""
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1.0, color="black", linewidth=0.5)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("importance ratio r = exp(x)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def over_ratio(
    axes: Any, title: str, curves: Iterable[Curve], *, multiplier: bool, counts: tuple[int, int] = (1, 0),
    ratios: Tensor = RATIOS, ticks: Sequence[float] = TICKS,
) -> None:  # fmt: skip
    """Curves against the importance ratio, dashed for A < 0; where they coincide, later ones are thinner."""
    for index, (label, objective, advantage) in enumerate(curves):
        values = [evaluate(objective, ratio, advantage, counts)[multiplier] for ratio in ratios.tolist()]
        style, width = "-" if advantage > 0 else "--", max(3.2 - 0.8 * index, 1.0)
        axes.plot(ratios, values, style, label=label, linewidth=width)
    ratio_axis(axes, title, ticks)


def page(rows: int, height: float = 2.6) -> tuple[Any, list[Any]]:
    """A figure with two columns of axes."""
    figure = Figure(figsize=(8.0, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, 2).flat)


def both(label: str, objective: hf.Objective) -> list[Curve]:
    return [(f"{label}, A > 0", objective, 1.0), (f"{label}, A < 0", objective, -1.0)]


def main() -> None:
    """Write every picture."""
    presets = {name: preset(name) for name in hf.Objective.presets()}
    grpo, dapo, gspo = presets["grpo"], presets["dapo"], presets["gspo"]
    delta, dual = (preset("dapo", shaping=hf.Clip(0.2, 0.28, **bound)) for bound in ({"delta": 4.0}, {"dual": 3.0}))
    bare = preset("mhpo", shaping=hf.LogFidelity(1.5, None))
    pictures = {}
    pictures["clip"], axes = page(3)
    up: list[Curve] = [("dapo", dapo, 1.0), ("grpo", grpo, 1.0)]
    down: list[Curve] = [("dual = 3", dual, -1.0), ("delta = 4", delta, -1.0), ("grpo, dapo", grpo, -1.0)]
    over_ratio(axes[0], "Surrogate s(x, A = +1)", up, multiplier=False)
    over_ratio(axes[1], "Surrogate s(x, A = −1)", down, multiplier=False)
    over_ratio(axes[2], "A > 0: multiplier (ds/dx)/A", up, multiplier=True)
    over_ratio(axes[3], "A < 0: multiplier (ds/dx)/A", down, multiplier=True)
    near, ticks = torch.linspace(0.9990, 1.0012, 97), (0.9993, 0.9997, 1.0, 1.0004, 1.0008)
    for place, sign in zip(axes[4:], (1.0, -1.0), strict=True):
        title = f"A {'>' if sign > 0 else '<'} 0: multiplier of gspo"
        over_ratio(place, title, [("gspo", gspo, sign)], multiplier=True, ratios=near, ticks=ticks)
    pictures["log_fidelity"], axes = page(2)
    curves = [*both("hazard=None", bare), *both("mhpo", presets["mhpo"])]
    over_ratio(axes[0], "Surrogate s(x, A)", curves, multiplier=False)
    over_ratio(axes[1], "Multiplier (ds/dx)/A, either sign", curves[::2], multiplier=True)
    x = RATIOS.log()
    psi = 1.5 * torch.tanh(x / 1.5)
    rising, falling = softplus(psi) ** 1.5, (softplus(-psi) / 0.8) ** 2
    for label, values in (("x = log r", x), ("ψ", psi)):
        axes[2].plot(RATIOS, values, label=label)
    for label, values in (("of upward shifts", rising), ("of downward shifts", falling), ("ζ", rising + falling)):
        axes[3].plot(RATIOS, values, label=label)
    ratio_axis(axes[2], "Bounded log-ratio ψ")
    ratio_axis(axes[3], "Cumulative hazard ζ")
    pictures["soft_gate"], axes = page(1)
    over_ratio(axes[0], "Surrogate s(x, A)", both("sapo", presets["sapo"]), multiplier=False)
    curves = [*both("sapo", presets["sapo"]), ("grpo, A > 0", grpo, 1.0)]
    over_ratio(axes[1], "Multiplier (ds/dx)/A", curves, multiplier=True)
    pictures["truncated_ratio"], axes = page(2)
    over_ratio(axes[0], "Surrogate s, where log p_old = −2.5", both("cispo", presets["cispo"]), multiplier=False)
    below = preset("cispo", shaping=hf.TruncatedRatio(high=5.0, low=0.8))
    curves = [("cispo", presets["cispo"], 1.0), ("with low = 0.8", below, 1.0)]
    over_ratio(axes[1], "Multiplier, either sign", curves, multiplier=True)
    dropped = preset("cispo", shaping=hf.TruncatedRatio(high=2.0, low=0.5, outside="zero"))
    curves = [('low = 0.5, high = 2, outside = "zero"', dropped, 1.0)]
    over_ratio(axes[2], "Multiplier, either sign", curves, multiplier=True, ratios=FINE)
    over_ratio(axes[3], "Multiplier, bounds by sign", both("topr", presets["topr"]), multiplier=True)
    pictures["gamma_gate"], axes = page(1)
    over_ratio(axes[0], "Surrogate s, where log p_old = −2.5", both("vespo", presets["vespo"]), multiplier=False)
    over_ratio(axes[1], "Multiplier: the gate", both("vespo", presets["vespo"]), multiplier=True)
    pictures["geometric_mean"], axes = page(1)
    over_ratio(axes[0], "Surrogate s(x, A)", both("gmpo", presets["gmpo"]), multiplier=False)
    over_ratio(axes[1], "Multiplier (ds/dx)/A", both("gmpo", presets["gmpo"]), multiplier=True)
    pictures["dro"], axes = page(1)
    penalised = hf.Objective("token", hf.DRO(0.5), None, "response")
    curves = [*both("β = 0.5", penalised), ("β = 0.5, A = 0.2", penalised, 0.2)]
    over_ratio(axes[0], "Surrogate s, where log p_old = −2.5", curves, multiplier=False)
    over_ratio(axes[1], "Multiplier", curves, multiplier=True)
    pictures["kl"], axes = page(1)
    kinds = [("k1", "k1", 1.0), ("k2", "k2", 1.0), ("k3", "k3", 1.0), ("k3+", "k3+", 1.0)]
    kinds += [("k3_ratio, r = 1", "k3_ratio", 1.0), ("k3_ratio, r = 2", "k3_ratio", 2.0)]
    differences = torch.linspace(-2.0, 2.0, 81).tolist()
    for index, (label, kind, ratio) in enumerate(kinds):
        for place, values in zip(
            axes, zip(*(divergence(kind, d, ratio) for d in differences), strict=True), strict=True
        ):
            place.plot(differences, values, label=label, linewidth=3.2 - 0.4 * index)
    for place, title in zip(axes, ("Estimate", "Slope by log p"), strict=True):
        place.axvline(0.0, color="black", linewidth=0.5)
        place.set_title(f"{title} at d = log p_ref − log p", fontsize=9)
        place.set_xlabel("d", fontsize=8)
        place.tick_params(labelsize=7)
        place.legend(fontsize=7)
    pictures["weighting"], axes = page(1)
    weighted: list[Curve] = [("grpo", grpo, -1.0), ("hpo", presets["hpo"], -1.0), ("ahpo", presets["ahpo"], -1.0)]
    over_ratio(axes[0], "A < 0: multiplier a·(ds/dx)/A, N⁺:N⁻ = 1:3", weighted, multiplier=True, counts=(1, 3))
    positives = [3, 5, 8, 10, 15, 25, 40, 60, 80, 100, 150, 300]
    for name in ("grpo", "hpo", "ahpo"):
        weights = [evaluate(presets[name], 1.0, -1.0, (count, 100))[1] for count in positives]
        axes[1].plot([count / 100 for count in positives], weights, label=name)
    axes[1].set(xscale="log", xlabel="N⁺/N⁻, responses with A > 0 to those with A < 0")
    axes[1].set_title("Weight α of negative advantages", fontsize=9)
    axes[1].legend(fontsize=7)
    pictures["overview"], axes = page(2, height=3.4)
    for place, sign in zip(axes, (1.0, -1.0), strict=False):
        chosen = [(name, presets[name], sign) for name in ("cispo", "sapo", "mhpo", "vespo", "grpo")]
        over_ratio(place, f"A {'>' if sign > 0 else '<'} 0: multiplier", chosen, multiplier=True)
    for place, sign in zip(axes[2:], (1.0, -1.0), strict=True):
        for y, objective in enumerate(presets.values()):
            few, many = (evaluate(objective, 1.0, sign, counts)[1] for counts in ((1, 100), (100, 1)))
            place.plot([few, many], [y, y], "o-", markersize=4)
            told = f"{few:.3g}" if few == many else f"{few:.3g} to {many:.3g}"
            place.text(max(few, many) + 0.03, y, told, va="center", fontsize=7)
        place.set(xlim=(0.0, 1.45), xlabel="times GRPO's gradient")
        place.set_yticks(range(len(presets)), list(presets), fontsize=7)
        place.invert_yaxis()
        place.set_title(f"On-policy (r = 1), A {'>' if sign > 0 else '<'} 0", fontsize=9)

    matplotlib.rcParams["svg.hashsalt"] = "hpo_fused"  # the same bytes each time
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a picture is small
    for name, figure in pictures.items():
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
