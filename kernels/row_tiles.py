"""How a row of V elements is cut: 16-byte groups, tiles and steps of them, the edges beside them, and parts of a row.

A tile is [LANES, VEC] elements, VEC being 16 bytes' worth; a step is UNROLL tiles.
"""

import triton
import triton.language as tl


@triton.jit
def frame(row, V, VEC: tl.constexpr):
    """Elements before the first 16-byte boundary, and whole groups from there on."""
    itemsize: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    misalignment = ((-row.to(tl.int64)) & (VEC * itemsize - 1)).to(tl.int32)
    head = tl.minimum(misalignment // itemsize, V)
    return head, (V - head) // VEC


@triton.jit
def edge_columns(head, groups, LANES: tl.constexpr, VEC: tl.constexpr):
    lane = tl.arange(0, LANES)
    return tl.where(lane < head, lane, lane + groups * VEC)


@triton.jit
def tile_offsets(step, i: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """Offset of a tile from the first boundary, and the elements' offsets in it."""
    lane = tl.arange(0, LANES)[:, None]
    element = tl.arange(0, VEC)[None, :]
    return (step * UNROLL + i) * (LANES * VEC), lane * VEC + element


@triton.jit
def group_mask(step, i: tl.constexpr, groups, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """[LANES, 1]: constant along a group, so that masked accesses stay 16 bytes wide."""
    return (step * UNROLL + i) * LANES + tl.arange(0, LANES)[:, None] < groups


@triton.jit
def without_target(
    tile, step, i: tl.constexpr, y_element, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr
):
    """-inf in place of the sampled token. Compares an element's index in its group, a literal, with one value per
    lane: comparing columns would keep VEC of them in registers throughout the loop."""
    base = (step * UNROLL + i) * (LANES * VEC)
    distance = (y_element - base) - tl.arange(0, LANES)[:, None] * VEC
    return tl.where(tl.arange(0, VEC)[None, :] == distance, float("-inf"), tile)


@triton.jit
def load_step(
    body, step, groups,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The step's tiles as loaded, all issued before any is used."""
    tiles = ()
    for i in tl.static_range(UNROLL):
        base, offsets = tile_offsets(step, i, LANES, VEC, UNROLL)
        if MASKED:
            mask = group_mask(step, i, groups, LANES, UNROLL)
            tile = tl.load(body + base + offsets, mask=mask, other=float("-inf"), eviction_policy=POLICY)
        else:
            tile = tl.load(body + base + offsets, eviction_policy=POLICY)
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def share_of_row(groups, part, parts, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """First whole step of the part-th of ``parts`` parts of a row (None: of all of it), the one after its last, and
    whether the row's last, masked step is its own too."""
    steps = groups // (LANES * UNROLL)
    if parts is None:
        return 0, steps, steps * (LANES * UNROLL) < groups
    else:
        count = tl.cdiv(groups, LANES * UNROLL)
        last = (part + 1) * count // parts
        return part * count // parts, tl.minimum(last, steps), last > steps
