"""Liger-Kernel's Triton kernels of logits: its GRPO loss, and the log-probabilities of old and reference policies.

Their layout is [B, T + 1, V], contiguous, the last position unused: what a model returns for ``logits_to_keep=T+1``.
The benchmark's logits are copied into that layout once, in the first call, which is not timed; logits that may be
overwritten are in it from the start.
"""

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

VERSION = "0.8"
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


class _Liger(Provider):
    """Logits in Liger's layout."""

    slow_start = "compiling kernels"

    def __init__(self) -> None:
        self.function: Callable[..., Any] | None = None
        self.storages: WeakKeyDictionary[Inputs, Tensor] = WeakKeyDictionary()

    def available(self, device: torch.device) -> str:
        version = require("liger-kernel", VERSION)
        require_gpu(device)
        return version

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        if case.length > LONGEST:
            raise Unavailable(f"its grid takes responses of {LONGEST} tokens at most, these have {case.length}")

    def room(self, inputs: Inputs) -> Tensor:
        return F.pad(inputs.logits.detach(), (0, 0, 0, 1))[:, :-1]

    def _longer(self, inputs: Inputs, logits: Tensor) -> Tensor:
        responses, length, vocabulary = logits.shape
        strides = (length + 1) * vocabulary, vocabulary, 1
        if self.inplace and logits.stride() == strides:
            return _longer(logits, logits.detach().as_strided((responses, length + 1, vocabulary), strides))
        if logits is not inputs.logits:
            return F.pad(logits, (0, 0, 0, 1))
        if inputs not in self.storages:
            self.storages[inputs] = F.pad(logits.detach(), (0, 0, 0, 1))
        return _longer(logits, self.storages[inputs])


class LigerTriton(_Liger):
    """``liger_kernel.transformers.grpo_loss.triton_grpo_loss`` per token, then weights and normaliser in PyTorch.

    Log-ratios are not clamped, which makes a difference beyond +-20 only. With a softcap, which the model applies, it
    is the capped logits that ``inplace`` overwrites.
    """

    name = "liger:triton"
    summary = (
        "Liger-Kernel >= 0.8's Triton GRPO loss (2 reads, 1 write; one read more at sequence level), its own layout "
        "[B, T+1, V] made beforehand; inplace=False unless asked for"
    )
    leaves_out = "entropy, log-probabilities; objectives other than clipping ones; the clamp of log-ratios"
    can_inplace = True
    memory_factor = 2.25

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        liger_shaping(case.resolved_objective())
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        self.function = triton_grpo_loss

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
            inplace=self.inplace,
            reduce=False,
            **bounds,
            **options,
        )
        return Output(normalised(objective, losses, mask), None, None)


class LigerLogprobs(_Liger):
    """``liger_kernel.ops.grpo_loss.fused_selective_log_softmax``, which Liger has for policies that are not trained."""

    name = "liger:logprobs"
    summary = "Liger-Kernel >= 0.8's fused_selective_log_softmax (1 read), its own layout [B, T+1, V] made beforehand"
    leaves_out = "entropy, the gradient, the loss"
    memory_factor = 1.25

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        if case.mode != "forward":
            raise Unavailable("Liger-Kernel's fused_selective_log_softmax has no backward: mode forward only")
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        self.function = fused_selective_log_softmax

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        assert self.function is not None, "prepare() first"
        mask = None if inputs.mask is None else inputs.mask.long()
        z = capped(self._longer(inputs, logits), inputs.case.shape.softcap)
        return Output(None, self.function(z, inputs.tokens, temperature=1.0, mask=mask), None)
