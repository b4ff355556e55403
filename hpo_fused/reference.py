"""The oracle: the README's mathematics written down once, plainly, differentiated by autograd.

Runs in the dtype of its input up to float64, response by response, with full [N, V] temporaries. It shares no code
with the package but :class:`Objective` and :class:`BatchStatistics`, so that a mistake there cannot hide here.
Inputs are taken as valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import BatchStatistics
from .objective import (
    AdaptiveHysteretic,
    Clip,
    Hysteretic,
    LogFidelity,
    Objective,
    SoftGate,
    TruncatedRatio,
    resolve_objective,
)


class ReferenceLogprobs(NamedTuple):
    """Shaped like tokens, in the logits' dtype, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor


class ReferenceOutput(NamedTuple):
    """Scalar loss attached to the graph; logprobs and entropy shaped like tokens, 0 where masked."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> ReferenceLogprobs:
    """log p(token) and entropy by log_softmax, unmasked rows only. Shapes as :func:`hpo_fused.token_logprobs`."""
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    z = logits[keep]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    logprobs = log_p.gather(-1, tokens[keep].long().unsqueeze(-1)).squeeze(-1)
    # p log p -> 0 as p -> 0; without the where, -inf logits give 0 * inf.
    entropy = -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)).sum(-1)
    zeros = logits.new_zeros(tokens.shape)
    return ReferenceLogprobs(zeros.masked_scatter(keep, logprobs), zeros.masked_scatter(keep, entropy))


def _responses(shape: torch.Size, cu_seqlens: Tensor | None) -> Iterator[Any]:
    """An index of a per-token tensor for each response in turn."""
    if cu_seqlens is None:
        yield from range(shape[0])
    else:
        bounds = cu_seqlens.tolist()
        yield from map(slice, bounds[:-1], bounds[1:])


def surrogate(objective: Objective, x: Tensor, advantage: Tensor, logprobs: Tensor) -> Tensor:
    """s(x, A) of clamped log-ratios, elementwise; autograd gives its derivative, stopped gradients included."""
    shaping, ratio = objective.shaping, x.exp()
    if isinstance(shaping, Clip):
        plain = ratio if shaping.delta is None else ratio.clamp(max=shaping.delta)
        clipped = ratio.clamp(1 - shaping.low, 1 + shaping.high)
        value = torch.minimum(plain * advantage, clipped * advantage)
        if shaping.dual is not None:
            value = torch.where(advantage < 0, torch.maximum(value, shaping.dual * advantage), value)
        return value
    if isinstance(shaping, LogFidelity):
        psi = shaping.c * torch.tanh(x / shaping.c)
        if shaping.hazard is None:
            return psi.exp() * advantage
        hazard = shaping.hazard
        zeta = ((1 + psi.exp()).log() / hazard.lambda_pos) ** hazard.k_pos
        zeta = zeta + ((1 + (-psi).exp()).log() / hazard.lambda_neg) ** hazard.k_neg
        return (psi - zeta.detach()).exp() * advantage
    if isinstance(shaping, SoftGate):
        tau = torch.full_like(advantage, shaping.tau_neg).masked_fill(advantage > 0, shaping.tau_pos)
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    assert isinstance(shaping, TruncatedRatio)
    return ratio.clamp(shaping.low, shaping.high).detach() * advantage * logprobs


def _alpha(objective: Objective, positive: int, negative: int) -> float:
    if objective.weighting is None:
        return 1.0
    if isinstance(objective.weighting, Hysteretic):
        return objective.weighting.alpha
    assert isinstance(objective.weighting, AdaptiveHysteretic)
    return 1.0 if negative == 0 else min(max(positive / negative, objective.weighting.alpha_min), 1.0)


def logprob_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None,
    objective: str | Objective = "mhpo_ahpo",
    statistics: BatchStatistics | None = None,
) -> Tensor:
    """The loss of the README's table; arguments as :func:`hpo_fused.logprob_policy_loss`."""
    objective = resolve_objective(objective)
    dtype, bound = logprobs.dtype, objective.max_log_ratio
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    places = list(_responses(logprobs.shape, cu_seqlens))

    def of_response(value: Tensor, i: int, place: Any) -> Tensor:
        """Unmasked entries of response i from a per-response or per-token tensor."""
        per_response = value.dim() == 1 if cu_seqlens is None else value.shape[0] == len(places)
        if per_response or (value.shape[-1] == 1 and logprobs.shape[-1] != 1):
            return value[i].reshape(1).expand(int(keep[place].sum())).to(dtype)
        return value[place][keep[place]].to(dtype)

    lengths = [int(keep[place].sum()) for place in places]
    signals = [of_response(advantages, i, place) for i, place in enumerate(places)]
    if statistics is None:
        positive = sum(bool(a.sum() > 0) for a in signals)
        negative = sum(bool(a.sum() < 0) for a in signals)
        count, tokens, average = len(places), sum(lengths), 1.0
        group_ids = None if groups is None else groups.tolist()
        group_lengths = lengths
    else:
        positive, negative = int(statistics.positive), int(statistics.negative)
        count, tokens, average = (
            int(statistics.responses),
            int(statistics.tokens),
            statistics.gradient_average,
        )
        group_ids = None if statistics.group_ids is None else statistics.group_ids.tolist()
        group_lengths = [] if statistics.group_lengths is None else statistics.group_lengths.tolist()
    alpha = _alpha(objective, positive, negative)

    total = logprobs.sum() * 0 if bool(keep.all()) else logprobs[keep].sum() * 0
    total = torch.nan_to_num(total)
    for i, place in enumerate(places):
        if lengths[i] == 0:
            continue
        logp, advantage = logprobs[place][keep[place]], signals[i]
        if objective.normalization == "response":
            n = 1 / (count * max(lengths[i], 1))
        elif objective.normalization == "mean_length":
            n = 1 / max(tokens, 1)
        elif objective.normalization == "group_mean_length":
            assert groups is not None and group_ids is not None
            mine = sum(length for g, length in zip(group_ids, group_lengths, strict=True) if g == int(groups[i]))
            n = 1 / (len(set(group_ids)) * max(mine, 1))
        else:
            assert objective.max_length is not None
            n = 1 / (count * objective.max_length)
        old = logp.detach() if old_logprobs is None else old_logprobs[place][keep[place]].to(dtype)
        x = logp - old
        if objective.ratio_level == "sequence":
            x = x.mean().expand(lengths[i])
        s = surrogate(objective, x.clamp(-bound, bound), advantage, logp)
        a = torch.ones_like(advantage).masked_fill(advantage < 0, alpha)
        u = 1.0 if token_weights is None else of_response(token_weights, i, place)
        loss = -n * u * a * s
        if objective.kl_coef != 0:
            assert ref_logprobs is not None
            d = (ref_logprobs[place][keep[place]].to(dtype) - logp).clamp(-bound, bound)
            loss = loss + n * objective.kl_coef * (d.exp() - d - 1)
        if objective.entropy_coef != 0:
            assert entropy is not None
            loss = loss - n * objective.entropy_coef * entropy[place][keep[place]]
        total = total + average * loss.sum()
    return total


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    **arguments: Any,
) -> ReferenceOutput:
    """Loss, log-probabilities and entropy; arguments as :func:`hpo_fused.policy_loss`."""
    result = token_logprobs(logits, tokens, mask=mask, temperature=temperature, softcap=softcap)
    loss = logprob_policy_loss(result.logprobs, advantages, entropy=result.entropy, mask=mask, **arguments)
    return ReferenceOutput(loss, result.logprobs, result.entropy)
