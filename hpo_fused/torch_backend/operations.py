"""The backend's operations on [B, T, V] logits and on log-probabilities.

Logits are read a chunk of rows at a time, never copied whole, and only the rows asked for: no temporary has as many
rows as there are tokens. Arithmetic over the vocabulary is in float32 (``sweeps.py``, on the CPU compiled by
``compiled_sweeps.py`` where that works), per token in float64 (``softmax.py``), and results are rounded once. A row's
results are bitwise the same whatever other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hpo_fused.interface import (
    LOGPROB,
    LOSS,
    MASKED,
    SKIPPED,
    LogitTransform,
    LogprobLoss,
    LossSpec,
    SoftmaxStatistics,
    TokenTerms,
)
from hpo_fused.response_ratio import response_ratio
from hpo_fused.surrogate import token_loss

from .compiled_sweeps import sweeps_for
from .selected_rows import SelectedRows, memory_of
from .softmax import softmax_statistics, write_gradient


@contextmanager
def _plain_mode(tensor: Tensor) -> Iterator[None]:
    """No autograd, no autocast; on the CPU no inference mode either (torch.compile would compile anew for each)."""
    inference = torch.is_inference_mode_enabled() and tensor.device.type != "cpu"
    with torch.autocast(tensor.device.type, enabled=False), torch.inference_mode(inference), torch.no_grad():
        yield


def _live(c: Tensor, h: Tensor | None) -> Tensor:
    return c != 0 if h is None else (c != 0) | (h != 0)


def _zero(out: Tensor, selected: Tensor) -> None:
    """Fills the rows of ``out`` where ``selected`` (bool [B, T]) with zeros."""
    positions = selected.reshape(-1).nonzero().squeeze(1)
    if positions.numel() > 0:
        SelectedRows(out, positions).zero()


def policy_loss(
    logits: Tensor, targets: Tensor, values: Tensor, spec: LossSpec, transform: LogitTransform, results: Tensor,
    out: Tensor | None,
) -> None:  # fmt: skip
    """Each row's loss and, in ``out``, the gradient of their sum: both sweeps over a chunk of rows after each other.

    Args:
        logits: float16, bfloat16 or float32 [B, T, V]; any strides but the last.
        targets: int32 [B, T], the sampled tokens' ids, ``MASKED`` or ``SKIPPED``.
        values: float32 [TERMS, B, T], see :class:`TokenTerms`.
        spec: the loss, a token-level one.
        transform: of the logits.
        results: float32 [2 or 3, B, T], contiguous, written in every row: LOSS, LOGPROB and, where there are 3,
            ENTROPY. All are 0 where masked; where skipped the loss is 0, the others NaN.
        out: [B, T, V] of logits' dtype for the gradient, written in every row; may be logits itself. None: no gradient.
    """
    with _plain_mode(logits):
        results = memory_of(results)
        results[LOSS] = 0.0
        results[LOGPROB:] = torch.where(targets == SKIPPED, torch.nan, 0.0)
        untouched = torch.ones(targets.numel(), dtype=torch.bool, device=logits.device)
        sweeps = sweeps_for(logits, transform)
        for rows in sweeps.chunks(targets >= 0):
            ids = sweeps.gathered(targets, rows).to(torch.int64)
            statistics = softmax_statistics(sweeps, rows, ids)
            logprobs, _, _, entropy = statistics
            losses, c, h = token_loss(spec, sweeps.gathered(values, rows), logprobs, entropy)
            for result, entries in zip(results, (losses, logprobs, entropy), strict=False):
                assert entries is not None
                result.view(-1)[rows.positions] = entries[: len(rows)]
            if out is None:
                continue
            live = _live(c, h)[: len(rows)].nonzero().squeeze(1)
            if len(live) == 0:
                continue
            if len(live) < len(rows):
                rows = rows.part(live)
                ids, c = sweeps.padded(ids[live]), sweeps.padded(c[live])
                h = None if h is None else sweeps.padded(h[live])
                statistics = SoftmaxStatistics._make(
                    None if entry is None else sweeps.padded(entry[live]) for entry in statistics
                )
            write_gradient(sweeps, rows, out, ids, statistics, c, h)
            untouched[rows.positions] = False
        if out is not None:
            _zero(out, untouched)


def token_statistics(logits: Tensor, targets: Tensor, transform: LogitTransform, statistics: SoftmaxStatistics) -> None:
    """First sweep: softmax statistics of every row that has a target.

    Args:
        logits, targets, transform: as for :func:`policy_loss`.
        statistics: float32 [B, T], contiguous, to be written in every row: NaN where masked or skipped.
    """
    with _plain_mode(logits):
        wanted = [None if whole is None else memory_of(whole).fill_(torch.nan) for whole in statistics]
        sweeps = sweeps_for(logits, transform)
        for rows in sweeps.chunks(targets >= 0):
            computed = softmax_statistics(sweeps, rows, sweeps.gathered(targets, rows).to(torch.int64))
            for whole, entries in zip(wanted, computed, strict=True):
                if whole is not None and entries is not None:
                    whole.view(-1)[rows.positions] = entries[: len(rows)]


def token_gradient(
    logits: Tensor, targets: Tensor, statistics: SoftmaxStatistics, logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None, transform: LogitTransform, out: Tensor,
) -> None:  # fmt: skip
    """Second sweep: dL/dlogits from c = dL/dlogp and h = dL/dH of each row.

    Args:
        logits, targets, transform: as for :func:`policy_loss`.
        statistics: from :func:`token_statistics`; with entropy coefficients the entropy is needed.
        logprob_coefficients: c, float32 [B, T].
        entropy_coefficients: h, float32 [B, T]; None for zeros.
        out: [B, T, V] of logits' dtype, written in every row; may be logits itself. Rows without a target and rows with
            c = h = 0 get zeros without being read.
    """
    with _plain_mode(logits):
        live = _live(logprob_coefficients, entropy_coefficients) & (targets >= 0)
        sweeps = sweeps_for(logits, transform)
        for rows in sweeps.chunks(live):
            ids = sweeps.gathered(targets, rows).to(torch.int64)
            entries = (None if entry is None else sweeps.gathered(entry, rows) for entry in statistics)
            c = sweeps.gathered(logprob_coefficients, rows)
            h = None if entropy_coefficients is None else sweeps.gathered(entropy_coefficients, rows)
            write_gradient(sweeps, rows, out, ids, SoftmaxStatistics._make(entries), c, h)
        _zero(out, ~live)


def logprob_loss(logprobs: Tensor, entropy: Tensor | None, terms: TokenTerms, spec: LossSpec) -> LogprobLoss:
    """Losses of log-probabilities, token by token, and their derivatives; traceable.

    Args:
        logprobs: float32 [B, T]; anything where masked.
        entropy: float32 [B, T]; needed with an entropy bonus, else passed on to the results where given.
        terms: the tokens' terms.
        spec: the loss, at either level.
    """
    with torch.no_grad():
        mask = terms.targets != MASKED
        losses, c, h = token_loss(spec, terms.values, logprobs, entropy, response_ratio(terms, spec))
        given = (logprobs,) if entropy is None else (logprobs, entropy)
        results = torch.stack([losses, *(torch.where(mask, value, 0.0) for value in given)])
        return LogprobLoss(results, c, h)


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """gradient [B, T, V] *= factor (0-d float32 on the same device), computed in float32 and rounded once, in place.

    On the CPU a factor of 1 costs no pass over the gradient; elsewhere finding that out would cost a
    synchronisation, and the multiplication runs in any case.
    """
    with torch.no_grad():
        if gradient.device.type != "cpu":
            gradient.mul_(factor)
        elif (value := factor.item()) != 1.0:
            gradient.mul_(value)
