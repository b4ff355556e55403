"""The two sweeps over one row of V logits: its softmax statistics, and its gradient. Neither knows the objective.

Everything runs in the scaled domain of base-2 exponentials: with v = z, or tanh(z / softcap) / 2 under a softcap,
and ``scale`` = log2(e) / temperature (times 2 softcap), the transformed logit is z' = ln2 * scale * v and
exp(z' - max) = exp2(u) with u = scale * v - peak: one FFMA and one MUFU.EX2 per element.

Each lane keeps a running maximum, sum and first moment of its own, rescaled once per UNROLL * VEC elements; lanes meet
once, after the last step (``row_tiles.py`` has the picture). The sampled token y is kept out of the sum of
exponentials, because subtracting it afterwards would cancel on peaked rows: the one step that contains it sees -inf
there. All other steps pay one uniform branch.

``transform`` is (scale, 1 / temperature, 2 log2(e) / softcap or None), see ``launch.transform_constants`` and, where
rows have temperatures of their own, :func:`row_scale`.
"""

import triton
import triton.language as tl

from .numerics import LN2, log1p_unit, multiply_subtract, round_to, to_float32
from .row_tiles import edge_columns, frame, group_mask, load_step, tile_offsets, without_target

# Finite stand-in for a scaled -inf: no inf - inf and no 0 * inf can arise, and a difference with any float32 is still
# finite.
LOWEST = tl.constexpr(-1e30)
# Start of the running maximum, in powers of two: what lies below, such as a mask's -1e10, vanishes beside it. Relative
# to a maximum of its own it would not: rounded, that is off by up to 2^-24 of itself, beyond 2^31 more than exp2 takes.
FLOOR = tl.constexpr(-1e9)
# Twice times a finite logit it is below half a unit of 1, and -inf of -inf. Its square is no float32.
TINY = tl.constexpr(2.0**-100)


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Element offset of row b * T + t, in 64 bits: logits pass 2^31 elements at 14,000 tokens of a 150k vocabulary."""
    b = row // T
    t = row - b * T
    return tl.cast(b, tl.int64) * stride_b + tl.cast(t, tl.int64) * stride_t


@triton.jit
def leads(LEADER: tl.constexpr):
    """Whether this thread is one that computes a row's scalars; :func:`from_leader` hands them to the others.

    On NVIDIA the threads of the first warp, the only condition in these kernels that is not the same in all threads:
    what stands under it may neither reduce nor wait. Executed by 32 warps alike these were 9 % of all instructions and
    up to 5 % of the time (an H200: Qwen 1.30 to 1.27 times a copy, GPT-2 1.38 to 1.32). Elsewhere every thread.
    """
    if LEADER:
        return tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], tl.int32, True, 1) < 32
    else:
        return tl.full((), True, tl.int1)


@triton.jit
def from_leader(value, LANES: tl.constexpr, LEADER: tl.constexpr):
    """A leader's scalar in every thread: the first lane's, through the sum's exchange between warps."""
    if LEADER:
        return tl.sum(tl.where(tl.arange(0, LANES) == 0, value, 0.0), axis=0)
    else:
        return value


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
    well. Of -inf v is -1/2 and the slope 0: enough for a gradient of 0, not for the sums, see :func:`_summand`.
    """
    z = to_float32(z)
    if transform[2] is not None:
        root = tl.rsqrt(1.0 + tl.exp2(z * transform[2]))
        q = root * root
        return 0.5 - root * root, 4.0 * q * (1.0 - q)
    else:
        return z, 1.0


@triton.jit
def _summand(z, transform):
    """v of raw logits as the sums take it: a token whose logit is -inf is impossible under a softcap, too.

    Finite logits, a mask's lowest number too, are what tanh makes of them. Two instructions. (A comparison takes
    registers that AMD has to spill.)
    """
    v, _ = softcapped(z, transform)
    if transform[2] is not None:
        v += to_float32(z) * TINY * TINY
    return v


@triton.jit
def _summands(
    raw, step, y_element, transform, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """A step's tiles of v, -inf in place of the sampled token, ``y_element`` elements from the first boundary."""
    tiles = ()
    for i in tl.static_range(UNROLL):
        tiles = tiles + (_summand(raw[i], transform),)  # type: ignore[assignment]
    y_in_step = y_element - step * (LANES * VEC * UNROLL)
    if (y_in_step >= 0) & (y_in_step < LANES * VEC * UNROLL):
        without_y = ()
        for i in tl.static_range(UNROLL):
            without_y = without_y + (without_target(tiles[i], step, i, y_element, LANES, VEC, UNROLL),)  # type: ignore[assignment]
        tiles = without_y
    return tiles


@triton.jit
def _absorb(
    peak, total, moment, tiles, scale, UNROLL: tl.constexpr, ENTROPY: tl.constexpr, FIRST: tl.constexpr = False
):
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
        if ENTROPY:
            moment = decay * (moment + drop * total)
        total = decay * total
    for i in tl.static_range(UNROLL):
        u = multiply_subtract(tiles[i], scale, raised[:, None])
        e = tl.exp2(u)
        total += tl.sum(e, axis=1)
        if ENTROPY:
            moment += tl.sum(e * tl.maximum(u, LOWEST), axis=1)
    return raised, total, moment


@triton.jit
def _target_terms(z_y, maximum, others, transform):
    """Of the sampled token: u, exp2(u), the softcap's slope; of the row: the log of its sum of exponentials."""
    _, slope = softcapped(z_y, transform)
    u = multiply_subtract(_summand(z_y, transform), transform[0], maximum)
    e = tl.exp2(u)
    log_total = tl.where(others < e, u * LN2 + log1p_unit(others / e), tl.log(others + e))
    return u, e, slope, log_total


@triton.jit
def edge_statistics(
    row, V, y, lead, groups, transform, LANES: tl.constexpr, VEC: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """Each lane's maximum, sum and moment over the edge, where every sweep begins; as :func:`lane_statistics`."""
    moment = tl.zeros([LANES], tl.float32)
    peak, total = tl.full([LANES], FLOOR, tl.float32), moment
    edge = V - groups * VEC
    if edge > 0:
        columns = edge_columns(lead, groups, LANES, VEC)
        mask = tl.arange(0, LANES) < edge
        v = _summand(tl.load(row + columns, mask=mask, other=float("-inf")), transform)
        v = tl.where(columns != y, v, float("-inf"))
        peak, total, moment = _absorb(peak, total, moment, (v[:, None],), transform[0], 1, ENTROPY, True)
    return peak, total, moment


@triton.jit
def absorb_step(
    peak, total, moment, raw, step, y_element, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The lanes' maximum, sum and moment with a whole step's raw tiles in them."""
    tiles = _summands(raw, step, y_element, transform, LANES, VEC, UNROLL)
    return _absorb(peak, total, moment, tiles, transform[0], UNROLL, ENTROPY)


@triton.jit
def absorb_last_step(
    peak, total, moment, body, step, groups, y_element, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The same of the masked last step, tile by tile; nothing where whole steps end with the groups."""
    if step * (LANES * UNROLL) < groups:
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, True, EVICTION)
        tiles = _summands(raw, step, y_element, transform, LANES, VEC, UNROLL)
        for i in tl.static_range(UNROLL):
            if (step * UNROLL + i) * LANES < groups:  # a tile beyond the row costs its (masked) load and this branch
                peak, total, moment = _absorb(peak, total, moment, (tiles[i],), transform[0], 1, ENTROPY)
    return peak, total, moment


@triton.jit
def lane_statistics(
    row, V, y, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """First sweep, before the lanes meet: each lane's maximum, sum and moment over its share, without the token y.

    Steps: 1. the edge, one element per lane; 2. whole steps; 3. the masked last step, tile by tile.

    Args:
        row: pointer to the row's first logit.
        V: logits in the row.
        y: the sampled token.
        transform: constants of the logits' transform.
        ENTROPY: whether the moment is wanted; it is 0 otherwise.
        EVICTION: eviction policy of the loads.
    """
    lead, groups = frame(row, V, VEC)
    peak, total, moment = edge_statistics(row, V, y, lead, groups, transform, LANES, VEC, ENTROPY)
    body = tl.multiple_of(row + lead, 16)
    steps = groups // (LANES * UNROLL)
    for step in range(0, steps):
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, False, EVICTION)
        peak, total, moment = absorb_step(
            peak, total, moment, raw, step, y - lead, transform, LANES, VEC, UNROLL, ENTROPY
        )  # fmt: skip
    return absorb_last_step(
        peak, total, moment, body, steps, groups, y - lead, transform, LANES, VEC, UNROLL, ENTROPY, EVICTION
    )  # fmt: skip


@triton.jit
def combine_lanes(lanes, z_y, transform, ENTROPY: tl.constexpr):
    """First sweep, the lanes' meeting: (maximum, others, moment) of the row, the same in every thread.

    ``maximum`` is scale * v as float32 rounds it, and what follows, in a second kernel too, is relative to it as it is:
    from a product of it, such as maximum * log2(e), one compiler subtracts the rounded value, another's fused
    multiply-add the exact one, and by the difference every sum would be off.

    Args:
        lanes: of :func:`lane_statistics`.
        z_y: the sampled token's raw logit.
        transform: constants of the logits' transform.
        ENTROPY: whether the lanes have moments; the row's is 0 otherwise.
    """
    peak, total, moment = lanes
    top = _summand(z_y, transform) * transform[0]
    maximum = tl.maximum(tl.max(peak, axis=0), top, propagate_nan=tl.PropagateNan.ALL)  # else -inf beside it hides it
    shift = peak - maximum
    decay = tl.exp2(shift)
    others = tl.sum(decay * total, axis=0)
    row_moment = tl.full((), 0.0, tl.float32)
    if ENTROPY:
        row_moment = tl.sum(decay * (moment + shift * total), axis=0)
    return maximum, others, row_moment


@triton.jit
def row_statistics(maximum, others, moment, z_y, transform, ENTROPY: tl.constexpr):
    """(logp, entropy) of a row, from what :func:`combine_lanes` gives; see ``SoftmaxStatistics``."""
    u, e, _, log_total = _target_terms(z_y, maximum, others, transform)
    peaked = others < e
    logprob = tl.where(peaked, -log1p_unit(others / e), u * LN2 - log_total)
    entropy = tl.full((), 0.0, tl.float32)
    if ENTROPY:
        # H = log S - ln2 (moment + e u) / S. On a peaked row log S and u are the same rounding residue and cancel:
        # with log S = u ln2 - logp, H = -logp + ln2 (u others - moment) / S keeps its relative precision.
        reciprocal = LN2 / (others + e)
        flat = log_total - (moment + e * tl.maximum(u, LOWEST)) * reciprocal
        entropy = tl.where(peaked, (u * others - moment) * reciprocal - logprob, flat)
    return logprob, entropy


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
    u_y, e_y, slope_y, log_total = _target_terms(z_y, maximum, others, transform)
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


@triton.jit
def scale_row(row, V, factor, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """A row of V elements times ``factor`` in place: float32 products, rounded once."""
    lead, groups = frame(row, V, VEC)
    body = tl.multiple_of(row + lead, 16)
    dtype: tl.constexpr = row.dtype.element_ty
    for step in range(tl.cdiv(groups, LANES * UNROLL)):
        raw = load_step(body, step, groups, LANES, VEC, UNROLL, True, "evict_first")
        for i in tl.static_range(UNROLL):
            base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
            mask = group_mask(step, i, groups, LANES, UNROLL)
            product = round_to(to_float32(raw[i]) * factor, dtype)
            tl.store(body + base + offsets, product, mask=mask, eviction_policy="evict_first")
    columns = edge_columns(lead, groups, LANES, VEC)
    mask = tl.arange(0, LANES) < V - groups * VEC
    edge = tl.load(row + columns, mask=mask, other=0.0)
    tl.store(row + columns, round_to(to_float32(edge) * factor, dtype), mask=mask)
