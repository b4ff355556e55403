"""The policy losses from log-probabilities on, in eager PyTorch: what follows a peer's log-probability kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo_fused.batch import BatchStatistics
from hpo_fused.objective import Objective
from hpo_fused.reference import surrogate


def weighted_advantages(objective: Objective, advantages: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Advantages [B] times the hysteretic weight of their sign.

    Every s(x, A) is proportional to A >= 0 and to A <= 0, so that a s(x, A) = s(x, a A).
    """
    if objective.weighting is None:
        return advantages
    keep = advantages.new_ones(len(advantages), length, dtype=torch.bool) if mask is None else mask
    alpha = BatchStatistics.from_batch(advantages, keep).alpha(objective.weighting)
    return advantages * torch.where(advantages < 0, alpha, 1.0)


def normalised(objective: Objective, losses: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens' losses [B, T] summed as the objective normalises them. Presets' normalisers only."""
    keep = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    sums, lengths = (losses * keep).sum(-1), keep.sum(-1)
    if objective.normalization == "response":
        return (sums / lengths.clamp(min=1)).mean()
    if objective.normalization == "mean_length":
        return sums.sum() / lengths.sum().clamp(min=1)
    assert objective.normalization == "constant" and objective.max_length is not None
    return sums.mean() / objective.max_length


def plain_logprob_loss(
    objective: Objective, logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor | None
) -> Tensor:
    """The loss of log-probabilities [B, T]; shapes as in :func:`hpo_fused.logprob_policy_loss`."""
    x = logprobs - old_logprobs
    if objective.ratio_level == "sequence":
        keep = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        x = ((x * keep).sum(-1) / keep.sum(-1).clamp(min=1)).unsqueeze(-1).expand_as(x)
    x = x.clamp(-objective.max_log_ratio, objective.max_log_ratio)
    signal = weighted_advantages(objective, advantages, mask, logprobs.shape[-1]).unsqueeze(-1)
    return normalised(objective, -surrogate(objective, x, signal, logprobs), mask)
