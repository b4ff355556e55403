"""Bounds on every implementation: a copy of the logits, and the GEMMs that the linear operations cannot do without."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo_fused.bench.cases import Case
from hpo_fused.bench.inputs import Inputs

from .base import Output, Provider, Unavailable

COLUMNS = 16384  # of the vocabulary that GEMMs in another dtype than the head's take at a time
NOTHING = Output(None, None, None)


class Copy(Provider):
    """One read and one write of the logits (or log-probabilities), to memory in use before."""

    name = "copy"
    summary = "the logits (or log-probabilities) copied to memory in use before"
    limit = True
    copies = 1.0

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        self.target: Tensor | None = None

    def policy_loss(self, inputs: Inputs) -> Output:
        source = inputs.leaves[0].detach()
        if self.target is None:
            self.target = torch.empty_like(source)
        self.target.copy_(source)
        return NOTHING

    token_logprobs = logprob_policy_loss = policy_loss


class Gemms(Provider):
    """Logits, dhidden and dweight of the active rows, to memory in use before.

    The forward alone is the first of the three GEMMs, the backward alone the others. The gradient of the logits is the
    logits: GEMMs do not look. In another dtype than the head's, columns of the vocabulary are taken a part at a time,
    each with the same part of the head, since a second head might not fit.

    Args:
        dtype: "fp32", or None for the case's own.
    """

    summary = "bare GEMMs over the active rows (three, forward one) to memory in use before"
    limit = True
    copies = 1.0

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype
        self.name = "gemms" if dtype is None else f"gemms:{dtype}"

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        self.buffers: tuple[Tensor, ...] = ()
        if self.dtype is not None and (self.dtype == case.dtype or device.type != "cpu"):
            raise Unavailable(f"on a CPU and another dtype than {self.dtype} only")

    def _buffers(self, inputs: Inputs) -> tuple[Tensor, ...]:
        hidden, weight = (leaf.detach() for leaf in inputs.leaves)
        x = hidden[inputs.needed()]
        if self.dtype is not None:
            x, weight = x.float(), weight[:COLUMNS].float()
        logits = torch.mm(x, weight.t())  # never zeros, which take less power
        return x, weight, logits, torch.zeros_like(x), torch.zeros_like(weight)

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        if not self.buffers:
            self.buffers = self._buffers(inputs)
        x, weight, logits, of_x, of_weight = self.buffers
        for start in range(0, inputs.case.shape.vocabulary, len(weight)):
            width = min(len(weight), inputs.case.shape.vocabulary - start)
            part = logits[:, :width]
            if inputs.case.mode != "backward":
                torch.mm(x, weight[:width].t(), out=part)
            if inputs.case.mode != "forward":
                torch.addmm(of_x, part, weight[:width], beta=0.0 if start == 0 else 1.0, out=of_x)
                torch.mm(part.t(), x, out=of_weight[:width])
        return NOTHING

    linear_token_logprobs = linear_policy_loss
