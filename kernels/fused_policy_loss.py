"""Kernel and launcher: the whole line of a token-level objective in one launch, loss and gradient.

    logits --sweep 1--> logp, H --token_loss--> loss, c, h --sweep 2 (cache)--> dlogits

Device-memory traffic is one read of the logits and one write of the gradient: the second sweep follows the first
before the row has left the last-level cache.

One launch also where there are fewer rows than processors, though sharing rows (token_statistics.py) would make better
use of them: a Qwen row takes one program about 22 us for both sweeps (304 KB each at 28 KB a microsecond), ten programs
and three kernels about 8; but the two launches more, and the operations on tokens between the sweeps, cost the host
more than the 14 us that the device would save.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import LogitTransform, SurrogateSpec, TokenTerms

from .launch import launch_configuration, on_device_of, same_alignment, transform_constants
from .surrogate import token_loss
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

_UNSPECIALIZED = ["N", "T", "V", "stride_b", "stride_t", "out_stride_b", "out_stride_t"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def fused_policy_loss_kernel(
    logits,  # [B, T, V], unit stride on V
    out,  # [B, T, V], unit stride on V; may be logits; None without GRADIENT
    tokens,  # [B, T]
    compute,  # [B, T] bool
    terms,  # TokenTerms of [B, T]
    losses,  # [B, T]
    logprobs,  # [B, T]
    entropies,  # [B, T] or None
    transform,
    parameters,
    max_log_ratio,
    kl_coef,
    entropy_coef,
    N,
    T,
    V,
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    KIND: tl.constexpr,
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
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        loss = tl.full((), 0.0, tl.float32)
        c = loss
        h = loss
        logprob = tl.full((), float("nan"), tl.float32)
        maximum, rest, entropy, z_y = logprob, logprob, logprob, logprob
        y = tl.full((), 0, tl.int32)
        start = logits + row_offset(row, T, stride_b, stride_t)
        if tl.load(compute + row):
            y = checked_token(tl.load(tokens + row), V)
            lanes = sweep_statistics(
                edge_statistics(start, V, y, transform, LANES, VEC, SOFTCAP, ENTROPY), start, V, y, transform,
                None, None, None, 0, LANES, VEC, UNROLL, SOFTCAP, ENTROPY, FIRST_READ, False,
            )  # fmt: skip
            # Asked for here, what the loss needs arrives while the lanes meet, and occupies no register before. In
            # place, the lanes' barriers also give every thread its copy of z_y before any thread overwrites it.
            z_y = load_target(start, y)
            advantage = tl.load(terms.advantages + row)
            policy_weight = tl.load(terms.policy_weights + row)
            penalty_weight = tl.load(terms.penalty_weights + row)
            old_logprob = tl.full((), 0.0, tl.float32)
            ref_logprob = tl.full((), 0.0, tl.float32)
            if HAS_OLD:
                old_logprob = tl.load(terms.old_logprobs + row)
            if HAS_KL:
                ref_logprob = tl.load(terms.ref_logprobs + row)
            logprob, maximum, rest, entropy = row_statistics(lanes, z_y, transform, SOFTCAP, ENTROPY)
            loss, c, h = token_loss(
                logprob, entropy, advantage, policy_weight, penalty_weight, old_logprob, ref_logprob,
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
    B, T, V = logits.shape
    if spec.kl_coef != 0 and terms.ref_logprobs is None:
        raise ValueError("ref_logprobs: expected a tensor beside a non-zero kl_coef, got None")
    entropy = entropy or spec.entropy_coef != 0
    losses, logprobs = torch.empty_like(terms.advantages), torch.empty_like(terms.advantages)
    entropies = torch.empty_like(losses) if entropy else None
    if B * T == 0:
        return losses, logprobs, entropies
    softcap, aligned = transform.softcap is not None, out is None or same_alignment(logits, out)
    launch = launch_configuration(logits, reread=out is not None, narrow=softcap or not aligned)
    out_strides = (0, 0) if out is None else (out.stride(0), out.stride(1))
    with on_device_of(logits):
        fused_policy_loss_kernel[launch.grid(B * T)](
            logits, out, tokens, compute, terms, losses, logprobs, entropies,
            transform_constants(*transform), spec.parameters, spec.max_log_ratio, spec.kl_coef, spec.entropy_coef,
            B * T, T, V, logits.stride(0), logits.stride(1), *out_strides,
            LANES=launch.lanes, VEC=launch.vec, UNROLL=launch.unroll, KIND=spec.kind,
            HAS_OLD=terms.old_logprobs is not None, HAS_KL=spec.kl_coef != 0,
            ENTROPY=entropy, ENTROPY_TERM=spec.entropy_coef != 0, SOFTCAP=softcap,
            GRADIENT=out is not None, ALIGNED_OUT=aligned,
            num_warps=launch.num_warps, **launch.options,
        )  # fmt: skip
    return losses, logprobs, entropies
