"""A vocabulary in shards: the ranks' statistics combined, and a column of the gradient. Per row, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo_fused.interface import LogitTransform, SoftmaxStatistics

from .softmax import through_softcap, wide_dtype

# So far below the row's maximum nothing is left; and a shard of masked logits has no exact maximum in float32.
_VANISHING = -1e4

# Closer to probability 1 the token is the maximum, and the others' sum need not be a normal number. (The token's own
# exponential is 1 but for the maximum's rounding, 2^-24 of it.)
_CERTAIN = 1e-30


def combine_statistics(
    gathered: Tensor, targets: Tensor, ranges: Tensor, rank: int
) -> tuple[Tensor, SoftmaxStatistics]:
    """The tokens' log-probabilities, and a rank's statistics relative to the whole row, NaN in rows without a target.

    With w_r the ranks' shares of a row's probability, log w_r = lse_r - lse: log p = log p_r + log w_r, r the token's
    rank, and H = sum_r w_r (H_r - log w_r), the chain rule of entropy.

    Args:
        gathered: float32 [W, 3 or 4, B, T], every rank's SoftmaxStatistics of its own columns in the fields' order,
            the log-probability that of the token or, where that is another rank's, of column 0.
        targets: int32 [B, T], ids of the whole vocabulary or codes.
        ranges: int32 [W, 2], each rank's first id and the one behind its last.
        rank: whose statistics are wanted.
    """
    with torch.no_grad():
        logprobs, maxima, others, *entropies = gathered.to(wide_dtype(gathered)).unbind(1)  # [W, B, T]
        start, stop = ranges[:, :, None, None].unbind(1)
        owned = (targets >= start) & (targets < stop)
        # What vanishes beside the row's maximum: no columns, or nothing but masked ones (under a softcap -inf alone). A
        # NaN is in the maxima.
        top = maxima.amax(0)
        drop = maxima - top
        empty = (drop < _VANISHING) | ((others == 0) & logprobs.isnan() & maxima.isfinite())
        sums = torch.where(logprobs > -_CERTAIN, 1.0, others / -torch.expm1(logprobs))
        sums, others = (torch.where(empty, 0.0, value) for value in (sums, others))
        logprobs = torch.where(empty, -torch.inf, logprobs)
        mass = drop.exp() * sums
        # Without the part itself, not the total less it: what little is left of a peaked row keeps its digits.
        rest = torch.where(owned, 0.0, mass).sum(0)
        share = drop + sums.log() - mass.sum(0).log()
        share = torch.where(owned & (rest < mass), -torch.log1p(rest / mass), share)
        beside = mass[:rank].sum(0) + mass[rank + 1 :].sum(0) + drop[rank].exp() * others[rank]
        found = torch.where(owned, logprobs + share, -torch.inf).amax(0)
        found = torch.where(owned.any(0), found, torch.nan)
        entropy = None
        if entropies:
            weight = share.exp()
            entropy = torch.where(weight == 0, 0.0, weight * (entropies[0] - share)).sum(0).to(torch.float32)
        found, column, top, beside = (
            value.to(torch.float32) for value in (found, (logprobs + share)[rank], top, beside)
        )
        return found, SoftmaxStatistics(column, top, beside, entropy)


def column_gradient(
    first: Tensor | None, targets: Tensor, start: int, statistics: SoftmaxStatistics, logprob_coefficients: Tensor,
    entropy_coefficients: Tensor | None, transform: LogitTransform, out: Tensor,
) -> None:  # fmt: skip
    """Write column 0 of a shard's gradient in rows whose token is another rank's, which the sweep took for the token's.

    dloss/dz of a column that is not the token's is p (h (E[z'] - z') - c) dz'/dz, and E[z'] - z' = -H - log p.

    Args:
        first: float32 [B, T], the logits of column 0; None without softcap.
        targets: int32 [B, T], ids of the whole vocabulary or codes.
        start: id of column 0.
        statistics: of :func:`combine_statistics`.
        logprob_coefficients: dloss/dlogp, float32 [B, T].
        entropy_coefficients: dloss/dH, likewise; None: zeros.
        transform: temperature and softcap.
        out: [B, T, columns], which the second sweep has written.
    """
    with torch.no_grad():
        c, h, dtype = logprob_coefficients, entropy_coefficients, wide_dtype(out)
        logprob, slope, live = statistics.logprobs.to(dtype), -c.to(dtype), c != 0
        if h is not None:
            assert statistics.entropy is not None
            slope, live = slope - h * (statistics.entropy + logprob), live | (h != 0)
        slope = through_softcap(slope, None if first is None else first.to(dtype), transform.softcap)
        slope = slope / (transform.temperature if transform.temperatures is None else transform.temperatures)
        gradient = torch.where(live & (logprob != -torch.inf), logprob.exp() * slope, 0.0).to(out.dtype)
        elsewhere = (targets >= 0) & ((targets < start) | (targets >= start + out.shape[-1]))
        out[..., 0] = torch.where(elsewhere, gradient, out[..., 0])
