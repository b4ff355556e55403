"""Kernel and launcher: which rows the first sweep of the two-kernel path computes, one program per response."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hpo_fused.rows import ComputedRows, SurrogateSpec

from .launch import on_device_of
from .token_weights import STATISTICS_BLOCK, batch_factors, response_rows, response_statistics, row_weights

if TYPE_CHECKING:
    from hpo_fused.loss_batch import LossBatch

_UNSPECIALIZED = [
    "mask", "advantages", "token_weights", "cu_seqlens", "normalizers", "N", "T", "B",
    "mask_stride", "advantages_stride", "token_weights_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def computed_rows_kernel(
    compute,  # bool [B, T] or [N]
    mask,  # this and the next three: fields of TokenInputs
    advantages,
    token_weights,
    cu_seqlens,
    statistics,  # of response_statistics_kernel
    normalizers,  # [B] or None
    counts,  # of BatchWeights
    numbers,
    N,
    T,
    B,
    mask_stride,
    advantages_stride,
    token_weights_stride,
    BLOCK: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    WEIGHTING: tl.constexpr,
    OWN_COUNTS: tl.constexpr,
    PACKED: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    WEIGHT_PER_TOKEN: tl.constexpr,
    SEQUENCE: tl.constexpr,
    SKIP: tl.constexpr,  # rows without a learning signal; else masked ones only
):
    response = tl.program_id(0)
    factor, alpha = batch_factors(statistics, counts, numbers, B, NORMALIZATION, WEIGHTING, OWN_COUNTS, False)
    first, last = response_rows(response, cu_seqlens, N, T, PACKED)
    signal = tl.full((), 0, tl.int32)  # tokens that move the response's ratio
    if SKIP and SEQUENCE:
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(first, last, BLOCK):
            row = start + tl.arange(0, BLOCK)
            _, advantage, policy_weight, _ = row_weights(
                row, row < last, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages,
                advantages_stride, token_weights, token_weights_stride,
                NORMALIZATION, WEIGHTING, PACKED, ADVANTAGE_PER_TOKEN, WEIGHT_PER_TOKEN, False,
            )  # fmt: skip
            count += ((policy_weight != 0) & (advantage != 0)).to(tl.int32)
        signal = tl.sum(count)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < last
        unmasked, advantage, policy_weight, _ = row_weights(
            row, inside, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages,
            advantages_stride, token_weights, token_weights_stride,
            NORMALIZATION, WEIGHTING, PACKED, ADVANTAGE_PER_TOKEN, WEIGHT_PER_TOKEN, False,
        )  # fmt: skip
        live = unmasked
        if SKIP:
            if SEQUENCE:
                live = unmasked & (signal > 0)
            else:
                live = (policy_weight != 0) & (advantage != 0)
        tl.store(compute + row, live, mask=inside)


def computed_rows(
    batch: LossBatch, V: int, spec: SurrogateSpec, *, skip_inactive: bool, sequence_level: bool
) -> ComputedRows:
    """The rows to compute, in two launches; token ids or boundaries out of range are a device-side assert.

    Args:
        batch: the arguments of the call, with tokens.
        V: the vocabulary's size.
        spec: the lowered objective; KL and entropy terms make every unmasked row active.
        skip_inactive: whether to leave out rows without a learning signal.
        sequence_level: one token with a signal makes its whole response active.
    """
    inputs, weights = batch.inputs(), batch.weights()
    _, mask, advantages, token_weights, _, _, cu_seqlens, advantage_per_token, weight_per_token = inputs
    packed = cu_seqlens is not None
    B, T = (1, batch.shape[0]) if packed else tuple(batch.shape)
    compute = torch.empty((B, T), dtype=torch.bool, device=batch.device)
    if B * T == 0:
        return ComputedRows(compute, None)
    with on_device_of(compute):
        statistics = response_statistics(inputs, weights, B * T, T, V)
        computed_rows_kernel[(weights.responses,)](
            compute, mask, advantages, token_weights, cu_seqlens, statistics, weights.normalizers, weights.counts,
            weights.numbers, B * T, T, weights.responses, 0 if mask is None else mask.stride(0), advantages.stride(0),
            0 if token_weights is None else token_weights.stride(0),
            BLOCK=STATISTICS_BLOCK, NORMALIZATION=weights.normalization, WEIGHTING=weights.weighting,
            OWN_COUNTS=weights.own_counts, PACKED=packed, ADVANTAGE_PER_TOKEN=advantage_per_token,
            WEIGHT_PER_TOKEN=weight_per_token, SEQUENCE=sequence_level,
            SKIP=skip_inactive and spec.kl_coef == 0 and spec.entropy_coef == 0, num_warps=4,
        )  # fmt: skip
    return ComputedRows(compute, statistics)
