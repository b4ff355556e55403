"""Kernel and launcher: logits, row statistics and each token's two coefficients to the logits' gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import LogitTransform, RowStatistics

from .launch import launch_configuration, on_device_of, same_alignment, transform_constants
from .vocab_sweep import checked_token, load_target, row_gradient, row_offset, zero_row

_UNSPECIALIZED = ["N", "T", "V", "parts", "stride_b", "stride_t", "out_stride_b", "out_stride_t"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def token_gradient_kernel(
    logits,  # [B, T, V], unit stride on V
    out,  # [B, T, V], unit stride on V; may be logits
    tokens,  # [B, T]
    statistics,  # RowStatistics of [B, T]
    logprob_coefficients,  # [B, T]
    entropy_coefficients,  # [B, T] or None
    transform,
    N,
    T,
    V,
    parts,  # programs that share a row
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILT: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
):
    for item in range(tl.program_id(0), N * parts, tl.num_programs(0)):
        row = item // parts
        part = item - row * parts
        c = tl.load(logprob_coefficients + row)
        h = tl.full((), 0.0, tl.float32)
        entropy = h
        if TILT:
            h = tl.load(entropy_coefficients + row)
            entropy = tl.load(statistics.entropy + row)
        destination = out + row_offset(row, T, out_stride_b, out_stride_t)
        if (c != 0) | (h != 0):
            start = logits + row_offset(row, T, stride_b, stride_t)
            y = checked_token(tl.load(tokens + row), V)
            z_y = load_target(start, y)
            maximum = tl.load(statistics.maximum + row)
            rest = tl.load(statistics.rest + row)
            tl.debug_barrier()  # in place: every thread has its copy of z_y before any overwrites it
            row_gradient(
                start, destination, V, y, z_y, maximum, rest, entropy, c, h, transform, part, parts,
                LANES, VEC, UNROLL, SOFTCAP, TILT, ALIGNED_OUT, "evict_first",
            )  # fmt: skip
        else:
            zero_row(destination, V, part, parts, LANES, VEC, UNROLL)


def token_gradient(
    logits: Tensor,
    tokens: Tensor,
    statistics: RowStatistics,
    logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """Write to ``out``, which may be ``logits``, the gradient of a loss whose dloss/dlogp and dloss/dH are given.

    Few rows are shared by several programs each (no entry depends on that), but not in place: a program might write
    over the sampled token's logit before another has read it.
    """
    B, T, V = logits.shape
    if B * T == 0:
        return
    if entropy_coefficients is not None and statistics.entropy is None:
        raise ValueError("statistics: expected the rows' entropy beside entropy_coefficients, got None")
    softcap, aligned = transform.softcap is not None, same_alignment(logits, out)
    launch = launch_configuration(logits, reread=False, narrow=softcap or not aligned)
    in_place = out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    parts = 1 if in_place else launch.parts(B * T, V)
    with on_device_of(logits):
        token_gradient_kernel[launch.grid(B * T * parts)](
            logits, out, tokens, statistics, logprob_coefficients, entropy_coefficients,
            transform_constants(*transform), B * T, T, V, parts,
            logits.stride(0), logits.stride(1), out.stride(0), out.stride(1),
            LANES=launch.lanes, VEC=launch.vec, UNROLL=launch.unroll,
            SOFTCAP=softcap, TILT=entropy_coefficients is not None,
            ALIGNED_OUT=aligned,
            num_warps=launch.num_warps, **launch.options,
        )  # fmt: skip
