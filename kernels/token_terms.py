"""Kernels and launcher: a call's arguments to factors per token, see ``TokenTerms``.

1. ``response_statistics_kernel``, one program per response: its length and the sign of its advantage.
2. ``token_terms_kernel``, one program per response: totals of the batch from those, reduced once per program; then
   the terms of each of its tokens.

Nothing is added up by atomics: bitwise the same every run. The torch twin is ``hpo_fused/token_terms.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hpo_fused import interface
from hpo_fused.interface import Batch, LossSpec, TokenTerms

from .launch import launch_programs, response_launch
from .numerics import to_float32

ADVANTAGE = tl.constexpr(interface.ADVANTAGE)
POLICY_WEIGHT = tl.constexpr(interface.POLICY_WEIGHT)
KL_WEIGHT = tl.constexpr(interface.KL_WEIGHT)
ENTROPY_WEIGHT = tl.constexpr(interface.ENTROPY_WEIGHT)
OLD_LOGPROB = tl.constexpr(interface.OLD_LOGPROB)
REF_LOGPROB = tl.constexpr(interface.REF_LOGPROB)
MASKED = tl.constexpr(interface.MASKED)
SKIPPED = tl.constexpr(interface.SKIPPED)

# Tokens per step of a program, and responses per step of the totals. Fixed: a new length must not recompile.
TOKENS_BLOCK = tl.constexpr(1024)
RESPONSES_BLOCK = tl.constexpr(128)

# Bits of the kernel's ``flags``. At run time they cost a few scalars, as constexprs a compilation for each combination.
BY_LENGTH = tl.constexpr(1)  # 1 / max(L_i, 1) is a part of 1 / n_i
BY_TOKENS = tl.constexpr(2)  # so is 1 / the batch's tokens
ADAPTIVE = tl.constexpr(4)  # the weight of negative advantages is the batch's, and alpha its minimum
EVERY_ADVANTAGE = tl.constexpr(8)  # see LossSpec
WITH_KL = tl.constexpr(16)
WITH_BONUS = tl.constexpr(32)
SHARED_RATIO = tl.constexpr(64)  # one token with a signal makes its whole response active
SKIP = tl.constexpr(128)  # rows that are not active are not computed


@triton.jit
def response_range(response, cu_seqlens, N, T):
    """First of the response's rows, and the one after its last; no row outside [0, N), whatever the boundaries say."""
    first = response * T
    last = first + T
    if cu_seqlens is not None:
        first = tl.maximum(tl.load(cu_seqlens + response).to(tl.int32), 0)
        last = tl.minimum(tl.load(cu_seqlens + response + 1).to(tl.int32), N)
    return first, last


@triton.jit
def _entries(tensor, response, row, inside, stride, step):
    """Entries of a caller's tensor at rows of a response; ``stride`` and ``step`` as :func:`_steps` gives them."""
    return tl.load(tensor + tl.cast(response, tl.int64) * stride + row.to(tl.int64) * step, mask=inside, other=0)


@triton.jit(
    debug=True,
    do_not_specialize=[
        "response_statistics", "mask", "advantages", "cu_seqlens", "N", "T", "B", "mask_stride", "advantages_stride",
        "advantages_step",
    ],
)  # fmt: skip
def response_statistics_kernel(
    response_statistics,  # int32 [2, B]: lengths; signs of the advantages
    mask,  # this to cu_seqlens: fields of Batch
    advantages,
    cu_seqlens,
    N,  # rows in all
    T,
    B,  # responses
    mask_stride,
    advantages_stride,
    advantages_step,  # 0: one for each response
):
    """Unmasked tokens of each response, and the sign of its unmasked advantages' sum; 0 where all is masked."""
    response = tl.program_id(0)
    if cu_seqlens is not None:
        before, after = tl.load(cu_seqlens + response).to(tl.int64), tl.load(cu_seqlens + response + 1).to(tl.int64)
        ordered = (before >= 0) & (before <= after) & (after <= N)
        ends = ((response > 0) | (before == 0)) & ((response < B - 1) | (after == N))
        tl.device_assert(ordered & ends, "cu_seqlens: expected boundaries that rise from 0 to N")
    first, last = response_range(response, cu_seqlens, N, T)
    count = tl.zeros([TOKENS_BLOCK], tl.int32)
    signal = tl.zeros([TOKENS_BLOCK], tl.float32)
    for start in range(first, last, TOKENS_BLOCK):
        row = start + tl.arange(0, TOKENS_BLOCK)
        unmasked = row < last
        if mask is not None:
            unmasked = unmasked & (_entries(mask, response, row, unmasked, mask_stride, 1) != 0)
        count += unmasked.to(tl.int32)
        counted = tl.where(advantages_step != 0, unmasked, row == first)  # one for all counts once, masked or not
        signal += to_float32(_entries(advantages, response, row, counted, advantages_stride, advantages_step))
    length, total = tl.sum(count), tl.sum(signal)
    sign = (total > 0).to(tl.int32) - (total < 0).to(tl.int32)
    tl.store(response_statistics + response, length)
    tl.store(response_statistics + B + response, tl.where(length > 0, sign, 0))


@triton.jit
def _total(pointer, number):
    """A given total of the optimiser batch as float32, from the device where it lies there."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float32)
    else:
        return number


@triton.jit
def _nonzero(count):
    """A count, 1 in place of 0: there is nothing to divide then."""
    return tl.where(count == 0, 1.0, count)


@triton.jit
def _shared_factors(
    response_statistics, responses, tokens, positive, negative, factors, flags, B, GIVEN_TOTALS: tl.constexpr
):  # fmt: skip
    """(factor, alpha): the part of the normalisation that all tokens share, and the weight of negative advantages.

    The factor is 1 / n_i itself, but for ``BY_LENGTH``, where 1 / max(L_i, 1) is left, and given normalizers, where
    1 / normalizers[i] is left.
    """
    factor = factors[0] + tl.full((), 0.0, tl.float32)
    if not GIVEN_TOTALS:
        lengths = tl.zeros([RESPONSES_BLOCK], tl.int32)
        above, below = lengths, lengths
        for start in range(0, B, RESPONSES_BLOCK):
            response = start + tl.arange(0, RESPONSES_BLOCK)
            lengths += tl.load(response_statistics + response, mask=response < B, other=0)
            sign = tl.load(response_statistics + B + response, mask=response < B, other=0)
            above += (sign > 0).to(tl.int32)
            below += (sign < 0).to(tl.int32)
        token_count = tl.sum(lengths).to(tl.float32)
        above_count, below_count = tl.sum(above).to(tl.float32), tl.sum(below).to(tl.float32)
    else:
        if responses is not None:
            factor = factor / _nonzero(tl.load(responses).to(tl.float32))
        token_count = _total(tokens, factors[5])
        above_count, below_count = _total(positive, factors[6]), _total(negative, factors[7])
    factor = tl.where((flags & BY_TOKENS) != 0, factor / _nonzero(token_count), factor)
    # arXiv 2605.30201: clip(N+ / N-, alpha_min, 1), our 1 where N- is 0
    quotient = tl.where(below_count == 0, 1.0, above_count / _nonzero(below_count))
    adaptive = tl.minimum(tl.maximum(quotient, factors[1]), 1.0)
    return factor, tl.where((flags & ADAPTIVE) != 0, adaptive, factors[1])


@triton.jit
def _policy_terms(
    response, row, inside, penalty, alpha, mask, mask_stride, advantages, advantages_stride, advantages_step,
    token_weights, weights_stride, weights_step, flags,
):  # fmt: skip
    """(unmasked, advantage, policy weight, penalty weight, live) of rows; weights are 0 where masked."""
    unmasked = inside
    if mask is not None:
        unmasked = inside & (_entries(mask, response, row, inside, mask_stride, 1) != 0)
    advantage = to_float32(_entries(advantages, response, row, inside, advantages_stride, advantages_step))
    penalty = tl.where(unmasked, penalty, 0.0)
    policy = tl.where(advantage < 0, penalty * alpha, penalty)
    if token_weights is not None:
        caller = to_float32(_entries(token_weights, response, row, inside, weights_stride, weights_step))
        policy = tl.where(policy != 0, policy * caller, 0.0)
    live = (policy != 0) & ((advantage != 0) | ((flags & EVERY_ADVANTAGE) != 0))
    return unmasked, advantage, policy, penalty, live


# Flat and unspecialised throughout: micro-batches are slices of larger tensors, whose alignment varies with T.
@triton.jit(
    debug=True,
    do_not_specialize=[
        "values", "targets", "active", "response_statistics", "tokens", "mask", "advantages", "token_weights",
        "entropy_weights", "loss_scale", "old_logprobs", "ref_logprobs", "cu_seqlens", "normalizers", "total_responses",
        "total_tokens", "total_positive", "total_negative", "N", "T", "B", "V", "tokens_stride", "mask_stride",
        "advantages_stride", "advantages_step", "weights_stride", "weights_step", "entropy_stride", "entropy_step",
        "old_stride", "ref_stride", "flags",
    ],
)  # fmt: skip
def token_terms_kernel(
    values,  # this to active: fields of TokenTerms
    targets,
    active,
    response_statistics,  # of response_statistics_kernel
    tokens,  # this to normalizers: fields of Batch
    mask,
    advantages,
    token_weights,
    entropy_weights,
    loss_scale,
    old_logprobs,
    ref_logprobs,
    cu_seqlens,
    normalizers,
    total_responses,  # this to total_negative: pointers to given totals of the optimiser batch, None where a number is
    total_tokens,  # on the host
    total_positive,
    total_negative,
    factors,  # factor, alpha (1: no weighting), kl_coef, entropy_coef, scale; with given totals then tokens, N+ and N-
    N,  # rows in all
    T,
    B,  # responses
    V,
    tokens_stride,  # this to ref_stride: see _steps
    mask_stride,
    advantages_stride,
    advantages_step,
    weights_stride,
    weights_step,
    entropy_stride,
    entropy_step,
    old_stride,
    ref_stride,
    flags,  # see above
    GIVEN_TOTALS: tl.constexpr,  # else they are this call's
):
    """The terms of each token of a response: 1. shared factors; 2. its tokens with a signal; 3. the terms."""
    response = tl.program_id(0)
    penalty, alpha = _shared_factors(
        response_statistics, total_responses, total_tokens, total_positive, total_negative, factors, flags, B,
        GIVEN_TOTALS,
    )  # fmt: skip
    length = tl.maximum(tl.load(response_statistics + response), 1).to(tl.float32)
    penalty = tl.where((flags & BY_LENGTH) != 0, penalty / length, penalty)
    if normalizers is not None:
        penalty = penalty / tl.load(normalizers + response)
    scale = factors[4]
    if loss_scale is not None:
        penalty *= to_float32(tl.load(loss_scale))
        scale *= to_float32(tl.load(loss_scale))
    first, last = response_range(response, cu_seqlens, N, T)
    signals = tl.full((), 0, tl.int32)
    if (flags & SHARED_RATIO) != 0:
        count = tl.zeros([TOKENS_BLOCK], tl.int32)
        for start in range(first, last, TOKENS_BLOCK):
            row = start + tl.arange(0, TOKENS_BLOCK)
            _, _, _, _, live = _policy_terms(
                response, row, row < last, penalty, alpha, mask, mask_stride, advantages, advantages_stride,
                advantages_step, token_weights, weights_stride, weights_step, flags,
            )  # fmt: skip
            count += live.to(tl.int32)
        signals = tl.sum(count)
    # Rows that have these weights end here, none where the objective has no such term.
    penalised, rewarded = tl.where((flags & WITH_KL) != 0, last, 0), tl.where((flags & WITH_BONUS) != 0, last, 0)
    for start in range(first, last, TOKENS_BLOCK):
        row = start + tl.arange(0, TOKENS_BLOCK)
        inside = row < last
        unmasked, advantage, policy, weight, live = _policy_terms(
            response, row, inside, penalty, alpha, mask, mask_stride, advantages, advantages_stride,
            advantages_step, token_weights, weights_stride, weights_step, flags,
        )  # fmt: skip
        live = tl.where((flags & SHARED_RATIO) != 0, unmasked & (signals > 0), live)
        live = tl.where((flags & WITH_KL) != 0, unmasked, live)
        tl.store(values + KL_WEIGHT * N + row, weight * factors[2], mask=row < penalised)
        bonus = weight * factors[3]
        if entropy_weights is not None:
            bonus = to_float32(_entries(entropy_weights, response, row, unmasked, entropy_stride, entropy_step)) * scale
        live = live | ((row < rewarded) & (bonus != 0))
        tl.store(values + ENTROPY_WEIGHT * N + row, bonus, mask=row < rewarded)
        target = tl.zeros([TOKENS_BLOCK], tl.int32)
        if tokens is not None:
            token = _entries(tokens, response, row, unmasked, tokens_stride, 1).to(tl.int64)
            valid = (token >= 0) & (token < V)
            tl.device_assert(valid | (unmasked == 0), "tokens: expected ids in [0, V) at unmasked positions")
            target = tl.where(valid, token, SKIPPED).to(tl.int32)  # nobody reads outside a row, even while this fails
        target = tl.where(live | ((flags & SKIP) == 0), target, SKIPPED)
        tl.store(targets + row, tl.where(unmasked, target, MASKED), mask=inside)
        tl.store(active + row, live, mask=inside)
        tl.store(values + ADVANTAGE * N + row, advantage, mask=inside)
        tl.store(values + POLICY_WEIGHT * N + row, policy, mask=inside)
        if old_logprobs is not None:
            old = _entries(old_logprobs, response, row, inside, old_stride, 1)
            tl.store(values + OLD_LOGPROB * N + row, to_float32(old), mask=inside)
        if ref_logprobs is not None:
            ref = _entries(ref_logprobs, response, row, inside, ref_stride, 1)
            tl.store(values + REF_LOGPROB * N + row, to_float32(ref), mask=inside)


def token_terms(batch: Batch, spec: LossSpec, vocabulary: int | None, skip_inactive: bool) -> TokenTerms:
    """The terms of every token, in two launches.

    Boundaries or token ids out of range are a device-side assert.

    Args:
        batch: the call's arguments.
        spec: the lowered objective.
        vocabulary: V; None: the batch has no tokens.
        skip_inactive: whether no sweep is to compute rows without a learning signal.
    """
    B, T = batch.rows
    rows, responses, device = B * T, batch.responses, batch.advantages.device
    values = torch.empty((interface.TERMS, B, T), dtype=torch.float32, device=device)
    targets = torch.empty((B, T), dtype=torch.int32, device=device)
    active = torch.empty((B, T), dtype=torch.bool, device=device)
    response_statistics = torch.empty((2, responses), dtype=torch.int32, device=device)
    terms = TokenTerms(values, targets, active, response_statistics, batch.cu_seqlens, batch.response_log_ratios)
    if responses == 0:
        return terms
    totals, factors = _given_totals(batch)
    launch = response_launch()
    tokens, mask, old, ref = batch.tokens, batch.mask, batch.old_logprobs, batch.ref_logprobs
    tokens_stride, mask_stride, old_stride, ref_stride = (
        0 if value is None or batch.cu_seqlens is not None else value.stride(0) - T
        for value in (tokens, mask, old, ref)
    )
    levels = batch.advantages, batch.token_weights, batch.entropy_weights
    advantages_steps, weights_steps, entropy_steps = (_steps(value, batch) for value in levels)
    arguments: tuple[object, ...] = (
        response_statistics, mask, batch.advantages, batch.cu_seqlens, rows, T, responses, mask_stride,
        *advantages_steps,
    )  # fmt: skip
    launch_programs(response_statistics_kernel, responses, arguments, {}, launch)
    arguments = (
        values, targets, active, response_statistics, tokens, mask, *levels, batch.loss_scale, old, ref,
        batch.cu_seqlens, batch.normalizers, *totals, factors, rows, T, responses, vocabulary or 0, tokens_stride,
        mask_stride, *advantages_steps, *weights_steps, *entropy_steps, old_stride, ref_stride,
        _flags(batch, spec, skip_inactive),
    )  # fmt: skip
    launch_programs(token_terms_kernel, responses, arguments, {"GIVEN_TOTALS": batch.totals is not None}, launch)
    return terms


def _flags(batch: Batch, spec: LossSpec, skip_inactive: bool) -> int:
    """The kernel's ``flags``."""
    return (
        BY_LENGTH.value * (batch.normalization == "response") + BY_TOKENS.value * (batch.normalization == "mean_length")
        + ADAPTIVE.value * (batch.weighting == "adaptive") + EVERY_ADVANTAGE.value * spec.every_advantage
        + WITH_KL.value * (spec.kl != "none") + WITH_BONUS.value * spec.entropy_bonus
        + SHARED_RATIO.value * spec.shared_ratio + SKIP.value * skip_inactive
    )  # fmt: skip


def _steps(value: torch.Tensor | None, batch: Batch) -> tuple[int, int]:
    """(stride, step): the entry of row r of response i is ``stride * i + step * r`` elements from a tensor's first.

    The tensor is of any level, see ``Batch``; the rows of all responses are numbered in turn.
    """
    if value is None or value.dim() == 0:
        return 0, 0
    if value.dim() == 1:
        return value.stride(0), 0
    step = value.stride(1)
    return (0 if batch.cu_seqlens is not None else value.stride(0) - batch.rows[1] * step), step


def _given_totals(batch: Batch) -> tuple[tuple[torch.Tensor | None, ...], tuple[float, ...]]:
    """The kernel's ``totals`` and ``factors``."""
    factor = batch.scale / batch.max_length
    by_responses = batch.normalization in ("response", "constant")
    responses = batch.responses if batch.totals is None else batch.totals[0]
    if by_responses and not isinstance(responses, torch.Tensor):
        factor /= responses or 1
    factors = (factor, batch.alpha, batch.kl_coef, batch.entropy_coef, batch.scale)
    if batch.totals is None:
        return (None,) * 4, factors
    pointers = tuple(total if isinstance(total, torch.Tensor) else None for total in batch.totals)
    pointers = pointers if by_responses else (None, *pointers[1:])
    given = (0.0 if isinstance(total, torch.Tensor) else float(total) for total in batch.totals[1:])
    return pointers, (*factors, *given)
