"""What a token's loss weighs, on the device: masks, counts of the batch, length normalisation, hysteretic weights.

Two steps. ``response_statistics_kernel``, one program per response: its unmasked length and the sign of its advantage.
The device functions after it: the totals of a batch from those, reduced once per program by whoever needs them, and a
row's weights. So no weight is ever written to memory, and nothing is added up by atomics: bitwise the same every run.

The torch twin is ``hpo_fused/batch.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpo_fused.rows import BatchWeights, TokenInputs

from .elementary import to_float32
from .launch import assertions

# Rows per step. Fixed: a new length must not recompile.
STATISTICS_BLOCK = 1024
# Responses per step. Not one per thread of the program: a reduction over all warps in the prologue left the fused
# kernel's thread offsets live throughout, which spilled on sm_100.
TOTALS_BLOCK = tl.constexpr(128)

# Flat and unspecialised throughout: micro-batches are slices of larger tensors, whose alignment varies with T.
INPUTS = ["tokens", "mask", "advantages", "token_weights", "old_logprobs", "ref_logprobs"]
INPUT_STRIDES = [f"{name}_stride" for name in INPUTS]


@triton.jit(
    debug=True,
    do_not_specialize=[
        "statistics", "tokens", "mask", "advantages", "cu_seqlens", "N", "T", "B", "V",
        "tokens_stride", "mask_stride", "advantages_stride",
    ],
)  # fmt: skip
def response_statistics_kernel(
    statistics,  # int32: room for two numbers of batch_factors; lengths [B]; signs of the advantages [B]; packed: each
    # row's response [N]
    tokens,  # [B, T] or [N], or None: nothing to check
    mask,  # [B, T] or [N], or None: nothing masked
    advantages,  # [B], [B, T] or [N]
    cu_seqlens,  # [B + 1], or None: padded
    N,
    T,
    B,
    V,
    tokens_stride,
    mask_stride,
    advantages_stride,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    response = tl.program_id(0)
    first = tl.full((), 0, tl.int64)  # of the response's rows, counted from the start of its row of [B, T]
    last = first + T
    base = response.to(tl.int64)
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + response).to(tl.int64)
        last = tl.load(cu_seqlens + response + 1).to(tl.int64)
        ordered = (first >= 0) & (first <= last) & (last <= N)
        ends = ((response > 0) | (first == 0)) & ((response < B - 1) | (last == N))
        tl.device_assert(ordered & ends, "cu_seqlens: expected boundaries that rise from 0 to N")
        first, last = tl.maximum(first, 0), tl.minimum(last, N)  # no read outside the rows, whatever they say
        base = tl.full((), 0, tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    signal = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < last
        unmasked = inside
        if mask is not None:
            unmasked = inside & (tl.load(mask + base * mask_stride + index, mask=inside, other=0) != 0)
        count += unmasked.to(tl.int32)
        if PER_TOKEN:
            advantage = tl.load(advantages + base * advantages_stride + index, mask=unmasked, other=0)
            signal += to_float32(advantage)
        if tokens is not None:
            token = tl.load(tokens + base * tokens_stride + index, mask=unmasked, other=0).to(tl.int64)
            tl.device_assert((token >= 0) & (token < V), "tokens: expected ids in [0, V) at unmasked positions")
        if cu_seqlens is not None:
            tl.store(statistics + (2 + 2 * B) + index, tl.zeros([BLOCK], tl.int32) + response, mask=inside)
    length = tl.sum(count)
    if PER_TOKEN:
        total = tl.sum(signal)
    else:
        total = to_float32(tl.load(advantages + response))
    sign = (total > 0).to(tl.int32) - (total < 0).to(tl.int32)
    tl.store(statistics + 2 + response, length)
    tl.store(statistics + (2 + B) + response, tl.where(length > 0, sign, 0))


@triton.jit
def _count(counts, numbers, index: tl.constexpr):
    """A total as float32, from the device where it lies there."""
    if counts[index] is not None:
        return tl.load(counts[index]).to(tl.float32)
    else:
        return numbers[index]


@triton.jit
def batch_factors(
    statistics, counts, numbers, B,
    NORMALIZATION: tl.constexpr, WEIGHTING: tl.constexpr, OWN_COUNTS: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Factor and alpha: what every row's normalisation shares, and the weight of negative advantages.

    ``counts``, ``numbers``: of :class:`~hpo_fused.rows.BatchWeights`. OWN_COUNTS: tokens, N+ and N- are this call's.
    The factor is n_i itself, but for "response", where 1 / max(L_i, 1) is left, and "response_given", where it is
    gradient_average and the rest is given per response.
    """
    average, alpha, max_length = numbers[4], numbers[5], numbers[6]
    tokens = tl.full((), 0.0, tl.float32)
    positive, negative = tokens, tokens
    if OWN_COUNTS:
        if (NORMALIZATION == "mean_length") | (WEIGHTING == "adaptive"):
            lengths = tl.zeros([TOTALS_BLOCK], tl.int32)
            above, below = lengths, lengths
            for start in range(0, B, TOTALS_BLOCK):
                response = start + tl.arange(0, TOTALS_BLOCK)
                inside = response < B
                lengths += tl.load(statistics + 2 + response, mask=inside, other=0)
                if WEIGHTING == "adaptive":
                    sign = tl.load(statistics + (2 + B) + response, mask=inside, other=0)
                    above += (sign > 0).to(tl.int32)
                    below += (sign < 0).to(tl.int32)
            tokens = tl.sum(lengths).to(tl.float32)
            positive, negative = tl.sum(above).to(tl.float32), tl.sum(below).to(tl.float32)
    else:
        tokens = _count(counts, numbers, 1)
        positive, negative = _count(counts, numbers, 2), _count(counts, numbers, 3)
    factor = average + tl.full((), 0.0, tl.float32)
    if NORMALIZATION == "mean_length":
        factor = average / tl.maximum(tokens, 1.0)
    elif NORMALIZATION != "response_given":
        factor = average / (tl.maximum(_count(counts, numbers, 0), 1.0) * max_length)
    weight = tl.full((), 1.0, tl.float32)
    if WEIGHTING == "adaptive":  # arXiv 2605.30201: clip(N+ / N-, alpha_min, 1), our 1 where N- is 0
        quotient = tl.where(negative == 0, 1.0, positive / tl.maximum(negative, 1.0))
        weight = tl.minimum(tl.maximum(quotient, alpha), 1.0)
    elif WEIGHTING == "fixed":
        weight = weight * alpha
    if RELOAD:
        # Kept in memory: in registers they would be live throughout a kernel's sweeps. Every program writes the same
        # bits to the same place, so that whichever of them is then found there is right.
        tl.store(statistics, factor.to(tl.int32, bitcast=True))
        tl.store(statistics + 1, weight.to(tl.int32, bitcast=True))
        tl.debug_barrier()
    return factor, weight


@triton.jit
def response_rows(response, cu_seqlens, N, T, PACKED: tl.constexpr):
    """Its first row, and the one after its last; no row outside [0, N), whatever the boundaries say."""
    first = response * T
    last = first + T
    if PACKED:
        first = tl.maximum(tl.load(cu_seqlens + response).to(tl.int32), 0)
        last = tl.minimum(tl.load(cu_seqlens + response + 1).to(tl.int32), N)
    return first, last


@triton.jit
def load_token(pointer, row, inside, T, stride, PACKED: tl.constexpr):
    """Entries of a per-token tensor [B, T] (packed: [N]) at ``row``, as they are."""
    if PACKED:  # neither T nor the stride need a register; nor, else, a second one for 64-bit offsets
        return tl.load(pointer + row, mask=inside)
    else:
        b = row // T
        return tl.load(pointer + (b * stride + (row - b * T)), mask=inside)


@triton.jit
def _load_any(pointer, row, response, inside, T, stride, PACKED: tl.constexpr, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return to_float32(load_token(pointer, row, inside, T, stride, PACKED))
    else:
        return to_float32(tl.load(pointer + response, mask=inside))


@triton.jit
def row_weights(
    row, inside, T, B, factor, alpha, statistics, normalizers, mask, mask_stride, advantages, advantages_stride,
    token_weights, token_weights_stride,
    NORMALIZATION: tl.constexpr, WEIGHTING: tl.constexpr, PACKED: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr, WEIGHT_PER_TOKEN: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """(unmasked, advantage, policy weight, penalty weight) of a row, or of a block of rows of which ``inside`` exist.

    Weights are 0 where masked. RELOAD: the factors are read from ``statistics``. "prepared": somebody else made both
    weights, ``token_weights`` and ``normalizers``, per row.
    """
    if PACKED:
        response = tl.load(statistics + (2 + 2 * B) + row, mask=inside)
    else:
        response = row // T
    unmasked = row >= 0
    if inside is not None:
        unmasked = inside
    if mask is not None:
        unmasked = unmasked & (load_token(mask, row, inside, T, mask_stride, PACKED) != 0)
    advantage = _load_any(advantages, row, response, inside, T, advantages_stride, PACKED, ADVANTAGE_PER_TOKEN)
    if NORMALIZATION == "prepared":
        return unmasked, advantage, tl.load(token_weights + row), tl.load(normalizers + row)
    else:
        if RELOAD:
            factor = tl.load(statistics).to(tl.float32, bitcast=True)
            alpha = tl.load(statistics + 1).to(tl.float32, bitcast=True)
        penalty = factor
        if NORMALIZATION == "response":
            length = tl.load(statistics + 2 + response, mask=inside)
            penalty = factor / tl.maximum(length, 1).to(tl.float32)
        elif NORMALIZATION == "response_given":
            penalty = factor / tl.load(normalizers + response, mask=inside)
        penalty = tl.where(unmasked, penalty, 0.0)
        policy = penalty
        if WEIGHTING != "none":
            policy = tl.where(advantage < 0, penalty * alpha, penalty)
        if token_weights is not None:
            caller = _load_any(token_weights, row, response, inside, T, token_weights_stride, PACKED, WEIGHT_PER_TOKEN)
            policy = tl.where(policy != 0, policy * caller, 0.0)
        return unmasked, advantage, policy, penalty


def response_statistics(inputs: TokenInputs, weights: BatchWeights, rows: int, T: int, V: int) -> Tensor:
    """Launch the kernel of that name; a device-side assert for token ids or boundaries out of range."""
    packed, B = inputs.cu_seqlens is not None, weights.responses
    statistics = torch.empty(2 + 2 * B + rows * packed, dtype=torch.int32, device=inputs.advantages.device)
    mask = inputs.mask
    response_statistics_kernel[(B,)](
        statistics, inputs.tokens, mask, inputs.advantages, inputs.cu_seqlens, rows, T, B, V,
        0 if inputs.tokens is None else inputs.tokens.stride(0), 0 if mask is None else mask.stride(0),
        inputs.advantages.stride(0), PER_TOKEN=inputs.advantage_per_token, BLOCK=STATISTICS_BLOCK, num_warps=4,
        **assertions(),
    )  # fmt: skip
    return statistics
