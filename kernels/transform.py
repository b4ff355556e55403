"""The transform of a row's logits, the same in both sweeps, and what both know of its sampled token.

Everything runs in the scaled domain of base-2 exponentials: with v = z, or tanh(z / softcap) / 2 under a softcap,
and ``scale`` = log2(e) / temperature (times 2 softcap), the transformed logit is z' = ln2 * scale * v and
exp(z' - max) = exp2(u) with u = scale * v - peak: one FFMA and one MUFU.EX2 per element.

``transform`` is (scale, 1 / temperature, 2 log2(e) / softcap or None), see ``launch.transform_constants`` and, where
rows have temperatures of their own, :func:`row_scale`.
"""

import triton
import triton.language as tl

from .numerics import LN2, log1p_unit, multiply_subtract, to_float32

# Finite stand-in for a scaled -inf: no inf - inf and no 0 * inf can arise, and a difference with any float32 is still
# finite.
LOWEST = tl.constexpr(-1e30)
# Twice times a finite logit it is below half a unit of 1, and -inf of -inf. Its square is no float32.
TINY = tl.constexpr(2.0**-100)


@triton.jit
def row_scale(transform, temperatures, row):
    """First two constants of a row's transform: the call's where ``temperatures`` is None, else divided by the row's.

    Divisions are IEEE's, for ``/`` may be off by two units. ``scale`` is then rounded twice instead of once, together
    2^-23 at most: as if the temperature were off by that much, the same in both sweeps.
    """
    if temperatures is None:
        return transform[0], transform[1]
    else:
        temperature = tl.load(temperatures + row)
        return tl.div_rn(transform[0], temperature), tl.div_rn(transform[1], temperature)


@triton.jit
def softcapped(z, transform):
    """v of raw logits, and dz'/dz up to the constant 1 / temperature: 1, or 1 - tanh^2 under a softcap.

    With q = 1 / (1 + exp2(2 log2(e) z / softcap)): tanh / 2 = 1/2 - q, one FFMA, its error half a unit of 1/2 and what
    the root has; 1 - tanh^2 = 4q(1 - q). q as the square of rsqrt: one MUFU.RSQ, where a division costs range checks as
    well. Of -inf v is -1/2 and the slope 0: enough for a gradient of 0, not for the sums, see :func:`summand`.
    """
    z = to_float32(z)
    if transform[2] is not None:
        root = tl.rsqrt(1.0 + tl.exp2(z * transform[2]))
        q = root * root
        return 0.5 - root * root, 4.0 * q * (1.0 - q)
    else:
        return z, 1.0


@triton.jit
def summand(z, transform):
    """v of raw logits as the sums take it: a token whose logit is -inf is impossible under a softcap, too.

    Finite logits, a mask's lowest number too, are what tanh makes of them. Two instructions. (A comparison takes
    registers that AMD has to spill.)
    """
    v, _ = softcapped(z, transform)
    if transform[2] is not None:
        v += to_float32(z) * TINY * TINY
    return v


@triton.jit
def target_terms(z_y, maximum, others, transform):
    """Of the sampled token: u, exp2(u), the softcap's slope; of the row: the log of its sum of exponentials."""
    _, slope = softcapped(z_y, transform)
    u = multiply_subtract(summand(z_y, transform), transform[0], maximum)
    e = tl.exp2(u)
    log_total = tl.where(others < e, u * LN2 + log1p_unit(others / e), tl.log(others + e))
    return u, e, slope, log_total
