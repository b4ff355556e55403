"""Kernel and launcher: logits to each sampled token's log-probability, its row's softmax denominator and entropy."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.interface import LogitTransform, SoftmaxStatistics

from .first_sweep import combine_lanes, lane_statistics, leads, row_statistics
from .launch import launch_configuration, launch_programs, pressure_of, transform_constants
from .numerics import to_float32
from .row_tiles import row_offset
from .transform import row_scale


@triton.jit(
    do_not_specialize=[
        "targets", "logprobs", "maxima", "others", "entropies", "temperatures", "N", "T", "V", "stride_b", "stride_t",
    ]
)  # fmt: skip
def token_statistics_kernel(
    logits,  # [B, T, V], unit stride on V
    targets,  # int32 [B, T]
    logprobs,  # this to entropies: fields of SoftmaxStatistics
    maxima,
    others,
    entropies,
    transform,  # of launch.transform_constants
    temperatures,  # float32 [B, T] by which transform is divided; None: 1
    N,  # B * T
    T,
    V,
    stride_b,
    stride_t,
    LANES: tl.constexpr,  # this and UNROLL: how a row is cut, see row_tiles.py
    UNROLL: tl.constexpr,
    LEADER: tl.constexpr,  # see first_sweep.leads
):
    """The first sweep of every row whose target is an id; NaN in the others, which are not read."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    ENTROPY: tl.constexpr = entropies is not None
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        y = tl.load(targets + row)
        if (y >= 0) & (y < V):
            scale, inverse = row_scale(transform, temperatures, row)
            own = (scale, inverse, transform[2])
            start = logits + row_offset(row, T, stride_b, stride_t)
            lanes = lane_statistics(start, V, y, own, LANES, VEC, UNROLL, ENTROPY, "evict_first")
            z_y = to_float32(tl.load(start + y))
            maximum, total, moment = combine_lanes(lanes, z_y, own, ENTROPY)
            if leads(LEADER):
                logprob, entropy = row_statistics(maximum, total, moment, z_y, own, ENTROPY)
                tl.store(logprobs + row, logprob)
                tl.store(maxima + row, maximum)
                tl.store(others + row, total)
                if ENTROPY:
                    tl.store(entropies + row, entropy)
        else:
            unknown = tl.full((), float("nan"), tl.float32)
            tl.store(logprobs + row, unknown)
            tl.store(maxima + row, unknown)
            tl.store(others + row, unknown)
            if ENTROPY:
                tl.store(entropies + row, unknown)


def token_statistics(logits: Tensor, targets: Tensor, transform: LogitTransform, statistics: SoftmaxStatistics) -> None:
    """Write the softmax statistics of every row of ``logits`` [B, T, V] whose target is an id; NaN elsewhere.

    Args:
        logits: [B, T, V], unit stride on V.
        targets: int32 [B, T], ids in [0, V) or codes.
        transform: temperature and softcap.
        statistics: where they go, contiguous float32 [B, T]; its entropy is None where that is not wanted.
    """
    B, T, V = logits.shape
    if B * T == 0:
        return
    launch = launch_configuration(logits, reread=False, pressure=pressure_of(transform.softcap))
    arguments = (
        logits, targets, *statistics, transform_constants(*transform[:2]), transform.temperatures, B * T, T, V,
        *logits.stride()[:2],
    )  # fmt: skip
    constants = {"LANES": launch.lanes, "UNROLL": launch.unroll, "LEADER": launch.leader}
    launch_programs(token_statistics_kernel, launch.programs(B * T), arguments, constants, launch.options)
