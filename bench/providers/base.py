"""What a provider is: a name, when it can run, and a forward pass whose loss autograd can differentiate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from hpo_fused.bench.cases import Case, Inputs


class Unavailable(Exception):
    """Raised by a provider that turns out not to run on this machine; the message is the reason shown."""


class Output(NamedTuple):
    """What every provider computes, so that all do the same work; log-probabilities and entropy are [B, T].

    None for what an implementation does not give away, and for the loss where log-probabilities were asked for;
    log-probabilities of a loss may be NaN where the advantage is zero.
    """

    loss: Tensor | None
    logprobs: Tensor | None
    entropy: Tensor | None


class Provider(ABC):
    """One way to compute the loss.

    Attributes:
        name: how it is selected and reported.
        summary: one line on what it runs.
        slow_start: what the first call does besides running, for the progress line.
        ours: belongs to this package; the first such provider is what the others are compared with.
        can_inplace, inplace: whether the gradient can take the logits' storage, and whether it shall.
        memory_factor: rough peak beyond the inputs, in float32 copies of the logits. Only used to skip a case that
            would not fit into main memory, where the alternative is being killed with every result.
    """

    name: str
    summary: str
    slow_start: str = ""
    ours: bool = False
    can_inplace: bool = False
    inplace: bool = False
    memory_factor: float = 3.5

    def prepare(self, case: Case, device: torch.device) -> None:  # noqa: B027 - most have nothing to do
        """Get ready for a case; raise :class:`Unavailable` with the reason where it cannot run."""

    @abstractmethod
    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        """Loss of ``inputs`` with ``logits`` in the place of ``inputs.logits``."""

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        """Log-probabilities, attached to ``logits``, and entropies; :class:`Unavailable` where it has none."""
        raise Unavailable("makes a loss, and gives no differentiable log-probabilities away")
