"""How a row of V elements is cut: whole 16-byte groups in tiles and steps, and the edge beside them.

    row           | lead | group | group | ...                                 ... | group | tail |
                  ^      ^ first 16-byte boundary                                          ^ last whole group ends
    edge          the fewer than 2 * VEC elements of lead and tail, one element per lane
    tile          [LANES, VEC]: one group of VEC elements (16 bytes) for each lane
    step          UNROLL tiles, whose loads are all issued before any is used; the last step is masked

Groups are aligned to 16 bytes in memory, not to the row's start: for an odd V seven rows in eight start between
boundaries. The edge costs a handful of instructions per row and needs no variant per alignment.
"""

import triton
import triton.language as tl


@triton.jit
def row_offset(row, T, stride_b, stride_t):
    """Element offset of row b * T + t, in 64 bits: logits pass 2^31 elements at 14,000 tokens of a 150k vocabulary."""
    b = row // T
    t = row - b * T
    return tl.cast(b, tl.int64) * stride_b + tl.cast(t, tl.int64) * stride_t


@triton.jit
def frame(row, V, VEC: tl.constexpr):
    """Elements before the first 16-byte boundary of a row, and whole groups from there on."""
    itemsize: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    misalignment = ((-row.to(tl.int64)) & (VEC * itemsize - 1)).to(tl.int32)
    lead = tl.minimum(misalignment // itemsize, V)
    return lead, (V - lead) // VEC


@triton.jit
def edge_columns(lead, groups, LANES: tl.constexpr, VEC: tl.constexpr):
    """[LANES]: the column of each lane's edge element; only the first V - groups * VEC lanes have one."""
    lane = tl.arange(0, LANES)
    return tl.where(lane < lead, lane, lane + groups * VEC)


@triton.jit
def tile_offsets(step, i: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """Offset of the step's i-th tile from the first boundary, and [LANES, VEC] offsets of the elements in it."""
    lane = tl.arange(0, LANES)[:, None]
    element = tl.arange(0, VEC)[None, :]
    return (step * UNROLL + i) * (LANES * VEC), lane * VEC + element


@triton.jit
def group_mask(step, i: tl.constexpr, groups, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """[LANES, 1]: groups of a tile that exist; constant along a group, so that masked accesses stay 16 bytes wide."""
    return (step * UNROLL + i) * LANES + tl.arange(0, LANES)[:, None] < groups


@triton.jit
def without_target(
    tile, step, i: tl.constexpr, y_element, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr
):
    """A tile with -inf in place of the sampled token, ``y_element`` elements from the first boundary.

    Compares an element's index in its group, a literal, with one value per lane: comparing columns would keep VEC of
    them in registers throughout the loop.
    """
    base = (step * UNROLL + i) * (LANES * VEC)
    distance = (y_element - base) - tl.arange(0, LANES)[:, None] * VEC
    return tl.where(tl.arange(0, VEC)[None, :] == distance, float("-inf"), tile)


@triton.jit
def load_step(
    body, step, groups,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, PARTIAL: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """The step's tiles as a tuple, all loads issued before any is used; -inf beyond the row where ``PARTIAL``."""
    tiles = ()
    for i in tl.static_range(UNROLL):
        base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
        if PARTIAL:
            mask = group_mask(step, i, groups, LANES, UNROLL)
            tile = tl.load(body + base + offsets, mask=mask, other=float("-inf"), eviction_policy=EVICTION)
        else:
            tile = tl.load(body + base + offsets, eviction_policy=EVICTION)
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles
