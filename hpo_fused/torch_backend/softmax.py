"""Arithmetic per row around the sweeps: softmax statistics and gradient factors, in float64, rounded once.

Per-token tensors are ``sweeps.padded_rows`` long; entries past the rows are of no meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpo_fused.interface import SoftmaxStatistics

from .selected_rows import SelectedRows
from .sweeps import Sweeps


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of per-token arithmetic: MPS has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _scale(softcap: float | None, temperature: Tensor) -> Tensor:
    # A number divided by a tensor would be multiplied by its reciprocal: one rounding more.
    return torch.full_like(temperature, softcap or 1.0) / temperature


def through_softcap(gradient: Tensor, logits: Tensor | None, softcap: float | None) -> Tensor:
    """A gradient by softcapped logits as one by the ``logits`` themselves, which are not looked at without softcap."""
    if softcap is None:
        return gradient
    assert logits is not None
    # 1 - tanh^2 as sech^2, which keeps its digits where the cap saturates.
    return gradient / torch.cosh(logits / softcap) ** 2


class _TargetSoftmax:
    """The sampled token's part in its row's softmax.

    ``difference`` is d_y = z'_y - maximum, ``exponential`` e_y = exp(d_y), ``sum`` the denominator S = others + e_y.
    """

    def __init__(
        self, logits: Tensor, maximum: Tensor, others: Tensor, softcap: float | None, temperature: Tensor
    ) -> None:
        if softcap is not None:
            logits = torch.where(logits == -torch.inf, logits, softcap * torch.tanh(logits / softcap))
        self.difference = logits / temperature - maximum
        self.exponential = self.difference.exp()
        self.sum = others + self.exponential
        peaked = others < self.exponential
        odds = torch.log1p(others / self.exponential)
        self.log_sum = torch.where(peaked, self.difference + odds, self.sum.log())
        self.logprob = torch.where(peaked, -odds, self.difference - self.sum.log())


def softmax_statistics(sweeps: Sweeps, rows: SelectedRows, targets: Tensor) -> SoftmaxStatistics:
    """First sweep over ``rows``: softmax statistics, float32 [padded_rows]; ``targets``: int64 [padded_rows]."""
    wide, softcap = wide_dtype(targets), sweeps.transform.softcap
    temperature = sweeps.temperature(rows, wide)
    scale = _scale(softcap, temperature)
    shift, others, moment = (entry.to(wide) for entry in sweeps.sums(rows, targets, scale.to(torch.float32)))
    target_logits = sweeps.padded(rows.take(targets[: len(rows)]).to(wide))
    maximum = (shift * scale).to(torch.float32)
    # The float32 maximum is not exactly scale * shift where scale is not 1: the sums move by the difference.
    gap = shift * scale - maximum.to(wide)
    others, moment = gap.exp() * others, gap.exp() * (moment + gap * others)
    softmax = _TargetSoftmax(target_logits, maximum.to(wide), others, softcap, temperature)
    moment = moment + torch.where(softmax.exponential > 0, softmax.exponential * softmax.difference, 0.0)
    entropy = softmax.log_sum - moment / softmax.sum
    return SoftmaxStatistics(
        softmax.logprob.to(torch.float32), maximum, others.to(torch.float32), entropy.to(torch.float32)
    )


def write_gradient(
    sweeps: Sweeps, rows: SelectedRows, out: Tensor, targets: Tensor, statistics: SoftmaxStatistics, c: Tensor,
    h: Tensor | None,
) -> None:  # fmt: skip
    """Second sweep over ``rows``, written to ``out`` [B, T, V]; ``targets`` and all after it are [padded_rows].

    dL/dz'_j = e'_j / S * (h * (E - d'_j) - c) with e', d' relative to the maximum and E = E_p[d'] = log S - H; in
    terms of the sweep's e, d, which are relative to a float32 shift in u, d' = d + gap. The sampled token's entry,
    c * others / S + h * e_y / S * (E - d_y), is written over the sweep's: added to -c * e_y / S, c would cancel.
    """
    wide, softcap, columns = wide_dtype(c), sweeps.transform.softcap, targets[: len(rows)]
    temperature = sweeps.temperature(rows, wide)
    scale = _scale(softcap, temperature)
    target_logits = sweeps.padded(rows.take(columns).to(wide))
    maximum, others, c = (entry.to(wide) for entry in (statistics.maximum, statistics.others, c))
    softmax = _TargetSoftmax(target_logits, maximum, others, softcap, temperature)
    shift = (maximum / scale).to(torch.float32)
    gap = shift.to(wide) * scale - maximum
    density = gap.exp() / (softmax.sum * temperature)
    target = c * (others / softmax.sum)
    if h is None:
        factor, slope = -density * c, torch.zeros_like(c)
    else:
        assert statistics.entropy is not None
        h = h.to(wide)
        mean = softmax.log_sum - statistics.entropy.to(wide)
        factor, slope = density * (h * (mean - gap) - c), density * h
        pull = h * softmax.exponential / softmax.sum * (mean - softmax.difference)
        target = target + torch.where(softmax.exponential > 0, pull, 0.0)
    target = through_softcap(target, target_logits, softcap) / temperature
    out_rows = SelectedRows(out, rows.positions)
    sweeps.gradient(rows, out_rows, shift, *(entry.to(torch.float32) for entry in (factor, slope, scale)))
    out_rows.put(columns, target[: len(rows)])
