"""Totals of the optimiser batch: counted, added up over micro-batches and ranks, compared."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .checks import (
    check_integer,
    check_positive,
    check_tensor,
    described,
    is_number,
    plain_numbers,
    same_device,
    values_readable,
)
from .context_parallel import counts_responses
from .interface import Count
from .layout import (
    AdvantageLevel,
    Layout,
    check_groups,
    counted_layout,
)
from .objective import AdaptiveHysteretic, Weighting
from .process_groups import GroupLike, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_TOTALS = ("responses", "tokens", "positive", "negative")


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """Totals of the whole optimiser batch: all micro-batches of an accumulation step on all data-parallel ranks.

    Pass one to every loss call of the step and all splits into micro-batches and ranks give the gradient of one
    big batch. Counts are numbers or 0-d tensors (tensors stay on their device, so that nothing synchronises). They need
    not be whole: a trainer that divides by an average over windows says so with a fraction.

    The loss cannot tell whether they are of the batch that is accumulated; :meth:`check` can.

    Args:
        responses: S, fully masked ones included.
        tokens: sum of L_i over the responses' unmasked tokens.
        positive, negative: N+ and N-, responses whose masked sum of advantages is above / below zero. (Sums of
            per-token advantages are float32: where they cancel to rounding errors, their sign depends on the order of
            summation, which is not the same in both backends.)
        group_ids, group_lengths: integer [S], each response's group and length; only for "group_mean_length". Without
            group_ids, group_lengths [G] are the tokens of the groups 0 to G - 1, every one of which counts.
        gradient_average: number of ranks over which the data-parallel wrapper averages gradients (DDP, FSDP: the
            world size); the loss is multiplied by it. 1 where gradients are summed.
        lengths: int64 [B], unmasked tokens of each whole response of those that were counted on this rank; None:
            unknown. For a loss call's ``lengths`` under context parallelism.

    Raises:
        TypeError, ValueError: gradient_average not a finite number above 0, or group_ids without group_lengths.

    Examples:
        >>> parts = [BatchStatistics.from_batch(torch.tensor([a]), torch.ones(1, 3)) for a in (1.0, -2.0)]
        >>> total = parts[0] + parts[1]
        >>> total.tokens, total.lengths
        (tensor(6), tensor([3, 3]))
        >>> total.check(parts[0])
        Traceback (most recent call last):
        ValueError: statistics: expected responses = 1, as in the accumulated micro-batches, got 2
    """

    responses: Count
    tokens: Count
    positive: Count
    negative: Count
    group_ids: Tensor | None = None
    group_lengths: Tensor | None = None
    gradient_average: float = 1.0
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in _TOTALS:
            value = getattr(self, name)
            if not isinstance(value, Tensor) and not is_number(value):
                raise TypeError(f"{name}: expected a number or a 0-d tensor, got {described(value)}")
            if isinstance(value, Tensor) and value.dim() != 0:
                raise ValueError(f"{name}: expected a number or a 0-d tensor, got {described(value)}")
            if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        check_positive("gradient_average", self.gradient_average)
        if self.group_ids is not None and self.group_lengths is None:
            raise ValueError("group_lengths: expected together with group_ids, got only one of them")

    @classmethod
    def from_batch(
        cls,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        groups: Tensor | None = None,
        process_group: GroupLike | None = None,
        context_group: GroupLike | None = None,
        group_count: int | None = None,
        gradient_average: float = 1.0,
        advantage_level: AdvantageLevel | None = None,
    ) -> BatchStatistics:
        """Count this rank's part of the optimiser batch and add up over ``process_group``.

        All ranks take part, those without responses too, and pass the same kinds of arguments. Nothing waits for the
        device but ``groups`` over ranks without ``group_count``, and a packed batch without a mask, whose N is read.

        Args:
            advantages: [B] or [B, T] (packed: [B] or [N]).
            mask: [B, T] (packed: [N]), bool or 0/1; None: every token counts.
            cu_seqlens: int [B + 1], packed layout.
            groups: int [B], equal for responses to the same prompt on whichever rank they are.
            process_group: process group or one-dimensional DeviceMesh of the ranks to add up over, in one all-reduce;
                None: this rank is everything, or its ``context_group``.
            context_group: the ranks that share this one's responses under context parallelism: each has some rows of
                every response, in the same order of responses. One more all-reduce, of [2, B], makes the parts' lengths
                and sums of advantages those of whole responses. A response counts once: on the context group's first
                rank if ``process_group`` has all its ranks, on every rank if it has this rank alone of them.
            group_count: G, where ``groups`` are numbered from 0 to G - 1 over the optimiser batch: their tokens go into
                the same all-reduce, and each of the G counts, also one without a response. None: any numbers, each
                response's own; over ranks they are gathered as objects, which waits for the device.
            gradient_average: see the class.
            advantage_level: as in :func:`policy_loss`.

        Raises:
            TypeError, ValueError: as :func:`policy_loss` does for the same arguments; also when the lengths of
                the responses cannot be told (neither mask nor cu_seqlens with advantages [B], or [B, 1] that
                ``advantage_level`` does not call those of tokens); a group that this rank is not in; some ranks of
                context_group in process_group, but neither all nor this one alone; groups outside [0, group_count) (a
                device-side assert on GPU).
        """
        layout, values = counted_layout(advantages, mask, cu_seqlens, advantage_level)
        groups = check_groups(groups, layout.responses, advantages.device)
        context = None if context_group is None else check_group("context_group", context_group)
        everyone = None if process_group is None else check_group("process_group", process_group)
        if everyone is not None:  # a refusal comes before the first collective
            counts_responses(everyone, context)
        local = cls._of_layout(layout, values, groups, group_count, context, gradient_average)
        return local if everyone is None else local.all_reduced(everyone, context)

    @classmethod
    def _of_layout(
        cls,
        layout: Layout,
        advantages: Tensor,
        groups: Tensor | None,
        group_count: int | None = None,
        context: ProcessGroup | None = None,
        gradient_average: float = 1.0,
    ) -> BatchStatistics:
        lengths = layout.lengths()
        sums = layout.response_sum(layout.rows(advantages.detach().to(torch.float32)))
        if context is not None:
            whole = torch.stack([lengths.to(torch.float64), sums.to(torch.float64)])
            distributed.all_reduce(whole, group=context)
            lengths, sums = whole[0].to(torch.int64), whole[1]
        of_groups = None if groups is None else lengths
        if group_count is not None:
            groups, of_groups = None, _tokens_of_groups(groups, group_count, lengths)
        return cls(
            layout.responses,
            lengths.sum(),
            (sums > 0).sum(),
            (sums < 0).sum(),
            None if groups is None else groups.to(torch.int64),
            of_groups,
            gradient_average,
            lengths,
        )

    def __add__(self, other: BatchStatistics) -> BatchStatistics:
        """The totals of both together, of micro-batches that were counted one by one; no synchronisation.

        Raises:
            ValueError: another gradient_average, or groups counted in another way.
        """
        if not isinstance(other, BatchStatistics):
            return NotImplemented
        if self.gradient_average != other.gradient_average:
            raise ValueError(
                f"gradient_average: expected {self.gradient_average} in both statistics, got {other.gradient_average}"
            )
        ours, others = (_way_of_counting(part) for part in (self, other))
        if ours != others:
            raise ValueError(f"groups: expected both statistics counted {ours}, got one counted {others}")
        ids, of_groups = _joined(self.group_ids, other.group_ids), _joined(self.group_lengths, other.group_lengths)
        if ids is None and self.group_lengths is not None and other.group_lengths is not None:
            of_groups = self.group_lengths + other.group_lengths
        totals: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _TOTALS}
        lengths = _joined(self.lengths, other.lengths)
        return replace(self, **totals, group_ids=ids, group_lengths=of_groups, lengths=lengths)

    def all_reduced(
        self,
        process_group: GroupLike,
        context_group: GroupLike | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> BatchStatistics:
        """The totals added up over ranks, one all-reduce as in :meth:`from_batch`; ``lengths`` stay this rank's.

        Args:
            process_group, context_group: as in :meth:`from_batch`; context_group also where it was given there.
            device: where to add up totals that are all numbers; tensors are added up where they are.

        Raises:
            TypeError, ValueError: as :meth:`from_batch`, of the groups.
        """
        group = check_group("process_group", process_group)
        context = None if context_group is None else check_group("context_group", context_group)
        counts, (ids, of_groups) = counts_responses(group, context), (self.group_ids, self.group_lengths)
        totals = [getattr(self, name) for name in _TOTALS]
        device = next((total.device for total in (*totals, of_groups) if isinstance(total, Tensor)), device)
        # Of one type on every rank, whatever its totals are. torch.full, for a number's copy would wait for the device.
        numbers = [
            total if isinstance(total, Tensor) else torch.full((), total, dtype=torch.float64, device=device)
            for total in totals
        ]
        message = torch.stack([number.to(torch.float64) for number in numbers])
        if ids is None and of_groups is not None:
            message = torch.cat([message, of_groups.to(torch.float64)])
        if not counts:
            message = torch.zeros_like(message)
        distributed.all_reduce(message, group=group)
        if ids is not None and of_groups is not None:
            own = (ids.cpu(), of_groups.cpu()) if counts else (ids[:0].cpu(), of_groups[:0].cpu())
            parts = [own] * distributed.get_world_size(group)
            distributed.all_gather_object(parts, own, group=group)
            ids, of_groups = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
        elif of_groups is not None:
            of_groups = message[len(totals) :]
        added: dict[str, Any] = dict(zip(_TOTALS, message.unbind(), strict=False))
        return replace(self, **added, group_ids=ids, group_lengths=of_groups)

    def check(
        self,
        *parts: BatchStatistics,
        process_group: GroupLike | None = None,
        context_group: GroupLike | None = None,
    ) -> None:
        """ValueError, which names the total, unless these are the totals of the accumulated micro-batches.

        For debugging: it waits for the device and, over ranks, is a collective that all of them call.

        Args:
            parts: of each micro-batch of this rank, counted from what its loss call got, with ``context_group`` if
                there is one. Groups are compared where both have them.
            process_group, context_group: as in :meth:`all_reduced`; without process_group this rank is everything.

        Raises:
            TypeError: no parts, or something else.
            ValueError: a total that differs.
        """
        if not parts:
            raise TypeError("parts: expected the statistics of at least one micro-batch, got none")
        given: tuple[object, ...] = parts
        if wrong := [part for part in given if not isinstance(part, BatchStatistics)]:
            raise TypeError(f"parts: expected BatchStatistics, got {described(wrong[0])}")
        counted = functools.reduce(operator.add, parts)
        if process_group is not None:
            counted = counted.all_reduced(process_group, context_group)
        for name in _TOTALS:
            expected, own = float(getattr(counted, name)), float(getattr(self, name))
            if not math.isclose(expected, own, rel_tol=1e-9):
                raise ValueError(
                    f"statistics: expected {name} = {expected:.12g}, as in the accumulated micro-batches, "
                    f"got {own:.12g}"
                )
        if counted.group_lengths is None or self.group_lengths is None:
            return
        of_parts, own_groups = counted._groups(), self._groups()
        if of_parts.keys() != own_groups.keys():
            raise ValueError(
                f"statistics: expected the groups {sorted(of_parts)}, as in the accumulated micro-batches, got "
                f"{sorted(own_groups)}"
            )
        for group, tokens in of_parts.items():
            if tokens != own_groups[group]:
                raise ValueError(
                    f"statistics: expected {tokens:g} tokens of group {group}, as in the accumulated micro-batches, "
                    f"got {own_groups[group]:g}"
                )

    def _groups(self) -> dict[int, float]:
        """Tokens of each group that counts; waits for the device."""
        assert self.group_lengths is not None
        ids = range(len(self.group_lengths)) if self.group_ids is None else self.group_ids.tolist()
        tokens = dict.fromkeys(ids, 0.0)
        for group, length in zip(ids, self.group_lengths.tolist(), strict=True):
            tokens[group] += length
        return tokens

    def group_normalizer(self, groups: Tensor) -> Tensor:
        """G * (sum of L_j over the group) for each response of a call, float32 [B]; no synchronisation.

        Raises:
            ValueError: a group of the call that the statistics never saw (CPU; a device-side assert elsewhere).
        """
        assert self.group_lengths is not None
        groups = groups.to(torch.int64)
        if self.group_ids is None:
            size = len(self.group_lengths)
            _check_known(groups, (groups >= 0) & (groups < size), f"in [0, {size})")
            return (size * self.group_lengths[groups.clamp(0, size - 1)].clamp(min=1)).to(torch.float32)
        ids, order = self.group_ids.sort()
        total = torch.cat([ids.new_zeros(1), self.group_lengths[order].cumsum(0)])
        first, last = torch.searchsorted(ids, groups), torch.searchsorted(ids, groups, right=True)
        _check_known(groups, last > first, "that statistics has seen")
        count = (ids[1:] != ids[:-1]).sum() + 1
        return (count * (total[last] - total[first]).clamp(min=1)).to(torch.float32)

    def alpha(self, weighting: Weighting | None) -> float | Tensor:
        """Weight of negative advantages in this optimiser batch: 1, alpha, or the adaptive one."""
        if isinstance(weighting, AdaptiveHysteretic):
            return adaptive_alpha(self.positive, self.negative, weighting.alpha_min)
        return 1.0 if weighting is None else weighting.alpha


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _way_of_counting(statistics: BatchStatistics) -> str:
    """How the groups were counted, in words."""
    if statistics.group_lengths is None:
        return "without groups"
    return "by group" if statistics.group_ids is not None else f"with group_count={len(statistics.group_lengths)}"


def _check_known(groups: Tensor, known: Tensor, expected: str) -> None:
    """ValueError unless all groups are ``known``; a device-side assert where values cannot be read."""
    message = f"groups: expected groups {expected}"
    if not values_readable(groups):
        torch._assert_async(known.all(), message)
    elif not bool(known.all()):
        raise ValueError(f"{message}, got {described(groups)} with {groups[~known][0].item()}")


def _tokens_of_groups(groups: Tensor | None, count: object, lengths: Tensor) -> Tensor:
    """Tokens of the groups 0 to ``count`` - 1, int64 [G]."""
    count = check_integer("group_count", count, "a positive int or None")
    if count < 1:
        raise ValueError(f"group_count: expected a positive int or None, got {count}")
    if groups is None:
        raise ValueError(f"groups: expected an integer tensor [B] for group_count={count}, got None")
    groups = groups.to(torch.int64)
    _check_known(groups, (groups >= 0) & (groups < count), f"in [0, {count})")
    return lengths.new_zeros(count).index_add(0, groups, lengths)


def check_statistics(statistics: object, device: torch.device) -> BatchStatistics | None:
    """``statistics`` itself; TypeError or ValueError unless it is None or a BatchStatistics on ``device``."""
    if statistics is None:
        return None
    if not isinstance(statistics, BatchStatistics):
        raise TypeError(f"statistics: expected a BatchStatistics or None, got {described(statistics)}")
    for name in (*_TOTALS, "group_ids", "group_lengths"):
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
