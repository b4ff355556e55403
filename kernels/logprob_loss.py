"""Kernel and launcher: log-probabilities to the loss and its gradient coefficients, one program per response.

Ratios of tokens take one walk over the response. A ratio that they share takes three: for its log, a mean or sum; for
the losses' derivative by it, of which every token receives the mean or sum (the operator is its own adjoint); for every
token's own part and the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.interface import LogprobLoss, LossSpec, TokenTerms

from .launch import launch_programs, response_launch
from .surrogate import token_log_ratio, token_loss
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


@triton.jit
def _tokens(
    row, inside, logprobs, entropy, targets, values, N,
    OFF_POLICY: tl.constexpr, KL: tl.constexpr, ENTROPY_BONUS: tl.constexpr,
):  # fmt: skip
    """Of rows: whether they are unmasked, log-probability, entropy, and their terms in the order of TERMS; 0 if masked.

    What no constexpr asks for is 0.
    """
    zero = tl.zeros(row.shape, tl.float32)
    unmasked = tl.load(targets + row, mask=inside, other=MASKED) != MASKED
    logprob = tl.load(logprobs + row, mask=unmasked, other=0.0)
    advantage = tl.load(values + ADVANTAGE * N + row, mask=unmasked, other=0.0)
    policy_weight = tl.load(values + POLICY_WEIGHT * N + row, mask=unmasked, other=0.0)
    row_entropy, entropy_weight, kl_weight, old, ref = zero, zero, zero, zero, zero
    if entropy is not None:
        row_entropy = tl.load(entropy + row, mask=unmasked, other=0.0)
    if ENTROPY_BONUS:
        entropy_weight = tl.load(values + ENTROPY_WEIGHT * N + row, mask=unmasked, other=0.0)
    if KL != "none":
        kl_weight = tl.load(values + KL_WEIGHT * N + row, mask=unmasked, other=0.0)
        ref = tl.load(values + REF_LOGPROB * N + row, mask=unmasked, other=0.0)
    if OFF_POLICY:
        old = tl.load(values + OLD_LOGPROB * N + row, mask=unmasked, other=0.0)
    return unmasked, logprob, row_entropy, advantage, policy_weight, kl_weight, entropy_weight, old, ref


@triton.jit(
    do_not_specialize=[
        "logprobs", "entropy", "targets", "values", "response_statistics", "cu_seqlens", "response_log_ratios", "N",
        "T", "summed", "spread",
    ]
)  # fmt: skip
def logprob_loss_kernel(
    logprobs,  # float32 [B, T]
    entropy,  # float32 [B, T] or None
    targets,  # this to response_log_ratios: fields of TokenTerms
    values,
    response_statistics,
    cu_seqlens,
    response_log_ratios,
    results,  # float32 [2 or 3, B, T]: losses, log-probabilities, entropies
    logprob_coefficients,  # float32 [B, T]
    entropy_coefficients,  # float32 [B, T] or None
    parameters,  # this, the next and the constexprs: fields of LossSpec
    max_log_ratio,
    summed,  # whether x is the sum of a response's log-ratios, else their mean
    spread,  # whether the derivative by x is spread over the response, else it stays with its token
    N,  # B * T
    T,
    KIND: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    SHARED_RATIO: tl.constexpr,
):
    """One ratio for a response only: 1. its log-ratio; 2. the derivative by it. Always: 3. every token's own."""
    response = tl.program_id(0)
    first, last = response_range(response, cu_seqlens, N, T)
    divisor = tl.maximum(tl.load(response_statistics + response), 1).to(tl.float32)
    divisor = tl.where(summed != 0, 1.0, divisor)
    zero = tl.zeros([TOKENS_BLOCK], tl.float32)
    log_ratio = tl.full((), 0.0, tl.float32)
    shared = tl.full((), 0.0, tl.float32)
    kl_spread = (spread != 0) & (summed == 0)
    if SHARED_RATIO:
        if response_log_ratios is not None:
            log_ratio = tl.load(response_log_ratios + response)
        elif OFF_POLICY:
            total = zero
            for start in range(first, last, TOKENS_BLOCK):
                row = start + tl.arange(0, TOKENS_BLOCK)
                unmasked, logprob, _, advantage, _, _, _, old, _ = _tokens(
                    row, row < last, logprobs, None, targets, values, N, OFF_POLICY, "none", False
                )
                bounded, _ = token_log_ratio(logprob - old, advantage, parameters, KIND)
                total += tl.where(unmasked, bounded, 0.0)
            # IEEE's: a weight's exponent may multiply the two units by which `/` can be off, GammaGate's by lambda r.
            log_ratio = tl.div_rn(tl.sum(total), divisor)
        if spread != 0:
            total = zero
            for start in range(first, last, TOKENS_BLOCK):
                row = start + tl.arange(0, TOKENS_BLOCK)
                _, logprob, _, advantage, policy_weight, kl_weight, _, _, ref = _tokens(
                    row, row < last, logprobs, None, targets, values, N, False, KL, False
                )
                _, by_ratio, _, _ = token_loss(
                    logprob, zero, advantage, policy_weight, kl_weight, zero, zero + log_ratio, zero + log_ratio, ref,
                    parameters, max_log_ratio, kl_spread, KIND, OFF_POLICY, KL, False,
                )  # fmt: skip
                total += by_ratio
            shared = tl.sum(total) / divisor
    for start in range(first, last, TOKENS_BLOCK):
        row = start + tl.arange(0, TOKENS_BLOCK)
        inside = row < last
        unmasked, logprob, row_entropy, advantage, policy_weight, kl_weight, entropy_weight, old, ref = _tokens(
            row, inside, logprobs, entropy, targets, values, N, OFF_POLICY, KL, ENTROPY_BONUS
        )
        difference = zero
        if OFF_POLICY:
            difference = logprob - old
        x, slope = token_log_ratio(difference, advantage, parameters, KIND)
        kl_log_ratio = difference
        if SHARED_RATIO:
            x = zero + log_ratio
            kl_log_ratio = tl.where(kl_spread, x, difference)
        loss, by_ratio, by_logprob, h = token_loss(
            logprob, row_entropy, advantage, policy_weight, kl_weight, entropy_weight, x, kl_log_ratio, ref,
            parameters, max_log_ratio, kl_spread, KIND, OFF_POLICY, KL, ENTROPY_BONUS,
        )  # fmt: skip
        if SHARED_RATIO:
            by_ratio = tl.where(spread != 0, tl.where(unmasked, shared, 0.0), by_ratio)
        tl.store(results + row, loss, mask=inside)
        tl.store(results + N + row, logprob, mask=inside)
        if entropy is not None:
            tl.store(results + 2 * N + row, row_entropy, mask=inside)
        tl.store(logprob_coefficients + row, tl.where(slope != 0, by_ratio, 0.0) + by_logprob, mask=inside)
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
    arguments = (
        logprobs, entropy, terms.targets, terms.values, terms.response_statistics, terms.cu_seqlens,
        terms.response_log_ratios, results, c, h, spec.parameters, spec.max_log_ratio,
        int(spec.ratio_level == "sequence_sum"), int(spec.spreads), B * T, T,
    )  # fmt: skip
    constants = {
        "KIND": spec.kind, "OFF_POLICY": spec.off_policy, "KL": spec.kl, "ENTROPY_BONUS": spec.entropy_bonus,
        "SHARED_RATIO": spec.shared_ratio,
    }  # fmt: skip
    launch_programs(logprob_loss_kernel, responses, arguments, constants, response_launch())
    return LogprobLoss(results, c, h)
