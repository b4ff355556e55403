"""Cross entropies from hidden states and head: cut-cross-entropy's, and PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo_fused.bench.cases import Case
from hpo_fused.bench.inputs import Inputs

from .base import Output, Provider, Unavailable
from .peers import Peer, eager_loss

IGNORED = -100
CPU_ROWS = 1024  # of a chunk, on a CPU


class CutCrossEntropy(Peer):
    """``cut_cross_entropy.linear_cross_entropy(reduction="none")``, any objective in eager PyTorch.

    Its gradient filter, "high" by its own default, is off: it drops blocks of the gradient that are small, so that the
    result is not the objective's gradient.
    """

    name = "cce"
    summary = (
        "cut-cross-entropy's per-token cross entropy without gradient filtering, eager loss; skips masked rows, rows "
        "of zero advantage never"
    )
    leaves_out = "entropy"
    distribution = "cut-cross-entropy"
    version = "25.1"
    needs_gpu = True
    copies = 0.5

    def linear_token_logprobs(self, inputs: Inputs) -> Output:
        from cut_cross_entropy import linear_cross_entropy

        targets = inputs.tokens if inputs.mask is None else inputs.tokens.masked_fill(~inputs.mask, IGNORED)
        losses: Tensor = linear_cross_entropy(
            *inputs.leaves, targets, ignore_index=IGNORED, softcap=inputs.softcap, reduction="none", filter_eps=None
        )
        return Output(None, -losses, None)

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        return eager_loss(inputs, self.linear_token_logprobs(inputs))


class TorchCrossEntropy(Provider):
    """``torch.nn.functional.linear_cross_entropy`` over all rows, chunked: less work than a policy loss."""

    name = "linear_cross_entropy"
    summary = (
        "torch.nn.functional.linear_cross_entropy (PyTorch >= 2.13), chunked: plain cross entropy of all rows, the "
        f"nearest to the same work; on a CPU in chunks of {CPU_ROWS} rows, acc_policy='compact', since its own choice "
        "('auto') takes over a minute there in bf16"
    )
    leaves_out = "the policy loss, masks, log-probabilities, entropy, softcap"
    copies = 1.5
    # It rounds probabilities and sums to the dtype itself, and its value, too.
    tolerance = 16.0
    loss_limit = 8e-3

    def available(self, device: torch.device) -> str:
        if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"needs PyTorch >= 2.13, this is {torch.__version__}")
        return super().available(device)

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        if case.shape.softcap is not None or case.ragged:
            raise Unavailable("has no softcap" if case.shape.softcap is not None else "has no mask")

    def loss_of(self, inputs: Inputs, logprobs: Tensor) -> Tensor:
        return -logprobs.mean()

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        options = torch.nn.LinearCrossEntropyOptions()
        if inputs.tokens.device.type == "cpu":
            rows = min(CPU_ROWS, inputs.case.tokens)
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_policy="compact")
        hidden, weight = inputs.leaves
        loss = F.linear_cross_entropy(hidden.flatten(0, 1), weight, inputs.tokens.flatten(), options=options)
        return Output(loss, None, None)
