"""Diagnostics of a loss call, computed from its terms and results."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Layout
from .interface import ADVANTAGE, OLD_LOGPROB, REF_LOGPROB, Batch, TokenTerms
from .objective import Clip, LogFidelity, Objective, TruncatedRatio
from .surrogate import clamped, clip_bound, k3, log_fidelity_terms
from .token_terms import hysteretic_weight, totals_of_batch


def policy_metrics(
    objective: Objective, batch: Batch, terms: TokenTerms, logprobs: Tensor, entropy: Tensor | None
) -> dict[str, Tensor]:
    """Diagnostics by name, see :meth:`hpo_fused.PolicyLossOutput.metrics`; log-probabilities are [B, T]."""
    layout = Layout.of_terms(terms)
    advantages, old_logprobs, ref_logprobs = (terms.values[i] for i in (ADVANTAGE, OLD_LOGPROB, REF_LOGPROB))
    # With skip_inactive, rows without a signal were not computed; they hold NaN. A NaN in an active row stays.
    known = layout.mask & (terms.active | ~logprobs.isnan())
    count = known.sum().clamp(min=1)

    def mean(value: Tensor) -> Tensor:
        return torch.where(known, value, 0.0).sum() / count

    def scalar(value: float | Tensor) -> Tensor:
        # full and not as_tensor: a copy from the host's memory would wait for the device.
        if isinstance(value, Tensor):
            return value.to(torch.float32)
        return torch.full((), value, dtype=torch.float32, device=logprobs.device)

    spec = objective.lower(off_policy=batch.old_logprobs is not None)
    if batch.old_logprobs is None:
        x = torch.zeros_like(logprobs)
    else:
        difference = torch.where(known, logprobs - old_logprobs, 0.0)
        x, _ = clamped(layout.response_mean(difference) if spec.sequence_level else difference, spec.max_log_ratio)
    metrics = {"ratio_mean": mean(x.exp())}
    if isinstance(objective.shaping, (Clip, TruncatedRatio)):
        metrics["clip_fraction"] = mean(clip_bound(spec, x, advantages).to(torch.float32))
    if isinstance(objective.shaping, LogFidelity):
        psi, zeta = log_fidelity_terms(x, *spec.parameters)
        metrics["psi_mean"] = mean(psi)
        if objective.shaping.hazard is not None:
            metrics["hazard_mean"], metrics["survival_mean"] = mean(zeta), mean((-zeta).exp())
    if batch.old_logprobs is not None:
        metrics["approx_kl"] = mean(k3(x))
    if batch.ref_logprobs is not None:
        metrics["kl_ref"] = mean(k3(clamped(ref_logprobs - logprobs, spec.max_log_ratio)[0]))
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    _, _, *counts = totals_of_batch(batch, terms.lengths, terms.signs)
    if objective.weighting is not None:
        metrics["hysteretic_weight"] = scalar(hysteretic_weight(batch, *counts))
    positive, negative = (scalar(count) for count in counts)
    metrics["positive_fraction"] = positive / (positive + negative).clamp(min=1)
    metrics["active_fraction"] = terms.active.sum().to(torch.float32) / layout.mask.sum().clamp(min=1)
    return metrics
