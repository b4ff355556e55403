"""Layouts of responses, padded and packed, and the checks of arguments that have one."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from .checks import check_positive, check_tensor, described, values_readable
from .interface import MASKED, LogitTransform, TokenTerms

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


def counted_layout(
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
