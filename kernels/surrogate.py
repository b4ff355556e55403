"""The objectives' table as device functions: one token's (x, A) to (s, ds/dx), then to its loss and two numbers.

The torch twin is ``hpo_fused/surrogate.py``: ties, NaN and clamps are treated alike in both. Everything here is a
scalar of one row, computed once per V logits, so each function aims at accuracy first; every thread of the
program computes it redundantly between the two sweeps, so long library routines are avoided where a short form
is as accurate. ``parameters`` travel at run time: a new epsilon, temperature or alpha never recompiles.
"""

import triton
import triton.language as tl

from .numerics import LOG2E, exp_minus_one_minus, log1p_unit


@triton.jit
def _bounded(value, low, high):
    """Clamp that lets NaN through; ``tl.clamp`` would replace it by a bound and hide it."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def clip(x, advantage, parameters):
    """PPO's clipped surrogate with its two extra bounds, see ``objective.Clip``."""
    low, high, delta, dual = parameters[0], parameters[1], parameters[2], parameters[3]
    ratio = tl.exp(x)
    plain = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = _bounded(ratio, low, high) * advantage
    slope = ratio * advantage
    plain_slope = tl.where(ratio > delta, 0.0, slope)
    # Inside [low, high] both branches are r A; outside, the clipped one is constant.
    clipped_slope = tl.where((ratio < low) | (ratio > high), 0.0, slope)
    # Written as "not greater" so that NaN, for which no comparison holds, takes the plain branch: it is NaN in both.
    value = tl.where(plain > clipped, clipped, plain)
    derivative = tl.where(plain <= clipped, plain_slope, clipped_slope)
    floor = tl.where(advantage < 0, dual * advantage, float("-inf"))
    return tl.where(value < floor, floor, value), tl.where(value < floor, 0.0, derivative)


@triton.jit
def log_fidelity(x, advantage, parameters):
    """MHPO's log-fidelity modulation with hazard penalty, see ``objective.LogFidelity``."""
    c, k_pos, inverse_lambda_pos = parameters[0], parameters[1], parameters[2]
    k_neg, inverse_lambda_neg = parameters[3], parameters[4]
    # tanh and sech^2 from e = exp(-2|x|/c) in (0, 1]: as 1 - tanh^2, sech^2 would lose every digit where |x| >> c.
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E / c))
    reciprocal = 1.0 / (1.0 + decay)
    magnitude = c * (1.0 - decay) * reciprocal
    psi = tl.where(x < 0, -magnitude, magnitude)
    shared = log1p_unit(tl.exp(-magnitude))  # softplus(+-psi) = max(+-psi, 0) + log1p(exp(-|psi|))
    rise = (tl.where(psi > 0, psi, 0.0) + shared) * inverse_lambda_pos
    fall = (tl.where(psi < 0, -psi, 0.0) + shared) * inverse_lambda_neg
    # Without a hazard both reciprocals are 0: log2(0) = -inf and exp2(-inf) = 0, since k > 0.
    zeta = tl.exp2(k_pos * tl.log2(rise)) + tl.exp2(k_neg * tl.log2(fall))
    value = tl.exp(psi - zeta) * advantage
    return value, value * (4.0 * decay * reciprocal * reciprocal)


@triton.jit
def soft_gate(x, advantage, parameters):
    """SAPO's soft gate, see ``objective.SoftGate``."""
    tau = tl.where(advantage > 0, parameters[0], parameters[1])
    ratio = tl.exp(x)
    offset = tau * (ratio - 1.0)
    small = tl.exp(-tl.abs(offset))
    reciprocal = 1.0 / (1.0 + small)
    gate = tl.where(offset < 0, small * reciprocal, reciprocal)
    complement = tl.where(offset < 0, reciprocal, small * reciprocal)
    return 4.0 / tau * gate * advantage, 4.0 * gate * complement * ratio * advantage


@triton.jit
def truncated_ratio(x, advantage, parameters, logprob):
    """CISPO's truncated importance weight, see ``objective.TruncatedRatio``."""
    weight = _bounded(tl.exp(x), parameters[0], parameters[1]) * advantage
    return weight * logprob, weight


@triton.jit
def surrogate(x, inside, advantage, logprob, parameters, KIND: tl.constexpr):
    """s(x, A) and its derivative with respect to the unclamped log-ratio (or log-probability)."""
    tl.static_assert(
        KIND == "clip" or KIND == "log_fidelity" or KIND == "soft_gate" or KIND == "truncated_ratio",
        "KIND: one of clip, log_fidelity, soft_gate, truncated_ratio",
    )
    if KIND == "truncated_ratio":  # the derivative is through logp itself, which no clamp bounds
        value, derivative = truncated_ratio(x, advantage, parameters, logprob)
    else:
        if KIND == "clip":
            value, derivative = clip(x, advantage, parameters)
        elif KIND == "log_fidelity":
            value, derivative = log_fidelity(x, advantage, parameters)
        else:
            value, derivative = soft_gate(x, advantage, parameters)
        derivative = tl.where(inside, derivative, 0.0)
    return value, derivative


@triton.jit
def token_loss(
    logprob,
    entropy,
    advantage,
    policy_weight,
    kl_weight,
    entropy_weight,
    log_ratio,
    ref_logprob,
    parameters,
    max_log_ratio,
    KIND: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
):
    """(loss, c, h) of tokens: their losses and gradient coefficients c = dloss/dlogp, h = dloss/dH.

    A weight of exactly 0 switches its part off whatever the other values hold, hence ``where`` and not products.

    Args:
        logprob, entropy: of the token; the entropy is read with ENTROPY_BONUS only.
        advantage, policy_weight, kl_weight, entropy_weight, ref_logprob: terms of the token, see ``TokenTerms``; what
            no constexpr asks for is not read.
        log_ratio: logp - old_logp before the clamp, or a response's mean of it; read with OFF_POLICY only.
        parameters, max_log_ratio, KIND, OFF_POLICY, KL, ENTROPY_BONUS: fields of ``LossSpec``.
    """
    if OFF_POLICY:
        x = _bounded(log_ratio, -max_log_ratio, max_log_ratio)
        # NaN counts as inside, so that it reaches the derivative: a NaN loss with gradient 0 would go unnoticed.
        inside = (tl.abs(log_ratio) > max_log_ratio) == 0
    else:
        x = tl.full((), 0.0, tl.float32)
        inside = tl.full((), 1, tl.int1)
    value, derivative = surrogate(x, inside, advantage, logprob, parameters, KIND)
    live = (policy_weight != 0) & (advantage != 0)
    loss = tl.where(live, -policy_weight * value, 0.0)
    c = tl.where(live, -policy_weight * derivative, 0.0)
    h = tl.full((), 0.0, tl.float32)
    if KL:
        difference = ref_logprob - logprob
        d = _bounded(difference, -max_log_ratio, max_log_ratio)
        inside = (tl.abs(difference) > max_log_ratio) == 0
        k3 = exp_minus_one_minus(d)
        penalised = kl_weight != 0
        loss += tl.where(penalised, kl_weight * k3, 0.0)
        c += tl.where(penalised & inside, -kl_weight * (k3 + d), 0.0)
    if ENTROPY_BONUS:
        loss += tl.where(entropy_weight != 0, -entropy_weight * entropy, 0.0)
        h = -entropy_weight
    return loss, c, h
