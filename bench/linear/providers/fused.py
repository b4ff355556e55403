"""This package."""

from __future__ import annotations

import torch

import hpo_fused
from hpo_fused.backend import Backend
from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.providers import Output
from hpo_fused.bench.providers.fused import backend_on

from .base import LossProvider


class Fused(LossProvider):
    """``hpo_fused.linear_policy_loss`` with the backend it chooses itself, or a given one."""

    ours = True
    skips_inactive = True

    def __init__(self, backend: Backend = "auto") -> None:
        self.backend = backend
        self.name = "hpo_fused" if backend == "auto" else f"hpo_fused:{backend}"
        self.summary = f"hpo_fused.linear_policy_loss, backend={backend!r}"
        self.slow_start = "compiling kernels"

    def available(self, device: torch.device) -> str:
        return backend_on(self.backend, device)

    def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
        return case.memory(device.type).peak

    def forward(self, inputs: LinearInputs) -> Output:
        out = hpo_fused.linear_policy_loss(
            inputs.hidden,
            inputs.weight,
            inputs.tokens,
            inputs.advantages,
            old_logprobs=inputs.old_logprobs,
            objective=inputs.objective,
            softcap=inputs.case.shape.softcap,
            chunk_bytes=inputs.case.chunk_bytes,
            active_count=inputs.case.active if self.told_active else None,
            backend=self.backend,
        )
        return Output(out.loss, out.logprobs, out.entropy)
