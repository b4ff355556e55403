"""Kernels and launchers of a vocabulary in shards: the ranks' statistics combined, and a column of the gradient.

One thread for a row; nothing here depends on the length of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.interface import LogitTransform, SoftmaxStatistics

from .launch import launch_programs, response_launch, transform_constants
from .numerics import LN2, log1p_unit, round_to
from .row_tiles import row_offset
from .transform import LOWEST, row_scale, softcapped

# Rows of a program. Fixed: a new number of rows must not recompile.
ROWS_BLOCK = tl.constexpr(128)
# So far below the row's maximum, in powers of two, nothing is left; and a shard of masked logits has no exact maximum.
VANISHING = tl.constexpr(-15000.0)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x) for x >= 0, to float32 relative precision; below 1/2, where it cancels, the series to x^9 / 9!."""
    series = 1.0 / 40320.0 - x * (1.0 / 362880.0)
    series = 1.0 / 5040.0 - x * series
    series = 1.0 / 720.0 - x * series
    series = 1.0 / 120.0 - x * series
    series = 1.0 / 24.0 - x * series
    series = 1.0 / 6.0 - x * series
    series = 0.5 - x * series
    return tl.where(x < 0.5, x - x * x * series, 1.0 - tl.exp(-x))


@triton.jit
def _of_rank(start, top, inside, N):
    """A rank's statistics of rows from ``start`` on: log-probability, maximum, others, and the sum of all.

    Nothing, where all of it vanishes beside the row's maximum ``top``: no columns, or nothing but masked ones.
    """
    logprob = tl.load(start, mask=inside, other=0.0)
    maximum = tl.load(start + N, mask=inside, other=0.0)
    others = tl.load(start + 2 * N, mask=inside, other=0.0)
    empty = (maximum < top + VANISHING) & (others == others)
    # All but certain, the token is the maximum, and the others' sum need not be a normal number. (The token's own
    # exponential is 1 but for the maximum's rounding, 2^-24 of it.)
    total = tl.where(logprob > -1e-30, 1.0, others / _one_minus_exp(-logprob))
    logprob = tl.where(empty, float("-inf"), logprob)
    return logprob, maximum, tl.where(empty, 0.0, others), tl.where(empty, 0.0, total)


@triton.jit(
    do_not_specialize=[
        "gathered", "targets", "ranges", "logprobs", "columns", "maxima", "others", "entropies", "rank", "ranks", "N",
    ]
)  # fmt: skip
def combine_statistics_kernel(
    gathered,  # float32 [W, 3 or 4, N]: every rank's SoftmaxStatistics
    targets,  # int32 [N], ids of the whole vocabulary
    ranges,  # int32 [W, 2]: each rank's first id and the one behind its last
    logprobs,  # float32 [N]: the tokens'
    columns,  # this to entropies: of the rank's SoftmaxStatistics relative to the whole row
    maxima,
    others,
    entropies,
    rank,
    ranks,  # W
    N,
):
    """Every rank's statistics of a row to the row's own: 1. its maximum; 2. its sum; 3. the ranks' shares of it."""
    ENTROPY: tl.constexpr = entropies is not None
    K: tl.constexpr = 4 if ENTROPY else 3
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    inside = row < N
    y = tl.load(targets + row, mask=inside, other=-1)
    top = tl.full([ROWS_BLOCK], LOWEST, tl.float32)
    part = gathered + row
    for _r in range(ranks):
        top = tl.maximum(top, tl.load(part + N, mask=inside, other=0.0))
        part += K * N

    zero = tl.zeros([ROWS_BLOCK], tl.float32)
    total, rest, beside = zero, zero, zero
    part = gathered + row
    for r in range(ranks):
        _, maximum, other, whole = _of_rank(part, top, inside, N)
        decay = tl.exp2(maximum - top)
        mass = decay * whole
        owned = (y >= tl.load(ranges + 2 * r)) & (y < tl.load(ranges + 2 * r + 1))
        total += mass
        rest += tl.where(owned, 0.0, mass)
        beside += tl.where(r == rank, decay * other, mass)
        part += K * N

    unknown = tl.full([ROWS_BLOCK], float("nan"), tl.float32)
    found, column, entropy = unknown, unknown, zero
    log_total = tl.log(total)
    part = gathered + row
    for r in range(ranks):
        logprob, maximum, _, whole = _of_rank(part, top, inside, N)
        drop = maximum - top
        mass = tl.exp2(drop) * whole
        owned = (y >= tl.load(ranges + 2 * r)) & (y < tl.load(ranges + 2 * r + 1))
        share = drop * LN2 + tl.log(whole) - log_total
        share = tl.where(owned & (rest < mass), -log1p_unit(rest / mass), share)
        found = tl.where(owned, logprob + share, found)
        column = tl.where(r == rank, logprob + share, column)
        if ENTROPY:
            of_part = tl.load(part + 3 * N, mask=inside, other=0.0)
            weight = tl.exp(share)
            entropy += tl.where(weight == 0, 0.0, weight * (of_part - share))
        part += K * N
    tl.store(logprobs + row, found, mask=inside)
    tl.store(columns + row, column, mask=inside)
    tl.store(maxima + row, top, mask=inside)
    tl.store(others + row, beside, mask=inside)
    if ENTROPY:
        tl.store(entropies + row, entropy, mask=inside)


def combine_statistics(
    gathered: Tensor, targets: Tensor, ranges: Tensor, rank: int
) -> tuple[Tensor, SoftmaxStatistics]:
    """The tokens' log-probabilities, and a rank's statistics relative to the whole row, NaN in rows without a target.

    Args:
        gathered: float32 [W, 3 or 4, B, T], every rank's SoftmaxStatistics of its own columns in the fields' order.
        targets: int32 [B, T], ids of the whole vocabulary or codes.
        ranges: int32 [W, 2], each rank's first id and the one behind its last.
        rank: whose statistics are wanted.
    """
    new = torch.empty((1 + gathered.shape[1], *targets.shape), dtype=torch.float32, device=gathered.device)
    logprobs, column, maximum, others, *entropy = new.unbind()
    statistics = SoftmaxStatistics(column, maximum, others, entropy[0] if entropy else None)
    N = targets.numel()
    if N > 0:
        arguments = (gathered, targets, ranges, logprobs, *statistics, rank, len(gathered), N)
        launch_programs(combine_statistics_kernel, triton.cdiv(N, ROWS_BLOCK.value), arguments, {}, response_launch())
    return logprobs, statistics


@triton.jit(
    do_not_specialize=[
        "first", "targets", "logprobs", "entropies", "logprob_coefficients", "entropy_coefficients", "temperatures",
        "start", "stop", "N", "T", "stride_b", "stride_t",
    ]
)  # fmt: skip
def column_gradient_kernel(
    out,  # [B, T, columns]
    first,  # float32 [B, T]: the logits of column 0; None without softcap
    targets,  # int32 [B, T]
    logprobs,  # float32 [B, T]: of column 0
    entropies,  # float32 [B, T], with entropy coefficients
    logprob_coefficients,  # float32 [B, T]
    entropy_coefficients,  # float32 [B, T] or None
    transform,  # of launch.transform_constants
    temperatures,  # float32 [B, T] by which transform is divided; None: 1
    start,
    stop,
    N,  # B * T
    T,
    stride_b,
    stride_t,
):
    """dloss/dz of column 0 where the token is elsewhere: p (h (E[z'] - z') - c) dz'/dz, E[z'] - z' = -H - log p."""
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    inside = row < N
    row = tl.minimum(row, N - 1)
    y = tl.load(targets + row)
    logprob = tl.load(logprobs + row)
    c = tl.load(logprob_coefficients + row)
    slope, live = -c, c != 0
    if entropy_coefficients is not None:
        h = tl.load(entropy_coefficients + row)
        slope -= h * (tl.load(entropies + row) + logprob)
        live = live | (h != 0)
    _, inverse = row_scale(transform, temperatures, row)
    derivative = 1.0
    if first is not None:
        _, derivative = softcapped(tl.load(first + row), transform)
    g = tl.where(live & (logprob != float("-inf")), tl.exp(logprob) * slope * derivative * inverse, 0.0)
    elsewhere = (y >= 0) & ((y < start) | (y >= stop))
    place = out + row_offset(row, T, stride_b, stride_t)
    tl.store(place, round_to(g, out.dtype.element_ty), mask=inside & elsewhere)


def column_gradient(
    first: Tensor | None, targets: Tensor, start: int, statistics: SoftmaxStatistics, logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None, transform: LogitTransform, out: Tensor,
) -> None:  # fmt: skip
    """Write column 0 of a shard's gradient in rows whose token is another rank's, which the sweep took for the token's.

    Args:
        first: float32 [B, T], the logits of column 0; None without softcap.
        targets: int32 [B, T], ids of the whole vocabulary or codes.
        start: id of column 0.
        statistics: of :func:`combine_statistics`.
        logprob_coefficients: dloss/dlogp, contiguous float32 [B, T].
        entropy_coefficients: dloss/dH, likewise; None: zeros.
        transform: temperature and softcap.
        out: [B, T, columns], which the second sweep has written.
    """
    B, T, columns = out.shape
    if B * T > 0:
        arguments = (
            out, first, targets, statistics.logprobs, statistics.entropy, logprob_coefficients, entropy_coefficients,
            transform_constants(*transform[:2]), transform.temperatures, start, start + columns, B * T, T,
            *out.stride()[:2],
        )  # fmt: skip
        launch_programs(column_gradient_kernel, triton.cdiv(B * T, ROWS_BLOCK.value), arguments, {}, response_launch())
