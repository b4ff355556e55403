"""What a provider is: a name, when it can run, and a forward pass whose loss autograd can differentiate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpo_fused.bench.cases import Case, Inputs, Op

# The same words for every provider, so that a report says it once.
NEEDS_GPU = "needs a GPU; what Triton's interpreter takes on a CPU says nothing"

LACKS: dict[Op, str] = {
    "logits": "gives log-probabilities, and makes no loss",
    "logprobs": "makes a loss, and gives no differentiable log-probabilities away",
}


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


class Candidate:
    """What providers of logits and of hidden states have in common.

    Attributes:
        name: how it is selected and reported.
        summary: one line on what it runs.
        leaves_out: what of the work of this package's functions it does not do.
        slow_start: what the first call does besides running, for the progress line.
        ours: belongs to this package; the first such provider is what the others are compared with.
        largest: bytes of logits up to which its memory is measured at several sizes; None: any.
    """

    name: str
    summary: str = ""
    leaves_out: str = ""
    slow_start: str = ""
    ours: bool = False
    largest: int | None = None

    def available(self, device: torch.device) -> str:
        """The implementation and version that would run on the device.

        Raises:
            Unavailable: none can, whatever the case; with the reason.
        """
        return f"torch {torch.__version__}"


class Provider(Candidate):
    """One way to compute the loss of logits, log-probabilities of logits, or both.

    Attributes:
        can_inplace, inplace: whether the gradient can take the logits' storage, and whether it shall.
        memory_factor: rough peak beyond the inputs, in float32 copies of the logits. Only used to skip a case that
            would not fit into main memory, where the alternative is being killed with every result.
    """

    can_inplace: bool = False
    inplace: bool = False
    memory_factor: float = 3.5

    @classmethod
    def ops(cls) -> tuple[Op, ...]:
        """What it can make of logits."""
        methods: dict[Op, str] = {"logits": "forward", "logprobs": "token_logprobs"}
        return tuple(op for op, method in methods.items() if getattr(cls, method) is not getattr(Provider, method))

    def prepare(self, case: Case, device: torch.device) -> None:
        """Get ready for a case; raise :class:`Unavailable` with the reason where it cannot run."""
        self.available(device)
        if case.op not in self.ops():
            raise Unavailable(LACKS[case.op])

    def room(self, inputs: Inputs) -> Tensor:
        """Memory [B, T, V] for logits that may be overwritten, in the layout that an ``inplace`` provider needs."""
        return torch.empty_like(inputs.logits).detach()

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        """Loss of ``inputs`` with ``logits`` in place of ``inputs.logits``; :class:`Unavailable` where it has none."""
        raise Unavailable(LACKS["logits"])

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        """Log-probabilities, attached to ``logits``, and entropies; :class:`Unavailable` where it has none."""
        raise Unavailable(LACKS["logprobs"])
