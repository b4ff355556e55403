"""Liger-Kernel's Triton GRPO loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo_fused.bench.cases import Case, Inputs
from hpo_fused.bench.logprob_loss import normalised, weighted_advantages

from .base import Output, Provider, Unavailable
from .peers import capped, liger_shaping, require, require_gpu

LONGEST = 65535  # responses are the grid's first axis, their tokens its second, which CUDA limits


class _Longer(torch.autograd.Function):
    """Logits [B, T, V] as the first T positions of ``storage`` [B, T + 1, V], which holds them already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, storage: Tensor) -> Tensor:
        return storage.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, :-1], None


_longer: Callable[[Tensor, Tensor], Tensor] = _Longer.apply


class LigerTriton(Provider):
    """``liger_kernel.transformers.grpo_loss.triton_grpo_loss`` per token, then weights and normaliser in PyTorch.

    Its layout is [B, T + 1, V], contiguous, the last position unused: what a model returns for ``logits_to_keep=T+1``.
    The benchmark's logits are copied into that layout once, in the first call, which is not timed. Log-ratios are not
    clamped, which makes a difference beyond +-20 only. It returns neither log-probabilities nor entropy.
    """

    name = "liger:triton"
    summary = (
        "Liger-Kernel >= 0.8's Triton GRPO loss (2 reads, 1 write; one read more at sequence level), its own layout "
        "[B, T+1, V] made beforehand, inplace=False; no entropy, no log-probabilities, clipping objectives only"
    )
    slow_start = "compiling kernels"
    memory_factor = 2.25

    def __init__(self) -> None:
        self.function: Callable[..., tuple[Tensor, Any, Any]] | None = None
        self.storages: WeakKeyDictionary[Inputs, Tensor] = WeakKeyDictionary()

    def prepare(self, case: Case, device: torch.device) -> None:
        require("liger-kernel", "0.8")
        liger_shaping(case.resolved_objective())
        require_gpu(device)
        if case.length > LONGEST:
            raise Unavailable(f"its grid takes responses of {LONGEST} tokens at most, these have {case.length}")
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        self.function = triton_grpo_loss

    def _longer(self, inputs: Inputs, logits: Tensor) -> Tensor:
        if logits is not inputs.logits:
            return F.pad(logits, (0, 0, 0, 1))
        if inputs not in self.storages:
            self.storages[inputs] = F.pad(logits.detach(), (0, 0, 0, 1))
        return _longer(logits, self.storages[inputs])

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        assert self.function is not None, "prepare() first"
        objective, mask = inputs.objective, inputs.mask
        options = liger_shaping(objective)
        bounds = {f"eps_{side}": options.pop(f"epsilon_{side}", 0.0) for side in ("low", "high")}
        losses, _, _ = self.function(
            capped(self._longer(inputs, logits), inputs.case.shape.softcap),
            inputs.old_logprobs,
            None,
            inputs.tokens,
            weighted_advantages(objective, inputs.advantages, mask, inputs.case.length),
            None if mask is None else mask.long(),
            temperature=1.0,
            beta=0.0,
            inplace=False,
            reduce=False,
            **bounds,
            **options,
        )
        return Output(normalised(objective, losses, mask), None, None)
