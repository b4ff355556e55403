"""Other projects' losses from hidden states and head, by their adapters in ``bench/providers/linear_peers.py``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.providers import Output
from hpo_fused.bench.providers.linear_peers import LinearPeer
from hpo_fused.bench.providers.peers import require, require_gpu
from hpo_fused.objective import Objective

from .base import LossProvider

TILE = 4096 * 32768  # entries of the largest float32 temporaries that any of them makes


class Function(Protocol):
    """An adapter."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        advantages: Tensor,
        old_logprobs: Tensor,
        mask: Tensor | None,
        objective: Objective,
        softcap: float | None,
    ) -> Output: ...


class Peer(LossProvider):
    """One of them."""

    slow_start = "compiling kernels"

    def __init__(self, peer: LinearPeer, function: Function, leniency: float = 1.0) -> None:
        self.name, self.summary, self.leaves_out = peer.name, peer.summary, peer.leaves_out
        self.peer, self.function, self.leniency = peer, function, leniency

    def available(self, device: torch.device) -> str:
        version = require(self.peer.distribution, self.peer.version)
        if self.peer.needs_gpu:
            require_gpu(device)
        return version

    def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
        # Up to three float32 copies of the head's gradient or the head, and as many temporaries.
        tile = min(TILE, case.tokens * case.shape.vocabulary)
        return 12.0 * case.shape.entries + 16.0 * tile + 2 * case.input_bytes

    def forward(self, inputs: LinearInputs) -> Output:
        return self.function(
            inputs.hidden,
            inputs.weight,
            inputs.tokens,
            inputs.advantages,
            inputs.old_logprobs,
            None,
            inputs.objective,
            inputs.case.shape.softcap,
        )
