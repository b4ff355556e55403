"""Layouts of responses, totals of the optimiser batch, and the two weights that every token's loss carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .checks import check_positive, check_tensor, found, values_readable
from .objective import AdaptiveHysteretic, Hysteretic, Objective
from .rows import TokenTerms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Layout(NamedTuple):
    """Where the responses lie among the rows.

    Padded input keeps its [B, T]; packed input becomes [1, N] with the response of each row beside it.
    """

    mask: Tensor  # bool [B, T] or [1, N]: rows that belong to the loss
    response_of_row: Tensor | None  # packed: int64 [N]
    responses: int

    @classmethod
    def of(
        cls,
        name: str,
        shape: torch.Size,
        device: torch.device,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Layout:
        """The layout of per-token tensors of ``shape``; ``name`` is the argument that ``shape`` was taken from.

        Raises:
            TypeError, ValueError: a mask or cu_seqlens of wrong dtype, shape, device or (where reading them costs
                no synchronisation) values.
        """
        responses = check_boundaries(name, shape, device, cu_seqlens)
        rows = (1, shape[0]) if len(shape) == 1 else tuple(shape)
        mask = as_mask(mask, shape, device).reshape(rows).contiguous()  # kernels read it row after row
        if cu_seqlens is None:
            return cls(mask, None, responses)
        return cls(mask, _response_of_row(cu_seqlens, shape[0], device), responses)

    def rows(self, value: Tensor) -> Tensor:
        """A [B] or per-token tensor as one entry per row: [B, T] or [1, N], by broadcasting or gathering."""
        if self.response_of_row is None:
            return (value if value.dim() == 2 else value.unsqueeze(-1)).expand(self.mask.shape)
        if value.shape[0] == self.responses and value.dim() == 1:
            value = value[self.response_of_row]
        return value.reshape(self.mask.shape)

    def per_token(self, name: str, value: object, kind: str = "floating") -> Tensor:
        """Check a [B, T] (packed: [N]) tensor and give it the rows' shape, detached, in float32."""
        shape = (self.mask.shape[1],) if self.response_of_row is not None else tuple(self.mask.shape)
        checked = check_tensor(name, value, [shape], kind, self.mask.device)
        return checked.detach().to(torch.float32).reshape(self.mask.shape)

    def per_response_or_token(self, name: str, value: object) -> Tensor:
        """Check a [B], [B, 1] or [B, T] (packed: [B] or [N]) tensor and give it the rows' shape, in float32.

        Packed input with as many responses as rows is taken as [B].
        """
        batch, length = self.mask.shape
        shapes = [(batch,), (batch, length), (batch, 1)]
        if self.response_of_row is not None:
            shapes = [(self.responses,), (length,)]
        return self.rows(check_tensor(name, value, shapes, "number", self.mask.device).detach().to(torch.float32))

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
        mean = self.response_sum(value) / self.lengths().clamp(min=1)
        return torch.where(self.mask, self.rows(mean), 0)


def check_mask(mask: object, shape: torch.Size, device: torch.device) -> Tensor:
    """``mask`` itself; TypeError or ValueError unless it is bool or 0/1, of ``shape``."""
    checked = check_tensor("mask", mask, [tuple(shape)], "mask", device)
    if checked.dtype == torch.bool or not values_readable(checked):
        return checked
    if not bool(((checked == 0) | (checked == 1)).all()):
        raise ValueError(
            f"mask: expected only 0 and 1 (fractional weights belong in token_weights), got {found(mask)} with "
            "other values"
        )
    return checked


def as_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """``mask`` as bool of ``shape`` (None: all True); TypeError or ValueError unless it is bool or 0/1."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    checked = check_mask(mask, shape, device)
    return checked if checked.dtype == torch.bool else checked != 0


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
        raise ValueError(f"cu_seqlens: expected None for padded {name} {list(shape)}, got {found(cu_seqlens)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        kind = TypeError if not isinstance(cu_seqlens, Tensor) else ValueError
        raise kind(f"cu_seqlens: expected an integer tensor of shape [B + 1], got {found(cu_seqlens)}")
    if cu_seqlens.shape[0] == 1 and shape[0] > 0:
        raise ValueError(f"cu_seqlens: expected boundaries of a response at least for N = {shape[0]}, got one entry")
    boundaries = check_tensor("cu_seqlens", cu_seqlens, [tuple(cu_seqlens.shape)], "integer", device)
    if values_readable(boundaries) and not bool(_rises(boundaries, shape[0])):
        shown = boundaries.tolist() if len(boundaries) <= 16 else found(cu_seqlens)
        raise ValueError(f"cu_seqlens: expected boundaries that rise from 0 to N = {shape[0]}, got {shown}")
    return boundaries.shape[0] - 1


def _rises(boundaries: Tensor, rows: int) -> Tensor:
    return (boundaries[1:] >= boundaries[:-1]).all() & (boundaries[0] == 0) & (boundaries[-1] == rows)


def _response_of_row(cu_seqlens: Tensor, rows: int, device: torch.device) -> Tensor:
    boundaries = cu_seqlens.to(torch.int64)
    if not values_readable(boundaries):
        message = f"cu_seqlens: expected boundaries that rise from 0 to N = {rows}"
        torch._assert_async(_rises(boundaries, rows), message)
    position = torch.arange(rows, device=device)
    return torch.searchsorted(boundaries[1:], position, right=True).clamp(max=max(len(boundaries) - 2, 0))


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """Totals of the whole optimiser batch: all micro-batches of an accumulation step on all data-parallel ranks.

    Pass one to every loss call of the step and all splits into micro-batches and ranks give the gradient of one
    big batch. Counts are ints or 0-d integer tensors (tensors stay on their device, so that nothing synchronises).

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

    responses: int | Tensor
    tokens: int | Tensor
    positive: int | Tensor
    negative: int | Tensor
    group_ids: Tensor | None = None
    group_lengths: Tensor | None = None
    gradient_average: float = 1.0

    def __post_init__(self) -> None:
        for name in ("responses", "tokens", "positive", "negative"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, Tensor)):
                raise TypeError(f"{name}: expected an int or a 0-d tensor, got {found(value)}")
            if isinstance(value, Tensor) and value.dim() != 0:
                raise ValueError(f"{name}: expected an int or a 0-d tensor, got {found(value)}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name}: expected a count >= 0, got {value}")
        check_positive("gradient_average", self.gradient_average)
        if (self.group_ids is None) != (self.group_lengths is None):
            raise ValueError("group_lengths: expected together with group_ids, got only one of them")

    def check_device(self, device: torch.device) -> None:
        """ValueError unless every tensor among the totals is on ``device``."""
        for name in ("responses", "tokens", "positive", "negative", "group_ids", "group_lengths"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.device != device:
                raise ValueError(f"statistics: expected {name} on {device}, got {found(value)}")

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
    ) -> BatchStatistics:
        """Count this rank's part of the optimiser batch and add up over ``process_group``.

        Args:
            advantages: [B] or [B, T] (packed: [B] or [N]).
            mask: [B, T] (packed: [N]), bool or 0/1; None: every token counts.
            cu_seqlens: int [B + 1], packed layout.
            groups: int [B], equal for responses to the same prompt on whichever rank they are.
            process_group: ranks to add up over (one collective, two with groups); None: this rank is everything.
            gradient_average: see the class.

        Raises:
            TypeError, ValueError: as :func:`policy_loss` does for the same arguments; also when the lengths of
                the responses cannot be told (advantages [B] with neither mask nor cu_seqlens).
        """
        if not isinstance(advantages, Tensor):
            raise TypeError(f"advantages: expected a tensor, got {found(advantages)}")
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor or None, got {found(mask)}")
        if mask is not None:
            name, shape = "mask", mask.shape
        elif isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 0:
            name, shape = "cu_seqlens", torch.Size([int(cu_seqlens[-1])])
        elif advantages.dim() == 2:
            name, shape = "advantages", advantages.shape
        else:
            raise ValueError(
                "mask: expected a mask, cu_seqlens or per-token advantages to tell the responses' "
                f"lengths from, got None with advantages {found(advantages)}"
            )
        layout = Layout.of(name, shape, advantages.device, mask, cu_seqlens)
        local = cls._of_layout(layout, layout.per_response_or_token("advantages", advantages), groups, gradient_average)
        return local if process_group is None else local._all_reduced(process_group)

    @classmethod
    def _of_layout(
        cls, layout: Layout, advantages: Tensor, groups: Tensor | None, gradient_average: float = 1.0
    ) -> BatchStatistics:
        lengths = layout.lengths()
        signs = layout.response_sum(advantages)
        if groups is not None:
            groups = check_tensor("groups", groups, [(layout.responses,)], "integer", lengths.device).to(torch.int64)
        return cls(
            layout.responses,
            lengths.sum(),
            (signs > 0).sum(),
            (signs < 0).sum(),
            groups,
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
        total = torch.cat([ids.new_zeros(1), self.group_lengths[order].cumsum(0)])
        first, last = torch.searchsorted(ids, groups), torch.searchsorted(ids, groups, right=True)
        known = (last > first).all()
        if values_readable(groups):
            if not bool(known):
                raise ValueError(f"groups: expected groups that statistics has seen, got {found(groups)} with others")
        else:
            torch._assert_async(known, "groups: expected groups that statistics has seen")
        count = (ids[1:] != ids[:-1]).sum() + 1
        return (count * (total[last] - total[first]).clamp(min=1)).to(torch.float32)

    def alpha(self, weighting: Hysteretic | AdaptiveHysteretic | None) -> float | Tensor:
        """Weight of negative advantages: 1, alpha, or clip(N+ / N-, alpha_min, 1) (arXiv 2605.30201)."""
        if weighting is None:
            return 1.0
        if isinstance(weighting, Hysteretic):
            return weighting.alpha
        if isinstance(self.positive, int) and isinstance(self.negative, int):
            quotient = self.positive / self.negative if self.negative else 1.0
            return min(max(quotient, weighting.alpha_min), 1.0)
        quotient_ = torch.as_tensor(self.positive).to(torch.float32) / torch.as_tensor(self.negative).clamp(min=1)
        quotient_ = torch.where(torch.as_tensor(self.negative) == 0, 1.0, quotient_)
        return quotient_.clamp(weighting.alpha_min, 1.0)


class PreparedBatch(NamedTuple):
    """A call's inputs in the form the backends take, and what its metrics need."""

    layout: Layout
    terms: TokenTerms
    active: Tensor  # bool, rows' shape
    alpha: float | Tensor
    signs: tuple[int | Tensor, int | Tensor]  # N+ and N-


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _normalizer(
    objective: Objective, layout: Layout, statistics: BatchStatistics, groups: Tensor | None
) -> float | Tensor:
    """1 / n_i of the README's table: a number, a 0-d tensor or one entry per row."""
    responses = _at_least_one(statistics.responses)
    if objective.normalization == "response":
        return layout.rows((responses * layout.lengths().clamp(min=1)).to(torch.float32))
    if objective.normalization == "mean_length":
        return _at_least_one(statistics.tokens)
    if objective.normalization == "group_mean_length":
        check_groups(groups, statistics)
        ids = check_tensor("groups", groups, [(layout.responses,)], "integer", layout.mask.device)
        return layout.rows(statistics.group_normalizer(ids.to(torch.int64)))
    return responses * check_max_length(objective)


def check_max_length(objective: Objective) -> int:
    """The objective's max_length; ValueError where there is none."""
    if objective.max_length is None:
        raise ValueError(
            "max_length: expected a positive int on the objective for normalization='constant', got "
            "None; use e.g. Objective.preset('dr_grpo', max_length=4096)"
        )
    return objective.max_length


def check_groups(groups: Tensor | None, statistics: BatchStatistics | None) -> None:
    """ValueError where a call with normalization="group_mean_length" lacks groups, or its statistics do."""
    if groups is None:
        raise ValueError("groups: expected an integer tensor [B] for normalization='group_mean_length', got None")
    if statistics is not None and statistics.group_ids is None:
        raise ValueError(
            "statistics: expected group counts for normalization='group_mean_length', got none; "
            "pass groups to BatchStatistics.from_batch"
        )


def prepare(
    objective: Objective,
    layout: Layout,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    groups: Tensor | None,
    statistics: BatchStatistics | None,
) -> PreparedBatch:
    """Fold mask, caller's weights, hysteresis, normalisation and gradient averaging into two weights per token.

    Raises:
        TypeError, ValueError: as :func:`policy_loss` documents.
    """
    signal = layout.per_response_or_token("advantages", advantages)
    if statistics is None:
        statistics = BatchStatistics._of_layout(layout, signal, groups)
    elif not isinstance(statistics, BatchStatistics):
        raise TypeError(f"statistics: expected a BatchStatistics or None, got {found(statistics)}")
    else:
        statistics.check_device(signal.device)
    if objective.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs: expected reference log-probabilities for kl_coef={objective.kl_coef}, got None"
        )
    old = None if old_logprobs is None else layout.per_token("old_logprobs", old_logprobs)
    ref = None if ref_logprobs is None else layout.per_token("ref_logprobs", ref_logprobs)

    # Quotients of integers and numbers in torch.where take the default dtype, which may be a narrow one.
    normalizer = _normalizer(objective, layout, statistics, groups)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(torch.float32)
    penalty = layout.mask.to(torch.float32) * (statistics.gradient_average / normalizer)
    alpha = statistics.alpha(objective.weighting)
    policy = penalty
    if objective.weighting is not None:  # not masked_fill: on CUDA it would fetch alpha, a tensor, to the host
        policy = penalty * torch.where(signal < 0, alpha, torch.ones_like(signal))
    if token_weights is not None:
        caller = layout.per_response_or_token("token_weights", token_weights)
        policy = torch.where(layout.mask & (policy != 0), policy * caller, 0.0)
    live = (policy != 0) & (signal != 0)
    if objective.ratio_level == "sequence":  # one live token moves the whole response's ratio
        live = layout.mask & layout.rows(layout.response_sum(live.to(torch.int64)) > 0)
    active = layout.mask if objective.kl_coef != 0 or objective.entropy_coef != 0 else live
    terms = TokenTerms(
        signal.contiguous(),
        policy.to(torch.float32).contiguous(),
        penalty.contiguous(),
        None if old is None else old.contiguous(),
        None if ref is None else ref.contiguous(),
    )
    return PreparedBatch(layout, terms, active.contiguous(), alpha, (statistics.positive, statistics.negative))
