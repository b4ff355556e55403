"""A provider's loss and both gradients against float64, at the full size that is about to be timed.

Loss, log-probabilities and every row of both gradients are checked: a few rows in full, all of them along random
directions. Rows of the logits that the provider's GEMM rounded otherwise than the oracle's are allowed for, as far as
that can reach, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused.bench.cases import CHUNK_ELEMENTS
from hpo_fused.bench.check import (
    ENTROPY_LIMIT,
    LOSS_LIMIT,
    NEGLIGIBLE,
    OWN_LOGPROB_LIMIT,
    PEAKED,
    logprob_errors,
    loss_and_coefficients,
    missing,
    off,
)
from hpo_fused.bench.providers import Output
from hpo_fused.bench.trial import Step

from .draw import LinearInputs
from .exact import BLOCKS, Exact
from .results import LinearErrors, RowErrors

# Complaints: a row's error relative to the row. The gradient of the logits is rounded to the dtype, then the GEMM's
# result, and over several chunks each chunk's part: three roundings, each at most half a unit in the last place.
ROW_LIMIT = {"bf16": 6e-3, "fp16": 1e-3, "fp32": 1e-3}
# Along a random direction an error as large as the row's whole rounding shows up to a few times larger.
PROBE_LIMIT = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 2e-3}
# A log-probability further off than float32 arithmetic explains belongs to a row with a logit that was rounded the
# other way. Few are: GEMMs sum to within a thousandth of a unit in the last place of bfloat16.
MOVED, MOVED_SHARE = 1e-4, 0.05
# Cross entropy in the dtype itself: its value may be rounded to it.
CROSS_ENTROPY_LIMIT = {"bf16": 8e-3, "fp16": 1e-3, "fp32": 1e-4}


@dataclass(frozen=True, eq=False)
class _Gradients:
    """What the gradients must be for coefficients dloss/dlogp [N]."""

    exact: Exact
    inputs: LinearInputs
    coefficients: Tensor
    moved: Tensor  # [N], 0, or by how much a log-probability is off in a row whose logits were rounded otherwise
    leniency: float = 1.0  # times the limits

    def judge(self, step: Step) -> tuple[RowErrors | None, RowErrors | None, list[str]]:
        """Errors of hidden's and weight's gradient, and complaints."""
        hidden, weight = (gradient.detach() for gradient in step.gradients)
        upstream = self.inputs.case.upstream
        of_hidden, complaints = self._judge_hidden(hidden.flatten(0, 1), upstream)
        of_weight, others = self._judge_weight(weight, upstream)
        return of_hidden, of_weight, [*complaints, *others]

    def _judge_hidden(self, got: Tensor, upstream: float) -> tuple[RowErrors | None, list[str]]:
        exact, c, dtype = self.exact, self.coefficients, self.inputs.case.dtype
        size = self.inputs.weight.detach()[self.inputs.tokens.flatten()].double().norm(dim=-1)
        floor = PEAKED * c.abs() * size
        steady = self.moved == 0
        expected = c[exact.rows].unsqueeze(-1) * exact.directions
        error = (got[exact.rows].double() / upstream - expected).norm(dim=-1)
        errors, worst = _relative(error, expected.norm(dim=-1), floor[exact.rows], steady[exact.rows])
        along = torch.cat([part.double() @ exact.probes for part in got.split(_step(got))]) / upstream
        expected = c.unsqueeze(-1) * exact.hidden_probes
        error = (along - expected).abs().amax(-1)
        size = torch.cat([part.double().norm(dim=-1) for part in got.split(_step(got))]) / upstream
        _, probed = _relative(error, size.maximum(expected.abs().amax(-1)), floor, steady)
        idle = got[c == 0]
        complaints = [
            off("gradient of hidden", worst, self.leniency * ROW_LIMIT[dtype]),
            off("gradient of hidden, all rows,", probed, self.leniency * PROBE_LIMIT[dtype]),
            "" if bool((idle == 0).all()) else "gradient of hidden not zero in rows without a learning signal",
        ]
        return errors, complaints

    def _judge_weight(self, got: Tensor, upstream: float) -> tuple[RowErrors | None, list[str]]:
        exact, c, dtype = self.exact, self.coefficients, self.inputs.case.dtype
        hidden = self.inputs.hidden.detach().flatten(0, 1).double()
        sizes = c.abs() * hidden.norm(dim=-1)

        def parts(slopes: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
            """Expected sums over rows [k, H], and what logits rounded otherwise may change of them [k].

            One that moves a log-probability by d moves the entries of s by 2 |d| in all, and none by more than slack.
            """
            rows = (self.moved != 0).nonzero().squeeze(1)
            reach = 2 * exact.slack.flatten()[rows].unsqueeze(-1) * masses[rows]
            reach = reach.minimum(3 * self.moved[rows].abs().unsqueeze(-1))
            return (c.unsqueeze(-1) * slopes).mT @ hidden, reach.mT @ sizes[rows]

        expected, allowed = parts(exact.column_slopes, exact.column_slopes.abs())
        error = ((got[exact.columns].double() / upstream - expected).norm(dim=-1) - allowed).clamp(min=0)
        ids = self.inputs.tokens.flatten()
        own = torch.where(ids.unsqueeze(-1) == exact.columns, sizes.unsqueeze(-1), 0.0).amax(0)
        everywhere = torch.ones_like(exact.columns, dtype=torch.bool)
        errors, worst = _relative(error, expected.norm(dim=-1), PEAKED * own, everywhere)
        expected, allowed = parts(exact.weight_probes, exact.masses)
        sums, norms = _block_sums(got, exact.signs, upstream)
        error = ((sums - expected).norm(dim=-1) - allowed).clamp(min=0)
        scale = norms.maximum(expected.norm(dim=-1))
        _, probed = _relative(error, scale, torch.zeros_like(scale), torch.ones_like(scale, dtype=torch.bool))
        complaints = [
            off("gradient of weight", worst, self.leniency * ROW_LIMIT[dtype]),
            off("gradient of weight, all rows,", probed, self.leniency * PROBE_LIMIT[dtype]),
        ]
        return errors, complaints


def _step(values: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // values.shape[-1])


def _block_sums(values: Tensor, signs: Tensor, upstream: float) -> tuple[Tensor, Tensor]:
    """Rows [V, H] times their signs, summed over each block of the vocabulary [BLOCKS, H], and the blocks' norms."""
    width = -(-values.shape[0] // BLOCKS)
    sums = torch.zeros(BLOCKS, values.shape[1], dtype=torch.float64, device=values.device)
    sizes = torch.zeros(BLOCKS, dtype=torch.float64, device=values.device)
    for block, (part, sign) in enumerate(zip(values.split(width), signs.split(width), strict=True)):
        exact = part.double() / upstream
        sums[block], sizes[block] = sign @ exact, exact.norm()
    return sums, sizes


def _relative(error: Tensor, size: Tensor, floor: Tensor, judged: Tensor) -> tuple[RowErrors | None, float]:
    """Errors relative to rows of that size, and the worst with small rows judged on the scale of ``floor``.

    Rows much smaller than the largest are judged on its scale: their relative error is cancellation, not a bug.
    """
    judged = judged | error.isnan()
    if not bool(judged.any()):
        return None, 0.0
    tiny = torch.finfo(torch.float64).tiny
    scale = size.maximum(floor).clamp(min=max(NEGLIGIBLE * size.max().item(), tiny))
    worst = (error / scale)[judged].max().item()
    rows = judged & (size > 0)
    if not bool(rows.any()):
        return None, worst
    relative = error[rows] / size[rows]
    return RowErrors(relative.max().item(), relative.median().item()), worst


class LinearOracle:
    """Judges steps on ``inputs``, of a problem that ``exact`` is the truth about."""

    def __init__(self, inputs: LinearInputs, exact: Exact) -> None:
        self.inputs, self.exact = inputs, exact

    def judge(self, step: Step, *, ours: bool = False, leniency: float = 1.0) -> LinearErrors:
        """Errors of a policy loss; ``ours`` holds it to this package's own limits as well.

        ``leniency``: times the gradients' limits, for who is known to round more often.
        """
        exact, inputs = self.exact, self.inputs
        error = self._logprob_errors(step.output)
        moved = ~(error.abs() <= MOVED)
        # The coefficients at the provider's own log-probabilities, as far as these may be off: that is judged here, and
        # next to a clip's edge it would decide whether there is a gradient at all.
        shift = error.nan_to_num(0.0).clamp(-exact.slack, exact.slack)
        loss, c = loss_and_coefficients(inputs, exact.logprobs + shift)
        loss_error = None
        if step.output.loss is not None:
            scale = c.abs().sum().clamp(min=torch.finfo(torch.float64).tiny)
            loss_error = ((step.output.loss.detach().double() - loss).abs() / scale).item()
        gradients = _Gradients(exact, inputs, c.flatten(), torch.where(moved, shift, 0.0).flatten(), leniency)
        hidden, weight, complaints = gradients.judge(step) if step.gradients else (None, None, [])
        count, most = int(moved.sum()), max(1, int(MOVED_SHARE * moved.numel()))
        far = int((moved & ~(error.abs() <= exact.slack)).sum())
        complaints = [
            *missing(step, inputs.case.mode, step.output.loss, "loss"),
            off("loss", loss_error or 0.0, LOSS_LIMIT),
            *complaints,
            f"log-probability off by more than its logits' rounding in {far} rows" if far else "",
            f"log-probability off by more than {MOVED:.0e} in {count} rows" if count > most else "",
        ]
        if step.output.entropy is not None:
            gone = (step.output.entropy.detach().double() - exact.entropies).abs()
            wrong = int((~(gone <= ENTROPY_LIMIT) & (inputs.advantages != 0).unsqueeze(-1)).sum())
            complaints.append(f"entropy off by more than {ENTROPY_LIMIT:.0e} in {wrong} rows" if wrong > most else "")
        logprob, broken = None, ""
        steady = error.abs()[~moved & (inputs.advantages != 0).unsqueeze(-1)]
        if step.output.logprobs is not None and steady.numel():
            logprob = RowErrors(steady.max().item(), steady.median().item())
            # The median: few rows have a logit rounded otherwise. In float32 a GEMM's own sum decides.
            if ours and inputs.case.dtype != "fp32":
                broken = off("median log-probability", logprob.median, OWN_LOGPROB_LIMIT)
        return LinearErrors(loss_error, logprob, count, hidden, weight, ", ".join(filter(None, complaints)), broken)

    def _logprob_errors(self, output: Output) -> Tensor:
        """[B, T]; 0 where there are none to judge."""
        if output.logprobs is None:
            return torch.zeros_like(self.exact.logprobs)
        return logprob_errors(self.inputs, output.logprobs, self.exact.logprobs)

    def judge_cross_entropy(self, step: Step) -> LinearErrors:
        """Errors of the mean cross entropy of all rows; only the loss is judged, the gradients are told."""
        exact, rows = self.exact, self.exact.logprobs.numel()
        expected = -exact.logprobs.mean()
        if step.output.loss is None:
            return LinearErrors(None, complaint="returned no cross entropy")
        loss = ((step.output.loss.detach().double() - expected).abs() / expected.abs()).item()
        c = torch.full((rows,), -1 / rows, dtype=torch.float64, device=exact.logprobs.device)
        gradients = _Gradients(exact, self.inputs, c, torch.zeros_like(c))
        hidden, weight, _ = gradients.judge(step) if step.gradients else (None, None, [])
        complaints = [
            *missing(step, self.inputs.case.mode, step.output.loss, "cross entropy"),
            off("cross entropy", loss, CROSS_ENTROPY_LIMIT[self.inputs.case.dtype]),
        ]
        return LinearErrors(loss, None, 0, hidden, weight, ", ".join(filter(None, complaints)))
