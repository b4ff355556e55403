"""This package."""

from __future__ import annotations

import torch
from torch import Tensor

import hpo_fused
from hpo_fused.backend import Backend, backend_for
from hpo_fused.bench.cases import Case, Inputs

from .base import Output, Provider, Unavailable


def check_backend(backend: Backend, device: torch.device) -> None:
    """Raises Unavailable, with the reason, where the backend cannot be timed on the device."""
    if backend == "triton" and device.type == "cpu":
        raise Unavailable("needs a GPU; what Triton's interpreter takes on a CPU says nothing")
    try:
        backend_for(torch.empty(0, device=device), backend)
    except ValueError as error:
        raise Unavailable(str(error)) from error


class Fused(Provider):
    """``hpo_fused.policy_loss`` with the backend it chooses itself, or a given one."""

    ours = True
    can_inplace = True
    memory_factor = 1.25

    def __init__(self, backend: Backend = "auto") -> None:
        self.backend = backend
        self.name = "hpo_fused" if backend == "auto" else f"hpo_fused:{backend}"
        self.summary = f"hpo_fused.policy_loss, backend={backend!r}"
        self.slow_start = "compiling kernels"

    def prepare(self, case: Case, device: torch.device) -> None:
        check_backend(self.backend, device)

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        out = hpo_fused.policy_loss(
            logits,
            inputs.tokens,
            inputs.advantages,
            old_logprobs=inputs.old_logprobs,
            mask=inputs.mask,
            objective=inputs.objective,
            softcap=inputs.case.shape.softcap,
            inplace=self.inplace,
            backend=self.backend,
        )
        return Output(out.loss, out.logprobs, out.entropy)

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        if self.inplace:
            raise Unavailable("hpo_fused.token_logprobs has no inplace")
        values = hpo_fused.token_logprobs(
            logits, inputs.tokens, mask=inputs.mask, softcap=inputs.case.shape.softcap, backend=self.backend
        )
        return Output(None, values.logprobs, values.entropy)
