"""The first sweep over one row of V logits: its softmax statistics. It does not know the objective.

Each lane keeps a running maximum, sum and first moment of its own, rescaled once per UNROLL * VEC elements; lanes meet
once, after the last step (``row_tiles.py`` has the picture, ``transform.py`` the domain). The sampled token y is kept
out of the sum of exponentials, because subtracting it afterwards would cancel on peaked rows: the one step that
contains it sees -inf there. All other steps pay one uniform branch.
"""

import triton
import triton.language as tl

from .numerics import LN2, log1p_unit, multiply_subtract
from .row_tiles import edge_columns, frame, load_step, without_target
from .transform import LOWEST, summand, target_terms

# Start of the running maximum, in powers of two: what lies below, such as a mask's -1e10, vanishes beside it. Relative
# to a maximum of its own it would not: rounded, that is off by up to 2^-24 of itself, beyond 2^31 more than exp2 takes.
FLOOR = tl.constexpr(-1e9)


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
def _summands(
    raw, step, y_element, transform, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """A step's tiles of v, -inf in place of the sampled token, ``y_element`` elements from the first boundary."""
    tiles = ()
    for i in tl.static_range(UNROLL):
        tiles = tiles + (summand(raw[i], transform),)  # type: ignore[assignment]
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
        v = summand(tl.load(row + columns, mask=mask, other=float("-inf")), transform)
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
    top = summand(z_y, transform) * transform[0]
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
    u, e, _, log_total = target_terms(z_y, maximum, others, transform)
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
