"""A provider's result against float64: nobody is timed for computing something else.

The result checked is the full-size one that is about to be timed. Loss, log-probabilities and entropies are checked on
every token, gradients as ``truth.py`` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .inputs import Inputs
from .truth import OWN_GRADIENT_LIMIT, OWN_LOGPROB_LIMIT, TINY, GradientError, Truth, Verdict, off

if TYPE_CHECKING:
    from .providers import Provider, Step

# Loss relative to sum |dloss/dlogp| or itself, the same for every dtype: it is a float32 sum over float32 arithmetic,
# and rounding log-probabilities to the logits' dtype is a mistake.
LOSS_LIMIT = 1e-4
LOGPROB_LIMIT = ENTROPY_LIMIT = 1e-3
# Of hidden states, a log-probability further off than float32 arithmetic explains belongs to a row with a logit that
# was rounded the other way. Few are: GEMMs sum to within a thousandth of a unit in the last place of bfloat16.
MOVED, MOVED_SHARE = 1e-4, 0.05


@dataclass(frozen=True)
class Errors:
    """Distance of a provider's result from float64.

    Attributes:
        loss: relative to the sum of |dloss/dlogp|, which does not cancel, or to the loss where that is larger; None
            where there is none.
        logprob: largest absolute error of the rows that had to be computed and whose logits were rounded as the
            truth's; None if none was returned.
        gradients: by the name of the gradient's part.
        complaint: what is wrong, "" if nothing.
        broken: limits that only this package's providers are held to and this one misses, "" if none.
    """

    loss: float | None
    logprob: float | None
    gradients: dict[str, GradientError]
    complaint: str = ""
    broken: str = ""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Errors:
        """The inverse of ``dataclasses.asdict``."""
        gradients = {name: GradientError(**error) for name, error in content["gradients"].items()}
        return cls(**{**content, "gradients": gradients})


def fingerprint(values: Tensor) -> Tensor:
    """One int64 for each row of [..., V], equal for equal bits and in all likelihood only for those.

    Two gradients are compared by it because a second one at full size might not fit beside the first.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    rows = values.detach().reshape(-1, values.shape[-1] if values.dim() else 1).view(bits)
    generator = torch.Generator(values.device).manual_seed(0)
    limit = 1 << 62
    weights = torch.randint(-limit, limit, rows.shape[-1:], generator=generator, device=values.device) | 1
    step = max(1, (1 << 20) // rows.shape[-1])  # int64, kept small enough for a CPU's cache
    return torch.cat([(part.long() * weights).sum(-1) for part in rows.split(step)])


def loss_and_coefficients(provider: Provider, inputs: Inputs, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The provider's loss as a function of the log-probabilities [B, T], in float64, and its derivative."""
    logprobs = logprobs.detach().clone().requires_grad_()
    loss = provider.loss_of(inputs, logprobs)
    (coefficients,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), coefficients


def judge(inputs: Inputs, truth: Truth, step: Step, provider: Provider) -> Errors:
    """Errors of a step of the provider, and what is wrong with it; this package's are held to its own limits, too."""
    case, out, needed = inputs.case, step.output, inputs.needed()
    error = torch.zeros_like(truth.logprobs)
    if out.logprobs is not None:
        # Where nothing is learnt a provider need not compute anything.
        error = (out.logprobs.detach().double() - truth.logprobs).masked_fill(~needed, 0.0)
    size = error.abs()
    moved = ~(size <= MOVED) if case.linear else torch.zeros_like(needed)
    few = max(1, int(MOVED_SHARE * needed.sum())) if case.linear else 0
    shift = error.nan_to_num(0.0).clamp(-truth.slack, truth.slack)
    loss_error: float | None = None
    coefficients = inputs.upstream.double()
    if case.gives_loss:
        loss, coefficients = loss_and_coefficients(provider, inputs, truth.logprobs + shift)
        if out.loss is not None:
            scale = coefficients.abs().sum().maximum(loss.abs()).clamp(min=TINY)
            got = out.loss.detach().double() / (case.loss_scale if provider.takes_loss_scale else 1.0)
            loss_error = ((got - loss).abs() / scale).item()
    verdict = Verdict()
    if step.gradients:
        verdict = truth.judge(inputs, step.gradients, coefficients, torch.where(moved, shift, 0.0), provider.tolerance)

    root, name = (out.loss, "loss") if case.gives_loss else (out.logprobs, "log-probabilities")
    far = ~(size <= truth.slack.clamp(min=LOGPROB_LIMIT))
    complaints = [
        f"returned no {name}" if root is None else "",
        "returned no gradient" if case.mode != "forward" and not step.gradients else "",
        off("loss", loss_error or 0.0, provider.loss_limit or LOSS_LIMIT),
        *verdict.complaints,
        f"log-probability off by up to {size.max():.1e} in {int(far.sum())} rows" if bool(far.any()) else "",
        f"log-probability off by more than {MOVED:.0e} in {int(moved.sum())} rows" if int(moved.sum()) > few else "",
    ]
    if out.entropy is not None and case.operation != "logprob_policy_loss":
        gone = (out.entropy.detach().double() - truth.entropies).abs().masked_fill(~needed, 0.0)
        wrong = int((~(gone <= ENTROPY_LIMIT)).sum())
        complaints.append(f"entropy off by up to {gone.max():.1e} in {wrong} rows" if wrong > few else "")

    steady = size[needed & ~moved]
    logprob = steady.max().item() if out.logprobs is not None and steady.numel() else None
    broken = []
    if provider.ours and case.linear:
        # The median: few rows have a logit rounded otherwise. In float32 a GEMM's own sum decides.
        if logprob is not None and case.dtype != "fp32":
            broken.append(off("median log-probability", steady.median().item(), OWN_LOGPROB_LIMIT))
    elif provider.ours:
        broken.append(off("log-probability", size.max().item(), OWN_LOGPROB_LIMIT))
        for part, found in verdict.errors.items():
            told = off(f"gradient of the {part}", found.beyond or 0.0, OWN_GRADIENT_LIMIT[case.dtype])
            broken.append(told and f"{told} beyond its rounding")
    joined = (", ".join(filter(None, each)) for each in (complaints, broken))
    return Errors(loss_error, logprob, verdict.errors, *joined)
