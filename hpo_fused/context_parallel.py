"""Responses whose rows lie on the ranks of a context-parallel group: their log-ratios, their derivatives, who counts.

Each rank has some rows of every response and computes those alone. What belongs to a whole response is a sum over the
ranks: one number a response in an all-reduce, and never of the vocabulary's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from .checks import described, values_readable
from .interface import ADVANTAGE, OLD_LOGPROB, ContextParts, LossSpec, TokenTerms
from .layout import Layout
from .process_groups import check_group
from .surrogate import token_log_ratio

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def context_parts(group: object, lengths: Tensor | None, means: object, alike: bool) -> ContextParts:
    """Where the responses' other rows are, from a call's arguments; ``lengths``, if given, are checked already.

    Raises:
        TypeError, ValueError: as :func:`hpo_fused.policy_loss` for ``context_group`` and what is needed beside it.
    """
    members = check_group("context_group", group)
    if lengths is None:
        raise ValueError("lengths: expected those of the whole responses, [B], beside context_group, got None")
    if means is not None:
        raise ValueError(
            "response_mean_log_ratios: expected None beside context_group, whose ranks add them up themselves, got "
            f"{described(means)}"
        )
    return ContextParts(members, lengths, alike)


def with_other_ranks(terms: TokenTerms, spec: LossSpec, logprobs: Tensor, context: ContextParts | None) -> TokenTerms:
    """The terms with the log-ratios of whole responses, from the rows of all ranks of ``context``; one all-reduce.

    Args:
        logprobs: floating, as many as ``terms.targets``; anything where masked.
        context: None, or no ratio that responses share: the terms as they are, and no collective.

    Raises:
        ValueError: the ranks' unmasked rows are not as many as the context's lengths (CPU; elsewhere a device-side
            assert).
    """
    if context is None or not spec.shared_ratio:
        return terms
    layout = Layout.of_terms(terms)
    with torch.no_grad():
        difference = torch.zeros_like(terms.values[OLD_LOGPROB])
        if spec.off_policy:
            difference = logprobs.detach().to(torch.float32).reshape(difference.shape) - terms.values[OLD_LOGPROB]
        bounded, _ = token_log_ratio(spec, difference, terms.values[ADVANTAGE])
        sums = torch.stack([layout.response_sum(bounded), layout.lengths().to(torch.float32)])
        distributed.all_reduce(sums, group=context.group)
        log_ratios, counts = sums
        right = (counts == context.lengths).all()
        message = "lengths: expected each response's unmasked tokens on all ranks of context_group"
        if not values_readable(counts):
            torch._assert_async(right, message)
        elif not bool(right):
            raise ValueError(f"{message}, {counts.long().tolist()}, got {context.lengths.tolist()}")
        return terms._replace(response_log_ratios=log_ratios / _divisor(spec, context.lengths), context=context)


def shared_over_ranks(value: Tensor, layout: Layout, spec: LossSpec, context: ContextParts) -> Tensor:
    """Each unmasked row's entry replaced by its response's mean over all ranks' rows, or its sum; one all-reduce."""
    sums = layout.response_sum(value)
    distributed.all_reduce(sums, group=context.group)
    return layout.unmasked(sums / _divisor(spec, context.lengths))


def _divisor(spec: LossSpec, lengths: Tensor) -> Tensor | float:
    """What a response's sum of log-ratios is divided by to become its log-ratio."""
    return 1.0 if spec.ratio_level == "sequence_sum" else lengths.clamp(min=1).to(torch.float32)


def counts_responses(process_group: ProcessGroup, context_group: ProcessGroup | None) -> bool:
    """Whether this rank's responses count in sums over ``process_group``: once for the ranks that share their rows.

    Where all of those are in ``process_group``, their first rank counts; where this one is their only one, it does.

    Raises:
        ValueError: some of them are in it, but neither all nor this one alone.
    """
    if context_group is None:
        return True
    added, sharing = (distributed.get_process_group_ranks(group) for group in (process_group, context_group))
    common = set(added) & set(sharing)
    if common == set(sharing):
        return distributed.get_rank(context_group) == 0
    if len(common) > 1:
        raise ValueError(
            f"process_group: expected all ranks {sharing} of context_group, or this one ({distributed.get_rank()}) "
            f"alone of them, got ranks {added}"
        )
    return True
