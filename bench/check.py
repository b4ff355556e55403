"""A provider's result against the float64 oracle: nobody is timed for computing something else.

The result checked is the full-size one that is about to be timed. Loss and log-probabilities are checked on every
token; the gradient row by row on a few rows spread over the batch, since one float64 copy of all of them would not
fit. The column of a row's token is judged apart from the others: its entry alone can be larger than all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.objective import Objective

from .cases import CHUNK_ELEMENTS, Inputs, Mode
from .results import ColumnErrors, Errors

if TYPE_CHECKING:
    from .trial import Step

ROWS = 16  # with a gradient, and as many without where there are such

# Complaints: what no implementation in float32 arithmetic comes near. (Plain PyTorch on a CPU comes nearest: its
# log_softmax is off by 5e-5 at V = 151936.)
#
# The gradient beyond one rounding to the logits' dtype, relative to the row's own; a second rounding passes.
GRADIENT_LIMIT = {"bf16": 4e-3, "fp16": 2e-3, "fp32": 2e-3}
# The loss, relative to sum |dloss/dlogp|. The same for every dtype: it is a float32 sum over float32 arithmetic, and
# rounding log-probabilities to the logits' dtype is a mistake.
LOSS_LIMIT = 1e-4
LOGPROB_LIMIT = ENTROPY_LIMIT = 1e-3
# Rows this much smaller than the largest are judged on its scale: their relative error is cancellation, not a bug.
NEGLIGIBLE = 1e-3
# As is the sampled token's entry, c (1 - p), where p is so near to 1 that it is this small beside c.
PEAKED = 0.05

# What this package promises of itself. A value that is rounded after it was perturbed by d ends at most 2 |d| beyond
# its own rounding error, hence twice float32's limit for the others.
OWN_LOGPROB_LIMIT = 4e-6
OWN_GRADIENT_LIMIT = {"bf16": 6e-6, "fp16": 6e-6, "fp32": 3e-6}


def fingerprint(values: Tensor) -> Tensor:
    """One int64 for each row of [..., V], equal for equal bits and in all likelihood only for those.

    Two gradients are compared by it because a second one at full size might not fit beside the first.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    rows = values.detach().reshape(-1, values.shape[-1]).view(bits)
    generator = torch.Generator(values.device).manual_seed(0)
    limit = 1 << 62
    weights = torch.randint(-limit, limit, rows.shape[-1:], generator=generator, device=values.device) | 1
    step = max(1, CHUNK_ELEMENTS // 8 // rows.shape[-1])  # int64, kept small enough for a CPU's cache
    return torch.cat([(part.long() * weights).sum(-1) for part in rows.split(step)])


def _parts(rows: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Size of each row in its token's column, and in all others."""
    return rows.gather(-1, column).abs().squeeze(-1), rows.scatter(-1, column, 0.0).norm(dim=-1)


def _column_errors(error: Tensor, rounding: Tensor, size: Tensor) -> ColumnErrors | None:
    """Rows' errors relative to their sizes; None where none has any."""
    rows = size > 0
    if not bool(rows.any()):
        return None
    error, rounding = (values[rows] / size[rows] for values in (error, rounding))
    # NaN wins a maximum, and a median too.
    return ColumnErrors(*(v.item() for v in (error.max(), error.median(), rounding.max(), (error - rounding).max())))


def missing(step: Step, mode: Mode, root: Tensor | None, name: str) -> list[str]:
    """Complaints about what a step did not return: the ``root`` of its gradients, and these."""
    return [
        f"returned no {name}" if root is None else "",
        "returned no gradient" if mode != "forward" and not step.gradients else "",
    ]


def off(what: str, error: float, limit: float) -> str:
    """The complaint about an error beyond its limit, else "". NaN is beyond every limit."""
    return "" if error <= limit else f"{what} off by {error:.1e} (limit {limit:.0e})"


class Batch(Protocol):
    """What the loss depends on besides the log-probabilities."""

    @property
    def objective(self) -> Objective: ...
    @property
    def advantages(self) -> Tensor: ...
    @property
    def old_logprobs(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...


def logprob_errors(batch: Batch, logprobs: Tensor, exact: Tensor) -> Tensor:
    """Errors [B, T] of those log-probabilities that have to be computed, 0 elsewhere."""
    error = logprobs.detach().double() - exact
    # Where nothing is learnt a provider need not compute anything, and then says NaN.
    idle = batch.advantages.unsqueeze(-1) == 0
    ignored = idle & error.isnan()
    return error.masked_fill(ignored if batch.mask is None else ~batch.mask | ignored, 0.0)


def _logprob_error(inputs: Inputs, logprobs: Tensor | None) -> tuple[float | None, Tensor]:
    """Largest error, and the errors as far as they are within this package's own limit [B, T]."""
    if logprobs is None:
        return None, torch.zeros_like(inputs.exact_logprobs)
    if inputs.case.op == "logprobs":
        error = logprobs.detach().double() - inputs.exact_logprobs
        error = error if inputs.mask is None else error.masked_fill(~inputs.mask, 0.0)
    else:
        error = logprob_errors(inputs, logprobs, inputs.exact_logprobs)
    return error.abs().max().item(), error.nan_to_num(0.0).clamp(-OWN_LOGPROB_LIMIT, OWN_LOGPROB_LIMIT)


def loss_and_coefficients(batch: Batch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The loss as a function of the log-probabilities [B, T], and its derivative."""
    logprobs = logprobs.detach().clone().requires_grad_()
    loss = reference.logprob_policy_loss(
        logprobs, batch.advantages, old_logprobs=batch.old_logprobs, mask=batch.mask, objective=batch.objective
    )
    (coefficients,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), coefficients


def spread_rows(chosen: Tensor, most: int) -> Tensor:
    """At most ``most`` of the indices where the flat ``chosen`` holds, spread evenly over them."""
    indices = chosen.nonzero().squeeze(1)
    return indices[torch.linspace(0, len(indices) - 1, min(most, len(indices))).round().long().to(indices.device)]


@dataclass(frozen=True, eq=False)
class Oracle:
    """The float64 truth about a case.

    Attributes:
        loss: exact.
        coefficients: dloss/dlogp [B, T]; for log-probabilities alone what is sent back to them.
        rows: indices of those rows of the flattened logits whose gradient is checked.
        slopes: dlogp/dlogits of these rows [R, V].
        entropies: of these rows [R].
    """

    loss: Tensor
    coefficients: Tensor
    rows: Tensor
    slopes: Tensor
    entropies: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> Oracle:
        """Compute it: the loss from every exact log-probability, the gradient by the chain rule through them."""
        loss, coefficients = loss_and_coefficients(inputs, inputs.exact_logprobs)
        if inputs.case.op == "logprobs":
            coefficients = inputs.upstream.double()
        learnt = coefficients.flatten() != 0
        rows = torch.cat([spread_rows(learnt, ROWS), spread_rows(~learnt, ROWS)])
        z = inputs.logits.detach().flatten(0, 1)[rows].double().requires_grad_()
        chosen = reference.token_logprobs(z, inputs.tokens.flatten()[rows], softcap=inputs.case.shape.softcap)
        (slopes,) = torch.autograd.grad(chosen.logprobs.sum(), z)
        return cls(loss, coefficients, rows, slopes, chosen.entropy.detach())

    def _entropy_error(self, entropy: Tensor | None) -> float:
        """Largest, over the checked rows that had to be computed; 0 where none was returned."""
        if entropy is None:
            return 0.0
        error = (entropy.detach().flatten()[self.rows].double() - self.entropies).abs()
        idle = self.coefficients.flatten()[self.rows] == 0
        return error.masked_fill(idle, 0.0).max().item()

    def judge(self, inputs: Inputs, step: Step, *, ours: bool = False) -> Errors:
        """Errors of a provider's output and of its gradient [B, T, V], which carries the case's upstream factor.

        ``ours`` holds it to this package's own limits as well.
        """
        case, output = inputs.case, step.output
        loss = None
        if output.loss is not None:
            scale = self.coefficients.abs().sum().clamp(min=torch.finfo(torch.float64).tiny)
            loss = ((output.loss.detach().double() - self.loss).abs() / scale).item()
        logprob, shift = _logprob_error(inputs, output.logprobs)
        target, others, beyond = (None, None, 0.0)
        if step.gradients:
            (gradient,) = step.gradients
            target, others, beyond = self._judge_gradient(inputs, gradient, shift)
        # Who gives no log-probabilities of a loss away is not asked for them, and nobody for entropies.
        asked = (output.logprobs, "log-probabilities") if case.op == "logprobs" else (output.loss, "loss")
        complaints = [
            *missing(step, case.mode, *asked),
            off("loss", loss or 0.0, LOSS_LIMIT),
            off("gradient", beyond, GRADIENT_LIMIT[case.dtype]),
            off("log-probability", logprob or 0.0, LOGPROB_LIMIT),
            off("entropy", self._entropy_error(output.entropy), ENTROPY_LIMIT),
        ]
        broken = []
        if ours:
            broken = [off("log-probability", logprob or 0.0, OWN_LOGPROB_LIMIT)]
            for name, columns in (("sampled token", target), ("other tokens", others)):
                if columns is not None:
                    beyond_own = off(f"gradient of the {name}", columns.beyond, OWN_GRADIENT_LIMIT[case.dtype])
                    broken.append(beyond_own and f"{beyond_own} beyond its rounding")
        return Errors(loss, logprob, target, others, *(", ".join(filter(None, each)) for each in (complaints, broken)))

    def _judge_gradient(
        self, inputs: Inputs, gradient: Tensor, shift: Tensor
    ) -> tuple[ColumnErrors | None, ColumnErrors | None, float]:
        """Errors of the sampled tokens' columns and of the others, and the worst of all beyond one rounding.

        The loss's coefficients are taken at the provider's own log-probabilities, off by ``shift`` [B, T], as far as
        these may be off: that error is judged already, and next to a clip's edge it would decide whether there is a
        gradient at all.
        """
        case = inputs.case
        tiny = torch.finfo(torch.float64).tiny
        coefficients = self.coefficients
        if case.op == "logits":
            _, coefficients = loss_and_coefficients(inputs, inputs.exact_logprobs + shift)
        coefficients = coefficients.flatten()[self.rows]
        exact = coefficients.unsqueeze(-1) * self.slopes
        got = gradient.detach().flatten(0, 1)[self.rows].double() / case.upstream
        rounded = (exact * case.upstream).to(gradient.dtype).double() / case.upstream

        column = inputs.tokens.flatten()[self.rows].unsqueeze(-1)
        errors, rounding, sizes = (_parts(rows, column) for rows in (got - exact, rounded - exact, exact))
        target, others = (_column_errors(*part) for part in zip(errors, rounding, sizes, strict=True))
        floor = max(NEGLIGIBLE * max(size.max().item() for size in sizes), tiny)
        allowed = (sizes[0].maximum(PEAKED * coefficients.abs()).clamp(min=floor), sizes[1].clamp(min=floor))
        beyond = torch.cat([(e - r) / a for e, r, a in zip(errors, rounding, allowed, strict=True)]).max()
        return target, others, beyond.item()
