"""Kernel and launchers: the whole line of a token-level objective in one launch, loss and gradient.

    logits --sweep 1--> logp, H --token_loss--> loss, c, h --sweep 2 (cache)--> dlogits

Device-memory traffic is one read of the logits and one write of the gradient: the second sweep follows the first
before the row has left the last-level cache. Two launchers: of a batch as the caller passed it, whose token weights the
kernel makes itself, and of rows whose weights somebody prepared (a chunk of gathered rows, a traced graph).

One launch also where there are fewer rows than processors, though sharing rows (token_statistics.py) would make better
use of them: a Qwen row takes one program about 22 us for both sweeps (304 KB each at 28 KB a microsecond), ten programs
and three kernels about 8; but the four launches more (rows to compute, merge, loss, gradient) cost the host more than
the 14 us that the device would save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import BatchWeights, LogitTransform, LossRows, SurrogateSpec, TokenInputs, TokenTerms

from .elementary import to_float32
from .launch import launch_configuration, on_device_of, reload_scalars, same_alignment, transform_constants
from .surrogate import token_loss
from .token_weights import INPUT_STRIDES, INPUTS, batch_factors, load_token, response_statistics, row_weights
from .vocab_sweep import (
    checked_token,
    edge_statistics,
    load_target,
    row_gradient,
    row_offset,
    row_statistics,
    sweep_statistics,
    zero_row,
)

if TYPE_CHECKING:
    from hpo_fused.loss_batch import LossBatch

_LENGTHS = ["N", "T", "B", "V", "stride_b", "stride_t", "out_stride_b", "out_stride_t"]
_UNSPECIALIZED = [*INPUTS, "normalizers", *_LENGTHS, *INPUT_STRIDES]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def fused_policy_loss_kernel(
    logits,  # [B, T, V], unit stride on V
    out,  # [B, T, V], unit stride on V; may be logits; None without GRADIENT
    tokens,  # this and the next five: fields of TokenInputs
    mask,
    advantages,
    token_weights,
    old_logprobs,
    ref_logprobs,
    statistics,  # of response_statistics_kernel; None where weights are "prepared"
    normalizers,  # [B], "prepared": penalty weights [B, T]
    counts,  # of BatchWeights
    numbers,
    losses,  # [B, T]
    logprobs,  # [B, T]
    entropies,  # [B, T] or None
    active,  # bool [B, T] or None
    transform,
    parameters,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    N,
    T,
    B,
    V,
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    tokens_stride,
    mask_stride,
    advantages_stride,
    token_weights_stride,
    old_logprobs_stride,
    ref_logprobs_stride,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    WEIGHTING: tl.constexpr,
    OWN_COUNTS: tl.constexpr,
    PACKED: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    WEIGHT_PER_TOKEN: tl.constexpr,
    SKIP: tl.constexpr,
    RELOAD: tl.constexpr,  # keep what all rows share in memory, not in registers
    HAS_OLD: tl.constexpr,
    HAS_KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGNED_OUT: tl.constexpr,
):
    # The row is read again only if a gradient follows; both readings ask the cache to act accordingly.
    FIRST_READ: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    PREPARED: tl.constexpr = NORMALIZATION == "prepared"
    factor = tl.full((), 0.0, tl.float32)
    alpha = factor
    if not PREPARED:
        factor, alpha = batch_factors(statistics, counts, numbers, B, NORMALIZATION, WEIGHTING, OWN_COUNTS, RELOAD)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        loss = tl.full((), 0.0, tl.float32)
        c = loss
        h = loss
        unknown = tl.full((), float("nan"), tl.float32)
        maximum, rest, z_y = unknown, unknown, unknown
        y = tl.full((), 0, tl.int32)
        start = logits + row_offset(row, T, stride_b, stride_t)
        unmasked, advantage, policy_weight, penalty_weight = row_weights(
            row, None, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages, advantages_stride,
            token_weights, token_weights_stride,
            NORMALIZATION, WEIGHTING, PACKED, ADVANTAGE_PER_TOKEN, WEIGHT_PER_TOKEN, RELOAD,
        )  # fmt: skip
        logprob = unknown if PREPARED else tl.where(unmasked, unknown, 0.0)
        entropy = logprob
        live = unmasked
        if not (PREPARED or HAS_KL or ENTROPY_TERM):
            live = (policy_weight != 0) & (advantage != 0)
        if active is not None:
            tl.store(active + row, live)
        if live if SKIP else unmasked:
            y = checked_token(load_token(tokens, row, None, T, tokens_stride, PACKED).to(tl.int64), V)
            lanes = sweep_statistics(
                edge_statistics(start, V, y, transform, LANES, VEC, SOFTCAP, ENTROPY), start, V, y, transform,
                None, None, None, 0, LANES, VEC, UNROLL, SOFTCAP, ENTROPY, FIRST_READ, False,
            )  # fmt: skip
            # Asked for here, what the loss needs arrives while the lanes meet, and occupies no register before. In
            # place, the lanes' barriers also give every thread its copy of z_y before any thread overwrites it.
            z_y = load_target(start, y)
            old_logprob = tl.full((), 0.0, tl.float32)
            ref_logprob = tl.full((), 0.0, tl.float32)
            if HAS_OLD:
                old_logprob = to_float32(load_token(old_logprobs, row, None, T, old_logprobs_stride, PACKED))
            if HAS_KL:
                ref_logprob = to_float32(load_token(ref_logprobs, row, None, T, ref_logprobs_stride, PACKED))
            logprob, maximum, rest, entropy = row_statistics(lanes, z_y, transform, SOFTCAP, ENTROPY)
            _, advantage, policy_weight, penalty_weight = row_weights(
                row, None, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages,
                advantages_stride, token_weights, token_weights_stride,
                NORMALIZATION, WEIGHTING, PACKED, ADVANTAGE_PER_TOKEN, WEIGHT_PER_TOKEN, RELOAD,
            )  # fmt: skip
            loss, c, h = token_loss(
                logprob, entropy, advantage, policy_weight, penalty_weight, logprob - old_logprob, ref_logprob,
                parameters, max_log_ratio, kl_coef, entropy_coef, KIND, HAS_OLD, HAS_KL, ENTROPY_TERM,
            )  # fmt: skip
        tl.store(losses + row, loss)
        tl.store(logprobs + row, logprob)
        if ENTROPY:
            tl.store(entropies + row, entropy)
        if GRADIENT:
            destination = out + row_offset(row, T, out_stride_b, out_stride_t)
            # NaN differs from 0: an undefined row gets a NaN gradient, never a silent 0.
            if (c != 0) | (h != 0):
                row_gradient(
                    start, destination, V, y, z_y, maximum, rest, entropy, c, h, transform, None, None,
                    LANES, VEC, UNROLL, SOFTCAP, ENTROPY_TERM, ALIGNED_OUT, "evict_first",
                )  # fmt: skip
            else:
                zero_row(destination, V, None, None, LANES, VEC, UNROLL)


def fused_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    compute: Tensor,
    terms: TokenTerms,
    transform: LogitTransform,
    spec: SurrogateSpec,
    *,
    entropy: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(losses, logprobs, entropy or None) of every token, each float32 [B, T], and the gradient of the losses' sum.

    Args:
        logits: [B, T, V], unit stride on V.
        tokens: int64 [B, T].
        compute: bool [B, T]; rows without it are not read: loss 0, log-probability and entropy NaN, gradient 0.
        terms: advantages, weights and log-probabilities of each token.
        transform: temperature and softcap.
        spec: the lowered objective, token-level.
        entropy: whether to return the entropy; implied by an entropy term.
        out: where the gradient goes, [B, T, V], any floating dtype, or ``logits`` itself; None: one sweep, no gradient.
    """
    inputs = TokenInputs(
        tokens,
        compute,
        terms.advantages,
        terms.policy_weights,
        terms.old_logprobs,
        terms.ref_logprobs,
        None,
        True,
        True,
    )
    rows = _launch(logits, inputs, _PREPARED, terms.penalty_weights, transform, spec, entropy, out, skip=False)
    return rows.losses, rows.logprobs, rows.entropy


def policy_loss(
    logits: Tensor,
    batch: LossBatch,
    transform: LogitTransform,
    spec: SurrogateSpec,
    *,
    skip_inactive: bool,
    entropy: bool,
    out: Tensor | None,
) -> LossRows:
    """The same of a batch as the caller passed it, in two launches; token ids out of range are a device-side assert.

    Args:
        logits, transform, spec, entropy, out: as for :func:`fused_policy_loss`.
        batch: the arguments of the call.
        skip_inactive: whether to leave rows without a learning signal uncomputed.
    """
    inputs, weights = batch.inputs(), batch.weights()
    return _launch(logits, inputs, weights, weights.normalizers, transform, spec, entropy, out, skip=skip_inactive)


_PREPARED = BatchWeights("prepared", "none", 0, False, (None,) * 4, (0.0,) * 7, None)


def _launch(
    logits: Tensor, inputs: TokenInputs, weights: BatchWeights, normalizers: Tensor | None, transform: LogitTransform,
    spec: SurrogateSpec, entropy: bool, out: Tensor | None, *, skip: bool,
) -> LossRows:  # fmt: skip
    B, T, V = logits.shape
    rows, device, prepared = B * T, logits.device, weights.normalization == "prepared"
    tokens, mask, advantages, token_weights, old, ref, cu_seqlens, advantage_per_token, weight_per_token = inputs
    if spec.kl_coef != 0 and ref is None:
        raise ValueError("ref_logprobs: expected a tensor beside a non-zero kl_coef, got None")
    assert tokens is not None
    entropy = entropy or spec.entropy_coef != 0
    losses = torch.empty((B, T), dtype=torch.float32, device=device)
    logprobs = torch.empty((B, T), dtype=torch.float32, device=device)
    entropies = torch.empty((B, T), dtype=torch.float32, device=device) if entropy else None
    active = torch.empty((B, T), dtype=torch.bool, device=device)
    result = LossRows(losses, logprobs, entropies, active)
    if rows == 0:
        return result
    softcap, aligned = transform.softcap is not None, out is None or same_alignment(logits, out)
    launch = launch_configuration(logits, reread=out is not None, narrow=softcap or not aligned)
    stride_b, stride_t, _ = logits.stride()
    out_stride_b, out_stride_t, _ = (0, 0, 0) if out is None else out.stride()
    with on_device_of(logits):
        statistics = None if prepared else response_statistics(inputs, weights, rows, T, V)
        fused_policy_loss_kernel[launch.grid(rows)](
            logits, out, tokens, mask, advantages, token_weights, old, ref if spec.kl_coef != 0 else None, statistics,
            normalizers, weights.counts, weights.numbers,
            losses, logprobs, entropies, None if prepared else active,
            transform_constants(*transform), spec.parameters, spec.max_log_ratio, spec.kl_coef, spec.entropy_coef,
            rows, T, weights.responses, V, stride_b, stride_t, out_stride_b, out_stride_t,
            tokens.stride(0), 0 if mask is None else mask.stride(0), advantages.stride(0),
            0 if token_weights is None else token_weights.stride(0),
            0 if old is None else old.stride(0), 0 if ref is None else ref.stride(0),
            LANES=launch.lanes, VEC=launch.vec, UNROLL=launch.unroll, KIND=spec.kind,
            NORMALIZATION=weights.normalization, WEIGHTING=weights.weighting, OWN_COUNTS=weights.own_counts,
            PACKED=cu_seqlens is not None, ADVANTAGE_PER_TOKEN=advantage_per_token, WEIGHT_PER_TOKEN=weight_per_token,
            SKIP=skip, RELOAD=reload_scalars(launch), HAS_OLD=old is not None, HAS_KL=spec.kl_coef != 0,
            ENTROPY=entropy, ENTROPY_TERM=spec.entropy_coef != 0, SOFTCAP=softcap,
            GRADIENT=out is not None, ALIGNED_OUT=aligned,
            num_warps=launch.num_warps, **launch.options,
        )  # fmt: skip
    return result
