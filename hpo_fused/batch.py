"""Totals of the optimiser batch, and the weights that come of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from .checks import check_positive, check_tensor, described, same_device, values_readable
from .interface import Count
from .layout import (
    AdvantageLevel,
    Layout,
    as_mask,
    check_advantage_level,
    check_boundaries,
    check_groups,
    check_level,
    check_mask,
)
from .objective import AdaptiveHysteretic, Weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """Totals of the whole optimiser batch: all micro-batches of an accumulation step on all data-parallel ranks.

    Pass one to every loss call of the step and all splits into micro-batches and ranks give the gradient of one
    big batch. Counts are numbers or 0-d tensors (tensors stay on their device, so that nothing synchronises). They need
    not be whole: a trainer that divides by an average over windows says so with a fraction.

    Args:
        responses: S, fully masked ones included.
        tokens: sum of L_i over the responses' unmasked tokens.
        positive, negative: N+ and N-, responses whose masked sum of advantages is above / below zero. (Sums of
            per-token advantages are float32: where they cancel to rounding errors, their sign depends on the order of
            summation, which is not the same in both backends.)
        group_ids, group_lengths: int64 [S], each response's group and length; only for "group_mean_length".
        gradient_average: number of ranks over which the data-parallel wrapper averages gradients (DDP, FSDP: the
            world size); the loss is multiplied by it. 1 where gradients are summed.

    Raises:
        TypeError, ValueError: gradient_average not a finite number above 0, or group_ids without group_lengths.
    """

    responses: Count
    tokens: Count
    positive: Count
    negative: Count
    group_ids: Tensor | None = None
    group_lengths: Tensor | None = None
    gradient_average: float = 1.0

    def __post_init__(self) -> None:
        for name in ("responses", "tokens", "positive", "negative"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
                raise TypeError(f"{name}: expected a number or a 0-d tensor, got {described(value)}")
            if isinstance(value, Tensor) and value.dim() != 0:
                raise ValueError(f"{name}: expected a number or a 0-d tensor, got {described(value)}")
            if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        check_positive("gradient_average", self.gradient_average)
        if (self.group_ids is None) != (self.group_lengths is None):
            raise ValueError("group_lengths: expected together with group_ids, got only one of them")

    @classmethod
    def from_batch(
        cls,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        groups: Tensor | None = None,
        process_group: ProcessGroup | None = None,
        gradient_average: float = 1.0,
        advantage_level: AdvantageLevel | None = None,
    ) -> BatchStatistics:
        """Count this rank's part of the optimiser batch and add up over ``process_group``.

        Args:
            advantages: [B] or [B, T] (packed: [B] or [N]).
            mask: [B, T] (packed: [N]), bool or 0/1; None: every token counts.
            cu_seqlens: int [B + 1], packed layout.
            groups: int [B], equal for responses to the same prompt on whichever rank they are.
            process_group: ranks to add up over (one collective, two with groups); None: this rank is everything.
            gradient_average: see the class.
            advantage_level: as in :func:`policy_loss`.

        Raises:
            TypeError, ValueError: as :func:`policy_loss` does for the same arguments; also when the lengths of
                the responses cannot be told (neither mask nor cu_seqlens with advantages [B], or [B, 1] that
                ``advantage_level`` does not call those of tokens).
        """
        layout, values = _counted(advantages, mask, cu_seqlens, advantage_level)
        groups = check_groups(groups, layout.responses, advantages.device)
        local = cls._of_layout(layout, values, groups, gradient_average)
        return local if process_group is None else local._all_reduced(process_group)

    @classmethod
    def _of_layout(
        cls,
        layout: Layout,
        advantages: Tensor,
        groups: Tensor | None,
        gradient_average: float = 1.0,
    ) -> BatchStatistics:
        lengths = layout.lengths()
        signs = layout.response_sum(layout.rows(advantages.detach().to(torch.float32)))
        return cls(
            layout.responses,
            lengths.sum(),
            (signs > 0).sum(),
            (signs < 0).sum(),
            None if groups is None else groups.to(torch.int64),
            None if groups is None else lengths,
            gradient_average,
        )

    def _all_reduced(self, group: ProcessGroup) -> BatchStatistics:
        from torch import distributed

        assert isinstance(self.tokens, Tensor)
        device = self.tokens.device
        counts = torch.stack(
            [
                torch.as_tensor(count, device=device)
                for count in (self.responses, self.tokens, self.positive, self.negative)
            ]
        )
        distributed.all_reduce(counts, group=group)
        ids, lengths = self.group_ids, self.group_lengths
        if ids is not None and lengths is not None:
            parts: list[tuple[Tensor, Tensor]] = [(ids, lengths)] * distributed.get_world_size(group)
            distributed.all_gather_object(parts, (ids.cpu(), lengths.cpu()), group=group)
            ids = torch.cat([part[0] for part in parts]).to(device)
            lengths = torch.cat([part[1] for part in parts]).to(device)
        responses, tokens, positive, negative = counts.unbind()
        return BatchStatistics(responses, tokens, positive, negative, ids, lengths, self.gradient_average)

    def group_normalizer(self, groups: Tensor) -> Tensor:
        """G * (sum of L_j over the group) for each response of a call, float32 [B]; no synchronisation.

        Raises:
            ValueError: a group of the call that the statistics never saw (CPU; a device-side assert elsewhere).
        """
        assert self.group_ids is not None and self.group_lengths is not None
        ids, order = self.group_ids.sort()
        groups = groups.to(torch.int64)
        total = torch.cat([ids.new_zeros(1), self.group_lengths[order].cumsum(0)])
        first, last = torch.searchsorted(ids, groups), torch.searchsorted(ids, groups, right=True)
        known = (last > first).all()
        if values_readable(groups):
            if not bool(known):
                raise ValueError(
                    f"groups: expected groups that statistics has seen, got {described(groups)} with others"
                )
        else:
            torch._assert_async(known, "groups: expected groups that statistics has seen")
        count = (ids[1:] != ids[:-1]).sum() + 1
        return (count * (total[last] - total[first]).clamp(min=1)).to(torch.float32)

    def alpha(self, weighting: Weighting | None) -> float | Tensor:
        """Weight of negative advantages in this optimiser batch: 1, alpha, or the adaptive one."""
        if isinstance(weighting, AdaptiveHysteretic):
            return adaptive_alpha(self.positive, self.negative, weighting.alpha_min)
        return 1.0 if weighting is None else weighting.alpha


def check_statistics(statistics: object, device: torch.device) -> BatchStatistics | None:
    """``statistics`` itself; TypeError or ValueError unless it is None or a BatchStatistics on ``device``."""
    if statistics is None:
        return None
    if not isinstance(statistics, BatchStatistics):
        raise TypeError(f"statistics: expected a BatchStatistics or None, got {described(statistics)}")
    for name in ("responses", "tokens", "positive", "negative", "group_ids", "group_lengths"):
        value = getattr(statistics, name)
        if isinstance(value, Tensor) and not same_device(value.device, device):
            raise ValueError(f"statistics: expected {name} on {device}, got {described(value)}")
    return statistics


def check_lengths(lengths: object, layout: Layout, statistics: BatchStatistics | None) -> None:
    """TypeError or ValueError unless ``lengths`` [B] can be those of responses of which the layout has parts.

    A length below the part's is refused on the CPU, and by a device-side assert elsewhere.
    """
    checked = check_tensor("lengths", lengths, [(layout.responses,)], "integer", layout.mask.device)
    if statistics is None:
        raise ValueError("lengths: expected the optimiser batch's statistics beside it, got statistics=None")
    enough = (checked >= layout.lengths()).all()
    message = "lengths: expected at least each response's unmasked tokens in this call"
    if not values_readable(checked):
        torch._assert_async(enough, message)
    elif not bool(enough):
        raise ValueError(f"{message}, got {checked.tolist()} for {layout.lengths().tolist()}")


def adaptive_alpha(positive: Count, negative: Count, alpha_min: float) -> float | Tensor:
    """A-HPO's clip(N+ / N-, alpha_min, 1) (arXiv 2605.30201); 1 where N- is 0, see ``AdaptiveHysteretic``."""
    if not isinstance(positive, Tensor) and not isinstance(negative, Tensor):
        return min(max(positive / negative if negative else 1.0, alpha_min), 1.0)
    negative = torch.as_tensor(negative).to(torch.float32)
    quotient = torch.as_tensor(positive).to(torch.float32) / torch.where(negative == 0, 1.0, negative)
    return torch.where(negative == 0, 1.0, quotient).clamp(alpha_min, 1.0)


def _counted(
    advantages: object, mask: object, cu_seqlens: Tensor | None, level: object, *, any_length: bool = False
) -> tuple[Layout, Tensor]:
    """The layout that advantages, mask and boundaries tell, and the advantages as in ``Batch``; checked here.

    ``any_length``: responses whose lengths are not told may have one token each.
    """
    if not isinstance(advantages, Tensor):
        raise TypeError(f"advantages: expected a tensor, got {described(advantages)}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor or None, got {described(mask)}")
    if mask is not None:
        name, shape = "mask", mask.shape
    elif isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0:
        name, shape = "cu_seqlens", torch.Size([int(cu_seqlens[-1])])
    elif advantages.dim() == 2 and (advantages.shape[1] != 1 or level == "token"):
        name, shape = "advantages", advantages.shape
    elif any_length and advantages.dim() > 0:
        name, shape = "advantages", torch.Size((len(advantages), 1))
    else:
        raise ValueError(
            "mask: expected a mask, cu_seqlens or per-token advantages to tell the responses' "
            f"lengths from, got None with advantages {described(advantages)}"
        )
    responses, device = check_boundaries(name, shape, advantages.device, cu_seqlens), advantages.device
    if mask is not None:
        check_mask(mask, shape, device)
    values = check_level("advantages", advantages, shape, responses, device, check_advantage_level(level))
    rows = (1, shape[0]) if len(shape) == 1 else tuple(shape)
    return Layout.of(as_mask(mask, rows, device), responses, cu_seqlens), values


def hysteretic_advantages(
    advantages: Tensor,
    mask: Tensor | None = None,
    weighting: Weighting | None = AdaptiveHysteretic(),  # noqa: B008 (immutable)
    statistics: BatchStatistics | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    advantage_level: AdvantageLevel | None = None,
) -> Tensor:
    """Advantages with the hysteretic weight folded in, for losses that know no weighting: alpha A where A < 0.

    Every shaping but :class:`DRO` is homogeneous in A, s(x, alpha A) = alpha s(x, A) for alpha > 0, so that a loss of
    these advantages without weighting is that of the given ones with it. DRO's weighting scales its quadratic term too,
    which the advantages do not reach.

    Args:
        advantages: [B], or one per token: [B, T] or packed [N].
        mask: [B, T] or [N], bool or 0/1, for the counts; None: every token counts.
        weighting: :class:`AdaptiveHysteretic`, :class:`Hysteretic` or None.
        statistics: totals of the optimiser batch, from the advantages as they are here; None: these are all of it.
        cu_seqlens: integer [B + 1], boundaries of packed responses.
        advantage_level: as in :func:`policy_loss`.

    Returns:
        Tensor of the advantages' shape and dtype; float32 for integers. Nothing is synchronised, unless packed
        advantages on a GPU come without a mask, when N is read from cu_seqlens.

    Raises:
        TypeError, ValueError: as :func:`policy_loss` does for the same arguments.

    Examples:
        >>> hysteretic_advantages(torch.tensor([1.0, -1.0, -1.0, -0.5, -2.0]))
        tensor([ 1.0000, -0.2500, -0.2500, -0.1250, -0.5000])
    """
    if weighting is not None and not isinstance(weighting, get_args(Weighting)):
        raise TypeError(f"weighting: expected a Hysteretic, AdaptiveHysteretic or None, got {weighting!r}")
    layout, values = _counted(advantages, mask, cu_seqlens, advantage_level, any_length=True)
    check_statistics(statistics, advantages.device)
    if statistics is None:
        statistics = BatchStatistics._of_layout(layout, values, None)
    exact = advantages.to(torch.promote_types(advantages.dtype, torch.float32))
    weighed = torch.where(exact < 0, exact * statistics.alpha(weighting), exact)
    return weighed.to(advantages.dtype) if advantages.is_floating_point() else weighed
