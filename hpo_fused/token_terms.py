"""A loss call's arguments, checked once, and their collapse to numbers per token in torch.

``check_batch`` states every rule about the arguments' shapes, dtypes, devices and combinations. ``token_terms`` is the
torch twin of ``kernels/token_terms.py``: masks, the caller's weights, hysteresis, normalisation and coefficients become
three weights per token. Traceable by torch.compile, and never waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import BatchStatistics, adaptive_alpha, check_lengths, check_statistics
from .checks import check_factor, check_tensor, check_token_ids, described
from .context_parallel import context_parts
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
    surrogate_spreads,
)
from .layout import Layout, as_mask, check_advantage_level, check_boundaries, check_groups, check_level, check_mask
from .objective import AdaptiveHysteretic, Hysteretic, Objective
from .shaping import GeometricMean


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
    entropy_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: Tensor | None,
    statistics: object,
    lengths: Tensor | None,
    response_mean_log_ratios: Tensor | None,
    advantage_level: object,
    loss_scale: object = 1.0,
    context_group: object = None,
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
    rows = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])

    def per_token(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else check_tensor(name, value, [tuple(shape)], "floating", device)

    def any_level(name: str, value: Tensor | None, scalar: bool = False) -> Tensor | None:
        return None if value is None else check_level(name, value, shape, responses, device, scalar=scalar)

    if mask is not None:
        mask = check_mask(mask, shape, device)
    given = advantages, token_weights, entropy_weights
    advantages = check_level("advantages", advantages, shape, responses, device, check_advantage_level(advantage_level))
    token_weights = any_level("token_weights", token_weights)
    entropy_weights = any_level("entropy_weights", entropy_weights, scalar=True)
    statistics = check_statistics(statistics, device)
    if statistics is None or objective.normalization == "group_mean_length":  # else nobody asks
        groups = check_groups(groups, responses, device)
    if objective.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: expected reference log-probabilities for kl_coef={objective.kl_coef}, got None"
        )
    old_logprobs, ref_logprobs = per_token("old_logprobs", old_logprobs), per_token("ref_logprobs", ref_logprobs)
    if objective.normalization == "constant" and objective.max_length is None:
        raise ValueError(
            "max_length: expected a positive int on the objective for normalization='constant', got "
            "None; use e.g. Objective.preset('dr_grpo', max_length=4096)"
        )
    if lengths is not None:
        check_lengths(lengths, Layout.of(as_mask(mask, rows, device), responses, cu_seqlens), statistics)
    context = None
    if context_group is not None:
        alike = all(
            value is None or value.dim() == 0 or (value.dim() == 1 and (len(shape) == 2 or responses != shape[0]))
            for value in (given if advantage_level != "response" else given[1:])
        )
        context = context_parts(context_group, lengths, response_mean_log_ratios, alike)
    log_ratios = None if context is not None else _given_log_ratios(
        objective, response_mean_log_ratios, lengths, old_logprobs, responses, device,
        constant=advantages.dim() == 1 and (token_weights is None or token_weights.dim() == 1),
    )  # fmt: skip
    normalization, normalizers, max_length = str(objective.normalization), None, 1
    if normalization == "group_mean_length":
        if groups is None:
            raise ValueError("groups: expected an integer tensor [B] for normalization='group_mean_length', got None")
        counted = statistics
        if counted is None:
            layout = Layout.of(as_mask(mask, rows, device), responses, cu_seqlens)
            counted = BatchStatistics._of_layout(layout, advantages, groups)
        elif counted.group_lengths is None:
            raise ValueError(
                "statistics: expected group counts for normalization='group_mean_length', got none; "
                "pass groups to BatchStatistics.from_batch"
            )
        normalization, normalizers = "given", counted.group_normalizer(groups)
    elif normalization == "response" and lengths is not None:
        assert statistics is not None
        # In float32 first: S times lengths need not fit in their type.
        normalization, normalizers = "given", lengths.clamp(min=1).float() * _at_least_one(statistics.responses)
    elif normalization in ("constant", "response_sum"):
        normalization, max_length = "constant", objective.max_length or 1 if normalization == "constant" else 1
    weighting, alpha = "none", 1.0
    if isinstance(objective.weighting, Hysteretic):
        weighting, alpha = "fixed", objective.weighting.alpha
    elif isinstance(objective.weighting, AdaptiveHysteretic):
        weighting, alpha = "adaptive", objective.weighting.alpha_min
    totals: tuple[Count, Count, Count, Count] | None = None
    scale, scale_tensor = check_factor("loss_scale", loss_scale, device)
    if statistics is not None:
        totals = statistics.responses, statistics.tokens, statistics.positive, statistics.negative
        scale *= statistics.gradient_average
    return Batch(
        rows, responses, _unit_stride(tokens), _unit_stride(mask), advantages, token_weights, entropy_weights,
        _unit_stride(old_logprobs), _unit_stride(ref_logprobs), _unit_stride(cu_seqlens), log_ratios, normalization,
        normalizers, max_length, weighting, float(alpha), float(objective.kl_coef), float(objective.entropy_coef),
        totals, scale, scale_tensor, context,
    )  # fmt: skip


def _given_log_ratios(
    objective: Objective, means: Tensor | None, lengths: Tensor | None, old_logprobs: Tensor | None, responses: int,
    device: torch.device, *, constant: bool,
) -> Tensor | None:  # fmt: skip
    """x of each response from ``response_mean_log_ratios``; ``constant``: its tokens share advantage and weight.

    With x known, the mean of the derivatives over the whole response, which every token gets, is the token's own
    derivative where they are all the same: no other part of the response is needed.
    """
    level, name = objective.ratio_level, "response_mean_log_ratios"
    if isinstance(objective.shaping, GeometricMean) and level != "token" and not (means is None and lengths is None):
        name = name if lengths is None else "lengths"
        raise ValueError(
            f"{name}: expected None for GeometricMean at ratio_level={level!r}, which needs whole responses: it bounds "
            f"log-ratios before their mean; got {described(means if lengths is None else lengths)}"
        )
    if means is None:
        if lengths is not None and level != "token":
            raise ValueError(
                f"{name}: expected each response's mean log-ratio beside lengths for ratio_level={level!r}, got None; "
                "a part of a response does not tell it: context_group or a first sweep over all parts does"
            )
        return None
    check_tensor(name, means, [(responses,)], "floating", device)
    if level == "token":
        raise ValueError(f"{name}: expected None for ratio_level='token', got {described(means)}")
    if lengths is None:
        raise ValueError(f"lengths: expected those of the whole responses, [B], beside {name}, got None")
    spreads = surrogate_spreads(objective.shaping.lower()[0], level)
    if spreads and level == "sequence_sum":  # the sum of L derivatives, not one of them
        raise ValueError(
            f"{name}: expected None for {type(objective.shaping).__name__} at ratio_level={level!r}, whose gradient "
            f"needs the responses' other parts, got {described(means)}"
        )
    if spreads and not constant:
        raise ValueError(
            f"{name}: expected advantages and token_weights [B] for ratio_level={level!r}, got some per token; their "
            "other parts would be needed, see ratio_level='sequence_token'"
        )
    if objective.kl == "k3_ratio" and objective.kl_coef != 0:
        if level == "sequence":
            raise ValueError(
                f"{name}: expected None for kl='k3_ratio' at ratio_level='sequence', whose gradient needs the "
                f"responses' other parts, got {described(means)}"
            )
        if old_logprobs is None:
            raise ValueError(f"old_logprobs: expected them beside {name} for kl='k3_ratio', got None")
    means = means.detach().to(torch.float32).contiguous()
    return means * lengths if level == "sequence_sum" else means


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
    """The count itself, 1 where it is 0: there is nothing to divide then."""
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count or 1


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
    advantages = layout.rows(batch.advantages.detach().to(torch.float32))
    lengths, sums = layout.lengths(), layout.response_sum(advantages)
    signs = (sums > 0).to(torch.int32) - (sums < 0).to(torch.int32)
    responses, tokens, positive, negative = totals_of_batch(batch, lengths, signs)

    # Quotients of integers and numbers in torch.where take the default dtype, which may be a narrow one.
    normalizer = _normalizer(batch, layout, lengths, responses, tokens)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(torch.float32)
    scale = batch.scale if batch.loss_scale is None else batch.scale * batch.loss_scale.detach().to(torch.float32)
    penalty = mask.to(torch.float32) * (scale / normalizer)
    policy = penalty
    if batch.weighting != "none":  # not masked_fill: on CUDA it would fetch alpha, a tensor, to the host
        alpha = hysteretic_weight(batch, positive, negative)
        policy = penalty * torch.where(advantages < 0, alpha, torch.ones_like(advantages))
    if batch.token_weights is not None:
        caller = layout.rows(batch.token_weights.detach().to(torch.float32))
        policy = torch.where(mask & (policy != 0), policy * caller, 0.0)
    live = policy != 0 if spec.every_advantage else (policy != 0) & (advantages != 0)
    if spec.shared_ratio and batch.context is not None and not batch.context.alike:
        live = mask  # for a row on another rank may be live
    elif spec.shared_ratio:  # one live token moves the whole response's ratio
        live = mask & layout.of_each_row(layout.response_sum(live.to(torch.int64)) > 0)

    values = torch.zeros(TERMS, *mask.shape, dtype=torch.float32, device=device)
    values[ADVANTAGE], values[POLICY_WEIGHT] = advantages, policy
    if batch.old_logprobs is not None:
        values[OLD_LOGPROB] = batch.old_logprobs.detach().reshape(mask.shape)
    if batch.ref_logprobs is not None:
        values[REF_LOGPROB] = batch.ref_logprobs.detach().reshape(mask.shape)
    if spec.kl != "none":
        values[KL_WEIGHT] = batch.kl_coef * penalty
        live = mask
    if spec.entropy_bonus:
        if batch.entropy_weights is None:
            weights = batch.entropy_coef * penalty
        else:
            given = scale * batch.entropy_weights.detach().to(torch.float32)
            weights = torch.where(mask, layout.rows(given), 0.0)
        values[ENTROPY_WEIGHT] = weights
        live = live | (weights != 0)
    active = live.contiguous()
    targets = token_targets(batch.tokens, mask, vocabulary)
    if skip_inactive:
        targets = torch.where(mask & ~active, SKIPPED, targets)
    statistics = torch.stack((lengths.to(torch.int32), signs))
    return TokenTerms(values, targets, active, statistics, batch.cu_seqlens, batch.response_log_ratios)


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
