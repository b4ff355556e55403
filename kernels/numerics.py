"""Elementary functions and roundings shared by the device functions, and whether the interpreter runs them.

Triton's ``exp2``, ``log`` and ``log2`` are taken as they are: ``exp2`` lowers to the bare hardware instruction
(ex2.approx.ftz on NVIDIA). What is here is what Triton lacks: log1p and expm1 - d at float32 relative precision, and
bfloat16 conversions that also hold under the interpreter.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, to float32 relative precision down to the smallest x.

    2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = x / (2 + x) <= 1/3: cut after s^13 / 13, the relative error
    is below (1/9)^7 / 15 = 1.4e-8.
    """
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 11.0 + q * (1.0 / 13.0)
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return 2.0 * s + 2.0 * s * (q * series)


@triton.jit
def exp_minus_one_minus(d):
    """expm1(d) - d = d^2/2 + d^3/6 + ..., to float32 relative precision.

    exp(d) - 1 - d cancels for small d: its error, about 1e-7, against d^2 / 2. Below |d| = 1/2 the series to
    d^9 / 9! stands in; the first term left out is 2 d^8 / 10! = 2e-9 of the sum.
    """
    series = 1.0 / 40320.0 + d * (1.0 / 362880.0)
    series = 1.0 / 5040.0 + d * series
    series = 1.0 / 720.0 + d * series
    series = 1.0 / 120.0 + d * series
    series = 1.0 / 24.0 + d * series
    series = 1.0 / 6.0 + d * series
    series = 0.5 + d * series
    return tl.where(tl.abs(d) < 0.5, d * d * series, tl.exp(d) - 1.0 - d)


# Under TRITON_INTERPRET=1 the decorator gives an interpreted function in place of a JITFunction; which of the two is
# settled once, when this module is imported.
INTERPRETED = tl.constexpr(not isinstance(log1p_unit, JITFunction))


@triton.jit
def multiply_subtract(a, b, c):
    """a * b - c rounded once, as the compilers contract it. NumPy has no fused operation: float64 stands in."""
    if INTERPRETED:
        return (a.to(tl.float64) * b - c).to(tl.float32)
    else:
        return a * b - c


@triton.jit
def to_float32(x):
    """Exact widening to float32.

    For bfloat16 by a shift: compilers make it one shift or mask per element, while their own conversion takes two for
    every second element, and the interpreter's decodes every field in NumPy.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to nearest even. The interpreter would truncate to bfloat16, twice the error."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
