"""Kernel and launcher: the whole line of a token-level objective in one launch, loss and gradient.

    logits --sweep 1--> logp, H --token_loss--> loss, c, h --sweep 2 (cache)--> dlogits

Device-memory traffic is one read of the logits and one write of the gradient: the second sweep follows the first
before the row has left the last-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.interface import LogitTransform, LossSpec

from .first_sweep import combine_lanes, from_leader, lane_statistics, leads, row_statistics
from .launch import launch_configuration, launch_programs, pressure_of, same_alignment, transform_constants
from .numerics import to_float32
from .row_tiles import row_offset
from .second_sweep import gradient_constants, row_gradient, zero_row
from .surrogate import token_log_ratio, token_loss
from .token_terms import ADVANTAGE, ENTROPY_WEIGHT, KL_WEIGHT, MASKED, OLD_LOGPROB, POLICY_WEIGHT, REF_LOGPROB
from .transform import row_scale


@triton.jit
def row_loss(
    row, start, y, lanes, values, results, transform, parameters, max_log_ratio, N,
    KIND: tl.constexpr, OFF_POLICY: tl.constexpr, KL: tl.constexpr, ENTROPY_BONUS: tl.constexpr, ENTROPY: tl.constexpr,
    LEADER: tl.constexpr,
):  # fmt: skip
    """Between the sweeps: writes a row's results; (maximum, constant, slope, target) of its second sweep.

    The last three are the leader's, and 0 where the row has no gradient. ``start``: pointer to the row's first logit;
    ``lanes``: of ``lane_statistics``; ``transform``: the row's own; the others as in the kernel.
    """
    zero = tl.full((), 0.0, tl.float32)
    constant, slope, target = zero, zero, zero
    # Asked for here, the row's terms arrive while the lanes meet, and occupy no register before. In place, the lanes'
    # barriers also give every thread its copy of z_y before any thread overwrites it.
    z_y = to_float32(tl.load(start + y))
    advantage = tl.load(values + ADVANTAGE * N + row)
    policy_weight = tl.load(values + POLICY_WEIGHT * N + row)
    kl_weight, entropy_weight, ref_logprob, difference = zero, zero, zero, zero
    if OFF_POLICY:
        old_logprob = tl.load(values + OLD_LOGPROB * N + row)
    if KL != "none":
        kl_weight = tl.load(values + KL_WEIGHT * N + row)
        ref_logprob = tl.load(values + REF_LOGPROB * N + row)
    if ENTROPY_BONUS:
        entropy_weight = tl.load(values + ENTROPY_WEIGHT * N + row)
    maximum, others, moment = combine_lanes(lanes, z_y, transform, ENTROPY)
    if leads(LEADER):
        logprob, entropy = row_statistics(maximum, others, moment, z_y, transform, ENTROPY)
        if OFF_POLICY:
            difference = logprob - old_logprob
        log_ratio, inside = token_log_ratio(difference, advantage, parameters, KIND)
        loss, by_ratio, by_logprob, h = token_loss(
            logprob, entropy, advantage, policy_weight, kl_weight, entropy_weight, log_ratio, difference, ref_logprob,
            parameters, max_log_ratio, 0, KIND, OFF_POLICY, KL, ENTROPY_BONUS,
        )  # fmt: skip
        tl.store(results + row, loss)
        tl.store(results + N + row, logprob)
        if ENTROPY:
            tl.store(results + 2 * N + row, entropy)
        c = tl.where(inside != 0, by_ratio, 0.0) + by_logprob
        if (c != 0) | (h != 0):  # a weight of 0 stays 0 whatever the row holds
            constant, slope, target = gradient_constants(
                maximum, others, entropy, z_y, c, h, transform, ENTROPY_BONUS
            )  # fmt: skip
    return maximum, constant, slope, target


@triton.jit
def empty_row(row, y, V, results, N, ENTROPY: tl.constexpr):
    """Writes the results of a row that is masked, skipped or has a target that there is not."""
    zero, unknown = tl.full((), 0.0, tl.float32), tl.full((), float("nan"), tl.float32)
    tl.store(results + row, tl.where(y < V, zero, unknown))
    tl.store(results + N + row, tl.where(y == MASKED, zero, unknown))
    if ENTROPY:
        tl.store(results + 2 * N + row, tl.where(y == MASKED, zero, unknown))


@triton.jit(
    do_not_specialize=[
        "targets", "values", "results", "temperatures", "N", "T", "V", "stride_b", "stride_t", "out_stride_b",
        "out_stride_t",
    ]
)  # fmt: skip
def policy_loss_kernel(
    logits,  # [B, T, V], unit stride on V
    out,  # [B, T, V], unit stride on V: the gradient; may be logits; None: no second sweep
    targets,  # int32 [B, T]: see TokenTerms
    values,  # float32 [TERMS, B, T]: see TokenTerms
    results,  # float32 [2 or 3, B, T]: losses, log-probabilities, entropies
    transform,  # of launch.transform_constants
    temperatures,  # float32 [B, T] by which transform is divided; None: 1
    parameters,  # this to ENTROPY_BONUS: fields of LossSpec
    max_log_ratio,
    N,  # B * T
    T,
    V,
    stride_b,
    stride_t,
    out_stride_b,
    out_stride_t,
    KIND: tl.constexpr,
    OFF_POLICY: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    ENTROPY: tl.constexpr,  # results has entropies
    ALIGNED_OUT: tl.constexpr,  # see second_sweep.row_gradient
    LANES: tl.constexpr,  # this and UNROLL: how a row is cut, see row_tiles.py
    UNROLL: tl.constexpr,
    LEADER: tl.constexpr,  # see first_sweep.leads
):
    """A row per iteration of persistent programs: 1. statistics; 2. loss and coefficients; 3. gradient."""
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    # The row is read again only if a gradient follows.
    FIRST_READ: tl.constexpr = "evict_last" if out is not None else "evict_first"
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        y = tl.load(targets + row)
        zero = tl.full((), 0.0, tl.float32)
        maximum, constant, slope, target = zero, zero, zero, zero
        start = logits + row_offset(row, T, stride_b, stride_t)
        if (y >= 0) & (y < V):
            scale, inverse = row_scale(transform, temperatures, row)
            own = (scale, inverse, transform[2])
            lanes = lane_statistics(start, V, y, own, LANES, VEC, UNROLL, ENTROPY, FIRST_READ)
            maximum, constant, slope, target = row_loss(
                row, start, y, lanes, values, results, own, parameters, max_log_ratio, N,
                KIND, OFF_POLICY, KL, ENTROPY_BONUS, ENTROPY, LEADER,
            )  # fmt: skip
            if out is not None:
                constant = from_leader(constant, LANES, LEADER)
            if out is not None and ENTROPY_BONUS:
                slope = from_leader(slope, LANES, LEADER)
        else:
            empty_row(row, y, V, results, N, ENTROPY)
        if out is not None:
            destination = out + row_offset(row, T, out_stride_b, out_stride_t)
            # NaN differs from 0: an undefined row gets a NaN gradient, never a silent 0.
            if (constant != 0) | (slope != 0):
                # Kept from above, they would crowd the registers.
                scale, inverse = row_scale(transform, temperatures, row)
                own = (scale, inverse, transform[2])
                row_gradient(
                    start, destination, V, y, maximum, constant, slope, target, own,
                    LANES, VEC, UNROLL, ENTROPY_BONUS, ALIGNED_OUT,
                )  # fmt: skip
            else:
                zero_row(destination, V, LANES, VEC, UNROLL)


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    values: Tensor,
    spec: LossSpec,
    transform: LogitTransform,
    results: Tensor,
    out: Tensor | None,
) -> None:
    """Write every token's loss, log-probability and entropy, and the gradient of the losses' sum.

    Args:
        logits: [B, T, V], unit stride on V.
        targets, values: of ``TokenTerms``; contiguous int32 [B, T] and float32 [TERMS, B, T].
        spec: the lowered objective, token-level.
        transform: temperature and softcap.
        results: contiguous float32 [2, B, T], or [3, B, T] where entropies are wanted; written in every row: LOSS,
            LOGPROB, ENTROPY, all 0 where masked; loss 0 and NaN where skipped.
        out: where the gradient goes, [B, T, V] of logits' dtype, or ``logits`` itself; None: one sweep, no gradient.
    """
    B, T, V = logits.shape
    if B * T == 0:
        return
    entropy, aligned = results.shape[0] == 3, out is None or same_alignment(logits, out)
    pressure = pressure_of(transform.softcap, spec.entropy_bonus, aligned)
    launch = launch_configuration(logits, reread=out is not None, pressure=pressure)
    out_stride_b, out_stride_t = (0, 0) if out is None else out.stride()[:2]
    arguments = (
        logits, out, targets, values, results, transform_constants(*transform[:2]), transform.temperatures,
        spec.parameters, spec.max_log_ratio, B * T, T, V, *logits.stride()[:2], out_stride_b, out_stride_t,
    )  # fmt: skip
    constants = {
        "KIND": spec.kind, "OFF_POLICY": spec.off_policy, "KL": spec.kl, "ENTROPY_BONUS": spec.entropy_bonus,
        "ENTROPY": entropy, "ALIGNED_OUT": aligned, "LANES": launch.lanes, "UNROLL": launch.unroll,
        "LEADER": launch.leader,
    }  # fmt: skip
    launch_programs(policy_loss_kernel, launch.programs(B * T), arguments, constants, launch.options)
