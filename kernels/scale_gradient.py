"""Kernel and launcher: multiply a gradient by the upstream gradient, without traffic when that is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_configuration, launch_programs
from .numerics import round_to, to_float32
from .row_tiles import edge_columns, frame, group_mask, load_step, row_offset, tile_offsets


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


@triton.jit(do_not_specialize=["N", "T", "V", "stride_b", "stride_t"])
def scale_gradient_kernel(
    gradient,  # [B, T, V], unit stride on V
    factor,  # [] float32
    N,  # B * T
    T,
    V,
    stride_b,
    stride_t,
    LANES: tl.constexpr,  # this and UNROLL: how a row is cut, see row_tiles.py
    UNROLL: tl.constexpr,
):
    """``gradient`` *= ``factor``, a row per iteration of persistent programs."""
    VEC: tl.constexpr = 128 // gradient.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    # Decided here and not on the host, which would have to wait for the device to learn the factor.
    multiplier = tl.load(factor)
    if multiplier != 1.0:
        for row in range(tl.program_id(0), N, tl.num_programs(0)):
            scale_row(gradient + row_offset(row, T, stride_b, stride_t), V, multiplier, LANES, VEC, UNROLL)


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """``gradient`` [B, T, V] *= ``factor``, 0-d float32 on the same device: float32 product, rounded once."""
    B, T, V = gradient.shape
    if B * T == 0:
        return
    launch = launch_configuration(gradient, reread=False)
    arguments = (gradient, factor, B * T, T, V, *gradient.stride()[:2])
    constants = {"LANES": launch.lanes, "UNROLL": launch.unroll}
    launch_programs(scale_gradient_kernel, launch.programs(B * T), arguments, constants, launch.options)
