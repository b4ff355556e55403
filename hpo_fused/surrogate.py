"""The objectives' table in torch, with closed-form derivatives: log-probabilities in, loss and two numbers out.

This file, ``kernels/surrogate.py`` (device functions) and ``reference.py`` (autograd) are the only places where a
formula of an objective stands; the tests hold the three against each other. Elementwise on tensors of one entry
per token, in the tensors' own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .interface import ADVANTAGE, ENTROPY_WEIGHT, KL_WEIGHT, OLD_LOGPROB, POLICY_WEIGHT, REF_LOGPROB, LossSpec


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


def kl_estimate(kind: str, d: Tensor) -> tuple[Tensor, Tensor]:
    """A KL estimate of the log-ratio d = log p_ref - log p (see ``Objective.kl``), and its derivative by log p."""
    if kind == "k1":
        return -d, torch.ones_like(d)
    if kind == "k2":
        return d.square() / 2, -d
    rise = torch.expm1(d)
    return rise - d, -d if kind == "k3+" else -rise


class ClipBounds(NamedTuple):
    """Which tokens' gradients of a nonzero advantage a bound removed or, of a weight, cut: three disjoint bool tensors.

    ``low``: below the lower bound; ``high``: above the upper one; ``dual``: Clip's delta or dual, where A < 0.
    """

    low: Tensor
    high: Tensor
    dual: Tensor


def clip_bounds(spec: LossSpec, x: Tensor, difference: Tensor, advantages: Tensor) -> ClipBounds | None:
    """The bounds at work, for kinds that have some; ``difference``: the token's own unclamped log-ratio."""
    nonzero, never = advantages != 0, torch.zeros_like(advantages, dtype=torch.bool)
    if spec.kind == "geometric_mean":
        least, most = spec.parameters
        return ClipBounds((difference < least) & (advantages < 0), (difference > most) & (advantages > 0), never)
    ratio = x.exp()
    if spec.kind == "truncated_ratio":
        low, high = _of_sign(advantages, spec.parameters[:4])
        nonzero = nonzero & (low < high)  # else the weight is a constant
        return ClipBounds((ratio < low) & nonzero, (ratio > high) & nonzero, never)
    if spec.kind != "clip":
        return None
    stopped = (_clip(x, advantages, *spec.parameters)[1] == 0) & nonzero
    below, positive = ratio < spec.parameters[0], advantages > 0
    return ClipBounds(stopped & below, stopped & ~below & positive, stopped & ~below & ~positive)


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


def _of_sign(advantages: Tensor, parameters: Sequence[float]) -> list[Tensor | float]:
    """Each parameter by its token's sign: from the first half for A > 0, else from the second; a number if equal."""
    half, positive = len(parameters) // 2, advantages > 0
    return [
        above if above == below else torch.full_like(advantages, below).masked_fill(positive, above)
        for above, below in zip(parameters[:half], parameters[half:], strict=True)
    ]


def _truncated_ratio(x: Tensor, advantages: Tensor, *parameters: float) -> Tensor:
    *bounds, outside = parameters
    ratio, (low, high) = x.exp(), _of_sign(advantages, bounds)
    return torch.where(ratio < low, low * outside, torch.where(ratio > high, high * outside, ratio))


def gamma_gate(x: Tensor, advantages: Tensor, *parameters: float) -> Tensor:
    """VESPO's weight e^lambda r^k e^(-lambda r), see ``shaping.GammaGate``."""
    k, rate = _of_sign(advantages, parameters)
    return (k * x - rate * torch.expm1(x)).exp()


def token_log_ratio(spec: LossSpec, difference: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a token's own log-ratio contributes to x, and whether it lies within its bound (None: there is none)."""
    if spec.kind != "geometric_mean":
        return difference, None
    low, high = spec.parameters
    positive, negative = advantages > 0, advantages < 0
    over, under = positive & (difference > high), negative & (difference < low)
    bounded = difference.masked_fill(over, high).masked_fill(under, low).masked_fill(~(positive | negative), 0.0)
    return bounded, (positive & ~over) | (negative & ~under)


def surrogate(spec: LossSpec, x: Tensor, advantages: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s(x, A), to be maximised, and its derivatives by the clamped log-ratio x and by log p itself."""
    parameters, zero = spec.parameters, torch.zeros_like(x)
    if spec.kind in ("truncated_ratio", "gamma_gate"):
        weight = _truncated_ratio if spec.kind == "truncated_ratio" else gamma_gate
        slope = weight(x, advantages, *parameters) * advantages
        return slope * logprobs, zero, slope
    if spec.kind == "dro":
        (beta,) = parameters
        return advantages * logprobs - beta / 2 * x.square(), -beta * x, advantages
    if spec.kind == "geometric_mean":
        value = x.exp() * advantages
        return value, value, zero
    if spec.kind == "clip":
        value, derivative = _clip(x, advantages, *parameters)
    elif spec.kind == "log_fidelity":
        value, derivative = _log_fidelity(x, advantages, *parameters)
    else:
        value, derivative = _soft_gate(x, advantages, *parameters)
    return value, derivative, zero


class ResponseRatio(NamedTuple):
    """How a response's tokens share one ratio: the operators from its tokens' entries to an entry of every token.

    Both are symmetric as matrices, m_t m_u / L_i or m_t m_u, so that ``reduced`` carries log-ratios forward and the
    derivative back; ``spread`` does the latter unless the gradient stays with its token (GSPO-token). Rows on other
    ranks take part in ``spread``, which is one all-reduce then; ``reduced`` is given their log-ratios.
    """

    reduced: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor] | None


def token_loss(
    spec: LossSpec,
    values: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    response: ResponseRatio | None = None,
) -> TokenLoss:
    """Each token's loss and its derivatives with respect to the token's log-probability and entropy.

    Args:
        spec: the loss.
        values: the tokens' terms, [TERMS, ...] with ``logprobs``' shape behind.
        logprobs: log-probabilities of the sampled tokens, any shape.
        entropy: their distributions' entropies; needed with an entropy bonus.
        response: where the tokens of a response share one ratio.
    """
    weights, advantages = values[POLICY_WEIGHT], values[ADVANTAGE]
    live = weights != 0 if spec.every_advantage else (weights != 0) & (advantages != 0)
    difference = logprobs - values[OLD_LOGPROB] if spec.off_policy else torch.zeros_like(logprobs)
    x, within = token_log_ratio(spec, difference, advantages)
    x, inside = clamped(x if response is None else response.reduced(x), spec.max_log_ratio)
    value, by_ratio, by_logprob = surrogate(spec, x, advantages, logprobs)
    losses = torch.where(live, -weights * value, 0.0)
    by_ratio = torch.where(live & inside, -weights * by_ratio, 0.0)
    by_logprob = torch.where(live, -weights * by_logprob, 0.0)
    spread = None if response is None else response.spread
    if spec.kl != "none":
        weights = values[KL_WEIGHT]
        d, known = clamped(values[REF_LOGPROB] - logprobs, spec.max_log_ratio)
        estimate, slope = kl_estimate(spec.kl, d)
        slope = torch.where(known, slope, 0.0)
        if spec.kl == "k3_ratio":
            if spec.ratio_level != "sequence":
                x, inside = clamped(difference, spec.max_log_ratio)
            weights = torch.where(weights != 0, weights * x.exp(), 0.0)
            if spec.ratio_level != "sequence":  # k3 - (e^d - 1) cancels to -d
                slope = torch.where(inside, torch.where(known, -d, estimate), slope)
            else:
                by_ratio = by_ratio + torch.where((weights != 0) & inside, weights * estimate, 0.0)
        losses = losses + torch.where(weights != 0, weights * estimate, 0.0)
        by_logprob = by_logprob + torch.where(weights != 0, weights * slope, 0.0)
    if spread is not None:
        by_ratio = spread(by_ratio)
    if within is not None:
        by_ratio = torch.where(within, by_ratio, 0.0)
    coefficients = by_ratio + by_logprob
    if not spec.entropy_bonus:
        return TokenLoss(losses, coefficients, None)
    assert entropy is not None
    weights = values[ENTROPY_WEIGHT]
    losses = losses - torch.where(weights != 0, weights * entropy, 0.0)
    return TokenLoss(losses, coefficients, -weights)
