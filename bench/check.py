"""A provider's result against the float64 oracle: nobody is timed for computing something else.

The result checked is the full-size one that is about to be timed. The loss takes every token; the gradient is
checked row by row on a few rows spread over the batch, since one float64 copy of all of them would not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused import reference

from .cases import Inputs
from .providers import Output

ROWS = 16

# A row's gradient: root-mean-square error relative to the row. Rounding to the logits' dtype alone is 1.1e-3 for
# bfloat16 and 1.4e-4 for float16; float32 carries the arithmetic's error, amplified on peaked rows where it comes
# from 1 - p.
GRADIENT_LIMIT = {"bf16": 4e-3, "fp16": 2e-3, "fp32": 1e-4}
# The loss, relative to sum |dloss/dlogp|, which unlike the loss does not cancel. The same for every dtype: it is a
# float32 sum over float32 arithmetic, and rounding log-probabilities to the logits' dtype is a mistake.
LOSS_LIMIT = 1e-4
# Rows this much smaller than the largest are judged on its scale: their relative error is cancellation, not a bug.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Errors:
    """Relative errors of a provider's loss and of its worst row of the gradient; ``complaint`` is empty if right."""

    loss: float
    gradient: float
    complaint: str


@dataclass(frozen=True, eq=False)
class Oracle:
    """The float64 truth about a case: its loss, and the gradient of a few rows of flattened [B*T, V] logits."""

    loss: Tensor
    scale: Tensor
    rows: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> Oracle:
        """Compute it: the loss from every exact log-probability, the gradient by the chain rule through them."""
        logprobs = inputs.exact_logprobs.detach().clone().requires_grad_()
        loss = reference.logprob_policy_loss(
            logprobs,
            inputs.advantages,
            old_logprobs=inputs.old_logprobs,
            mask=inputs.mask,
            objective=inputs.objective,
        )
        (coefficients,) = torch.autograd.grad(loss, logprobs)
        count = inputs.case.tokens
        rows = torch.linspace(0, count - 1, min(ROWS, count), device=logprobs.device).round().long().unique()
        z = inputs.logits.detach().flatten(0, 1)[rows].double().requires_grad_()
        tokens = inputs.tokens.flatten()[rows]
        chosen = reference.token_logprobs(z, tokens, softcap=inputs.case.shape.softcap).logprobs
        (gradient,) = torch.autograd.grad(chosen, z, coefficients.flatten()[rows])
        return cls(loss.detach(), coefficients.abs().sum(), rows, gradient)

    def judge(self, inputs: Inputs, output: Output, gradient: Tensor) -> Errors:
        """Errors of a provider's loss and gradient [B, T, V]; the gradient carries the case's upstream factor."""
        case = inputs.case
        tiny = torch.finfo(torch.float64).tiny
        loss_error = ((output.loss.detach().double() - self.loss).abs() / self.scale.clamp(min=tiny)).item()
        got = gradient.flatten(0, 1)[self.rows].double() / case.upstream
        sizes = self.gradient.norm(dim=-1)
        allowed = sizes.clamp(min=max(NEGLIGIBLE * sizes.max().item(), tiny))
        row_errors = (got - self.gradient).norm(dim=-1) / allowed
        gradient_error = row_errors.max().item()  # NaN wins the maximum
        complaints = []
        # "not <=" so that NaN is an error as well.
        if not loss_error <= LOSS_LIMIT:
            complaints.append(f"loss off by {loss_error:.1e} (limit {LOSS_LIMIT:.0e})")
        if not gradient_error <= GRADIENT_LIMIT[case.dtype]:
            complaints.append(f"gradient off by {gradient_error:.1e} (limit {GRADIENT_LIMIT[case.dtype]:.0e})")
        return Errors(loss_error, gradient_error, ", ".join(complaints))
