"""Diagnostics of a loss call as sums and counts, computed from its terms and results when asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import ADVANTAGE, OLD_LOGPROB, REF_LOGPROB, Batch, TokenTerms
from .layout import Layout
from .objective import Objective
from .response_ratio import response_ratio
from .surrogate import clamped, clip_bounds, gamma_gate, kl_estimate, log_fidelity_terms, token_log_ratio
from .token_terms import hysteretic_weight, totals_of_batch

# What a sum is divided by to become a mean: "ratios" unless it stands here.
_DENOMINATORS = {
    "approx_kl": "rows",
    "kl_ref": "rows",
    "entropy": "rows",
    "active_fraction": "unmasked",
    "positive_fraction": "signed",
    "hysteretic_weight": "calls",
}
COUNTS = ("rows", "ratios", "unmasked", "signed", "calls")


@dataclass(frozen=True, eq=False)
class MetricSums:
    """Sums and counts behind a loss call's metrics; those of micro-batches and ranks add up to those of their union.

    Calls with the same objective and the same kinds of arguments have the same names, so that one collective,
    ``torch.distributed.all_reduce(sums.values)``, adds up ranks.

    Ranks of a ``context_group``, which have parts of the same responses, add up to whole ones, but for two things that
    no rank knows alone: the sign of a response whose advantages differ by token is that of the rank's part, and the
    extremes of ratios of tokens are shares in parts, so that they enclose those of whole responses.

    Attributes:
        values: float32 [k].
        names: of the values: numerators under their metric's name, then rows (tokens that the means are over), ratios
            (those whose ratio is known: a response's only where all of its rows are), unmasked (tokens), signed
            (responses with an advantage of either sign), calls.
        extremes: float32 [m], per-response extremes; across calls and ranks their maximum counts, minima are negated.
        extreme_names: of the extremes.
    """

    values: Tensor
    names: tuple[str, ...]
    extremes: Tensor
    extreme_names: tuple[str, ...]

    def __add__(self, other: MetricSums) -> MetricSums:
        """The sums of both calls together; ValueError unless they have the same names."""
        if not isinstance(other, MetricSums):
            return NotImplemented
        names, others = self.names + self.extreme_names, other.names + other.extreme_names
        if names != others:
            raise ValueError(f"metric sums: expected the names {names}, got {others}")
        extremes = torch.maximum(self.extremes, other.extremes)
        return MetricSums(self.values + other.values, self.names, extremes, self.extreme_names)

    def metrics(self) -> dict[str, Tensor]:
        """Means by name as 0-d float32 tensors, absent where there is nothing to average; waits for the device once."""
        sums = dict(zip(self.names, self.values.unbind(), strict=True))
        shown = torch.cat([self.values[-len(COUNTS) :], self.extremes]).tolist()
        counts = dict(zip(COUNTS, shown, strict=False))
        means = {
            name: total / sums[_DENOMINATORS.get(name, "ratios")]
            for name, total in sums.items()
            if name not in COUNTS and counts[_DENOMINATORS.get(name, "ratios")] > 0
        }
        for name, value, known in zip(self.extreme_names, self.extremes.unbind(), shown[len(COUNTS) :], strict=True):
            if known > -torch.inf:
                means[name] = -value if name.endswith("_min") else value
        return means | {"rows": sums["rows"]}


def metric_sums(
    objective: Objective, batch: Batch, terms: TokenTerms, logprobs: Tensor, entropy: Tensor | None
) -> MetricSums:
    """Sums and counts of a call, see :meth:`hpo_fused.PolicyLossOutput.metrics`; log-probabilities are [B, T]."""
    layout, spec = Layout.of_terms(terms), objective.lower(batch)
    advantages, old_logprobs, ref_logprobs = (terms.values[i] for i in (ADVANTAGE, OLD_LOGPROB, REF_LOGPROB))
    # The rows that a sweep computes, or would: the same whether logits, hidden states or log-probabilities were given.
    known = terms.targets >= 0
    difference = x = torch.zeros_like(logprobs)
    response, whole = response_ratio(terms, spec), known
    if response is not None and terms.response_log_ratios is None:
        missing = layout.response_sum((layout.mask & ~known).to(torch.int64))
        whole = known & layout.of_each_row(missing == 0)
    if batch.old_logprobs is not None:
        difference = torch.where(known, logprobs - old_logprobs, 0.0)
    if spec.off_policy:
        x = token_log_ratio(spec, difference, advantages)[0]
        x = clamped(x if response is None else response.reduced(x), spec.max_log_ratio)[0]
    rows = {"ratio_mean": x.exp()}
    bounds = clip_bounds(spec, x, difference, advantages)
    if bounds is not None:
        rows["clip_fraction"] = bounds.low | bounds.high | bounds.dual
        rows |= {f"clip_{side}_fraction": at_work for side, at_work in bounds._asdict().items()}
    if spec.kind == "log_fidelity":
        psi, zeta = log_fidelity_terms(x, *spec.parameters)
        rows["psi_mean"] = psi
        if spec.parameters[2] != 0:
            rows |= {"hazard_mean": zeta, "survival_mean": (-zeta).exp()}
    if spec.kind == "gamma_gate":
        rows["gate_mean"] = gamma_gate(x, advantages, *spec.parameters)
    if batch.old_logprobs is not None:
        rows["approx_kl"] = kl_estimate("k3", clamped(difference, spec.max_log_ratio)[0])[0]
    if batch.ref_logprobs is not None:
        kind = objective.kl if objective.kl in ("k1", "k2") else "k3"
        rows["kl_ref"] = kl_estimate(kind, clamped(ref_logprobs - logprobs, spec.max_log_ratio)[0])[0]
    if entropy is not None:
        rows["entropy"] = entropy
    sums = {
        name: torch.where(known if _DENOMINATORS.get(name) == "rows" else whole, value, 0.0).sum()
        for name, value in rows.items()
    }

    # Of a response in parts each rank counts its share of the rows, for together they are one response.
    parts = 1.0 if batch.context is None else terms.lengths / batch.context.lengths.clamp(min=1)
    positive, negative = ((parts * (terms.signs * sign > 0)).sum() for sign in (1, -1))
    sums |= {"active_fraction": terms.active.sum(), "positive_fraction": positive}
    calls = torch.ones((), device=logprobs.device)
    if objective.weighting is not None:
        _, _, *counts = totals_of_batch(batch, terms.lengths, terms.signs)
        sums["hysteretic_weight"] = calls * hysteretic_weight(batch, *counts)
    sums |= dict(zip(COUNTS, (known.sum(), whole.sum(), layout.mask.sum(), positive + negative, calls), strict=True))
    extremes: dict[str, Tensor] = {}
    if bounds is not None:
        count = layout.response_sum(whole.to(torch.float32))
        for name, at_work, sign in (("clip_low_min", bounds.low, -1.0), ("clip_high_max", bounds.high, 1.0)):
            share = layout.response_sum((at_work & whole).to(torch.float32)) / count
            shares = torch.where(count > 0, sign * share, -torch.inf)
            extremes[name] = torch.cat([shares, shares.new_full((1,), -torch.inf)]).amax()
    return MetricSums(
        torch.stack([value.to(torch.float32) for value in sums.values()]),
        tuple(sums),
        torch.stack(list(extremes.values())) if extremes else logprobs.new_empty(0),
        tuple(extremes),
    )
