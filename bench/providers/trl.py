"""TRL's functions of logits. TRL has no softcap: the model applies it before, in eager PyTorch.

Up to TRL 1.14 GRPOTrainer called them; from 1.15 on it makes log-probabilities from hidden states
(``linear_peers.trl_chunked``) and other trainers still call these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpo_fused.bench.cases import Case, Inputs
from hpo_fused.bench.logprob_loss import plain_logprob_loss

from .base import Output, Provider
from .peers import capped, require, require_gpu

VERSION = "1.16"


class _Logprobs(Provider):
    """Log-probabilities by TRL, and the loss of them in eager PyTorch."""

    def available(self, device: torch.device) -> str:
        return require("trl", VERSION)

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        _, logprobs, entropy = self.token_logprobs(inputs, logits)
        assert logprobs is not None
        loss = plain_logprob_loss(inputs.objective, logprobs, inputs.advantages, inputs.old_logprobs, inputs.mask)
        return Output(loss, logprobs.detach(), entropy)


class TrlEager(_Logprobs):
    """``selective_log_softmax`` and ``entropy_from_logits`` in their PyTorch implementation.

    On a GPU both hand over to the Triton kernel, for arguments that it takes. It does not take several tokens per
    row, nor logits of four dimensions: that is how this provider has PyTorch run on every device.
    """

    name = "trl:eager"
    summary = (
        "TRL >= 1.16 in PyTorch: logits cast to float32 (as accelerate does under mixed precision; in bfloat16 its "
        "log-probabilities are off by 5e-3), selective_log_softmax, entropy_from_logits, eager loss"
    )
    memory_factor = 5.0

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        import trl.trainer.utils  # noqa: F401 - here, not in the first call, which is measured

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        z = capped(logits.float(), inputs.case.shape.softcap)
        logprobs: Tensor = selective_log_softmax(z, inputs.tokens.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy: Tensor = entropy_from_logits(z.unsqueeze(0)).squeeze(0)
        return Output(None, logprobs, entropy)


class TrlTriton(_Logprobs):
    """``trl.kernels.selective_log_softmax_and_entropy``: two reads and one write of the logits."""

    name = "trl:triton"
    summary = "TRL >= 1.16's Triton kernel of log-probabilities and entropy (2 reads, 1 write), eager loss"
    slow_start = "compiling kernels"
    memory_factor = 1.25

    def __init__(self) -> None:
        self.kernel: Callable[..., tuple[Tensor, Tensor]] | None = None

    def available(self, device: torch.device) -> str:
        version = super().available(device)
        require_gpu(device)
        return version

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        from trl.kernels import selective_log_softmax_and_entropy

        self.kernel = selective_log_softmax_and_entropy

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        assert self.kernel is not None, "prepare() first"
        z = capped(logits, inputs.case.shape.softcap)
        logprobs, entropy = self.kernel(z, inputs.tokens, row_mask=inputs.mask)
        return Output(None, logprobs, entropy.detach())
