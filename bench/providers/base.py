"""Base class of providers: a name, a test of where it can run, and a method for each operation that it has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.bench.cases import OPERATIONS, Case, Operation
from hpo_fused.bench.inputs import Inputs

NEEDS_GPU = "needs a GPU; times of Triton's interpreter on a CPU say nothing"


class Unavailable(Exception):
    """Raised by a provider that cannot run on this machine or case; the message is the reason shown."""


class Output(NamedTuple):
    """Result of an operation; log-probabilities and entropies are [B, T].

    The root of the gradient (the loss, or log-probabilities where the operation gives these) is attached to the inputs.
    None stands for a value that an implementation does not give away.
    """

    loss: Tensor | None
    logprobs: Tensor | None
    entropy: Tensor | None


class Step(NamedTuple):
    """Result of one forward and backward pass: its output, and the gradient of each leaf."""

    output: Output
    gradients: tuple[Tensor, ...]


class Provider:
    """One way to compute some of the operations.

    A subclass defines a method for each that it has, under the operation's name: from :class:`Inputs`, whose ``leaves``
    are differentiated, to an :class:`Output`.

    Attributes:
        name: how it is selected and reported.
        summary: one line on the code that it runs.
        leaves_out: work of this package's functions that it does not do, "" if none.
        slow_start: what the first call does besides running, for the progress line.
        ours: belongs to this package; the first such provider is the one that others are compared with.
        limit: no implementation but a bound on all of them, whose result is nothing to judge.
        can_inplace: the gradient can take the logits' storage.
        takes_loss_scale: the loss that it returns is multiplied by the case's ``loss_scale``; else backward is.
        copies: rough peak beyond the inputs, in float32 copies of the logits. Only used to skip a case that would not
            fit into main memory, where the alternative is being killed with every result.
        tolerance: times the limits of the gradients' errors, for implementations that sum in a narrow dtype.
        loss_limit: limit of the loss's error, None for the usual one.
    """

    name: str
    summary: str = ""
    leaves_out: str = ""
    slow_start: str = ""
    ours: bool = False
    limit: bool = False
    can_inplace: bool = False
    takes_loss_scale: bool = False
    copies: float = 3.5
    tolerance: float = 1.0
    loss_limit: float | None = None

    @classmethod
    def operations(cls) -> tuple[Operation, ...]:
        """Operations whose method the class defines."""
        return tuple(name for name in OPERATIONS if hasattr(cls, name))

    def available(self, device: torch.device) -> str:
        """The implementation and version that would run on the device.

        Raises:
            Unavailable: none can, whatever the case; with the reason.
        """
        return f"torch {torch.__version__}"

    def prepare(self, case: Case, device: torch.device) -> None:
        """Get ready for a case; raise :class:`Unavailable` with the reason where it cannot run."""
        self.available(device)
        if case.operation not in self.operations():
            raise Unavailable(f"has no {case.operation}")

    def room(self, inputs: Inputs) -> Tensor:
        """Memory [B, T, V] for logits that may be overwritten, in the layout that an in-place provider needs."""
        return torch.empty_like(inputs.leaves[0]).detach()

    def context(self) -> AbstractContextManager[object]:
        """Entered around each step."""
        return nullcontext()

    def peak_bytes(self, case: Case, device: torch.device) -> float:
        """Rough peak beyond the inputs."""
        head = 12.0 * case.shape.vocabulary * case.shape.hidden if case.linear else 0.0
        return self.copies * 4 * case.tokens * case.shape.vocabulary + head

    def loss_of(self, inputs: Inputs, logprobs: Tensor) -> Tensor:
        """The exact loss as a function of the log-probabilities, float64 [B, T]."""
        return reference.logprob_policy_loss(
            logprobs, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask, objective=inputs.objective
        )

    def run(self, inputs: Inputs) -> Output:
        """The case's operation on ``inputs``."""
        output: Output = getattr(self, inputs.case.operation)(inputs)
        return output
