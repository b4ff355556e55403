"""Liger-Kernel's GRPO losses of logits and of hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo_fused import hysteretic_advantages
from hpo_fused.bench import plain
from hpo_fused.bench.cases import Case
from hpo_fused.bench.inputs import Inputs

from .base import Output, Unavailable
from .peers import Peer, liger_shaping

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


class LigerTriton(Peer):
    """``liger_kernel.transformers.grpo_loss.triton_grpo_loss`` per token, then weights and normaliser in PyTorch.

    Its layout is [B, T + 1, V], contiguous, the last position unused: that of a model's output for
    ``logits_to_keep=T+1``. The benchmark's logits are copied into it once, in the first call, which is not timed;
    logits that may be overwritten are in it from the start. Log-ratios are not clamped, which makes a difference beyond
    +-20 only. With a softcap, which the model applies, it is the capped logits that ``inplace`` overwrites.
    """

    name = "liger:triton"
    summary = (
        "Liger-Kernel >= 0.8's Triton GRPO loss (2 reads, 1 write; one read more at sequence level), its own layout "
        "[B, T+1, V] made beforehand; inplace=False unless asked for"
    )
    leaves_out = "entropy, log-probabilities; objectives other than clipping ones; the clamp of log-ratios"
    distribution = "liger-kernel"
    version = "0.8"
    needs_gpu = True
    can_inplace = True
    copies = 2.25

    def __init__(self) -> None:
        self.storages: WeakKeyDictionary[Inputs, Tensor] = WeakKeyDictionary()

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        if case.length > LONGEST:
            raise Unavailable(f"its grid takes responses of {LONGEST} tokens at most, these have {case.length}")
        liger_shaping(case.resolved_objective())

    def room(self, inputs: Inputs) -> Tensor:
        return F.pad(inputs.leaves[0].detach(), (0, 0, 0, 1))[:, :-1]

    def _logits(self, inputs: Inputs) -> Tensor:
        """Logits [B, T + 1, V] under the model's softcap."""
        (logits,) = inputs.leaves
        responses, length, vocabulary = logits.shape
        strides = (length + 1) * vocabulary, vocabulary, 1
        if logits.stride() == strides:
            storage = logits.detach().as_strided((responses, length + 1, vocabulary), strides)
        else:
            if inputs not in self.storages:
                self.storages[inputs] = F.pad(logits.detach(), (0, 0, 0, 1))
            storage = self.storages[inputs]
        return plain.capped(_longer(logits, storage), inputs.softcap)

    def policy_loss(self, inputs: Inputs) -> Output:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        objective, mask = inputs.objective, inputs.mask
        options = liger_shaping(objective)
        bounds = {f"eps_{side}": options.pop(f"epsilon_{side}", 0.0) for side in ("low", "high")}
        advantages = hysteretic_advantages(inputs.advantages, mask, objective.weighting)
        keep = None if mask is None else mask.long()
        losses, _, _ = triton_grpo_loss(
            self._logits(inputs), inputs.old_logprobs, None, inputs.tokens, advantages, keep, temperature=1.0, beta=0.0,
            inplace=inputs.case.inplace, reduce=False, **bounds, **options,
        )  # fmt: skip
        return Output(plain.normalised(objective, losses, mask), None, None)


class LigerChunked(Peer):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``; its loss (not its GEMMs) is compiled, by default."""

    name = "liger:chunked"
    summary = (
        "Liger-Kernel >= 0.8's LigerFusedLinearGRPOLoss (4 GEMMs, two of them in float32; a response at a time, "
        "gradients in forward whether or not asked for, weight's summed in its own dtype)"
    )
    leaves_out = "log-probabilities, entropy, softcap; objectives other than clipping ones"
    distribution = "liger-kernel"
    version = "0.8"
    copies = 1.0
    tolerance = 4.0
    compiled = True

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        objective, mask = inputs.objective, inputs.mask
        if inputs.softcap is not None:
            raise Unavailable("Liger-Kernel's chunked GRPO loss has no softcap")
        options = liger_shaping(objective)
        kinds = {"sapo": {"response": "sapo"}, "cispo": {"mean_length": "cispo"}}
        clipped = {"response": "grpo", "mean_length": "dapo", "constant": "dr_grpo"}
        kind = kinds.get(str(options["loss_type"]), clipped).get(objective.normalization)
        if kind is None:
            raise Unavailable(
                "Liger-Kernel's chunked loss normalises a clipped ratio by response, mean_length or constant, SAPO by "
                f"response and CISPO by mean_length; not {options['loss_type']} by {objective.normalization}"
            )
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        options.update(loss_type=kind, max_completion_length=objective.max_length)
        loss_function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=self.compiled, **options)
        advantages = hysteretic_advantages(inputs.advantages, mask, objective.weighting)
        keep = torch.ones_like(inputs.tokens) if mask is None else mask.long()
        loss, _ = loss_function(
            *inputs.leaves, inputs.tokens, keep, advantages, old_per_token_logps=inputs.old_logprobs
        )
        return Output(loss, None, None)
