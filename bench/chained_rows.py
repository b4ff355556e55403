"""Experiment: a row's gradient overlaps the next row. No GPU has timed it yet.

The shipped kernel does a row's sweeps one after the other, and between them, and between rows, a program has nothing in
flight (docs/kernels.md). Two remedies; each row's arithmetic is in the shipped kernel's order, so that at the same
threads and loads the results are the same bits.

"step": the first step of a row, read longest ago and lost from the nearest cache, waits for the next row. It is loaded
before that row's lanes meet and written after, so that reads and writes of memory fill the meeting.

"all": a row's gradient is written while the next row's logits arrive for their statistics, in one loop:

    row r       g n-1 | g n-2 | ... | g 0      what was read last is read again first
    row r + 1   s 0   | s 1   | ... | s n-1    its lines take the place of those used up

Timed on a GPU by naming the variants as providers::

    hpo-fused-bench speed --op policy_loss --shape qwen3-8b --shape gemma3-270m --shape gpt2 --provider hpo_fused \\
        --provider hpo_fused.bench.chained_rows:Deferred --provider hpo_fused.bench.chained_rows:Chained
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from hpo_fused.kernels import launch
from hpo_fused.kernels.first_sweep import (
    absorb_last_step,
    absorb_step,
    edge_statistics,
    from_leader,
    lane_statistics,
)
from hpo_fused.kernels.numerics import round_to
from hpo_fused.kernels.policy_loss import empty_row, row_loss
from hpo_fused.kernels.row_tiles import frame, group_mask, load_step, row_offset, tile_offsets
from hpo_fused.kernels.second_sweep import (
    gradient_body,
    gradient_edge,
    gradient_last_step,
    gradient_step,
    row_gradient,
    store_gradient,
    zero_row,
)
from hpo_fused.kernels.transform import row_scale

from .providers.fused import Fused


@triton.jit
def chained_sweeps(
    row, V, y, transform, done, out, maximum, constant, slope, done_transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, ENTROPY: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr, ALIGNED_OUT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """``lane_statistics`` of a row, and ``row_gradient`` of the row done before but for its sampled token's."""
    lead, groups = frame(row, V, VEC)
    body = tl.multiple_of(row + lead, 16)
    steps = groups // (LANES * UNROLL)
    done_lead, done_groups = frame(done, V, VEC)
    done_body, out_body = tl.multiple_of(done + done_lead, 16), gradient_body(out, done_lead, ALIGNED_OUT)
    done_steps = done_groups // (LANES * UNROLL)
    y_element = y - lead

    peak, total, moment = edge_statistics(row, V, y, lead, groups, transform, LANES, VEC, ENTROPY)
    gradient_last_step(
        done_body, out_body, done_steps, done_groups, maximum, constant, slope, done_transform,
        LANES, VEC, UNROLL, ENTROPY_BONUS,
    )  # fmt: skip
    # Aligned differently, two rows can differ by a group, and so by a step.
    if done_steps > steps:
        gradient_step(
            done_body, out_body, done_steps - 1, done_groups, maximum, constant, slope, done_transform,
            LANES, VEC, UNROLL, ENTROPY_BONUS,
        )  # fmt: skip
    common = tl.minimum(steps, done_steps)
    if DEEP:
        raw = load_step(body, 0, groups, LANES, VEC, UNROLL, True, "evict_last")
    for step in range(common):
        if DEEP:
            ahead = load_step(body, tl.minimum(step + 1, common - 1), groups, LANES, VEC, UNROLL, False, "evict_last")
        else:
            raw = load_step(body, step, groups, LANES, VEC, UNROLL, False, "evict_last")
        gradient_step(
            done_body, out_body, common - 1 - step, done_groups, maximum, constant, slope, done_transform,
            LANES, VEC, UNROLL, ENTROPY_BONUS,
        )  # fmt: skip
        peak, total, moment = absorb_step(
            peak, total, moment, raw, step, y_element, transform, LANES, VEC, UNROLL, ENTROPY
        )  # fmt: skip
        if DEEP:
            raw = ahead
    if steps > done_steps:
        raw = load_step(body, steps - 1, groups, LANES, VEC, UNROLL, False, "evict_last")
        peak, total, moment = absorb_step(
            peak, total, moment, raw, steps - 1, y_element, transform, LANES, VEC, UNROLL, ENTROPY
        )  # fmt: skip
    gradient_edge(
        done, out, V, done_lead, done_groups, maximum, constant, slope, done_transform, LANES, VEC, ENTROPY_BONUS
    )  # fmt: skip
    return absorb_last_step(
        peak, total, moment, body, steps, groups, y_element, transform, LANES, VEC, UNROLL, ENTROPY, "evict_last"
    )  # fmt: skip


@triton.jit
def load_first_step(body, groups, LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):
    """``load_step`` of step 0 past the first-level cache, which has lost it, and keeps the next row so."""
    tiles = ()
    for i in tl.static_range(UNROLL):
        base, offsets = tile_offsets(0, i, LANES, VEC, UNROLL)
        mask = group_mask(0, i, groups, LANES, UNROLL)
        tile = tl.load(body + base + offsets, mask=mask, other=float("-inf"), cache_modifier=".cg")
        tiles = tiles + (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def deferred_sweep(
    row, out, V, maximum, constant, slope, transform,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr, ALIGNED_OUT: tl.constexpr,
):  # fmt: skip
    """``row_gradient`` but for the first whole step's, read longest ago, and the sampled token's."""
    lead, groups = frame(row, V, VEC)
    body, out_body = tl.multiple_of(row + lead, 16), gradient_body(out, lead, ALIGNED_OUT)
    steps = groups // (LANES * UNROLL)
    gradient_last_step(
        body, out_body, steps, groups, maximum, constant, slope, transform, LANES, VEC, UNROLL, ENTROPY_BONUS
    )  # fmt: skip
    for index in range(steps - 1):
        gradient_step(
            body, out_body, steps - 1 - index, groups, maximum, constant, slope, transform,
            LANES, VEC, UNROLL, ENTROPY_BONUS,
        )  # fmt: skip
    gradient_edge(row, out, V, lead, groups, maximum, constant, slope, transform, LANES, VEC, ENTROPY_BONUS)


@triton.jit(
    do_not_specialize=[
        "targets", "values", "results", "temperatures", "N", "T", "V", "stride_b", "stride_t", "out_stride_b",
        "out_stride_t",
    ]
)  # fmt: skip
def chained_rows_kernel(
    logits, out, targets, values, results, transform, temperatures, parameters, max_log_ratio, N, T, V, stride_b,
    stride_t, out_stride_b, out_stride_t, KIND: tl.constexpr, OFF_POLICY: tl.constexpr, KL: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED_OUT: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr, LEADER: tl.constexpr, PART: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The shipped kernel's parameters and results.

    ``PART``: what of a row's gradient waits for the next row: "all", written during its first sweep, or "step", the
    first step's, read before the next row's lanes meet and written after. ``DEEP``: with "all", the next row's loads
    run a step ahead.
    """
    VEC: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    zero = tl.full((), 0.0, tl.float32)
    # The row whose gradient is still to be written, or -1, and what that takes.
    done, done_y = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    done_maximum, done_constant, done_slope, done_target = zero, zero, zero, zero
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        y = tl.load(targets + row)
        if (y >= 0) & (y < V):
            start = logits + row_offset(row, T, stride_b, stride_t)
            before = tl.maximum(done, 0)
            done_start = logits + row_offset(before, T, stride_b, stride_t)
            destination = out + row_offset(before, T, out_stride_b, out_stride_t)
            done_lead, done_groups = frame(done_start, V, VEC)
            scale, inverse = row_scale(transform, temperatures, row)
            own = (scale, inverse, transform[2])
            if PART == "step":
                peak, total, moments = lane_statistics(start, V, y, own, LANES, VEC, UNROLL, ENTROPY, "evict_last")
            elif done >= 0:
                done_scale, done_inverse = row_scale(transform, temperatures, done)
                peak, total, moments = chained_sweeps(
                    start, V, y, own, done_start, destination, done_maximum, done_constant, done_slope,
                    (done_scale, done_inverse, transform[2]), LANES, VEC, UNROLL, ENTROPY, ENTROPY_BONUS, ALIGNED_OUT,
                    DEEP,
                )  # fmt: skip
            else:
                peak, total, moments = lane_statistics(start, V, y, own, LANES, VEC, UNROLL, ENTROPY, "evict_last")
            # Of step 0 all groups or, where there is none, nothing.
            held_groups = tl.where((done >= 0) & (done_groups >= LANES * UNROLL), LANES * UNROLL, 0)
            if PART == "step":
                body = tl.multiple_of(done_start + done_lead, 16)
                held = load_first_step(body, held_groups, LANES, VEC, UNROLL)
            maximum, constant, slope, target = row_loss(
                row, start, y, (peak, total, moments), values, results, own, parameters, max_log_ratio, N,
                KIND, OFF_POLICY, KL, ENTROPY_BONUS, ENTROPY, LEADER,
            )  # fmt: skip
            if PART == "step":  # settled while compiling
                if held_groups > 0:  # by the other warps while the leader computes
                    done_scale, done_inverse = row_scale(transform, temperatures, done)
                    store_gradient(
                        held, gradient_body(destination, done_lead, ALIGNED_OUT), 0, done_maximum, done_constant,
                        done_slope, (done_scale, done_inverse, transform[2]), LANES, VEC, UNROLL, ENTROPY_BONUS,
                    )  # fmt: skip
            constant = from_leader(constant, LANES, LEADER)
            if ENTROPY_BONUS:
                slope = from_leader(slope, LANES, LEADER)
            if done >= 0:
                tl.debug_barrier()
                tl.store(destination + done_y, round_to(done_target, out.dtype.element_ty))
            done, done_y = row, y
            done_maximum, done_constant, done_slope, done_target = maximum, constant, slope, target
            destination = out + row_offset(row, T, out_stride_b, out_stride_t)
            if (constant == 0) & (slope == 0):
                done = tl.full((), -1, tl.int32)
                zero_row(destination, V, LANES, VEC, UNROLL)
            elif PART == "step":
                scale, inverse = row_scale(transform, temperatures, row)
                deferred_sweep(
                    start, destination, V, maximum, constant, slope, (scale, inverse, transform[2]),
                    LANES, VEC, UNROLL, ENTROPY_BONUS, ALIGNED_OUT,
                )  # fmt: skip
        else:
            empty_row(row, y, V, results, N, ENTROPY)
            zero_row(out + row_offset(row, T, out_stride_b, out_stride_t), V, LANES, VEC, UNROLL)
    if done >= 0:
        scale, inverse = row_scale(transform, temperatures, done)
        own = (scale, inverse, transform[2])
        start = logits + row_offset(done, T, stride_b, stride_t)
        destination = out + row_offset(done, T, out_stride_b, out_stride_t)
        if PART == "all":
            row_gradient(
                start, destination, V, done_y, done_maximum, done_constant, done_slope, done_target, own,
                LANES, VEC, UNROLL, ENTROPY_BONUS, ALIGNED_OUT,
            )  # fmt: skip
        else:
            lead, groups = frame(start, V, VEC)
            if groups >= LANES * UNROLL:
                gradient_step(
                    tl.multiple_of(start + lead, 16), gradient_body(destination, lead, ALIGNED_OUT), 0, groups,
                    done_maximum, done_constant, done_slope, own, LANES, VEC, UNROLL, ENTROPY_BONUS,
                )  # fmt: skip
            tl.debug_barrier()
            tl.store(destination + done_y, round_to(done_target, out.dtype.element_ty))


class _Chained:
    """In the place of the shipped kernel, which keeps the calls without a gradient."""

    def __init__(self, shipped: Any, part: str, deep: bool) -> None:
        self.shipped, self.constants, self.launches = shipped, {"PART": part, "DEEP": deep}, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(logits: object, out: object, *others: object, **options: object) -> object:
            if out is None:
                return self.shipped[grid](logits, out, *others, **options)
            self.launches += 1
            return chained_rows_kernel[grid](logits, out, *others, **options, **self.constants)

        return run


@contextmanager
def chained(part: str, deep: bool = False) -> Iterator[_Chained]:
    """Until the block ends ``policy_loss`` launches :func:`chained_rows_kernel`, as the value given counts."""
    module = importlib.import_module("hpo_fused.kernels.policy_loss")
    kernel = _Chained(module.policy_loss_kernel, part, deep)
    with mock.patch.object(module, "policy_loss_kernel", kernel):
        yield kernel


class Deferred(Fused):
    """hpo_fused with a row's first step left to the next row: 1024 threads, 4 loads."""

    threads, loads, part, deep = 1024, 4, "step", False

    def __init__(self) -> None:
        super().__init__()
        self.summary = str(self.__doc__).partition(":")[0]

    @contextmanager
    def context(self) -> Iterator[None]:
        rows = torch.cuda.get_device_properties().multi_processor_count
        parameters = launch.LaunchParameters(self.threads, self.loads, rows)
        with chained(self.part, self.deep), launch.override(parameters=parameters):
            yield


class Deferred512x8(Deferred):
    """hpo_fused with a row's first step left to the next row: 512 threads of 128 registers, 8 loads."""

    threads, loads = 512, 8


class Chained(Deferred):
    """hpo_fused with two rows' sweeps in one loop: 512 threads, 4 loads, a row per SM."""

    threads, loads, part = 512, 4, "all"


class ChainedDeep(Chained):
    """hpo_fused with two rows' sweeps in one loop, the next row's loads a step ahead: 512 threads, 4 loads."""

    deep = True
