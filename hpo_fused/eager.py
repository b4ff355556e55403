"""The torch backend: statistics, gradient and the fused loss of [B, T, V] logits, on any device.

The same functions as ``hpo_fused.kernels``. Logits are read a chunk of rows at a time, never copied whole, and only
the rows asked for: no temporary has as many rows as there are tokens. Arithmetic over the vocabulary is in float32
(``vocab_sweeps.py``, on the CPU compiled by ``compiled_rows.py`` where that works), what is left per token in
float64, and results are rounded once. A row's results are bitwise the same whatever other rows are in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_token_ids, values_readable
from .row_chunks import RowSelection
from .rows import ComputedRows, LogitTransform, LogprobRows, LossRows, RowStatistics, SurrogateSpec, TokenTerms
from .surrogate import token_loss
from .vocab_sweeps import Sweeps

if TYPE_CHECKING:
    from .loss_batch import LossBatch


@contextmanager
def _plain_mode(tensor: Tensor) -> Iterator[None]:
    """No autograd, no autocast; on the CPU no inference mode either (torch.compile would compile anew for each)."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        if tensor.device.type == "cpu":
            with torch.inference_mode(False), torch.no_grad():
                yield
        else:
            yield


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype of per-token arithmetic: MPS has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class _SelectedTokens:
    """Per-token tensors [B, T] gathered at ``positions``, padded so that every chunk can take ``padding`` entries."""

    def __init__(self, positions: Tensor, padding: int) -> None:
        self._positions, self._padding = positions, padding

    def __call__(self, entries: Tensor) -> Tensor:
        count = self._positions.numel()
        result = entries.new_zeros(count + self._padding)
        result[:count] = entries.reshape(-1)[self._positions]
        return result


def _positions(selected: Tensor) -> Tensor:
    return selected.reshape(-1).nonzero().squeeze(1)


def _check_tokens(tokens: Tensor, width: int) -> None:
    """Raises ValueError for ids outside [0, width); on a GPU the indexing itself asserts, without a synchronisation."""
    if tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= width:
        raise ValueError(f"tokens: expected ids in [0, {width}) at unmasked positions, got {low if low < 0 else high}")


def _transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits / transform.temperature


def _scale(transform: LogitTransform) -> float:
    return (transform.softcap or 1.0) / transform.temperature


class _Row:
    """What a row's statistics say about its sampled token, in wide precision: d_y, e_y, the sum S and log S."""

    def __init__(self, target_logits: Tensor, maximum: Tensor, rest: Tensor, transform: LogitTransform) -> None:
        self.difference = _transformed(target_logits, transform) - maximum
        self.exponential = self.difference.exp()
        self.sum = rest + self.exponential
        peaked = rest < self.exponential
        odds = torch.log1p(rest / self.exponential)
        self.log_sum = torch.where(peaked, self.difference + odds, self.sum.log())
        self.logprob = torch.where(peaked, -odds, self.difference - self.sum.log())


def _finish_statistics(
    shift: Tensor, rest: Tensor, weighted: Tensor, target_logits: Tensor, transform: LogitTransform
) -> RowStatistics:
    """Statistics relative to the maximum, from a sweep's sums relative to its shift (all [padded_rows])."""
    wide = _wide(shift)
    shift, rest, weighted, target_logits = (entry.to(wide) for entry in (shift, rest, weighted, target_logits))
    maximum = (shift * _scale(transform)).to(torch.float32)
    # The float32 maximum is not exactly scale * shift where scale is not 1: the sums move by the difference.
    gap = shift * _scale(transform) - maximum.to(wide)
    rest, weighted = gap.exp() * rest, gap.exp() * (weighted + gap * rest)
    row = _Row(target_logits, maximum.to(wide), rest, transform)
    weighted = weighted + torch.where(row.exponential > 0, row.exponential * row.difference, 0.0)
    entropy = row.log_sum - weighted / row.sum
    return RowStatistics(row.logprob.to(torch.float32), maximum, rest.to(torch.float32), entropy.to(torch.float32))


def _sweep_statistics(sweeps: Sweeps, logits: RowSelection, start: int, stop: int, tokens: Tensor) -> RowStatistics:
    """Statistics of rows [start, stop), each [padded_rows]; ``tokens``: the selection's, padded."""
    tokens = tokens[start : start + sweeps.padded_rows]
    shift, rest, weighted = sweeps.statistics(logits, start, stop, tokens)
    target_logits = torch.zeros_like(shift)
    target_logits[: stop - start] = logits.take(start, stop, tokens[: stop - start]).to(torch.float32)
    return _finish_statistics(shift, rest, weighted, target_logits, sweeps.transform)


def _sweep_gradient(
    sweeps: Sweeps,
    logits: RowSelection,
    out: RowSelection,
    start: int,
    stop: int,
    tokens: Tensor,
    statistics: RowStatistics,
    c: Tensor,
    h: Tensor | None,
    live: Tensor | None = None,
) -> None:
    """Writes the gradient of rows [start, stop) to ``out``; ``tokens`` and all after it are [padded_rows].

    dL/dz'_j = e'_j / S * (h * (E - d'_j) - c) with e', d' relative to the maximum and E = E_p[d'] = log S - H; in
    terms of the sweep's e, d, which are relative to a float32 shift in u, d' = d + gap.
    """
    wide, transform, count = _wide(c), sweeps.transform, stop - start
    target_logits = torch.zeros_like(c, dtype=wide)
    target_logits[:count] = logits.take(start, stop, tokens[:count]).to(wide)
    maximum, rest, c = (entry.to(wide) for entry in (statistics.maximum, statistics.rest, c))
    row = _Row(target_logits, maximum, rest, transform)
    shift = (maximum / _scale(transform)).to(torch.float32)
    gap = shift.to(wide) * _scale(transform) - maximum
    density = gap.exp() / (row.sum * transform.temperature)
    target = c * (rest / row.sum)
    if h is None:
        factor, slope = -density * c, torch.zeros_like(c)
    else:
        assert statistics.entropy is not None
        h = h.to(wide)
        mean = row.log_sum - statistics.entropy.to(wide)
        factor, slope = density * (h * (mean - gap) - c), density * h
        pull = h * row.exponential / row.sum * (mean - row.difference)
        target = target + torch.where(row.exponential > 0, pull, 0.0)
    if transform.softcap is not None:
        target = target / torch.cosh(target_logits / transform.softcap) ** 2
    target = target / transform.temperature
    if live is not None:
        target = torch.where(live, target, 0.0)
    sweeps.gradient(logits, out, start, stop, shift, factor.to(torch.float32), slope.to(torch.float32), live)
    out.put(start, stop, tokens[:count], target[:count])


def token_statistics(
    logits: Tensor, tokens: Tensor, compute: Tensor, transform: LogitTransform, *, entropy: bool
) -> RowStatistics:
    """Log-probability of each row's token, and what ``token_gradient`` needs to know about the row.

    Args:
        logits: [B, T, V] float16, bfloat16 or float32; any strides but 1 for V.
        tokens: int64 [B, T]; anything where ``compute`` is False.
        compute: bool [B, T]; other rows are not read.
        transform: softcap and temperature.
        entropy: whether the entropy is wanted.

    Returns:
        RowStatistics, float32 [B, T]; NaN in rows not computed.

    Raises:
        ValueError: an id outside [0, V) in a computed row (CPU; elsewhere PyTorch's indexing assert).
    """
    with _plain_mode(logits):
        logprobs, maximum, rest, entropies = full = tuple(
            torch.full(tokens.shape, torch.nan, dtype=torch.float32, device=logits.device) for _ in range(4)
        )
        positions = _positions(compute)
        if positions.numel() > 0:
            sweeps = Sweeps(logits, transform)
            selected_tokens = _SelectedTokens(positions, sweeps.padded_rows)(tokens)
            _check_tokens(selected_tokens, logits.shape[-1])
            selection = RowSelection(logits, positions)
            for start in range(0, len(selection), sweeps.chunk_rows):
                stop = min(start + sweeps.chunk_rows, len(selection))
                statistics = _sweep_statistics(sweeps, selection, start, stop, selected_tokens)
                for whole, part in zip(full, statistics, strict=True):
                    assert part is not None
                    whole.view(-1)[positions[start:stop]] = part[: stop - start]
        return RowStatistics(logprobs, maximum, rest, entropies if entropy else None)


def token_gradient(
    logits: Tensor,
    tokens: Tensor,
    statistics: RowStatistics,
    logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """Writes dL/dlogits to ``out``, given c = dL/dlogp and h = dL/dH of each row.

    Args:
        logits, tokens, transform: as for ``token_statistics``.
        statistics: its result; rows with c or h other than 0 must have been computed.
        logprob_coefficients: float32 [B, T].
        entropy_coefficients: float32 [B, T], or None for zeros.
        out: [B, T, V] of logits' dtype; may be logits itself. Rows with c = h = 0 get zeros without being read.

    Raises:
        ValueError: an id outside [0, V) in a row with c or h other than 0 (CPU).
    """
    c, h = logprob_coefficients, entropy_coefficients
    live = c != 0 if h is None else (c != 0) | (h != 0)
    with _plain_mode(logits):
        positions = _positions(live)
        if positions.numel() > 0:
            sweeps = Sweeps(logits, transform)
            gather = _SelectedTokens(positions, sweeps.padded_rows)
            selected_tokens = gather(tokens)
            _check_tokens(selected_tokens, logits.shape[-1])
            c, h = gather(c), None if h is None else gather(h)
            entries = [None if entry is None else gather(entry) for entry in statistics]
            selection, target = RowSelection(logits, positions), RowSelection(out, positions)
            for start in range(0, len(selection), sweeps.chunk_rows):
                stop = min(start + sweeps.chunk_rows, len(selection))
                part = slice(start, start + sweeps.padded_rows)
                rows = RowStatistics._make(None if entry is None else entry[part] for entry in entries)
                pull = None if h is None else h[part]
                ids = selected_tokens[part]
                _sweep_gradient(sweeps, selection, target, start, stop, ids, rows, c[part], pull)
        _zero(out, ~live)


def fused_policy_loss(
    logits: Tensor,
    tokens: Tensor,
    compute: Tensor,
    terms: TokenTerms,
    transform: LogitTransform,
    spec: SurrogateSpec,
    *,
    entropy: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each row's loss and, in ``out``, the gradient of their sum: token-level objectives, one read of the logits.

    Args:
        logits, tokens, compute, transform: as for ``token_statistics``; rows whose loss can be other than 0 must
            be computed.
        terms: advantages, weights and log-probabilities, float32 [B, T].
        spec: the lowered objective.
        entropy: whether the entropy is wanted; implied by an entropy term in the objective.
        out: [B, T, V] of logits' dtype for the gradient, may be logits itself; None: no gradient.

    Returns:
        losses float32 [B, T], 0 in rows without loss; logprobs and entropy (None where not wanted), NaN in rows not
        computed.

    Raises:
        ValueError: an id outside [0, V) in a computed row (CPU); ``out`` is then untouched.
    """
    with _plain_mode(logits):
        losses = torch.zeros(tokens.shape, dtype=torch.float32, device=logits.device)
        logprobs = torch.full_like(losses, torch.nan)
        entropies = torch.full_like(losses, torch.nan)
        positions = _positions(compute)
        written = torch.zeros(tokens.numel(), dtype=torch.bool, device=logits.device)
        if positions.numel() > 0:
            sweeps = Sweeps(logits, transform)
            gather = _SelectedTokens(positions, sweeps.padded_rows)
            selected_tokens = gather(tokens)
            _check_tokens(selected_tokens, logits.shape[-1])
            selected_terms = [None if entry is None else gather(entry) for entry in terms]
            selection = RowSelection(logits, positions)
            target = None if out is None else RowSelection(out, positions)
            for start in range(0, len(selection), sweeps.chunk_rows):
                stop = min(start + sweeps.chunk_rows, len(selection))
                part, here = slice(start, start + sweeps.padded_rows), positions[start:stop]
                statistics = _sweep_statistics(sweeps, selection, start, stop, selected_tokens)
                row_terms = TokenTerms._make(None if entry is None else entry[part] for entry in selected_terms)
                loss = token_loss(spec, row_terms, statistics.logprobs, statistics.entropy)
                for whole, rows in zip(
                    (losses, logprobs, entropies),
                    (loss.losses, statistics.logprobs, statistics.entropy),
                    strict=True,
                ):
                    assert rows is not None
                    whole.view(-1)[here] = rows[: stop - start]
                if target is not None:
                    live = _gradient_of_chunk(
                        sweeps,
                        selection,
                        target,
                        start,
                        stop,
                        selected_tokens[part],
                        statistics,
                        loss.logprob_coefficients,
                        loss.entropy_coefficients,
                    )
                    written[here] = live
        if out is not None:
            _zero(out, ~written)
        return losses, logprobs, entropies if entropy or spec.entropy_coef != 0 else None


def policy_loss(
    logits: Tensor,
    batch: LossBatch,
    transform: LogitTransform,
    spec: SurrogateSpec,
    *,
    skip_inactive: bool,
    entropy: bool,
    out: Tensor | None,
) -> LossRows:
    """The same of a batch as the caller passed it.

    Args:
        logits, transform, spec, entropy, out: as for ``fused_policy_loss``.
        batch: the arguments of the call.
        skip_inactive: whether to leave rows without a learning signal uncomputed.

    Raises:
        ValueError: an id outside [0, V) at an unmasked position (CPU; elsewhere a device-side assert).
    """
    assert batch.tokens is not None
    with _plain_mode(logits):
        prepared = batch.prepared
        mask = prepared.layout.mask
        tokens = batch.tokens.to(torch.int64).reshape(mask.shape).contiguous()
        check_token_ids(tokens, mask, logits.shape[-1])
        compute = prepared.active if skip_inactive else mask
        losses, logprobs, entropies = fused_policy_loss(
            logits, tokens, compute, prepared.terms, transform, spec, entropy=entropy, out=out
        )
        logprobs = torch.where(mask, logprobs, 0.0)
        entropies = None if entropies is None else torch.where(mask, entropies, 0.0)
        return LossRows(losses, logprobs, entropies, prepared.active)


def computed_rows(
    batch: LossBatch, V: int, spec: SurrogateSpec, *, skip_inactive: bool, sequence_level: bool
) -> ComputedRows:
    """The rows to compute: active ones, or with ``skip_inactive=False`` unmasked ones; traceable.

    ``spec`` and ``sequence_level`` repeat what the batch's objective says.

    Raises:
        ValueError: an id outside [0, V) at an unmasked position, where ``policy_loss`` could not see it (a device-side
            assert).
    """
    mask = batch.prepared.layout.mask
    assert batch.tokens is not None
    if not values_readable(batch.tokens):
        check_token_ids(batch.tokens.reshape(mask.shape), mask, V)
    return ComputedRows(batch.prepared.active if skip_inactive else mask, None)


def logprob_policy_loss(
    logprobs: Tensor, entropy: Tensor | None, batch: LossBatch, spec: SurrogateSpec, *, sequence_level: bool,
    statistics: Tensor | None = None,
) -> LogprobRows:  # fmt: skip
    """Loss of log-probabilities (and entropies) of the batch's shape, any floating dtype, and its derivatives.

    ``entropy`` may be None without an entropy term; ``statistics`` is None. Arithmetic in float32.
    """
    with _plain_mode(logprobs):
        prepared = batch.prepared
        layout = prepared.layout
        rows = logprobs.to(torch.float32).reshape(layout.mask.shape)
        entropies = None if entropy is None else entropy.to(torch.float32).reshape(layout.mask.shape)
        mean = layout.response_mean if sequence_level else None
        losses, c, h = token_loss(spec, prepared.terms, rows, entropies, mean)
        return LogprobRows(
            losses,
            c.reshape(batch.shape),
            None if h is None else h.reshape(batch.shape),
            torch.where(layout.mask, rows, 0.0).reshape(batch.shape),
            None if entropies is None else torch.where(layout.mask, entropies, 0.0).reshape(batch.shape),
            prepared.active.reshape(batch.shape),
        )


def _gradient_of_chunk(
    sweeps: Sweeps,
    logits: RowSelection,
    out: RowSelection,
    start: int,
    stop: int,
    tokens: Tensor,
    statistics: RowStatistics,
    c: Tensor,
    h: Tensor | None,
) -> Tensor:
    """The second sweep over those rows [start, stop) whose c or h is not 0. Returns which of them are now written."""
    live = c != 0 if h is None else (c != 0) | (h != 0)
    count = stop - start
    if not logits.on_cpu:  # which rows are live is not known without a synchronisation: all are swept
        _sweep_gradient(sweeps, logits, out, start, stop, tokens, statistics, c, h, live)
        return torch.ones_like(live[:count])
    chosen = live[:count].nonzero().squeeze(1)
    if chosen.numel() == count:
        _sweep_gradient(sweeps, logits, out, start, stop, tokens, statistics, c, h)
    elif chosen.numel() > 0:
        gather = _SelectedTokens(chosen, sweeps.padded_rows - chosen.numel())
        positions = logits.positions[start:stop][chosen]
        rows = RowStatistics._make(None if entry is None else gather(entry) for entry in statistics)
        logits, out = RowSelection(logits.tensor, positions), RowSelection(out.tensor, positions)
        _sweep_gradient(
            sweeps,
            logits,
            out,
            0,
            chosen.numel(),
            gather(tokens),
            rows,
            gather(c),
            None if h is None else gather(h),
        )
    return live[:count]


def _zero(out: Tensor, rows: Tensor) -> None:
    positions = _positions(rows)
    if positions.numel() > 0 and out.numel() > 0:
        RowSelection(out, positions).zero()


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
