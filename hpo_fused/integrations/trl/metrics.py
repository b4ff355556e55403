"""TRL's metrics and ours as sums, gathered over ranks once per logging instead of ten times per micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused.metrics import MetricSums
from hpo_fused.objective import Objective
from hpo_fused.shaping import Clip, TruncatedRatio


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """What TRL logs of one micro-batch, as this rank's part of it.

    Attributes:
        means: numerator and denominator, 0-d, by TRL's key; a mean over ranks is the quotient of their sums.
        extremes: 0-d by key, -inf where there is nothing; the largest over ranks counts, minima are negated.
    """

    means: dict[str, tuple[Tensor, Tensor]]
    extremes: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.means, *self.extremes)

    def add_mean(self, key: str, value: Tensor, mask: Tensor) -> None:
        """A mean over unmasked tokens of a value [B, T], or over responses of one [B, 1]."""
        tokens = mask.sum()
        if value.shape[1] == 1:
            self.means[key] = value.sum(), tokens.new_full((), len(value))
        else:
            self.means[key] = torch.where(mask.bool(), value, 0).sum(), tokens

    def add_call(self, key: str, value: Tensor) -> None:
        """A mean over ranks of a number [], those that have none (NaN) left out."""
        known = ~value.isnan()
        self.means[key] = torch.where(known, value, 0), known

    def vector(self) -> Tensor:
        """Numerators, denominators, extremes, float32 [2 n + m]."""
        numerators, denominators = zip(*self.means.values(), strict=True)
        return torch.stack([value.detach().float() for value in (*numerators, *denominators, *self.extremes.values())])


class Unlogged:
    """Metrics of micro-batches since the last logging, on the device."""

    def __init__(self) -> None:
        self._first: StepMetrics | None = None
        self._vectors: list[Tensor] = []
        self._sums: MetricSums | None = None

    def accepts(self, step: StepMetrics, sums: MetricSums) -> bool:
        """Whether a micro-batch can be added before the others are taken: of the same names, and no more than 256."""
        if self._first is None or self._sums is None:
            return True
        same = self._first.names == step.names and self._sums.names == sums.names
        return same and len(self._vectors) < 256

    def add(self, step: StepMetrics, sums: MetricSums) -> None:
        """One more micro-batch; no synchronisation."""
        self._first = self._first or step
        self._vectors.append(step.vector())
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """Everything added since, by key: TRL's per micro-batch, ours once; one collective, one wait."""
        if self._first is None or self._sums is None:
            return {}
        step, sums, count = self._first, self._sums, len(self._vectors)
        local = torch.cat([*self._vectors, sums.values, sums.extremes])
        ranks = gather(local).view(-1, len(local)).cpu().double()
        theirs, values, extremes = ranks.split([count * len(self._vectors[0]), len(sums.values), len(sums.extremes)], 1)
        theirs = theirs.view(len(ranks), count, -1)
        n = len(step.means)
        means = theirs[..., :n].sum(0) / theirs[..., n : 2 * n].sum(0).clamp(min=1)
        largest = theirs[..., 2 * n :].amax(0)
        taken = {key: means[:, i].tolist() for i, key in enumerate(step.means)}
        for i, key in enumerate(step.extremes):
            sign = -1.0 if key.endswith("_min") else 1.0
            taken[key] = [sign * value if value > -math.inf else math.nan for value in largest[:, i].tolist()]
        ours = MetricSums(values.sum(0), sums.names, extremes.amax(0), sums.extreme_names).metrics()
        taken |= {f"hpo/{name}": [float(value)] for name, value in ours.items() if name != "rows"}
        return taken


def step_metrics(
    objective: Objective,
    penalty_level: str,
    logprobs: Tensor,
    entropies: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
) -> StepMetrics:
    """TRL's metrics of a loss over all unmasked tokens, or responses where each has one ratio.

    Args:
        objective: whose ratios and bounds count.
        penalty_level: ``ratio_level`` of the objective that holds the KL term.
        logprobs, mask, old_logprobs, ref_logprobs: [B, T]; log-probabilities of tokens without a learning signal may be
            NaN, which count as not clipped.
        entropies: [B, T]; None: not known of every token.
        advantages: [B] or [B, T].
    """
    keep, lengths = mask.bool(), mask.sum(-1, keepdim=True)
    advantages = advantages.reshape(len(mask), -1)
    difference = torch.zeros_like(logprobs) if old_logprobs is None else logprobs - old_logprobs

    def ratio_at(level: str) -> Tensor:
        if level == "token":
            return difference.exp()
        total = torch.where(keep, difference, 0).sum(-1, keepdim=True)
        return (total if level == "sequence_sum" else total / lengths.clamp(min=1)).exp()

    step, shaping, ratio = StepMetrics({}, {}), objective.shaping, ratio_at(objective.ratio_level)
    if ref_logprobs is not None:
        distance = ref_logprobs - logprobs
        estimate = distance.exp() - distance - 1
        if objective.kl == "k3_ratio":
            estimate = estimate * ratio_at("sequence" if penalty_level == "sequence" else "token")
        step.add_mean("kl", estimate, mask)
    if entropies is not None:
        step.add_mean("entropy", entropies, mask)
    if isinstance(shaping, TruncatedRatio):
        step.add_mean("cispo_clip_ratio", ((ratio > shaping.high) & (advantages > 0)).float(), mask)
    if isinstance(shaping, Clip):
        ratio = ratio if shaping.delta is None else ratio.clamp(max=shaping.delta)
        low = ((ratio < 1 - shaping.low) & (advantages < 0)).float()
        high = ((ratio > 1 + shaping.high) & (advantages > 0)).float()
        both = {"low_mean": low, "high_mean": high, "region_mean": low + high}  # no token is in both
        for name, value in both.items():
            step.add_mean(f"clip_ratio/{name}", value, mask)
        for name, value, sign in (("low_min", low, -1.0), ("high_max", high, 1.0)):
            each = value if value.shape[1] == 1 else torch.where(keep, value, 0).sum(-1, keepdim=True) / lengths
            step.extremes[f"clip_ratio/{name}"] = torch.where(each.isnan(), -torch.inf, sign * each).amax()
    return step
