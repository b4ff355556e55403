"""The two sweeps over one row of V logits: its statistics, and its gradient. Nothing here knows the objective.

Everything runs in the scaled domain of base-2 exponentials: with v = z, or tanh(z / softcap) under a softcap, and
``scale`` = log2(e) / temperature (times softcap), the transformed logit is z' = ln2 * scale * v and
exp(z' - max) = exp2(u) with u = scale * v - peak: one FFMA and one MUFU.EX2 per element.

A row is walked in steps of UNROLL tiles of [LANES, VEC] elements, VEC elements being 16 bytes, so that every thread
owns whole 16-byte groups. Each thread keeps a running maximum and sums of its own, rescaled once per UNROLL * VEC
elements; lanes meet once, after the last step. UNROLL independent 16-byte loads per thread are what keeps enough
bytes in flight (``launch.py``).

Groups are aligned to 16 bytes in memory, not to the row's start: for an odd V seven rows in eight start between
boundaries. The fewer than 2 * VEC elements before the first and after the last whole group are the row's edge, one
element per lane. This costs a handful of instructions per row and needs no variant per alignment.

The sampled token y is kept out of the sum of exponentials, because subtracting it afterwards would cancel on peaked
rows: the one step that contains it sees -inf there. All other steps pay one uniform branch.
"""

import triton
import triton.language as tl

from .elementary import LN2, LOG2E, log1p_unit, multiply_subtract, round_to, to_float32
from .row_tiles import edge_columns, frame, group_mask, load_step, share_of_row, tile_offsets, without_target

# Finite start of the running maximum and finite stand-in for a scaled -inf: no inf - inf and no 0 * inf can arise,
# and a difference with any float32 is still finite.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Element offset of row b * T + t, in 64 bits: logits pass 2^31 elements at 14,000 tokens of a 150k vocabulary."""
    b = row // T
    t = row - b * T
    return tl.cast(b, tl.int64) * stride_b + tl.cast(t, tl.int64) * stride_t


@triton.jit
def checked_token(token, V):
    """The token's id, or -1 where it is outside [0, V): ``load_target`` then gives NaN, which no one overlooks."""
    valid = (token >= 0) & (token < V)
    tl.device_assert(valid, "tokens: expected ids in [0, V) in computed rows")
    return tl.where(valid, token, -1).to(tl.int32)


@triton.jit
def load_target(row, y):
    """The sampled token's logit; reads nothing outside the row."""
    return to_float32(tl.load(row + y, mask=y >= 0, other=float("nan")))


@triton.jit
def _squash(z, transform, SOFTCAP: tl.constexpr):
    """v, and dv'/dz up to the constant 1 / temperature: 1, or 1 - tanh^2 under a softcap.

    With q = 1 / (1 + exp2(2 log2(e) z / softcap)): tanh = 1 - 2q, absolute error one ulp of 1; 1 - tanh^2 = 4q(1 - q).
    q as the square of rsqrt: one MUFU.RSQ, where a division costs range checks as well.
    """
    z = to_float32(z)
    if SOFTCAP:
        root = tl.rsqrt(1.0 + tl.exp2(z * transform[2]))
        q = root * root
        return 1.0 - 2.0 * q, 4.0 * q * (1.0 - q)
    else:
        return z, 1.0


@triton.jit
def _absorb(peak, total, moment, tiles, scale, UNROLL: tl.constexpr, MOMENT: tl.constexpr, FIRST: tl.constexpr = False):
    """Fold tiles of v into the lanes' running maximum, sum of exp2(u) and, for the entropy, sum of exp2(u) * u.

    The maximum skips NaN, as the hardware's does; u then carries it into the sums. ``FIRST``: the sums are still 0.
    """
    top = tl.max(tiles[0], axis=1)
    for i in tl.static_range(1, UNROLL):
        top = tl.maximum(top, tl.max(tiles[i], axis=1))
    raised = tl.maximum(peak, top * scale)
    if not FIRST:
        drop = peak - raised
        decay = tl.exp2(drop)
        if MOMENT:
            moment = decay * (moment + drop * total)
        total = decay * total
    for i in tl.static_range(UNROLL):
        u = multiply_subtract(tiles[i], scale, raised[:, None])
        e = tl.exp2(u)
        total += tl.sum(e, axis=1)
        if MOMENT:
            moment += tl.sum(e * tl.maximum(u, LOWEST), axis=1)
    return raised, total, moment


@triton.jit
def merge_statistics(lanes, others, MOMENT: tl.constexpr):
    """Of two disjoint shares of the row. Fused multiplications are written out, so that every kernel rounds alike.

    One of the two keeps its maximum, so one exponential is enough for both factors.
    """
    peak, total, moment = lanes
    other_peak, other_total, other_moment = others
    raised = tl.maximum(peak, other_peak)
    down, other_down = peak - raised, other_peak - raised
    e = tl.exp2(down + other_down)  # one of them is 0
    decay = tl.where(down < 0, e, 1.0)
    other_decay = tl.where(down < 0, 1.0, e)
    if MOMENT:
        other_moment = other_decay * tl.fma(other_down, other_total, other_moment)
        moment = tl.fma(decay, tl.fma(down, total, moment), other_moment)
    total = tl.fma(decay, total, other_decay * other_total)
    return raised, total, moment


@triton.jit
def target_terms(z_y, maximum, rest, transform, SOFTCAP: tl.constexpr):
    """Of the sampled token: u, exp2(u), the softcap's slope; of the row: the log of the sum of exponentials."""
    v, slope = _squash(z_y, transform, SOFTCAP)
    u = multiply_subtract(v, transform[0], maximum * LOG2E)
    e = tl.exp2(u)
    log_total = tl.where(rest < e, u * LN2 + log1p_unit(rest / e), tl.log(rest + e))
    return u, e, slope, log_total


@triton.jit
def _no_statistics(LANES: tl.constexpr):
    """Of no elements."""
    zeros = tl.zeros([LANES], tl.float32)
    return tl.full([LANES], LOWEST, tl.float32), zeros, zeros


@triton.jit
def edge_statistics(
    row, V, y, transform, LANES: tl.constexpr, VEC: tl.constexpr, SOFTCAP: tl.constexpr, MOMENT: tl.constexpr
):
    """Each lane's maximum, sum and moment over its share of the row's edge, the sampled token left out."""
    head, groups = frame(row, V, VEC)
    peak, total, moment = _no_statistics(LANES)
    edge = V - groups * VEC
    if edge > 0:
        columns = edge_columns(head, groups, LANES, VEC)
        mask = tl.arange(0, LANES) < edge
        v, _ = _squash(tl.load(row + columns, mask=mask, other=float("-inf")), transform, SOFTCAP)
        v = tl.where(mask & (columns != y), v, float("-inf"))
        peak, total, moment = _absorb(peak, total, moment, (v[:, None],), transform[0], 1, MOMENT, True)
    return peak, total, moment


@triton.jit
def lane_partials(partials, slot, LANES: tl.constexpr):
    """Where a slot's maxima are; sums and moments follow, LANES entries each. 64 bits: slots count rows x steps."""
    return partials + tl.cast(slot, tl.int64) * (3 * LANES) + tl.arange(0, LANES)


@triton.jit
def _add_step(lanes, step, partials, slot, LANES: tl.constexpr, MOMENT: tl.constexpr, own):
    """Merge a step's own statistics into the lanes', or leave them in memory for ``combine_statistics_kernel``."""
    if partials is None:
        return merge_statistics(lanes, own, MOMENT)
    else:
        where = lane_partials(partials, slot + step, LANES)
        tl.store(where, own[0])
        tl.store(where + LANES, own[1])
        if MOMENT:
            tl.store(where + 2 * LANES, own[2])
        return lanes


@triton.jit
def sweep_statistics(
    lanes, row, V, y, transform, part, parts, partials, slot,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr, MOMENT: tl.constexpr, POLICY: tl.constexpr, STEPWISE: tl.constexpr,
):  # fmt: skip
    """``lanes`` (the row's edge), and every lane's share of the part-th part's steps, the sampled token left out.
    ``part``, ``parts`` None: all of the row.

    ``STEPWISE``: every step has a maximum and sums of its own, which are merged in the steps' order: results are then
    the same to the bit however many programs share the row. Else a running maximum, which takes fewer registers.
    ``partials``: see ``_add_step``; the row's own start at ``slot``.
    """
    scale = transform[0]
    head, groups = frame(row, V, VEC)
    body = tl.multiple_of(row + head, 16)
    steps = groups // (LANES * UNROLL)
    first, whole, tail = share_of_row(groups, part, parts, LANES, UNROLL)
    y_element = y - head
    # An edge token before the first group must not select step 0: hence not the truncating division of a negative.
    y_step = tl.where(y_element < 0, -1, y_element // (LANES * VEC * UNROLL))
    peak, total, moment = lanes
    for step in range(first, whole):
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, False, POLICY)
        tiles = ()
        for i in tl.static_range(UNROLL):
            v, _ = _squash(raw[i], transform, SOFTCAP)
            tiles = tiles + (v,)  # type: ignore[assignment]
        if step == y_step:
            others = ()
            for i in tl.static_range(UNROLL):
                others = others + (without_target(tiles[i], step, i, y_element, LANES, VEC, UNROLL),)  # type: ignore[assignment]
            tiles = others
        if STEPWISE:
            start = _no_statistics(LANES)
            own = _absorb(start[0], start[1], start[2], tiles, scale, UNROLL, MOMENT, True)
            peak, total, moment = _add_step((peak, total, moment), step, partials, slot, LANES, MOMENT, own)
        else:
            peak, total, moment = _absorb(peak, total, moment, tiles, scale, UNROLL, MOMENT)
    if tail:
        raw = load_step(body, steps, groups, LANES, VEC, UNROLL, True, POLICY)
        kept = (peak, total, moment)
        if STEPWISE:
            peak, total, moment = _no_statistics(LANES)
        for i in tl.static_range(UNROLL):
            if (steps * UNROLL + i) * LANES < groups:  # a tile beyond the row costs its (masked) load and this branch
                v, _ = _squash(raw[i], transform, SOFTCAP)
                if SOFTCAP:  # a padded -inf has become -1, the smallest legitimate value
                    v = tl.where(group_mask(steps, i, groups, LANES, UNROLL), v, float("-inf"))
                v = without_target(v, steps, i, y_element, LANES, VEC, UNROLL)
                peak, total, moment = _absorb(peak, total, moment, (v,), scale, 1, MOMENT)
        if STEPWISE:
            peak, total, moment = _add_step(kept, steps, partials, slot, LANES, MOMENT, (peak, total, moment))
    return peak, total, moment


@triton.jit
def merge_partials(
    lanes, partials, slot, row, V, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, MOMENT: tl.constexpr
):
    """``lanes`` and all steps of the row, whose statistics other programs left in ``partials``, in the steps' order."""
    _, groups = frame(row, V, VEC)
    peak, total, moment = lanes
    for step in range(tl.cdiv(groups, LANES * UNROLL)):
        where = lane_partials(partials, slot + step, LANES)
        other_moment = moment
        if MOMENT:
            other_moment = tl.load(where + 2 * LANES)
        own = (tl.load(where), tl.load(where + LANES), other_moment)
        peak, total, moment = merge_statistics((peak, total, moment), own, MOMENT)
    return peak, total, moment


@triton.jit
def row_statistics(lanes, z_y, transform, SOFTCAP: tl.constexpr, MOMENT: tl.constexpr):
    """logp, maximum, rest and entropy of the row (the entropy is 0 without MOMENT), from its lanes' sums.

    ``maximum`` is in natural units and everything after it is relative to maximum * log2(e) as float32 rounds it,
    so that a second kernel which starts from ``maximum`` finds exactly the same u.
    """
    peak, total, moment = lanes
    v_y, _ = _squash(z_y, transform, SOFTCAP)
    maximum = tl.maximum(tl.max(peak, axis=0), v_y * transform[0]) * LN2
    shift = peak - maximum * LOG2E
    decay = tl.exp2(shift)
    rest = tl.sum(decay * total, axis=0)
    u, e, _, log_total = target_terms(z_y, maximum, rest, transform, SOFTCAP)
    peaked = rest < e
    logprob = tl.where(peaked, -log1p_unit(rest / e), u * LN2 - log_total)
    entropy = tl.full((), 0.0, tl.float32)
    if MOMENT:
        others = tl.sum(decay * (moment + shift * total), axis=0)
        # H = log S - ln2 (others + e u) / S. On a peaked row log S and u are the same rounding residue and cancel:
        # with log S = u ln2 - logp, H = -logp + ln2 (u rest - others) / S keeps its relative precision.
        reciprocal = LN2 / (rest + e)
        spread = log_total - (others + e * tl.maximum(u, LOWEST)) * reciprocal
        entropy = tl.where(peaked, (u * rest - others) * reciprocal - logprob, spread)
    return logprob, maximum, rest, entropy


@triton.jit
def _gradient(raw, transform, peak, common, tilt, SOFTCAP: tl.constexpr, TILT: tl.constexpr):
    v, slope = _squash(raw, transform, SOFTCAP)
    u = multiply_subtract(v, transform[0], peak)
    if TILT:
        g = tl.exp2(u) * (common - tilt * tl.maximum(u, LOWEST))
    else:
        g = tl.exp2(u) * common
    if SOFTCAP:
        g = g * slope
    return g


@triton.jit
def row_gradient(
    row, out, V, y, z_y, maximum, rest, entropy, c, h, transform, part, parts,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr, TILT: tl.constexpr, ALIGNED_OUT: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Write dloss/dz of the part-th of ``parts`` parts of the row to ``out``, which may be ``row`` where parts is 1.
    None, None: all of the row.

    For j != y, g_j = p_j (h (E[z'] - z'_j) - c) dz'/dz = exp2(u_j) (common - tilt u_j) slope_j, with the row's
    constants folded: E[z'] - z'_j = (log S - H) - ln2 u_j relative to the maximum. The target gets its own value,
    c (1 - p_y) with 1 - p_y = rest / S, in one scalar store after a barrier: no per-element comparison.
    The sweep walks backwards, since what was read last is nearest in the cache.
    """
    head, groups = frame(row, V, VEC)
    body = tl.multiple_of(row + head, 16)
    out_body = out + head
    if ALIGNED_OUT:  # the rows' alignment; otherwise the compiler itself finds narrower, coalesced stores
        out_body = tl.multiple_of(out_body, 16)
    dtype: tl.constexpr = out.dtype.element_ty
    peak = maximum * LOG2E
    u_y, e_y, slope_y, log_total = target_terms(z_y, maximum, rest, transform, SOFTCAP)
    normalizer = transform[1] / (rest + e_y)
    common = -c * normalizer
    tilt = 0.0
    target = c * rest * normalizer
    if TILT:
        mean = log_total - entropy
        common = (h * mean - c) * normalizer
        tilt = h * LN2 * normalizer
        target += h * e_y * normalizer * (mean - LN2 * tl.maximum(u_y, LOWEST))
    if SOFTCAP:
        target = target * slope_y

    steps = groups // (LANES * UNROLL)
    first, whole, tail = share_of_row(groups, part, parts, LANES, UNROLL)
    if tail:
        raw = load_step(body, steps, groups, LANES, VEC, UNROLL, True, POLICY)
        for i in tl.static_range(UNROLL):
            if (steps * UNROLL + i) * LANES < groups:
                base, offsets = tile_offsets(steps, i, LANES, VEC, UNROLL)
                g = _gradient(raw[i], transform, peak, common, tilt, SOFTCAP, TILT)
                mask = group_mask(steps, i, groups, LANES, UNROLL)
                tl.store(out_body + base + offsets, round_to(g, dtype), mask=mask, eviction_policy=POLICY)
    for index in range(whole - first):
        step = whole - 1 - index
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, False, POLICY)
        for i in tl.static_range(UNROLL):
            base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
            g = _gradient(raw[i], transform, peak, common, tilt, SOFTCAP, TILT)
            tl.store(out_body + base + offsets, round_to(g, dtype), eviction_policy=POLICY)
    edge = V - groups * VEC
    with_edge = edge > 0
    mine = y >= 0
    if parts is not None:
        with_edge = with_edge & (part == 0)
        # The target is stored by the part that wrote it as any other element: another's barrier would order nothing.
        y_group = (y - head) // VEC
        y_step = y_group // (LANES * UNROLL)
        at_edge = (y < head) | (y_group >= groups)
        in_share = (y_step >= first) & ((y_step < whole) | (tail & (y_step == steps)))
        mine = mine & tl.where(at_edge, part == 0, in_share)
    if with_edge:
        columns = edge_columns(head, groups, LANES, VEC)
        mask = tl.arange(0, LANES) < edge
        raw = tl.load(row + columns, mask=mask, other=float("-inf"))
        g = _gradient(raw, transform, peak, common, tilt, SOFTCAP, TILT)
        tl.store(out + columns, round_to(g, dtype), mask=mask)
    tl.debug_barrier()  # orders the target's store after the sweep's
    tl.store(out + y, round_to(target, dtype), mask=mine)


@triton.jit
def zero_row(out, V, part, parts, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    head, groups = frame(out, V, VEC)
    body = tl.multiple_of(out + head, 16)
    zeros = tl.zeros([LANES, VEC], out.dtype.element_ty)
    last = tl.cdiv(groups, LANES * UNROLL)
    if parts is None:
        first = 0
    else:
        first, last = part * last // parts, (part + 1) * last // parts
    for step in range(first, last):
        for i in tl.static_range(UNROLL):
            base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
            mask = group_mask(step, i, groups, LANES, UNROLL)
            tl.store(body + base + offsets, zeros, mask=mask, eviction_policy="evict_first")
    columns = edge_columns(head, groups, LANES, VEC)
    mask = tl.arange(0, LANES) < V - groups * VEC
    if parts is not None:
        mask = mask & (part == 0)
    tl.store(out + columns, tl.zeros([LANES], out.dtype.element_ty), mask=mask)


@triton.jit
def scale_row(row, V, factor, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    head, groups = frame(row, V, VEC)
    body = tl.multiple_of(row + head, 16)
    dtype: tl.constexpr = row.dtype.element_ty
    for step in range(tl.cdiv(groups, LANES * UNROLL)):
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, True, "evict_first")
        for i in tl.static_range(UNROLL):
            base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
            mask = group_mask(step, i, groups, LANES, UNROLL)
            product = round_to(to_float32(raw[i]) * factor, dtype)
            tl.store(body + base + offsets, product, mask=mask, eviction_policy="evict_first")
    columns = edge_columns(head, groups, LANES, VEC)
    mask = tl.arange(0, LANES) < V - groups * VEC
    edge = tl.load(row + columns, mask=mask, other=0.0)
    tl.store(row + columns, round_to(to_float32(edge) * factor, dtype), mask=mask)
