"""The provider that is this package."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import hpo_fused
from hpo_fused.backend import Backend
from hpo_fused.bench.cases import Case
from hpo_fused.bench.inputs import Inputs

from .base import NEEDS_GPU, Output, Provider, Unavailable


class Fused(Provider):
    """The public functions, with the backend that they choose themselves or a given one.

    Args:
        backend: as for the functions.
        launch: threads, loads and rows in flight of every launch, instead of the shipped table's.
    """

    ours = True
    can_inplace = True
    takes_loss_scale = True
    copies = 1.25
    slow_start = "compiling kernels"

    def __init__(self, backend: Backend = "auto", launch: tuple[int, int, int] | None = None) -> None:
        self.backend, self.launch = backend, launch
        self.name = "hpo_fused" if backend == "auto" else f"hpo_fused:{backend}"
        self.summary = f"the public functions of hpo_fused, backend={backend!r}"
        if launch is not None:
            self.name = f"hpo_fused@{','.join(map(str, launch))}"
            self.summary = "the same, launched with these threads, loads and rows in flight"

    def available(self, device: torch.device) -> str:
        if self.backend == "triton" and device.type == "cpu":
            raise Unavailable(NEEDS_GPU)
        try:
            chosen = hpo_fused.backend_for(torch.empty(0, device=device), self.backend)
        except ValueError as error:
            raise Unavailable(str(error)) from error
        return f"{chosen} {importlib.import_module(chosen).__version__}"

    def context(self) -> AbstractContextManager[object]:
        if self.launch is None:
            return nullcontext()
        from hpo_fused.kernels import launch

        context: AbstractContextManager[object] = launch.override(parameters=launch.LaunchParameters(*self.launch))
        return context

    def peak_bytes(self, case: Case, device: torch.device) -> float:
        if not case.linear:
            return super().peak_bytes(case, device)
        memory = hpo_fused.linear_memory(
            case.active, case.shape.hidden, case.shape.vocabulary, tokens=case.tokens, dtype=case.torch_dtype,
            chunk_bytes=case.chunk_bytes, device=device.type,
        )  # fmt: skip
        return float(memory.peak)

    def _loss(self, inputs: Inputs) -> dict[str, Any]:
        advantages, old_logprobs, mask = inputs.batch
        return {
            "advantages": advantages, "old_logprobs": old_logprobs, "mask": mask, "objective": inputs.objective,
            "loss_scale": inputs.case.loss_scale, "backend": self.backend,
        }  # fmt: skip

    def _active_count(self, inputs: Inputs) -> int | None:
        """Told where a CUDA graph is captured: asking the device for it would wait, which a graph cannot."""
        return inputs.case.active if inputs.case.cuda_graph else None

    def policy_loss(self, inputs: Inputs) -> Output:
        (logits,) = inputs.leaves
        out = hpo_fused.policy_loss(
            logits, inputs.tokens, softcap=inputs.softcap, inplace=inputs.case.inplace, **self._loss(inputs)
        )
        return Output(out.loss, out.logprobs, out.entropy)

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        out = hpo_fused.linear_policy_loss(
            *inputs.leaves, inputs.tokens, softcap=inputs.softcap, chunk_bytes=inputs.case.chunk_bytes,
            active_count=self._active_count(inputs), **self._loss(inputs),
        )  # fmt: skip
        return Output(out.loss, out.logprobs, out.entropy)

    def logprob_policy_loss(self, inputs: Inputs) -> Output:
        out = hpo_fused.logprob_policy_loss(inputs.leaves[0], **self._loss(inputs))
        return Output(out.loss, out.logprobs, None)

    def token_logprobs(self, inputs: Inputs) -> Output:
        (logits,) = inputs.leaves
        values = hpo_fused.token_logprobs(
            logits, inputs.tokens, mask=inputs.mask, softcap=inputs.softcap, backend=self.backend
        )
        return Output(None, values.logprobs, values.entropy)

    def linear_token_logprobs(self, inputs: Inputs) -> Output:
        values = hpo_fused.linear_token_logprobs(
            *inputs.leaves, inputs.tokens, mask=inputs.mask, softcap=inputs.softcap,
            chunk_bytes=inputs.case.chunk_bytes, active_count=self._active_count(inputs), backend=self.backend,
        )  # fmt: skip
        return Output(None, values.logprobs, values.entropy)
