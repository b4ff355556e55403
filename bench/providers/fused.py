"""This package."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

import hpo_fused
from hpo_fused.backend import Backend, backend_for
from hpo_fused.bench.cases import Inputs

from .base import NEEDS_GPU, Output, Provider, Unavailable


def backend_on(backend: Backend, device: torch.device) -> str:
    """What ``backend`` means on the device, with its version; raises Unavailable where it cannot be timed there."""
    if backend == "triton" and device.type == "cpu":
        raise Unavailable(NEEDS_GPU)
    try:
        chosen = backend_for(torch.empty(0, device=device), backend)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return f"{chosen} {importlib.import_module(chosen).__version__}"


class Fused(Provider):
    """``hpo_fused.policy_loss`` and ``token_logprobs`` with the backend it chooses itself, or a given one."""

    ours = True
    can_inplace = True
    memory_factor = 1.25

    def __init__(self, backend: Backend = "auto") -> None:
        self.backend = backend
        self.name = "hpo_fused" if backend == "auto" else f"hpo_fused:{backend}"
        self.summary = f"hpo_fused.policy_loss, of logprobs token_logprobs; backend={backend!r}"
        self.slow_start = "compiling kernels"

    def available(self, device: torch.device) -> str:
        return backend_on(self.backend, device)

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
