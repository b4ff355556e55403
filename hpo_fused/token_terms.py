"""A loss call's arguments, checked once, and their collapse to numbers per token in torch.

``check_batch`` states every rule about the arguments' shapes, dtypes, devices and combinations. ``token_terms`` is the
torch twin of ``kernels/token_terms.py``: masks, the caller's weights, hysteresis, normalisation and coefficients become
three weights per token. Traceable by torch.compile, and never waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import (
    BatchStatistics,
    Layout,
    adaptive_alpha,
    as_mask,
    check_boundaries,
    check_groups,
    check_mask,
    check_per_response,
)
from .checks import check_tensor, check_token_ids, described
from .interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    MASKED,
    OLD_LOGPROB,
    POLICY_WEIGHT,
    REF_LOGPROB,
    SKIPPED,
    TERMS,
    Batch,
    Count,
    LossSpec,
    TokenTerms,
)
from .objective import AdaptiveHysteretic, Hysteretic, Objective


def check_batch(
    objective: Objective,
    name: str,
    shape: torch.Size,
    device: torch.device,
    tokens: Tensor | None,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: Tensor | None,
    statistics: object,
) -> Batch:
    """The arguments of a loss call as plain values.

    Args:
        objective: what to optimise.
        name: the argument that ``shape`` was taken from, for messages.
        shape: [B, T], or packed [N], of per-token tensors.
        device: where every tensor has to be.
        tokens: the sampled ids, whose shape, dtype and device are checked already; None: log-probabilities are given.
        advantages and all others: as in :func:`hpo_fused.policy_loss`.

    Raises:
        TypeError, ValueError: as :func:`hpo_fused.policy_loss` documents, but for the ids' range.
    """
    responses = check_boundaries(name, shape, device, cu_seqlens)
    per_token = [tuple(shape)]
    rows = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
    if mask is not None:
        mask = check_mask(mask, shape, device)
    advantages, advantage_per_token = check_per_response("advantages", advantages, shape, responses, device)
    if statistics is not None:
        if not isinstance(statistics, BatchStatistics):
            raise TypeError(f"statistics: expected a BatchStatistics or None, got {described(statistics)}")
        statistics.check_device(device)
    if statistics is None or objective.normalization == "group_mean_length":  # else nobody asks
        groups = check_groups(groups, responses, device)
    if objective.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: expected reference log-probabilities for kl_coef={objective.kl_coef}, got None"
        )
    if old_logprobs is not None:
        old_logprobs = check_tensor("old_logprobs", old_logprobs, per_token, "floating", device)
    if ref_logprobs is not None:
        ref_logprobs = check_tensor("ref_logprobs", ref_logprobs, per_token, "floating", device)
    if objective.normalization == "constant" and objective.max_length is None:
        raise ValueError(
            "max_length: expected a positive int on the objective for normalization='constant', got "
            "None; use e.g. Objective.preset('dr_grpo', max_length=4096)"
        )
    weight_per_token = False
    if token_weights is not None:
        token_weights, weight_per_token = check_per_response("token_weights", token_weights, shape, responses, device)
    normalization, normalizers = str(objective.normalization), None
    if objective.normalization == "group_mean_length":
        if groups is None:
            raise ValueError("groups: expected an integer tensor [B] for normalization='group_mean_length', got None")
        counted = statistics
        if counted is None:
            layout = Layout.of(as_mask(mask, rows, device), responses, cu_seqlens)
            counted = BatchStatistics._of_layout(layout, advantages, advantage_per_token, groups)
        elif counted.group_ids is None:
            raise ValueError(
                "statistics: expected group counts for normalization='group_mean_length', got none; "
                "pass groups to BatchStatistics.from_batch"
            )
        normalization, normalizers = "given", counted.group_normalizer(groups)
    weighting, alpha = "none", 1.0
    if isinstance(objective.weighting, Hysteretic):
        weighting, alpha = "fixed", objective.weighting.alpha
    elif isinstance(objective.weighting, AdaptiveHysteretic):
        weighting, alpha = "adaptive", objective.weighting.alpha_min
    totals: tuple[Count, Count, Count, Count] | None = None
    if statistics is not None:
        totals = statistics.responses, statistics.tokens, statistics.positive, statistics.negative
    return Batch(
        rows, responses, _unit_stride(tokens), _unit_stride(mask),
        advantages if advantages.stride(-1) == 1 else advantages.contiguous(),
        _unit_stride(token_weights), _unit_stride(old_logprobs), _unit_stride(ref_logprobs),
        _unit_stride(cu_seqlens), advantage_per_token, weight_per_token, normalization, normalizers,
        objective.max_length or 1 if normalization == "constant" else 1, weighting, float(alpha),
        float(objective.kl_coef), float(objective.entropy_coef), totals,
        1.0 if statistics is None else float(statistics.gradient_average),
    )  # fmt: skip


def _unit_stride(value: Tensor | None) -> Tensor | None:
    """The tensor as kernels can address it: last dimension contiguous. Copied only where it is not."""
    return value if value is None or value.stride(-1) == 1 else value.contiguous()


def totals_of_batch(batch: Batch, lengths: Tensor, signs: Tensor) -> tuple[Count, Count, Count, Count]:
    """(S, tokens, N+, N-) of the optimiser batch: as given, or counted in this call."""
    if batch.totals is not None:
        return batch.totals
    return batch.responses, lengths.sum(), (signs > 0).sum(), (signs < 0).sum()


def hysteretic_weight(batch: Batch, positive: Count, negative: Count) -> float | Tensor:
    """Weight of negative advantages: 1, alpha, or the adaptive one."""
    return adaptive_alpha(positive, negative, batch.alpha) if batch.weighting == "adaptive" else batch.alpha


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _normalizer(batch: Batch, layout: Layout, lengths: Tensor, responses: Count, tokens: Count) -> float | Tensor:
    """1 / n_i, see ``Objective.normalization``: a number, a 0-d tensor or one entry per row."""
    if batch.normalization == "response":
        return layout.of_each_row((_at_least_one(responses) * lengths.clamp(min=1)).to(torch.float32))
    if batch.normalization == "mean_length":
        return _at_least_one(tokens)
    if batch.normalizers is not None:
        return layout.of_each_row(batch.normalizers)
    return _at_least_one(responses) * batch.max_length


def token_terms(batch: Batch, spec: LossSpec, vocabulary: int | None, skip_inactive: bool) -> TokenTerms:
    """The terms of every token, in some thirty small operations.

    Args:
        batch: the call's arguments.
        spec: the lowered objective.
        vocabulary: V; None: the batch has no tokens.
        skip_inactive: whether no sweep is to compute rows without a learning signal.

    Raises:
        ValueError: a token id outside [0, V) at an unmasked position; see :func:`token_targets`.
    """
    device = batch.advantages.device
    layout = Layout.of(as_mask(batch.mask, batch.rows, device), batch.responses, batch.cu_seqlens)
    mask = layout.mask
    advantages = layout.rows(batch.advantages.detach().to(torch.float32), batch.advantage_per_token)
    lengths, sums = layout.lengths(), layout.response_sum(advantages)
    signs = (sums > 0).to(torch.int32) - (sums < 0).to(torch.int32)
    responses, tokens, positive, negative = totals_of_batch(batch, lengths, signs)

    # Quotients of integers and numbers in torch.where take the default dtype, which may be a narrow one.
    normalizer = _normalizer(batch, layout, lengths, responses, tokens)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(torch.float32)
    penalty = mask.to(torch.float32) * (batch.gradient_average / normalizer)
    policy = penalty
    if batch.weighting != "none":  # not masked_fill: on CUDA it would fetch alpha, a tensor, to the host
        alpha = hysteretic_weight(batch, positive, negative)
        policy = penalty * torch.where(advantages < 0, alpha, torch.ones_like(advantages))
    if batch.token_weights is not None:
        caller = layout.rows(batch.token_weights.detach().to(torch.float32), batch.weight_per_token)
        policy = torch.where(mask & (policy != 0), policy * caller, 0.0)
    live = (policy != 0) & (advantages != 0)
    if spec.sequence_level:  # one live token moves the whole response's ratio
        live = mask & layout.of_each_row(layout.response_sum(live.to(torch.int64)) > 0)
    active = (mask if spec.kl or spec.entropy_bonus else live).contiguous()

    values = torch.zeros(TERMS, *mask.shape, dtype=torch.float32, device=device)
    values[ADVANTAGE], values[POLICY_WEIGHT] = advantages, policy
    if batch.old_logprobs is not None:
        values[OLD_LOGPROB] = batch.old_logprobs.detach().reshape(mask.shape)
    if batch.ref_logprobs is not None:
        values[REF_LOGPROB] = batch.ref_logprobs.detach().reshape(mask.shape)
    if spec.kl:
        values[KL_WEIGHT] = batch.kl_coef * penalty
    if spec.entropy_bonus:
        values[ENTROPY_WEIGHT] = batch.entropy_coef * penalty
    targets = token_targets(batch.tokens, mask, vocabulary)
    if skip_inactive:
        targets = torch.where(mask & ~active, SKIPPED, targets)
    return TokenTerms(values, targets, active, torch.stack((lengths.to(torch.int32), signs)), batch.cu_seqlens)


def token_targets(tokens: Tensor | None, mask: Tensor, vocabulary: int | None) -> Tensor:
    """The sampled ids of unmasked rows as int32 of ``mask``'s shape, MASKED elsewhere; 0 stands for ids not given.

    Raises:
        ValueError: an unmasked id outside [0, V), where values can be read; elsewhere an assertion on the device. While
            that is under way, no kernel is to read outside the row: the row is skipped. Traced on a CPU nothing is
            asserted: the id becomes V, which indexing refuses and which gives NaN in the kernels.
    """
    if tokens is None or vocabulary is None:
        return torch.where(mask, 0, MASKED).to(torch.int32)
    ids = tokens.reshape(mask.shape).to(torch.int64)
    inside = check_token_ids(ids, mask, vocabulary)
    ids = torch.where(inside, ids, vocabulary if tokens.device.type == "cpu" else SKIPPED)
    return torch.where(mask, ids, MASKED).to(torch.int32)
