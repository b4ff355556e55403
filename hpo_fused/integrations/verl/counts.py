"""Numbers of positive and negative responses of an optimiser batch, of which a policy loss sees a micro-batch only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from hpo_fused import BatchStatistics
from hpo_fused.interface import Count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Of the batches that are being trained on, the innermost last.
_batches: list[BatchStatistics] = []


@contextmanager
def optimiser_batch(advantages: Tensor, mask: Tensor, process_group: ProcessGroup | None = None) -> Iterator[None]:
    """The batch that adaptive weighting counts in, for the policy losses called inside.

    verl's engines are inside while they train (``BaseEngine.train_batch``); who calls the losses otherwise enters it.

    Args:
        advantages: [B] or [B, T], of the rank's whole mini-batch, on the device that process_group communicates from.
        mask: bool or 0/1 [B, T].
        process_group: the data-parallel ranks to add up over, one collective; None: this rank has the whole batch.

    Raises:
        TypeError, ValueError: as :meth:`BatchStatistics.from_batch`.
    """
    _batches.append(BatchStatistics.from_batch(advantages, mask, process_group=process_group))
    try:
        yield
    finally:
        _batches.pop()


def current_signs() -> tuple[Count, Count]:
    """N+ and N- of the optimiser batch; RuntimeError outside of one."""
    if not _batches:
        raise RuntimeError(
            "adaptive weighting: expected the responses' signs of the whole optimiser batch, which "
            "BaseEngine.train_batch of verl counts, got a policy loss called outside of it; call it inside of "
            "hpo_fused.integrations.verl.optimiser_batch(advantages, mask, process_group)"
        )
    return _batches[-1].positive, _batches[-1].negative
