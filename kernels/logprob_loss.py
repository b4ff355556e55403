"""Kernel and launcher: log-probabilities to the loss and its gradient coefficients, one program per response.

Token-level ratios take one walk over the response. Sequence-level ones take three: for the mean log-ratio x; for the
surrogate s(x, A) of every token's weight, whose mean derivative each token receives (x is a mean, and a mean's
adjoint is a mean); for the penalties and the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.interface import LogprobLoss, LossSpec, TokenTerms

from .launch import on_device_of, response_launch
from .surrogate import token_loss
from .token_terms import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    MASKED,
    OLD_LOGPROB,
    POLICY_WEIGHT,
    REF_LOGPROB,
    response_range,
)

# Tokens per step, one a thread (256 spill 8 bytes on sm_120). Fixed: a new length must not recompile.
TOKENS_BLOCK = tl.constexpr(128)


@triton.jit(
    do_not_specialize=["logprobs", "entropy", "targets", "values", "response_statistics", "cu_seqlens", "N", "T"]
)
def logprob_loss_kernel(
    logprobs,  # float32 [B, T]
    entropy,  # float32 [B, T] or None
    targets,  # this to cu_seqlens: fields of TokenTerms
    values,
    response_statistics,
    cu_seqlens,
    results,  # float32 [2 or 3, B, T]: losses, log-probabilities, entropies
    logprob_coefficients,  # float32 [B, T]
    entropy_coefficients,  # float32 [B, T] or None
    parameters,  # this, the next and the constexprs: fields of LossSpec
    max_log_ratio,
    N,  # B * T
    T,
    KIND: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    SEQUENCE: tl.constexpr,
):
    """Sequence level only: 1. mean log-ratio; 2. losses' sum and shared coefficient. Always: 3. every token's own."""
    response = tl.program_id(0)
    first, last = response_range(response, cu_seqlens, N, T)
    length = tl.maximum(tl.load(response_statistics + response), 1).to(tl.float32)
    zero = tl.zeros([TOKENS_BLOCK], tl.float32)
    log_ratio = tl.full((), 0.0, tl.float32)
    shared = tl.full((), 0.0, tl.float32)
    if SEQUENCE:
        if OFF_POLICY:
            total = zero
            for start in range(first, last, TOKENS_BLOCK):
                row = start + tl.arange(0, TOKENS_BLOCK)
                unmasked = tl.load(targets + row, mask=row < last, other=MASKED) != MASKED
                logprob = tl.load(logprobs + row, mask=unmasked, other=0.0)
                total += logprob - tl.load(values + OLD_LOGPROB * N + row, mask=unmasked, other=0.0)
            log_ratio = tl.sum(total) / length
        total = zero
        for start in range(first, last, TOKENS_BLOCK):
            row = start + tl.arange(0, TOKENS_BLOCK)
            advantage = tl.load(values + ADVANTAGE * N + row, mask=row < last, other=0.0)
            policy_weight = tl.load(values + POLICY_WEIGHT * N + row, mask=row < last, other=0.0)
            _, c, _ = token_loss(
                zero, zero, advantage, policy_weight, zero, zero, zero + log_ratio, zero,
                parameters, max_log_ratio, KIND, OFF_POLICY, False, False,
            )  # fmt: skip
            total += c
        shared = tl.sum(total) / length
    for start in range(first, last, TOKENS_BLOCK):
        row = start + tl.arange(0, TOKENS_BLOCK)
        inside = row < last
        unmasked = tl.load(targets + row, mask=inside, other=MASKED) != MASKED
        advantage = tl.load(values + ADVANTAGE * N + row, mask=inside)
        policy_weight = tl.load(values + POLICY_WEIGHT * N + row, mask=inside)
        logprob = tl.load(logprobs + row, mask=unmasked, other=0.0)
        row_entropy, entropy_weight, kl_weight, ref, x = zero, zero, zero, zero, zero + log_ratio
        if entropy is not None:
            row_entropy = tl.load(entropy + row, mask=unmasked, other=0.0)
            tl.store(results + 2 * N + row, row_entropy, mask=inside)
        if ENTROPY_BONUS:
            entropy_weight = tl.load(values + ENTROPY_WEIGHT * N + row, mask=inside)
        if KL:
            kl_weight = tl.load(values + KL_WEIGHT * N + row, mask=inside)
            ref = tl.load(values + REF_LOGPROB * N + row, mask=inside)
        if OFF_POLICY and not SEQUENCE:
            x = logprob - tl.load(values + OLD_LOGPROB * N + row, mask=inside)
        response_loss = zero
        if SEQUENCE:  # the policy's part, whose coefficient all tokens share; below, the penalties' alone
            response_loss, _, _ = token_loss(
                zero, zero, advantage, policy_weight, zero, zero, x, zero,
                parameters, max_log_ratio, KIND, OFF_POLICY, False, False,
            )  # fmt: skip
            policy_weight = zero
        loss, c, h = token_loss(
            logprob, row_entropy, advantage, policy_weight, kl_weight, entropy_weight, x, ref,
            parameters, max_log_ratio, KIND, OFF_POLICY, KL, ENTROPY_BONUS,
        )  # fmt: skip
        if SEQUENCE:
            loss += response_loss
            c += tl.where(unmasked, shared, 0.0)
        tl.store(results + row, loss, mask=inside)
        tl.store(results + N + row, logprob, mask=inside)
        tl.store(logprob_coefficients + row, c, mask=inside)
        if ENTROPY_BONUS:
            tl.store(entropy_coefficients + row, h, mask=inside)


def logprob_loss(logprobs: Tensor, entropy: Tensor | None, terms: TokenTerms, spec: LossSpec) -> LogprobLoss:
    """Every token's loss and gradient coefficients, in one launch.

    Args:
        logprobs: of the sampled tokens, contiguous float32 [B, T]; anything where masked.
        entropy: of their distributions, likewise; may be None without an entropy bonus.
        terms: the batch's.
        spec: the lowered objective.
    """
    B, T = logprobs.shape
    results = torch.empty(2 if entropy is None else 3, B, T, dtype=torch.float32, device=logprobs.device)
    c = torch.empty_like(logprobs)
    h = torch.empty_like(logprobs) if spec.entropy_bonus else None
    responses = terms.response_statistics.shape[1]
    if B * T == 0:
        return LogprobLoss(results, c, h)
    with on_device_of(logprobs):
        logprob_loss_kernel[(responses,)](
            logprobs, entropy, terms.targets, terms.values, terms.response_statistics, terms.cu_seqlens, results, c, h,
            spec.parameters, spec.max_log_ratio, B * T, T,
            KIND=spec.kind, OFF_POLICY=spec.off_policy, KL=spec.kl, ENTROPY_BONUS=spec.entropy_bonus,
            SEQUENCE=spec.sequence_level, **response_launch(),
        )  # fmt: skip
    return LogprobLoss(results, c, h)
