"""Plain PyTorch with logits: the same function eager and compiled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.plain import PlainOutput, plain_policy_loss
from hpo_fused.bench.providers import Output
from hpo_fused.bench.providers.plain import Function, compiler_missing, fresh_copy
from hpo_fused.objective import Objective

from .base import LossProvider


def plain_linear_loss(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    softcap: float | None,
) -> PlainOutput:
    """All the logits, and the loss as a trainer writes it."""
    logits = F.linear(hidden, weight)
    return plain_policy_loss(objective, logits, tokens, advantages, old_logprobs, None, softcap)


class Eager(LossProvider):
    """The loss in plain PyTorch, differentiated by autograd."""

    name = "eager"
    summary = "plain PyTorch: F.linear to logits, float32 log_softmax, entropy, loss, autograd"
    copies = 3.5  # of the logits in float32, at the worst moment

    def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
        logits = case.tokens * case.shape.vocabulary
        return self.copies * 4 * logits + 2 * case.logits_bytes + case.input_bytes

    def function(self) -> Function:
        """The loss as a function of the objective and tensors."""
        return plain_linear_loss

    def forward(self, inputs: LinearInputs) -> Output:
        out = self.function()(
            inputs.objective, inputs.hidden, inputs.weight, inputs.tokens, inputs.advantages, inputs.old_logprobs,
            inputs.case.shape.softcap,
        )  # fmt: skip
        return Output(*out)


class Compiled(Eager):
    """The same under torch.compile, for exactly the case's shapes, as a tuned trainer would have it."""

    name = "compile"
    summary = "torch.compile(dynamic=False) of the eager function"
    slow_start = "torch.compile can take a minute"
    copies = 2.5
    largest = 1 << 29  # each number of tokens is compiled anew

    def __init__(self) -> None:
        self.compiled: Function | None = None

    def prepare(self, case: LinearCase, device: torch.device) -> None:
        super().prepare(case, device)
        self.compiled = torch.compile(fresh_copy(plain_linear_loss), dynamic=False)

    def function(self) -> Function:
        assert self.compiled is not None
        return self.compiled

    def forward(self, inputs: LinearInputs) -> Output:
        with compiler_missing():
            return super().forward(inputs)
