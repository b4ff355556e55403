"""Kernels and launcher: logits to each sampled token's log-probability, its row's softmax denominator and entropy.

Few rows would leave most processors idle, so several programs share a row then: each leaves the statistics of its
steps in memory, and a second, small kernel merges them in the order in which one program would have. A row's results
are the same to the bit however many rows the call has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import LogitTransform, RowStatistics

from .launch import launch_configuration, on_device_of, transform_constants
from .vocab_sweep import (
    checked_token,
    edge_statistics,
    load_target,
    merge_partials,
    row_offset,
    row_statistics,
    sweep_statistics,
)

_UNSPECIALIZED = ["N", "T", "V", "parts", "slots", "stride_b", "stride_t"]

# What sharing rows must take off the longest program's reading. A program of 512 threads reads 28 KB a microsecond:
# 32 KB in flight, 0.8 us of latency and 0.35 us of arithmetic. The second kernel costs about 3 us, its launch included.
_WORTH_SHARING_BYTES = 96 * 1024


@triton.jit
def _store(statistics, row, logprob, maximum, rest, entropy, ENTROPY: tl.constexpr):
    tl.store(statistics.logprobs + row, logprob)
    tl.store(statistics.maximum + row, maximum)
    tl.store(statistics.rest + row, rest)
    if ENTROPY:
        tl.store(statistics.entropy + row, entropy)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def token_statistics_kernel(
    logits,  # [B, T, V], unit stride on V
    tokens,  # [B, T]
    compute,  # [B, T] bool
    statistics,  # RowStatistics of [B, T]
    partials,  # float32 [B * T, slots, 3, LANES]: each step's statistics, where several programs share a row; or None
    transform,
    N,
    T,
    V,
    parts,  # programs that share a row
    slots,  # steps that a row has at most
    stride_b,
    stride_t,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    for item in range(tl.program_id(0), N * parts, tl.num_programs(0)):
        row = item // parts
        part = item - row * parts
        logprob = tl.full((), float("nan"), tl.float32)
        maximum, rest, entropy = logprob, logprob, logprob
        if tl.load(compute + row):
            start = logits + row_offset(row, T, stride_b, stride_t)
            y = checked_token(tl.load(tokens + row), V)
            # Shared rows: the edge is done where the steps are merged.
            edge = edge_statistics(start, V, y, transform, LANES, VEC, SOFTCAP, ENTROPY)
            lanes = sweep_statistics(
                edge, start, V, y, transform, part, parts, partials, row * slots,
                LANES, VEC, UNROLL, SOFTCAP, ENTROPY, "evict_first", True,
            )  # fmt: skip
            if partials is None:
                z_y = load_target(start, y)
                logprob, maximum, rest, entropy = row_statistics(lanes, z_y, transform, SOFTCAP, ENTROPY)
        if partials is None:
            _store(statistics, row, logprob, maximum, rest, entropy, ENTROPY)


@triton.jit(do_not_specialize=["N", "T", "V", "slots", "stride_b", "stride_t"])
def combine_statistics_kernel(
    logits,  # [B, T, V], unit stride on V
    tokens,  # [B, T]
    compute,  # [B, T] bool
    statistics,  # RowStatistics of [B, T]
    partials,  # float32 [B * T, slots, 3, LANES]
    transform,
    N,
    T,
    V,
    slots,
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
            lanes = edge_statistics(start, V, y, transform, LANES, VEC, SOFTCAP, ENTROPY)
            lanes = merge_partials(lanes, partials, row * slots, start, V, LANES, VEC, UNROLL, ENTROPY)
            z_y = load_target(start, y)
            logprob, maximum, rest, entropy = row_statistics(lanes, z_y, transform, SOFTCAP, ENTROPY)
        _store(statistics, row, logprob, maximum, rest, entropy, ENTROPY)


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
    slots, parts = launch.steps(V), launch.parts(B * T, V)
    row_bytes = V * logits.element_size()
    partials = None
    if row_bytes - row_bytes // parts >= _WORTH_SHARING_BYTES:
        partials = torch.empty(B * T, slots, 3, launch.lanes, dtype=torch.float32, device=logits.device)
    else:
        parts = 1
    constants, strides = transform_constants(*transform), (logits.stride(0), logits.stride(1))
    settings = dict(
        LANES=launch.lanes, VEC=launch.vec, UNROLL=launch.unroll, SOFTCAP=softcap, ENTROPY=entropy,
        num_warps=launch.num_warps, **launch.options,
    )  # fmt: skip
    with on_device_of(logits):
        token_statistics_kernel[launch.grid(B * T * parts)](
            logits, tokens, compute, statistics, partials, constants, B * T, T, V, parts, slots, *strides, **settings
        )
        if partials is not None:
            combine_statistics_kernel[launch.grid(B * T)](
                logits, tokens, compute, statistics, partials, constants, B * T, T, V, slots, *strides, **settings
            )
    return statistics
