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
from .objective import AdaptiveHysteretic, Hysteretic, Objective, ObjectiveLike, resolve_objective
from .shaping import DRO, Clip, GammaGate, GeometricMean, LogFidelity, SoftGate, TruncatedRatio


class ReferenceLogprobs(NamedTuple):
    """Shaped like tokens, in the logits' dtype, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor


class ReferenceOutput(NamedTuple):
    """Scalar loss attached to the graph; logprobs and entropy shaped like tokens, 0 where masked."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def token_temperatures(
    temperature: float | Tensor, tokens: Tensor, cu_seqlens: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The temperature of every token, shaped like tokens, from any form that :func:`hpo_fused.policy_loss` takes."""
    value = torch.as_tensor(temperature, dtype=dtype, device=tokens.device)
    places = list(_responses(tokens.shape, cu_seqlens))
    if value.dim() == 0:
        return value.expand(tokens.shape)
    if value.shape not in ((len(places),), (len(places), 1)):
        return value.reshape(tokens.shape)
    rows = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    for i, place in enumerate(places):
        rows[place] = value[i]
    return rows


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> ReferenceLogprobs:
    """log p(token) and entropy by log_softmax, unmasked rows only. Shapes as :func:`hpo_fused.token_logprobs`.

    ``cu_seqlens`` tells the responses of packed tokens, where each has a temperature.
    """
    keep = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    z = logits[keep]
    if softcap is not None:
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    z = z / token_temperatures(temperature, tokens, cu_seqlens, logits.dtype)[keep].unsqueeze(-1)
    log_p = torch.log_softmax(z, dim=-1)
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


def bounded_log_ratios(objective: Objective, x: Tensor, advantage: Tensor) -> Tensor:
    """Tokens' log-ratios as they enter the ratio: GMPO bounds them by the advantage's sign."""
    if not isinstance(objective.shaping, GeometricMean):
        return x
    low, high = objective.shaping.low, objective.shaping.high
    one_sided = torch.where(advantage > 0, x.clamp(max=high), x.clamp(min=-low))
    return torch.where(advantage == 0, 0.0, one_sided)  # sgn(A) min(sgn(A) x, sgn(A) clip(x, -low, high))


def surrogate(objective: Objective, x: Tensor, advantage: Tensor, logprobs: Tensor) -> Tensor:
    """s(x, A) of clamped log-ratios, elementwise; autograd gives its derivative, stopped gradients included."""
    shaping, ratio = objective.shaping, x.exp()

    def of_sign(name: str) -> Tensor:
        above, below = (float(getattr(shaping, f"{name}_{sign}")) for sign in ("pos", "neg"))
        return torch.full_like(advantage, below).masked_fill(advantage > 0, above)

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
        tau = of_sign("tau")
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    if isinstance(shaping, GammaGate):
        k, rate = of_sign("k"), of_sign("lambda")
        return (rate + k * x - rate * ratio).exp().detach() * advantage * logprobs
    if isinstance(shaping, GeometricMean):
        return ratio * advantage
    if isinstance(shaping, DRO):
        return advantage * logprobs - shaping.beta / 2 * x**2
    assert isinstance(shaping, TruncatedRatio)
    (low, high), (low_neg, high_neg) = (shaping.bounds(negative=negative) for negative in (False, True))
    weight = torch.where(advantage > 0, ratio.clamp(low, high), ratio.clamp(low_neg, high_neg))
    if shaping.outside == "zero":
        weight = torch.where(weight == ratio, ratio, 0.0)
    return weight.detach() * advantage * logprobs


def kl_term(kind: str, d: Tensor, ratio: Tensor) -> Tensor:
    """The estimate of KL(policy || reference) from d = log p_ref - log p; autograd gives its derivative."""
    if kind == "k1":
        return -d
    if kind == "k2":
        return d**2 / 2
    k3 = d.exp() - d - 1
    if kind == "k3+":
        return k3.detach() + d**2 / 2 - (d**2 / 2).detach()
    return ratio * k3 if kind == "k3_ratio" else k3


def _alpha(objective: Objective, positive: float, negative: float) -> float:
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
    entropy_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None,
    objective: ObjectiveLike = "mhpo_ahpo",
    statistics: BatchStatistics | None = None,
    advantage_level: str | None = None,
    loss_scale: float | Tensor = 1.0,
) -> Tensor:
    """The loss of the README's table; arguments as :func:`hpo_fused.logprob_policy_loss`."""
    objective = resolve_objective(objective)
    dtype, bound = logprobs.dtype, objective.max_log_ratio
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    places = list(_responses(logprobs.shape, cu_seqlens))

    def of_response(value: Tensor, i: int, place: Any, level: str | None = None) -> Tensor:
        """Unmasked entries of response i from a 0-d, per-response or per-token tensor."""
        if value.dim() == 0:
            return value.expand(int(keep[place].sum())).to(dtype)
        if level is None:
            level = "response" if value.shape in ((len(places),), (len(places), 1)) else "token"
        if level == "response":
            return value[i].reshape(1).expand(int(keep[place].sum())).to(dtype)
        return value.reshape(logprobs.shape)[place][keep[place]].to(dtype)

    lengths = [int(keep[place].sum()) for place in places]
    signals = [of_response(advantages, i, place, advantage_level) for i, place in enumerate(places)]
    if statistics is None:
        positive, negative = (float(sum(bool(a.sum() * sign > 0) for a in signals)) for sign in (1, -1))
        count, tokens, average = float(len(places)), float(sum(lengths)), 1.0
        group_ids = None if groups is None else groups.tolist()
        group_lengths = lengths
    else:
        positive, negative = float(statistics.positive), float(statistics.negative)
        count, tokens, average = float(statistics.responses), float(statistics.tokens), statistics.gradient_average
        group_lengths = [] if statistics.group_lengths is None else statistics.group_lengths.tolist()
        group_ids = list(range(len(group_lengths))) if statistics.group_ids is None else statistics.group_ids.tolist()
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
            n = 1 / (tokens or 1)
        elif objective.normalization == "group_mean_length":
            assert groups is not None and group_ids
            mine = sum(length for g, length in zip(group_ids, group_lengths, strict=True) if g == int(groups[i]))
            n = 1 / (len(set(group_ids)) * max(mine, 1))
        elif objective.normalization == "response_sum":
            n = 1 / count
        else:
            assert objective.max_length is not None
            n = 1 / (count * objective.max_length)
        old = logp.detach() if old_logprobs is None else old_logprobs[place][keep[place]].to(dtype)
        own = bounded_log_ratios(objective, logp - old, advantage)
        if objective.ratio_level == "sequence":
            x = own.mean().expand(lengths[i])
        elif objective.ratio_level == "sequence_token":  # sg[s_i] p / sg[p] (arXiv 2507.18071, eq. 14)
            x = own.mean().detach() + own - own.detach()
        elif objective.ratio_level == "sequence_sum":
            x = own.sum().expand(lengths[i])
        else:
            x = own
        x = x.clamp(-bound, bound)
        s = surrogate(objective, x, advantage, logp)
        a = torch.ones_like(advantage).masked_fill(advantage < 0, alpha)
        u = 1.0 if token_weights is None else of_response(token_weights, i, place)
        loss = -n * u * a * s
        if objective.kl_coef != 0:
            assert ref_logprobs is not None
            d = (ref_logprobs[place][keep[place]].to(dtype) - logp).clamp(-bound, bound)
            r = x if objective.ratio_level == "sequence" else own.clamp(-bound, bound)
            loss = loss + n * objective.kl_coef * kl_term(objective.kl, d, r.exp())
        if objective.entropy_coef != 0 or entropy_weights is not None:
            assert entropy is not None
            weight = entropy_weights
            bonus = n * objective.entropy_coef if weight is None else of_response(weight, i, place)
            loss = loss - bonus * entropy[place][keep[place]]
        total = total + average * loss.sum()
    return total * loss_scale


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    **arguments: Any,
) -> ReferenceOutput:
    """Loss, log-probabilities and entropy; arguments as :func:`hpo_fused.policy_loss`."""
    result = token_logprobs(logits, tokens, mask=mask, cu_seqlens=cu_seqlens, temperature=temperature, softcap=softcap)
    loss = logprob_policy_loss(
        result.logprobs, advantages, entropy=result.entropy, mask=mask, cu_seqlens=cu_seqlens, **arguments
    )
    return ReferenceOutput(loss, result.logprobs, result.entropy)
