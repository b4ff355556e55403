"""The hysteretic weight of negative advantages, adaptive or folded into the advantages."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .batch import BatchStatistics, check_statistics
from .layout import AdvantageLevel, counted_layout
from .objective import AdaptiveHysteretic, Weighting


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
    layout, values = counted_layout(advantages, mask, cu_seqlens, advantage_level, any_length=True)
    check_statistics(statistics, advantages.device)
    if statistics is None:
        statistics = BatchStatistics._of_layout(layout, values, None)
    exact = advantages.to(torch.promote_types(advantages.dtype, torch.float32))
    weighed = torch.where(exact < 0, exact * statistics.alpha(weighting), exact)
    return weighed.to(advantages.dtype) if advantages.is_floating_point() else weighed
