"""The objectives' table as device functions: one token's (x, A) to (s, ds/dx), then to its loss and two numbers.

The torch twin is ``hpo_fused/surrogate.py``: ties, NaN and clamps are treated alike in both. Everything here is a
scalar of one row, computed once per V logits, so each function aims at accuracy first; it stands between the two
sweeps, while no byte moves, so long library routines are avoided where a short form is as accurate. Under
``first_sweep.leads`` one warp alone computes it: nothing here may reduce or wait. ``parameters`` travel at run time: a
new epsilon, temperature or alpha never recompiles.
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
    """PPO's clipped surrogate with its two extra bounds, see ``shaping.Clip``."""
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
    """MHPO's log-fidelity modulation with hazard penalty, see ``shaping.LogFidelity``."""
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
    """SAPO's soft gate, see ``shaping.SoftGate``."""
    tau = tl.where(advantage > 0, parameters[0], parameters[1])
    ratio = tl.exp(x)
    offset = tau * (ratio - 1.0)
    small = tl.exp(-tl.abs(offset))
    reciprocal = 1.0 / (1.0 + small)
    gate = tl.where(offset < 0, small * reciprocal, reciprocal)
    complement = tl.where(offset < 0, reciprocal, small * reciprocal)
    return 4.0 / tau * gate * advantage, 4.0 * gate * complement * ratio * advantage


@triton.jit
def truncated_ratio(x, advantage, parameters):
    """CISPO's truncated importance weight, with bounds per sign, see ``shaping.TruncatedRatio``."""
    positive, outside = advantage > 0, parameters[4]
    low, high = tl.where(positive, parameters[0], parameters[2]), tl.where(positive, parameters[1], parameters[3])
    ratio = tl.exp(x)
    return tl.where(ratio < low, low * outside, tl.where(ratio > high, high * outside, ratio))


@triton.jit
def gamma_gate(x, advantage, parameters):
    """VESPO's weight e^lambda r^k e^(-lambda r), see ``shaping.GammaGate``."""
    positive = advantage > 0
    k, rate = tl.where(positive, parameters[0], parameters[2]), tl.where(positive, parameters[1], parameters[3])
    return tl.exp(k * x - rate * (exp_minus_one_minus(x) + x))


@triton.jit
def token_log_ratio(difference, advantage, parameters, KIND: tl.constexpr):
    """(log-ratio, slope): what a token's own log-ratio contributes to x, and 0 where a bound cut it, else 1."""
    slope = tl.full((), 1.0, tl.float32)
    if KIND == "geometric_mean":
        over, under = (advantage > 0) & (difference > parameters[1]), (advantage < 0) & (difference < parameters[0])
        slope = tl.where(over | under | (advantage == 0), 0.0, slope)
        difference = tl.where(over, parameters[1], tl.where(under, parameters[0], difference))
        difference = tl.where(advantage == 0, 0.0, difference)
    return difference, slope


@triton.jit
def surrogate(x, advantage, logprob, parameters, KIND: tl.constexpr):
    """s(x, A) and its derivatives by the clamped log-ratio x and by log p itself."""
    tl.static_assert(
        KIND == "clip" or KIND == "log_fidelity" or KIND == "soft_gate" or KIND == "truncated_ratio"
        or KIND == "gamma_gate" or KIND == "geometric_mean" or KIND == "dro",
        "KIND: one of those that LossSpec lists",
    )  # fmt: skip
    by_ratio, by_logprob = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if KIND == "truncated_ratio" or KIND == "gamma_gate":
        if KIND == "truncated_ratio":
            by_logprob = truncated_ratio(x, advantage, parameters) * advantage
        else:
            by_logprob = gamma_gate(x, advantage, parameters) * advantage
        value = by_logprob * logprob
    elif KIND == "clip":
        value, by_ratio = clip(x, advantage, parameters)
    elif KIND == "log_fidelity":
        value, by_ratio = log_fidelity(x, advantage, parameters)
    elif KIND == "soft_gate":
        value, by_ratio = soft_gate(x, advantage, parameters)
    elif KIND == "geometric_mean":
        value = tl.exp(x) * advantage
        by_ratio = value
    else:  # DRO
        value = advantage * logprob - 0.5 * parameters[0] * x * x
        by_ratio, by_logprob = -parameters[0] * x, advantage
    return value, by_ratio, by_logprob


@triton.jit
def kl_estimate(d, KL: tl.constexpr):
    """A KL estimate of the log-ratio d = log p_ref - log p (see ``Objective.kl``), and its derivative by log p."""
    tl.static_assert(
        KL == "k1" or KL == "k2" or KL == "k3" or KL == "k3+" or KL == "k3_ratio", "KL: one of those of Objective.kl"
    )
    if KL == "k1":
        value, slope = -d, tl.full((), 1.0, tl.float32)
    elif KL == "k2":
        value, slope = 0.5 * d * d, -d
    else:
        value = exp_minus_one_minus(d)
        if KL == "k3+":
            slope = -d
        else:
            slope = -(value + d)
    return value, slope


@triton.jit
def token_loss(
    logprob,
    entropy,
    advantage,
    policy_weight,
    kl_weight,
    entropy_weight,
    log_ratio,
    kl_log_ratio,
    ref_logprob,
    parameters,
    max_log_ratio,
    kl_spread,
    KIND: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
):
    """(loss, c_x, c_logp, h) of tokens: their losses, and the derivatives by x, by log p itself and by the entropy.

    A weight of exactly 0 switches its part off whatever the other values hold, hence ``where`` and not products.

    Args:
        logprob, entropy: of the token; the entropy is read with ENTROPY_BONUS only.
        advantage, policy_weight, kl_weight, entropy_weight, ref_logprob: terms of the token, see ``TokenTerms``; what
            no constexpr asks for is not read.
        log_ratio: what x is before the clamp: the token's own, or its response's; read with OFF_POLICY only.
        kl_log_ratio: likewise, of the ratio by which "k3_ratio" corrects.
        parameters, max_log_ratio, KIND, OFF_POLICY, KL, ENTROPY_BONUS: fields of ``LossSpec``.
        kl_spread: whether that ratio is a response's and its derivative going to be spread over it: it is in c_x then,
            else in c_logp.
    """
    if OFF_POLICY:
        x = _bounded(log_ratio, -max_log_ratio, max_log_ratio)
        # NaN counts as inside, so that it reaches the derivative: a NaN loss with gradient 0 would go unnoticed.
        inside = (tl.abs(log_ratio) > max_log_ratio) == 0
    else:
        x = tl.full((), 0.0, tl.float32)
        inside = tl.full((), 1, tl.int1)
    value, by_ratio, by_logprob = surrogate(x, advantage, logprob, parameters, KIND)
    live = policy_weight != 0
    if KIND != "dro":
        live = live & (advantage != 0)
    loss = tl.where(live, -policy_weight * value, 0.0)
    by_ratio = tl.where(live & inside, -policy_weight * by_ratio, 0.0)
    by_logprob = tl.where(live, -policy_weight * by_logprob, 0.0)
    h = tl.full((), 0.0, tl.float32)
    if KL != "none":
        difference = ref_logprob - logprob
        d = _bounded(difference, -max_log_ratio, max_log_ratio)
        known = (tl.abs(difference) > max_log_ratio) == 0
        estimate, slope = kl_estimate(d, KL)
        slope = tl.where(known, slope, 0.0)
        weight = kl_weight
        if KL == "k3_ratio":
            if OFF_POLICY:
                ratio = tl.exp(_bounded(kl_log_ratio, -max_log_ratio, max_log_ratio))
                weight = tl.where(weight != 0, weight * ratio, 0.0)
                inside = (tl.abs(kl_log_ratio) > max_log_ratio) == 0
            # r moves as well: by k3, which with k3's own -(e^d - 1) cancels to -d where both are the token's.
            slope = tl.where(inside & (kl_spread == 0), tl.where(known, -d, estimate), slope)
            by_ratio += tl.where((weight != 0) & inside & (kl_spread != 0), weight * estimate, 0.0)
        loss += tl.where(weight != 0, weight * estimate, 0.0)
        by_logprob += tl.where(weight != 0, weight * slope, 0.0)
    if ENTROPY_BONUS:
        loss += tl.where(entropy_weight != 0, -entropy_weight * entropy, 0.0)
        h = -entropy_weight
    return loss, by_ratio, by_logprob, h
