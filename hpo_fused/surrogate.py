"""The objectives' table in torch, with closed-form derivatives: log-probabilities in, loss and two numbers out.

This file, ``kernels/surrogate.py`` (device functions) and ``reference.py`` (autograd) are the only places where a
formula of an objective stands; the tests hold the three against each other. Elementwise on tensors of one entry
per token, in the tensors' own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    OLD_LOGPROB,
    POLICY_WEIGHT,
    REF_LOGPROB,
    LossSpec,
)


class TokenLoss(NamedTuple):
    """Each token's loss and its derivatives: c = dl/dlogp, h = dl/dH (None without an entropy term)."""

    losses: Tensor
    logprob_coefficients: Tensor
    entropy_coefficients: Tensor | None


def clamped(difference: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """``difference`` clamped to +-bound, and whether it lay inside (where the clamp's derivative is 1).

    NaN counts as inside, so that it reaches the derivative: a NaN loss with gradient 0 would go unnoticed.
    """
    return difference.clamp(-bound, bound), ~(difference.abs() > bound)


def k3(d: Tensor) -> Tensor:
    """e^d - d - 1, Schulman's low-variance estimate of a KL divergence from a log-ratio d; >= 0."""
    return torch.expm1(d) - d


def clip_bound(spec: LossSpec, x: Tensor, advantages: Tensor) -> Tensor:
    """Where a bound of Clip removed the gradient of a nonzero advantage, or one of TruncatedRatio cut the weight."""
    if spec.kind == "truncated_ratio":
        low, high = spec.parameters
        return ((x.exp() < low) | (x.exp() > high)) & (advantages != 0)
    return (_clip(x, advantages, *spec.parameters)[1] == 0) & (advantages != 0)


def _clip(x: Tensor, advantages: Tensor, low: float, high: float, delta: float, dual: float) -> tuple[Tensor, Tensor]:
    ratio = x.exp()
    plain = ratio.clamp(max=delta) * advantages
    clipped = ratio.clamp(low, high) * advantages
    slope = ratio * advantages
    plain_slope = torch.where(ratio > delta, 0.0, slope)
    # Inside [low, high] both branches are r A; outside, the clipped one is constant.
    clipped_slope = torch.where((ratio < low) | (ratio > high), 0.0, slope)
    value = torch.minimum(plain, clipped)
    derivative = torch.where(plain <= clipped, plain_slope, clipped_slope)
    floor = torch.where(advantages < 0, dual * advantages, -torch.inf)
    return torch.maximum(value, floor), torch.where(value < floor, 0.0, derivative)


def log_fidelity_terms(
    x: Tensor, c: float, k_pos: float, inverse_lambda_pos: float, k_neg: float, inverse_lambda_neg: float
) -> tuple[Tensor, Tensor]:
    """MHPO's bounded log-ratio psi and cumulative hazard zeta (arXiv 2603.16929)."""
    psi = c * torch.tanh(x / c)
    zeta = (softplus(psi) * inverse_lambda_pos) ** k_pos + (softplus(-psi) * inverse_lambda_neg) ** k_neg
    return psi, zeta


def _log_fidelity(x: Tensor, advantages: Tensor, c: float, *hazard: float) -> tuple[Tensor, Tensor]:
    psi, zeta = log_fidelity_terms(x, c, *hazard)
    value = (psi - zeta).exp() * advantages
    # dpsi/dx = sech^2(x/c); as 1 - tanh^2 it would lose all its digits where |x| >> c.
    return value, value / torch.cosh(x / c) ** 2


def _soft_gate(x: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> tuple[Tensor, Tensor]:
    tau = torch.full_like(x, tau_neg).masked_fill(advantages > 0, tau_pos)
    ratio = x.exp()
    gate, complement = torch.sigmoid(tau * (ratio - 1)), torch.sigmoid(tau * (1 - ratio))
    return 4 / tau * gate * advantages, 4 * gate * complement * ratio * advantages


def _truncated_ratio(x: Tensor, advantages: Tensor, logprobs: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    weight = x.exp().clamp(low, high) * advantages
    return weight * logprobs, weight


def surrogate(spec: LossSpec, x: Tensor, inside: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """s(x, A), to be maximised, and its derivative with respect to the unclamped log-ratio (or log-probability)."""
    if spec.kind == "truncated_ratio":  # the derivative is through logp itself, which no clamp bounds
        return _truncated_ratio(x, advantages, logprobs, *spec.parameters)
    if spec.kind == "clip":
        value, derivative = _clip(x, advantages, *spec.parameters)
    elif spec.kind == "log_fidelity":
        value, derivative = _log_fidelity(x, advantages, *spec.parameters)
    else:
        value, derivative = _soft_gate(x, advantages, *spec.parameters)
    return value, torch.where(inside, derivative, 0.0)


def token_loss(
    spec: LossSpec,
    values: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    response_mean: Callable[[Tensor], Tensor] | None = None,
) -> TokenLoss:
    """Each token's loss and its derivatives with respect to the token's log-probability and entropy.

    Args:
        spec: the loss.
        values: the tokens' terms, [TERMS, ...] with ``logprobs``' shape behind.
        logprobs: log-probabilities of the sampled tokens, any shape.
        entropy: their distributions' entropies; needed with an entropy bonus.
        response_mean: for sequence-level ratios, the operator that replaces every unmasked token's entry by its
            response's mean over unmasked tokens (0 at masked ones). As a matrix it is m_t m_u / L_i, symmetric,
            so that the same operator carries x forward and the derivative back.
    """
    weights, advantages = values[POLICY_WEIGHT], values[ADVANTAGE]
    live = (weights != 0) & (advantages != 0)
    if spec.off_policy:
        difference = logprobs - values[OLD_LOGPROB]
        x, inside = clamped(difference if response_mean is None else response_mean(difference), spec.max_log_ratio)
    else:
        x, inside = torch.zeros_like(logprobs), torch.ones_like(live)
    value, derivative = surrogate(spec, x, inside, advantages, logprobs)
    losses = torch.where(live, -weights * value, 0.0)
    coefficients = torch.where(live, -weights * derivative, 0.0)
    if response_mean is not None:
        coefficients = response_mean(coefficients)
    if spec.kl:
        weights = values[KL_WEIGHT]
        d, inside = clamped(values[REF_LOGPROB] - logprobs, spec.max_log_ratio)
        losses = losses + torch.where(weights != 0, weights * k3(d), 0.0)
        coefficients = coefficients + torch.where((weights != 0) & inside, -weights * torch.expm1(d), 0.0)
    if not spec.entropy_bonus:
        return TokenLoss(losses, coefficients, None)
    assert entropy is not None
    weights = values[ENTROPY_WEIGHT]
    losses = losses - torch.where(weights != 0, weights * entropy, 0.0)
    return TokenLoss(losses, coefficients, -weights)
