"""Diagnostics of a loss call, computed from what the call kept."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import PreparedBatch
from .objective import Clip, LogFidelity, Objective, TruncatedRatio
from .surrogate import clamped, clip_bound, k3, log_fidelity_terms


def policy_metrics(
    objective: Objective, batch: PreparedBatch, logprobs: Tensor, entropy: Tensor | None
) -> dict[str, Tensor]:
    """See :meth:`hpo_fused.policy_loss.PolicyLossOutput.metrics`; every tensor has the rows' shape."""
    layout, terms = batch.layout, batch.terms
    # With skip_inactive, rows without a signal were not computed; they hold NaN. A NaN in an active row stays.
    known = layout.mask & (batch.active | ~logprobs.isnan())
    count = known.sum().clamp(min=1)

    def mean(value: Tensor) -> Tensor:
        return torch.where(known, value, 0.0).sum() / count

    def scalar(value: float | Tensor) -> Tensor:
        # full and not as_tensor: a copy from the host's memory would wait for the device.
        if isinstance(value, Tensor):
            return value.to(torch.float32)
        return torch.full((), value, dtype=torch.float32, device=logprobs.device)

    spec = objective.lower()
    sequence = objective.ratio_level == "sequence"
    if terms.old_logprobs is None:
        x = torch.zeros_like(logprobs)
    else:
        difference = torch.where(known, logprobs - terms.old_logprobs, 0.0)
        x, _ = clamped(layout.response_mean(difference) if sequence else difference, spec.max_log_ratio)
    metrics = {"ratio_mean": mean(x.exp())}
    if isinstance(objective.shaping, (Clip, TruncatedRatio)):
        metrics["clip_fraction"] = mean(clip_bound(spec, x, terms.advantages).to(torch.float32))
    if isinstance(objective.shaping, LogFidelity):
        psi, zeta = log_fidelity_terms(x, *spec.parameters)
        metrics["psi_mean"] = mean(psi)
        if objective.shaping.hazard is not None:
            metrics["hazard_mean"], metrics["survival_mean"] = mean(zeta), mean((-zeta).exp())
    if terms.old_logprobs is not None:
        metrics["approx_kl"] = mean(k3(x))
    if terms.ref_logprobs is not None:
        metrics["kl_ref"] = mean(k3(clamped(terms.ref_logprobs - logprobs, spec.max_log_ratio)[0]))
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    if objective.weighting is not None:
        metrics["hysteretic_weight"] = scalar(batch.alpha)
    positive, negative = (scalar(count) for count in batch.signs)
    metrics["positive_fraction"] = positive / (positive + negative).clamp(min=1)
    metrics["active_fraction"] = batch.active.sum().to(torch.float32) / layout.mask.sum().clamp(min=1)
    return metrics
