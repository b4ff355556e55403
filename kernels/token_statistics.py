"""Kernel and launcher: logits to each sampled token's log-probability, its row's softmax denominator and entropy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import LogitTransform, RowStatistics

from .launch import launch_configuration, on_device_of, transform_constants
from .vocab_sweep import checked_token, load_target, row_offset, row_statistics, sweep_statistics

_UNSPECIALIZED = ["N", "T", "V", "stride_b", "stride_t"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def token_statistics_kernel(
    logits,  # [B, T, V], unit stride on V
    tokens,  # [B, T]
    compute,  # [B, T] bool
    statistics,  # RowStatistics of [B, T]
    transform,
    N,
    T,
    V,
    stride_b,
    stride_t,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        logprob = tl.full((), float("nan"), tl.float32)
        maximum, rest, entropy = logprob, logprob, logprob
        if tl.load(compute + row):
            start = logits + row_offset(row, T, stride_b, stride_t)
            y = checked_token(tl.load(tokens + row), V)
            lanes = sweep_statistics(start, V, y, transform, LANES, VEC, UNROLL, SOFTCAP, ENTROPY, "evict_first")
            z_y = load_target(start, y)
            logprob, maximum, rest, entropy = row_statistics(lanes, z_y, transform, SOFTCAP, ENTROPY)
        tl.store(statistics.logprobs + row, logprob)
        tl.store(statistics.maximum + row, maximum)
        tl.store(statistics.rest + row, rest)
        if ENTROPY:
            tl.store(statistics.entropy + row, entropy)


def token_statistics(
    logits: Tensor, tokens: Tensor, compute: Tensor, transform: LogitTransform, *, entropy: bool
) -> RowStatistics:
    """Statistics of every row of ``logits`` [B, T, V] where ``compute``; NaN, without reading the row, elsewhere."""
    B, T, V = logits.shape
    logprobs, maximum, rest = (torch.empty(B, T, dtype=torch.float32, device=logits.device) for _ in range(3))
    statistics = RowStatistics(logprobs, maximum, rest, torch.empty_like(rest) if entropy else None)
    if B * T == 0:
        return statistics
    softcap = transform.softcap is not None
    launch = launch_configuration(logits, reread=False, narrow=softcap)
    with on_device_of(logits):
        token_statistics_kernel[launch.grid(B * T)](
            logits, tokens, compute, statistics, transform_constants(*transform),
            B * T, T, V, logits.stride(0), logits.stride(1),
            LANES=launch.lanes, VEC=launch.vec, UNROLL=launch.unroll,
            SOFTCAP=softcap, ENTROPY=entropy,
            num_warps=launch.num_warps, **launch.options,
        )  # fmt: skip
    return statistics
