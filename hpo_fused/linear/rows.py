"""The rows whose hidden states enter the GEMMs, and the way of their entries into a chunk and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hpo_fused.checks import check_integer, values_readable
from hpo_fused.interface import SKIPPED


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of [B, T, ...] tensors, as many as the host knows of.

    ``positions``: flat b * T + t, int64 [n], ascending among the rows with a target; a slice where they are all the
    rows there are, or a chunk of those. ``everywhere``: targets of all rows, int32 [B, T]. Unless ``exact``, some of
    these may be negative: rows that only fill up to a bound the caller gave, and contribute nothing.
    """

    positions: Tensor | slice
    everywhere: Tensor
    exact: bool

    def __len__(self) -> int:
        positions = self.positions
        return positions.stop - positions.start if isinstance(positions, slice) else positions.numel()

    @property
    def everything(self) -> bool:
        """Whether no row is left out."""
        return isinstance(self.positions, slice)

    @cached_property
    def targets(self) -> Tensor:
        """int32 [n]; gathered when asked for: the first GEMM waits for them only where rows fill up to a bound."""
        return self._select(self.everywhere.view(-1), 0)

    @classmethod
    def at(cls, positions: Tensor, targets: Tensor, *, exact: bool = True) -> Rows:
        """The rows at ``positions`` of ``targets``, contiguous int32 [B, T]."""
        if exact and positions.numel() == targets.numel():
            return cls.all(targets)
        return cls(positions, targets, exact)

    @classmethod
    def all(cls, targets: Tensor) -> Rows:
        """Every row of ``targets``, contiguous int32 [B, T], none of which is negative."""
        return cls(slice(0, targets.numel()), targets, True)

    def part(self, part: slice) -> Rows:
        """The chunk of them in ``part``."""
        positions = self.positions
        if part.stop - part.start == len(self):
            return self
        if isinstance(positions, slice):
            positions = slice(positions.start + part.start, positions.start + part.stop)
        else:
            positions = positions[part]
        return Rows(positions, self.everywhere, self.exact)

    def _select(self, whole: Tensor, dimension: int) -> Tensor:
        """The rows' entries along a dimension of B * T."""
        positions = self.positions  # in half the time of indexing
        if isinstance(positions, slice):
            return whole.narrow(dimension, positions.start, len(self))
        return whole.index_select(dimension, positions)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The rows' indices b and t."""
        positions, steps = self.positions, max(self.everywhere.shape[1], 1)
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=self.everywhere.device)
        return positions.div(steps, rounding_mode="floor"), positions % steps

    def write(self, entries: Tensor, whole: Tensor, dimension: int) -> None:
        """Writes the rows' ``entries`` to their places along a dimension of B * T."""
        if isinstance(self.positions, slice):
            self._select(whole, dimension).copy_(entries)
        else:
            whole.index_copy_(dimension, self.positions, entries)

    def gather(self, entries: Tensor) -> Tensor:
        """The rows' entries [k, 1, n], contiguous, of per-token ``entries`` [k, B, T]."""
        return self._select(entries.reshape(entries.shape[0], 1, -1), 2).contiguous()

    def scatter(self, entries: Tensor, whole: Tensor) -> None:
        """Writes the rows' ``entries`` [k, 1, n] to their places in ``whole``, contiguous [k, B, T]."""
        self.write(entries, whole.view(whole.shape[0], 1, -1), 2)

    def of(self, whole: Tensor) -> Tensor:
        """The rows [n, k] of ``whole`` [B, T, k], not copied where they lie side by side."""
        if whole.is_contiguous():
            return self._select(whole.view(-1, whole.shape[-1]), 0)
        return whole[self._places]

    def hidden(self, hidden: Tensor) -> Tensor:
        """The rows' hidden states [n, H]; zeros in rows that only fill up."""
        rows = self.of(hidden)
        if not self.exact:  # a NaN times their gradient of 0 would still be a NaN in dweight
            rows = rows.masked_fill_((self.targets < 0).unsqueeze(-1), 0)
        return rows


def _first(chosen: Tensor, count: int) -> Tensor:
    """Positions of ``count`` rows, first of those where ``chosen`` (bool [B, T]) holds; waits for nothing."""
    return chosen.view(-1).view(torch.int8).argsort(stable=True, descending=True)[:count]


def _check_active_count(active_count: object, active: Tensor) -> int:
    bound = check_integer("active_count", active_count, "an int or None")
    if not 0 <= bound <= active.numel():
        raise ValueError(f"active_count: expected between 0 and {active.numel()} rows, got {bound}")
    number = active.sum()
    if not values_readable(active):
        torch._assert_async(number <= bound, "active_count: expected at least the number of active rows")
    elif int(number) > bound:
        raise ValueError(f"active_count: expected at least the {int(number)} active rows, got {bound}")
    return bound


def choose_rows(targets: Tensor, active: Tensor, active_count: object, *, idle: bool) -> list[Rows]:
    """The active rows and, where ``idle``, those with a target but without a gradient; at most one synchronisation.

    Args:
        targets: int32 [B, T], contiguous; not negative in active rows.
        active: bool [B, T], contiguous.
        active_count: number of active rows, or a bound on it: then, unless ``idle``, nothing synchronises. Or None.

    Raises:
        TypeError, ValueError: active_count not an int in [0, rows], or (a device-side assert where reading values
            would synchronise) below the number of active rows.
    """
    bound = None if active_count is None else _check_active_count(active_count, active)
    if not idle:
        if bound is None:
            return [Rows.at(active.view(-1).nonzero().squeeze(1), targets)]
        return [Rows.at(_first(active, bound), targets, exact=False)]
    idle_rows = (targets >= 0) ^ active
    number, idle_number = torch.stack([active.sum(), idle_rows.sum()]).tolist()
    filling = targets.masked_fill(idle_rows, SKIPPED)  # up to a bound they fill like any row without a target
    rows = Rows.at(_first(active, number if bound is None else bound), filling, exact=bound is None)
    return [rows, Rows.at(_first(idle_rows, idle_number), targets)]
