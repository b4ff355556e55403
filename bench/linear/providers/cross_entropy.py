"""PyTorch's own loss from hidden states and head: plain cross entropy, which is less work than a policy loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.check import LinearOracle
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.linear.results import LinearErrors
from hpo_fused.bench.providers import Output, Unavailable
from hpo_fused.bench.trial import Step

from .base import LossProvider

ROWS = 1024  # of a chunk, on a CPU


class CrossEntropy(LossProvider):
    """``torch.nn.functional.linear_cross_entropy`` over all rows, chunked."""

    name = "linear_cross_entropy"
    summary = (
        "torch.nn.functional.linear_cross_entropy (PyTorch >= 2.13), chunked: plain cross entropy of all rows, the "
        f"nearest to the same work; on a CPU in chunks of {ROWS} rows, acc_policy='compact', since its own choice "
        "('auto') takes over a minute there in bf16"
    )
    leaves_out = "the policy loss, log-probabilities, entropy, softcap"

    def available(self, device: torch.device) -> str:
        if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable(f"needs PyTorch >= 2.13, this is {torch.__version__}")
        return super().available(device)

    def prepare(self, case: LinearCase, device: torch.device) -> None:
        super().prepare(case, device)
        if case.shape.softcap is not None:
            raise Unavailable("has no softcap")

    def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
        return 12.0 * min(case.tokens, ROWS) * case.shape.vocabulary + 3 * case.weight_bytes + case.input_bytes

    def forward(self, inputs: LinearInputs) -> Output:
        options = torch.nn.LinearCrossEntropyOptions()
        if inputs.hidden.device.type == "cpu":
            rows = min(ROWS, inputs.case.tokens)
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_policy="compact")
        loss = F.linear_cross_entropy(
            inputs.hidden.flatten(0, 1), inputs.weight, inputs.tokens.flatten(), options=options
        )
        return Output(loss, None, None)

    def judge(self, oracle: LinearOracle, step: Step) -> LinearErrors:
        return oracle.judge_cross_entropy(step)
