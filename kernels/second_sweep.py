"""The second sweep over one row of V logits: its gradient, which may be zero. It does not know the objective."""

import triton
import triton.language as tl

from .numerics import LN2, multiply_subtract, round_to
from .row_tiles import edge_columns, frame, group_mask, load_step, tile_offsets
from .transform import LOWEST, softcapped, target_terms


@triton.jit
def gradient_constants(maximum, others, entropy, z_y, c, h, transform, ENTROPY_BONUS: tl.constexpr):
    """A row's three numbers of the second sweep: (constant, slope, target), see :func:`row_gradient`.

    For j != y, g_j = p_j (h (E[z'] - z'_j) - c) dz'/dz = exp2(u_j) (constant - slope u_j) dz'/dz, with the row's
    constants folded: E[z'] - z'_j = (log S - H) - ln2 u_j relative to the maximum. The sampled token's own gradient is
    c (1 - p_y) with 1 - p_y = others / S.

    Args:
        maximum, others, entropy: the row's statistics; the entropy is read with ENTROPY_BONUS only.
        z_y, transform: as in the first sweep.
        c, h: the row's gradient coefficients dloss/dlogp and dloss/dH.
        ENTROPY_BONUS: whether h can differ from 0.
    """
    u_y, e_y, slope_y, log_total = target_terms(z_y, maximum, others, transform)
    normalizer = transform[1] / (others + e_y)
    constant = -c * normalizer
    slope = tl.full((), 0.0, tl.float32)
    target = c * others * normalizer
    if ENTROPY_BONUS:
        mean = log_total - entropy
        constant = (h * mean - c) * normalizer
        slope = h * LN2 * normalizer
        target += h * e_y * normalizer * (mean - LN2 * tl.maximum(u_y, LOWEST))
    if transform[2] is not None:
        target = target * slope_y
    return constant, slope, target


@triton.jit
def _gradient(raw, transform, maximum, constant, slope, ENTROPY_BONUS: tl.constexpr):
    """dloss/dz of raw logits but the sampled token's: exp2(u) (constant - slope u), times the softcap's derivative."""
    v, derivative = softcapped(raw, transform)
    u = multiply_subtract(v, transform[0], maximum)
    if ENTROPY_BONUS:
        g = tl.exp2(u) * (constant - slope * tl.maximum(u, LOWEST))
    else:
        g = tl.exp2(u) * constant
    if transform[2] is not None:
        g = g * derivative
    return g


@triton.jit
def gradient_last_step(
    body, out_body, step, groups, maximum, constant, slope, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY_BONUS: tl.constexpr,
):  # fmt: skip
    """The gradient of a masked last step, tile by tile; nothing where whole steps end with the groups."""
    if step * (LANES * UNROLL) < groups:
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, True, "evict_first")
        for i in tl.static_range(UNROLL):
            if (step * UNROLL + i) * LANES < groups:
                base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
                g = _gradient(raw[i], transform, maximum, constant, slope, ENTROPY_BONUS)
                mask = group_mask(step, i, groups, LANES, UNROLL)
                rounded = round_to(g, out_body.dtype.element_ty)
                tl.store(out_body + base + offsets, rounded, mask=mask, eviction_policy="evict_first")


@triton.jit
def gradient_step(
    body, out_body, step, groups, maximum, constant, slope, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY_BONUS: tl.constexpr,
):  # fmt: skip
    """The gradient of a whole step."""
    raw = load_step(body, step, groups, LANES, VEC, UNROLL, False, "evict_first")
    store_gradient(raw, out_body, step, maximum, constant, slope, transform, LANES, VEC, UNROLL, ENTROPY_BONUS)


@triton.jit
def store_gradient(
    raw, out_body, step, maximum, constant, slope, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY_BONUS: tl.constexpr,
):  # fmt: skip
    """The gradient of a whole step's raw tiles."""
    for i in tl.static_range(UNROLL):
        base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
        g = _gradient(raw[i], transform, maximum, constant, slope, ENTROPY_BONUS)
        tl.store(out_body + base + offsets, round_to(g, out_body.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def gradient_edge(
    row, out, V, lead, groups, maximum, constant, slope, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, ENTROPY_BONUS: tl.constexpr,
):  # fmt: skip
    """The gradient of the edge, one element per lane."""
    edge = V - groups * VEC
    if edge > 0:
        columns = edge_columns(lead, groups, LANES, VEC)
        mask = tl.arange(0, LANES) < edge
        raw = tl.load(row + columns, mask=mask, other=float("-inf"))
        g = _gradient(raw, transform, maximum, constant, slope, ENTROPY_BONUS)
        tl.store(out + columns, round_to(g, out.dtype.element_ty), mask=mask)


@triton.jit
def gradient_body(out, lead, ALIGNED_OUT: tl.constexpr):
    """Where the gradient of a row's first whole group goes."""
    out_body = out + lead
    if ALIGNED_OUT:  # the rows' alignment; otherwise the compiler itself finds narrower, coalesced stores
        out_body = tl.multiple_of(out_body, 16)
    return out_body


@triton.jit
def row_gradient(
    row, out, V, y, maximum, constant, slope, target, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr, ALIGNED_OUT: tl.constexpr,
):  # fmt: skip
    """Second sweep: dloss/dz of the whole row, written to ``out``.

    The sampled token gets its own value in one scalar store after a barrier: no per-element comparison.

    Steps: 1. the masked last step; 2. whole steps backwards, since the end of the row is nearest in the cache; 3. the
    edge; 4. the sampled token.

    Args:
        row, out: pointers to the row's first logit and to its gradient's, which may be the same.
        V, y, maximum, transform: as in the first sweep.
        constant, slope, target: of :func:`gradient_constants`; the target's gradient is read by the leader only.
        ENTROPY_BONUS: whether the slope can differ from 0.
        ALIGNED_OUT: whether ``out`` is as far from a 16-byte boundary as ``row``.
    """
    lead, groups = frame(row, V, VEC)
    body, out_body = tl.multiple_of(row + lead, 16), gradient_body(out, lead, ALIGNED_OUT)
    steps = groups // (LANES * UNROLL)
    gradient_last_step(
        body, out_body, steps, groups, maximum, constant, slope, transform, LANES, VEC, UNROLL, ENTROPY_BONUS
    )  # fmt: skip
    for index in range(0, steps):
        gradient_step(
            body, out_body, steps - 1 - index, groups, maximum, constant, slope, transform,
            LANES, VEC, UNROLL, ENTROPY_BONUS,
        )  # fmt: skip
    gradient_edge(row, out, V, lead, groups, maximum, constant, slope, transform, LANES, VEC, ENTROPY_BONUS)
    tl.debug_barrier()  # orders the sampled token's store after the sweep's
    tl.store(out + y, round_to(target, out.dtype.element_ty))


@triton.jit
def zero_row(out, V, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """Zeros in a row of V elements: the gradient of a row without gradient coefficients."""
    lead, groups = frame(out, V, VEC)
    body = tl.multiple_of(out + lead, 16)
    zeros = tl.zeros([LANES, VEC], out.dtype.element_ty)
    for step in range(tl.cdiv(groups, LANES * UNROLL)):
        for i in tl.static_range(UNROLL):
            base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
            mask = group_mask(step, i, groups, LANES, UNROLL)
            tl.store(body + base + offsets, zeros, mask=mask, eviction_policy="evict_first")
    columns = edge_columns(lead, groups, LANES, VEC)
    mask = tl.arange(0, LANES) < V - groups * VEC
    tl.store(out + columns, tl.zeros([LANES], out.dtype.element_ty), mask=mask)
