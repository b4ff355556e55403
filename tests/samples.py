"""Small inputs that many tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused.interface import ADVANTAGE, POLICY_WEIGHT, TERMS, LossSpec, SoftmaxStatistics

from .conftest import BACKENDS


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that require a gradient."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _batch(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, advantages (one of them 0) and old log-probabilities."""
    tokens = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    old = hf.token_logprobs(logits, tokens).logprobs + 0.2 * torch.randn(tokens.shape, generator=generator)
    return tokens, torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0]), old


def logits_arguments(
    device: torch.device, vocabulary: int = 211, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [5, 4, V], tokens, advantages and old log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(5, 4, vocabulary, generator=generator)
    tokens, advantages, old = _batch(logits, generator)
    return logits.to(device, dtype), tokens.to(device), advantages.to(device), old.to(device)


def hidden_arguments(
    device: torch.device, vocabulary: int = 211, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [5, 4, 24], weight, tokens, advantages and old log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 4, 24, generator=generator)
    weight = torch.randn(vocabulary, 24, generator=generator) / 3
    tokens, advantages, old = _batch(hidden @ weight.t(), generator)
    return hidden.to(device, dtype), weight.to(device, dtype), tokens.to(device), advantages.to(device), old.to(device)


class Sample:
    """A small loss call: from logits by a backend, or from hidden states and a head in chunks of 6 rows ("linear")."""

    def __init__(
        self, path: str, device: torch.device, vocabulary: int = 37, dtype: torch.dtype = torch.float32
    ) -> None:
        self.linear = path == "linear"
        arguments = (hidden_arguments if self.linear else logits_arguments)(device, vocabulary, dtype)
        *self.values, self.tokens, self.advantages, self.old = arguments
        self.options: dict[str, Any] = {"backend": path}
        if self.linear:
            self.options = {"chunk_bytes": 6 * vocabulary * dtype.itemsize}

    def leaves(self) -> list[Tensor]:
        """Logits, or hidden states and weight."""
        return leaves(*self.values)

    def loss(self, inputs: list[Tensor], **options: Any) -> hf.PolicyLossOutput:
        function = hf.linear_policy_loss if self.linear else hf.policy_loss
        given = {"tokens": self.tokens, "advantages": self.advantages, "old_logprobs": self.old}
        return function(*inputs, **{**given, **self.options, **options})

    def logprobs(self, inputs: list[Tensor], **options: Any) -> hf.TokenLogprobs:
        function = hf.linear_token_logprobs if self.linear else hf.token_logprobs
        return function(*inputs, **{"tokens": self.tokens, **self.options, **options})

    def logits(self, inputs: list[Tensor]) -> Tensor:
        return inputs[0] @ inputs[1].t() if self.linear else inputs[0]


every_path = pytest.mark.parametrize("path", [*BACKENDS, "linear"])


def lowered(objective: hf.Objective) -> LossSpec:
    """Its plain values for an off-policy call."""
    one = torch.zeros(1, 1)
    out = hf.logprob_policy_loss(
        one, one[0], entropy=one, old_logprobs=one, ref_logprobs=one, objective=objective, backend="torch"
    )
    return objective.lower(out._batch)


def room_for_statistics(targets: Tensor, *, entropy: bool = True) -> SoftmaxStatistics:
    """What a backend's token_statistics writes to."""
    logprobs, maximum, others, entropies = torch.full((4, *targets.shape), 7.0, device=targets.device)
    return SoftmaxStatistics(logprobs, maximum, others, entropies if entropy else None)


def values_of(advantages: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Terms of an on-policy call without penalties."""
    values = torch.full((TERMS, *advantages.shape), torch.nan, device=advantages.device)
    values[ADVANTAGE], values[POLICY_WEIGHT] = advantages, weights
    return values
