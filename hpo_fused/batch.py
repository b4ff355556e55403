"""Layouts of responses, their checks, and totals of the optimiser batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .checks import check_positive, check_tensor, described, same_device, values_readable
from .interface import MASKED, Count, LogitTransform, TokenTerms
from .objective import AdaptiveHysteretic, Weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


AdvantageLevel: TypeAlias = Literal["response", "token"]


class Layout(NamedTuple):
    """The rows of each response, and which rows are masked.

    Padded input keeps its [B, T]; packed input becomes [1, N] with the response of each row beside it.
    """

    mask: Tensor  # bool [B, T] or [1, N]: rows that belong to the loss
    response_of_row: Tensor | None  # packed: int64 [N]
    responses: int

    @classmethod
    def of(cls, mask: Tensor, responses: int, cu_seqlens: Tensor | None) -> Layout:
        """The layout of a bool mask [B, T], packed [1, N], and its boundaries, asserted where they were not read."""
        if cu_seqlens is not None and not values_readable(cu_seqlens):
            message = f"cu_seqlens: expected boundaries that rise from 0 to N = {mask.shape[1]}"
            torch._assert_async(rises(cu_seqlens, mask.shape[1]), message)
        return cls._of(mask, responses, cu_seqlens)

    @classmethod
    def of_terms(cls, terms: TokenTerms) -> Layout:
        """The layout of a call whose terms are known."""
        return cls._of(terms.targets != MASKED, terms.response_statistics.shape[1], terms.cu_seqlens)

    @classmethod
    def _of(cls, mask: Tensor, responses: int, cu_seqlens: Tensor | None) -> Layout:
        if cu_seqlens is None:
            return cls(mask, None, responses)
        position = torch.arange(mask.shape[1], device=mask.device)
        response = torch.searchsorted(cu_seqlens.to(torch.int64)[1:], position, right=True)
        return cls(mask, response.clamp(max=max(responses - 1, 0)), responses)

    def of_each_row(self, value: Tensor) -> Tensor:
        """A per-response tensor [B] as one entry per row: [B, T] or [1, N], by broadcasting or gathering."""
        if self.response_of_row is None:
            return value.unsqueeze(-1).expand(self.mask.shape)
        return value[self.response_of_row].unsqueeze(0)

    def rows(self, value: Tensor) -> Tensor:
        """A tensor of any level (see ``Batch``) as one entry per row."""
        return self.of_each_row(value) if value.dim() == 1 else value.expand(self.mask.shape)

    def response_sum(self, value: Tensor) -> Tensor:
        """Sum of the unmasked rows of each response, [B]; bitwise reproducible."""
        value = torch.where(self.mask, value, 0)
        if self.response_of_row is None:
            return value.sum(-1)
        sums = value.new_zeros(self.responses)
        if value.is_cuda and value.is_floating_point():  # index_add is atomic on CUDA, index_put sorts first
            return sums.index_put((self.response_of_row,), value[0], accumulate=True)
        return sums.index_add(0, self.response_of_row, value[0])

    def lengths(self) -> Tensor:
        """Number of unmasked rows of each response, int64 [B]."""
        return self.response_sum(self.mask.to(torch.int64))

    def response_mean(self, value: Tensor) -> Tensor:
        """Each unmasked row's entry replaced by its response's mean over unmasked rows; 0 at masked rows."""
        return self.unmasked(self.response_sum(value) / self.lengths().clamp(min=1))

    def response_total(self, value: Tensor) -> Tensor:
        """Each unmasked row's entry replaced by its response's sum over unmasked rows; 0 at masked rows."""
        return self.unmasked(self.response_sum(value))

    def unmasked(self, value: Tensor) -> Tensor:
        """A per-response tensor [B] as one entry per row, 0 at masked ones."""
        return torch.where(self.mask, self.of_each_row(value), 0)


def check_mask(mask: object, shape: torch.Size, device: torch.device) -> Tensor:
    """``mask`` itself; TypeError or ValueError unless it is bool or 0/1, of ``shape``."""
    checked = check_tensor("mask", mask, [tuple(shape)], "mask", device)
    if checked.dtype == torch.bool or not values_readable(checked):
        return checked
    if not bool(((checked == 0) | (checked == 1)).all()):
        raise ValueError(
            f"mask: expected only 0 and 1 (fractional weights belong in token_weights), got {described(mask)} with "
            "other values"
        )
    return checked


def as_mask(mask: Tensor | None, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """A checked mask, any dtype, as contiguous bool of ``shape``; all True for None."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(shape).contiguous()


def check_advantage_level(level: object) -> AdvantageLevel | None:
    """``level`` itself; ValueError unless it is a level of advantages or None."""
    if level is not None and level not in get_args(AdvantageLevel):
        raise ValueError(f"advantage_level: expected one of {get_args(AdvantageLevel)} or None, got {level!r}")
    return level  # type: ignore[return-value]


def check_level(
    name: str,
    value: object,
    shape: torch.Size,
    responses: int,
    device: torch.device,
    level: str | None = None,
    kind: str = "number",
    *,
    scalar: bool = False,
) -> Tensor:
    """A tensor that has one entry per response or per token: as [B], or as [B, T], packed [1, N]; 0-d stays.

    Takes [B] and [B, 1], per token [B, T], or packed [N] and [1, N]. A tensor that is expanded along T is per response.

    Args:
        level: "response" or "token", where the caller said which; None: its shape tells.
        kind: of its dtype, see :func:`check_tensor`.
        scalar: whether one for all, 0-d, is allowed too.

    Raises:
        TypeError, ValueError: another dtype than ``kind``, another shape or device; packed with as many
            responses as tokens, [N] without a level.
    """
    packed, (count, length) = len(shape) == 1, (1, shape[0]) if len(shape) == 1 else shape
    per_response = [] if level == "token" else [(responses,), (responses, 1)]
    per_token = [] if level == "response" else [tuple(shape), (count, length)]
    shapes = [*per_response, *per_token]
    checked = check_tensor(name, value, [(), *shapes] if scalar else shapes, kind, device)
    if checked.dim() == 0:
        return checked
    if packed and checked.dim() == 1 and responses == length > 1 and level is None:
        hint = "advantage_level='response' or 'token'" if name == "advantages" else "[B, 1] or [1, N]"
        raise ValueError(
            f"{name}: expected {hint} to tell one entry per response from one per token, for there are as many "
            f"responses as tokens, got {described(checked)}"
        )
    if tuple(checked.shape) in per_response:
        return checked if checked.dim() == 1 else checked.reshape(responses)
    if checked.dim() == 2 and checked.stride(1) == 0 and not packed and length > 0:
        return checked[:, 0]
    return checked.reshape(count, length)


def check_boundaries(name: str, shape: torch.Size, device: torch.device, cu_seqlens: object) -> int:
    """Number of responses of a batch whose per-token tensor ``name`` has ``shape``.

    Raises:
        TypeError, ValueError: neither [B, T] without nor [N] with ``cu_seqlens``; boundaries that are no integers
            [B + 1] or (where reading them costs no synchronisation) do not rise from 0 to N.
    """
    if len(shape) == 2 and cu_seqlens is None:
        return shape[0]
    packed = len(shape) == 1
    if len(shape) not in (1, 2):
        raise ValueError(f"{name}: expected shape [B, T], or [N] with cu_seqlens, got {list(shape)}")
    if packed and cu_seqlens is None:
        raise ValueError(f"cu_seqlens: expected response boundaries [B + 1] for packed {name} {list(shape)}, got None")
    if not packed and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens: expected None for padded {name} {list(shape)}, got {described(cu_seqlens)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        kind = TypeError if not isinstance(cu_seqlens, Tensor) else ValueError
        raise kind(f"cu_seqlens: expected an integer tensor of shape [B + 1], got {described(cu_seqlens)}")
    if cu_seqlens.shape[0] == 1 and shape[0] > 0:
        raise ValueError(f"cu_seqlens: expected boundaries of a response at least for N = {shape[0]}, got one entry")
    boundaries = check_tensor("cu_seqlens", cu_seqlens, [tuple(cu_seqlens.shape)], "integer", device)
    if values_readable(boundaries) and not bool(rises(boundaries, shape[0])):
        shown = boundaries.tolist() if len(boundaries) <= 16 else described(cu_seqlens)
        raise ValueError(f"cu_seqlens: expected boundaries that rise from 0 to N = {shape[0]}, got {shown}")
    return boundaries.shape[0] - 1


def rises(boundaries: Tensor, rows: int) -> Tensor:
    """Whether integer ``boundaries`` never fall from 0 to ``rows``, bool 0-d."""
    return (boundaries[1:] >= boundaries[:-1]).all() & (boundaries[0] == 0) & (boundaries[-1] == rows)


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


def check_transform(
    temperature: object,
    softcap: object,
    shape: torch.Size,
    device: torch.device,
    mask: Tensor | None,
    responses: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> LogitTransform:
    """The logits' transform; a tensor of temperatures becomes one for each row, in float32.

    Args:
        temperature: a number, or a tensor: 0-d, per response or per token as :func:`check_level` takes it.
        softcap: a number or None.
        shape, device: [B, T], or packed [N], of per-token tensors, and where they are.
        mask: checked; None: nothing is masked.
        responses, cu_seqlens: checked; without them packed temperatures are per token.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; a temperature that requires grad; a number that is
            not finite or not above 0, at an unmasked position of a tensor (a device-side assert on GPU).
    """
    cap = None if softcap is None else check_positive("softcap", softcap)
    if not isinstance(temperature, Tensor):
        return LogitTransform(check_positive("temperature", temperature, " or a tensor of such"), cap)
    packed = len(shape) == 1
    level = "token" if packed and responses is None else None
    count = shape[0] if responses is None else responses
    given = check_level("temperature", temperature, shape, count, device, level, scalar=True)
    if given.requires_grad:
        raise ValueError(
            f"temperature: expected a tensor that does not require grad, for the loss is not differentiated by it, got "
            f"{described(temperature)}; pass temperature.detach()"
        )
    unmasked = as_mask(mask, (1, shape[0]) if packed else shape, device)
    rows = Layout.of(unmasked, count, cu_seqlens if given.dim() == 1 else None).rows(given.to(torch.float32))
    rows = torch.where(unmasked, rows, 1.0)  # also a copy: the caller may write to theirs before backward
    right = (rows > 0) & (rows < torch.inf)
    message = "temperature: expected finite numbers > 0 at unmasked positions"
    if not values_readable(rows):
        torch._assert_async(right.all(), message)
    elif not bool(right.all()):
        raise ValueError(f"{message}, got {rows[~right][0].item()}")
    return LogitTransform(1.0, cap, rows.contiguous())


def check_groups(groups: object, responses: int, device: torch.device) -> Tensor | None:
    """``groups`` itself; TypeError or ValueError unless it is None or an integer tensor [B]."""
    return None if groups is None else check_tensor("groups", groups, [(responses,)], "integer", device)


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
