"""Kernel and launcher: logits, softmax statistics and each token's gradient coefficients to the logits' gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.interface import LogitTransform, SoftmaxStatistics

from .launch import launch_configuration, launch_programs, pressure_of, same_alignment, transform_constants
from .numerics import to_float32
from .row_tiles import row_offset
from .second_sweep import gradient_constants, row_gradient, zero_row
from .transform import row_scale


@triton.jit(
    do_not_specialize=[
        "targets", "maxima", "others", "entropies", "logprob_coefficients", "entropy_coefficients", "temperatures", "N",
        "T", "V", "stride_b", "stride_t", "out_stride_b", "out_stride_t",
    ]
)  # fmt: skip
def token_gradient_kernel(
    logits,  # [B, T, V], unit stride on V
    out,  # [B, T, V], unit stride on V; may be logits
    targets,  # int32 [B, T]
    maxima,  # this to entropies: fields of SoftmaxStatistics
    others,
    entropies,
    logprob_coefficients,  # float32 [B, T]
    entropy_coefficients,  # float32 [B, T] or None
    transform,  # of launch.transform_constants
    temperatures,  # float32 [B, T] by which transform is divided; None: 1
    N,  # B * T
    T,
    V,
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    ALIGNED_OUT: tl.constexpr,  # see second_sweep.row_gradient
    LANES: tl.constexpr,  # this and UNROLL: how a row is cut, see row_tiles.py
    UNROLL: tl.constexpr,
):
    """The second sweep of every row whose coefficients are not both 0; zeros in the others, which are not read."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        y = tl.load(targets + row)
        c = tl.load(logprob_coefficients + row)
        h = tl.full((), 0.0, tl.float32)
        entropy = h
        if entropy_coefficients is not None:
            h = tl.load(entropy_coefficients + row)
            entropy = tl.load(entropies + row)
        destination = out + row_offset(row, T, out_stride_b, out_stride_t)
        if (y >= 0) & (y < V) & ((c != 0) | (h != 0)):  # NaN differs from 0: an undefined row gets a NaN gradient
            scale, inverse = row_scale(transform, temperatures, row)
            own = (scale, inverse, transform[2])
            start = logits + row_offset(row, T, stride_b, stride_t)
            z_y = to_float32(tl.load(start + y))
            maximum = tl.load(maxima + row)
            total = tl.load(others + row)
            BONUS: tl.constexpr = entropy_coefficients is not None
            constant, slope, target = gradient_constants(maximum, total, entropy, z_y, c, h, own, BONUS)
            tl.debug_barrier()  # in place: every thread has its copy of z_y before any overwrites it
            row_gradient(
                start, destination, V, y, maximum, constant, slope, target, own,
                LANES, VEC, UNROLL, BONUS, ALIGNED_OUT,
            )  # fmt: skip
        else:
            zero_row(destination, V, LANES, VEC, UNROLL)


def token_gradient(
    logits: Tensor,
    targets: Tensor,
    statistics: SoftmaxStatistics,
    logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """Write to ``out`` the gradient of a loss whose derivatives by log-probability and entropy are given.

    Args:
        logits: [B, T, V], unit stride on V.
        targets: int32 [B, T]; rows with a code in place of an id get zeros.
        statistics: of the first sweep, which must have computed every row that has a coefficient.
        logprob_coefficients: dloss/dlogp, contiguous float32 [B, T].
        entropy_coefficients: dloss/dH, likewise; None: zeros.
        transform: temperature and softcap.
        out: [B, T, V] of logits' dtype; may be ``logits``. Written in every row.
    """
    B, T, V = logits.shape
    if B * T == 0:
        return
    if entropy_coefficients is not None and statistics.entropy is None:
        raise ValueError("statistics: expected the rows' entropy beside entropy_coefficients, got None")
    aligned = same_alignment(logits, out)
    pressure = pressure_of(transform.softcap, entropy_coefficients is not None, aligned)
    launch = launch_configuration(logits, reread=False, pressure=pressure)
    arguments = (
        logits, out, targets, *statistics[1:], logprob_coefficients, entropy_coefficients,
        transform_constants(*transform[:2]), transform.temperatures, B * T, T, V, *logits.stride()[:2],
        *out.stride()[:2],
    )  # fmt: skip
    constants = {"ALIGNED_OUT": aligned, "LANES": launch.lanes, "UNROLL": launch.unroll}
    launch_programs(token_gradient_kernel, launch.programs(B * T), arguments, constants, launch.options)
