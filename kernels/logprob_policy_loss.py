"""Kernel and launcher: log-probabilities to the loss and its gradient, one program per response.

Token-level ratios take one walk over the response. Sequence-level ones take three: for the mean log-ratio x; for the
surrogate s(x, A) of every token's weight, whose mean derivative each token receives (DESIGN's x is the mean, and the
mean's adjoint is a mean); for the penalties and the results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import LogprobRows, SurrogateSpec

from .elementary import to_float32
from .launch import on_device_of
from .surrogate import token_loss
from .token_weights import (
    INPUT_STRIDES,
    INPUTS,
    batch_factors,
    load_token,
    response_rows,
    response_statistics,
    row_weights,
)

if TYPE_CHECKING:
    from hpo_fused.loss_batch import LossBatch

# Rows per step, one a thread (256 spill 8 bytes on sm_120). Fixed: a new length must not recompile.
LOSS_BLOCK = 128
_LENGTHS = ["N", "T", "B", "logprobs_stride", "entropies_stride"]
_UNSPECIALIZED = [*INPUTS[1:], *INPUT_STRIDES[1:], "logprobs", "entropies", "cu_seqlens", "normalizers", *_LENGTHS]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def logprob_policy_loss_kernel(
    logprobs,  # [B, T] or [N]
    entropies,  # likewise, or None
    mask,  # this and the next five: fields of TokenInputs
    advantages,
    token_weights,
    old_logprobs,
    ref_logprobs,
    cu_seqlens,
    statistics,  # of response_statistics_kernel
    normalizers,  # [B] or None
    counts,  # of BatchWeights
    numbers,
    losses,  # [B]: of each response
    logprob_coefficients,  # this and the rest [B, T]
    entropy_coefficients,  # or None
    known_logprobs,  # logprobs as float32, 0 where masked
    known_entropies,  # likewise, or None
    active,  # bool
    parameters,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    N,
    T,
    B,
    logprobs_stride,
    entropies_stride,
    mask_stride,
    advantages_stride,
    token_weights_stride,
    old_logprobs_stride,
    ref_logprobs_stride,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    WEIGHTING: tl.constexpr,
    OWN_COUNTS: tl.constexpr,
    PACKED: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    WEIGHT_PER_TOKEN: tl.constexpr,
    SEQUENCE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_KL: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
):
    response = tl.program_id(0)
    factor, alpha = batch_factors(statistics, counts, numbers, B, NORMALIZATION, WEIGHTING, OWN_COUNTS, False)
    first, last = response_rows(response, cu_seqlens, N, T, PACKED)
    length = tl.maximum(tl.load(statistics + 2 + response), 1).to(tl.float32)

    log_ratio = tl.full((), 0.0, tl.float32)
    if SEQUENCE and HAS_OLD:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(first, last, BLOCK):
            row = start + tl.arange(0, BLOCK)
            unmasked = row < last
            if mask is not None:
                unmasked = unmasked & (load_token(mask, row, unmasked, T, mask_stride, PACKED) != 0)
            logprob = to_float32(load_token(logprobs, row, unmasked, T, logprobs_stride, PACKED))
            old = to_float32(load_token(old_logprobs, row, unmasked, T, old_logprobs_stride, PACKED))
            total += tl.where(unmasked, logprob - old, 0.0)
        log_ratio = tl.sum(total) / length
    loss = tl.zeros([BLOCK], tl.float32)
    shared = tl.full((), 0.0, tl.float32)
    signal = tl.full((), 0, tl.int32)  # tokens that move the response's ratio
    zero = tl.zeros([BLOCK], tl.float32)
    if SEQUENCE:
        total = tl.zeros([BLOCK], tl.float32)
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(first, last, BLOCK):
            row = start + tl.arange(0, BLOCK)
            _, advantage, policy_weight, _ = row_weights(
                row, row < last, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages,
                advantages_stride, token_weights, token_weights_stride,
                NORMALIZATION, WEIGHTING, PACKED, ADVANTAGE_PER_TOKEN, WEIGHT_PER_TOKEN, False,
            )  # fmt: skip
            value, c, _ = token_loss(
                zero, zero, advantage, policy_weight, zero, zero + log_ratio, zero,
                parameters, max_log_ratio, kl_coef, entropy_coef, KIND, HAS_OLD, False, False,
            )  # fmt: skip
            loss += value
            total += c
            count += ((policy_weight != 0) & (advantage != 0)).to(tl.int32)
        shared = tl.sum(total) / length
        signal = tl.sum(count)
    for start in range(first, last, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < last
        unmasked, advantage, policy_weight, penalty_weight = row_weights(
            row, inside, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages,
            advantages_stride, token_weights, token_weights_stride,
            NORMALIZATION, WEIGHTING, PACKED, ADVANTAGE_PER_TOKEN, WEIGHT_PER_TOKEN, False,
        )  # fmt: skip
        logprob = tl.where(unmasked, to_float32(load_token(logprobs, row, unmasked, T, logprobs_stride, PACKED)), 0.0)
        old, ref, entropy = zero, zero, zero
        if HAS_OLD:
            old = to_float32(load_token(old_logprobs, row, unmasked, T, old_logprobs_stride, PACKED))
        if HAS_KL:
            ref = to_float32(load_token(ref_logprobs, row, unmasked, T, ref_logprobs_stride, PACKED))
        if entropies is not None:
            entropy = tl.where(
                unmasked, to_float32(load_token(entropies, row, unmasked, T, entropies_stride, PACKED)), 0.0
            )
        live = unmasked
        if not (HAS_KL or ENTROPY_TERM):
            if SEQUENCE:
                live = unmasked & (signal > 0)
            else:
                live = (policy_weight != 0) & (advantage != 0)
        if SEQUENCE:
            policy_weight = zero
        value, c, h = token_loss(
            logprob, entropy, advantage, policy_weight, penalty_weight, logprob - old, ref,
            parameters, max_log_ratio, kl_coef, entropy_coef, KIND, HAS_OLD, HAS_KL, ENTROPY_TERM,
        )  # fmt: skip
        loss += value
        if SEQUENCE:
            c += tl.where(unmasked, shared, 0.0)
        tl.store(logprob_coefficients + row, c, mask=inside)
        tl.store(known_logprobs + row, logprob, mask=inside)
        tl.store(active + row, live, mask=inside)
        if entropies is not None:
            tl.store(known_entropies + row, entropy, mask=inside)
        if ENTROPY_TERM:
            tl.store(entropy_coefficients + row, zero + h, mask=inside)
    tl.store(losses + response, tl.sum(loss))


def logprob_policy_loss(
    logprobs: Tensor, entropy: Tensor | None, batch: LossBatch, spec: SurrogateSpec, *, sequence_level: bool,
    statistics: Tensor | None = None,
) -> LogprobRows:  # fmt: skip
    """Loss of log-probabilities (and entropies) of the batch's shape, any floating dtype, and its derivatives.

    Two launches; one with ``statistics``, of this batch's :class:`ComputedRows`. ``entropy`` may be None without an
    entropy term.
    """
    inputs, weights = batch.inputs(), batch.weights()
    _, mask, advantages, token_weights, old, ref, cu_seqlens, advantage_per_token, weight_per_token = inputs
    packed = cu_seqlens is not None
    B, T = (1, batch.shape[0]) if packed else tuple(batch.shape)

    def rows(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch.shape, dtype=dtype, device=batch.device)

    responses = weights.responses
    losses = torch.empty(responses, dtype=torch.float32, device=batch.device)
    result = LogprobRows(
        losses, rows(), rows() if spec.entropy_coef != 0 else None, rows(), None if entropy is None else rows(),
        rows(torch.bool),
    )  # fmt: skip
    if B * T == 0:
        losses.zero_()
        return result
    with on_device_of(logprobs):
        if statistics is None:
            statistics = response_statistics(inputs._replace(tokens=None), weights, B * T, T, 0)
        logprob_policy_loss_kernel[(responses,)](
            logprobs, entropy, mask, advantages, token_weights, old, ref if spec.kl_coef != 0 else None, cu_seqlens,
            statistics, weights.normalizers, weights.counts, weights.numbers, *result,
            spec.parameters, spec.max_log_ratio, spec.kl_coef, spec.entropy_coef, B * T, T, responses,
            logprobs.stride(0), 0 if entropy is None else entropy.stride(0),
            0 if mask is None else mask.stride(0), advantages.stride(0),
            0 if token_weights is None else token_weights.stride(0),
            0 if old is None else old.stride(0), 0 if ref is None else ref.stride(0),
            BLOCK=LOSS_BLOCK, KIND=spec.kind, NORMALIZATION=weights.normalization, WEIGHTING=weights.weighting,
            OWN_COUNTS=weights.own_counts, PACKED=packed, ADVANTAGE_PER_TOKEN=advantage_per_token,
            WEIGHT_PER_TOKEN=weight_per_token, SEQUENCE=sequence_level, HAS_OLD=old is not None,
            HAS_KL=spec.kl_coef != 0, ENTROPY_TERM=spec.entropy_coef != 0, num_warps=4,
        )  # fmt: skip
    return result
