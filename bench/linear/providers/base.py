"""What a provider is: a name, when it can run, and a step from hidden states and head to loss and both gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.check import LinearOracle
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.linear.results import LinearErrors
from hpo_fused.bench.providers import Candidate, Output
from hpo_fused.bench.trial import Step


class LinearProvider(Candidate, ABC):
    """One way to compute loss and gradients.

    Attributes:
        skips_inactive: leaves rows without a learning signal out of its GEMMs, so that their share matters.
        measures_memory: whether its peak means something.
        leniency: times the limits of the gradients' errors, for who sums them in the dtype itself.
        told_active: whether it is told how many rows are active, where it would ask the device otherwise: that wait
            belongs into a step's time, and cannot be captured in a CUDA graph.
    """

    skips_inactive: bool = False
    measures_memory: bool = True
    leniency: float = 1.0
    told_active: bool = False

    def prepare(self, case: LinearCase, device: torch.device) -> None:
        """Get ready for a case; raise ``Unavailable`` with the reason where it cannot run."""
        self.available(device)

    @abstractmethod
    def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
        """Rough peak beyond the inputs. Only used to skip a case that would not fit into main memory, where the
        alternative is being killed with every result."""

    def begin(self, inputs: LinearInputs) -> Output | None:
        """What goes before the gradient alone, not timed."""
        return None

    @abstractmethod
    def step(self, inputs: LinearInputs, begun: Output | None = None) -> Step:
        """What the case's mode asks for, once; ``begun`` is what :meth:`begin` returned for it."""

    def judge(self, oracle: LinearOracle, step: Step) -> LinearErrors | None:
        """How far a step is off the policy loss; None where it is no loss at all."""
        return oracle.judge(step, ours=self.ours, leniency=self.leniency)

    def release(self) -> None:
        """Let go of memory that was kept from step to step: nothing follows on this case."""


class LossProvider(LinearProvider):
    """One that makes a loss, which autograd differentiates."""

    @abstractmethod
    def forward(self, inputs: LinearInputs) -> Output:
        """The loss, attached to hidden and weight."""

    def begin(self, inputs: LinearInputs) -> Output:
        return self.forward(inputs)

    def step(self, inputs: LinearInputs, begun: Output | None = None) -> Step:
        """Forward, backward or both, once."""
        if inputs.case.mode == "forward":
            with torch.no_grad():
                return Step(self.forward(inputs), ())
        output = begun or self.forward(inputs)
        if output.loss is None:
            return Step(output, ())  # which the check complains about
        scale = inputs.case.upstream
        upstream = None if scale == 1 else torch.full_like(output.loss, scale)
        return Step(output, torch.autograd.grad(output.loss, (inputs.hidden, inputs.weight), upstream))
