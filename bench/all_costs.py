"""What the parts of ``all`` should take: a first guess, from two CPU cores or an H100; the run itself corrects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import Case
from .linear.cases import LinearCase
from .linear.providers import LinearProvider
from .linear.results import GEMMS
from .providers import Provider

# Passes over the logits, in units of this package's own; of the linear path in units of the bare GEMMs.
PASSES = {"hpo_fused": 1.0, "eager": 8.0, "compile": 2.4}
GEMM_PASSES = {"hpo_fused": 1.2, "eager": 2.0, "compile": 1.5, "linear_cross_entropy": 1.3, GEMMS: 1.0}
OTHERS, OTHER_GEMMS = 5.0, 3.0
SOFTCAP = 2.5  # what a cap on the logits makes of it
CALLS = 3  # before the first round: the one that is checked, the one whose memory is taken, the warm-up
COPIES = 0.6


@dataclass(frozen=True)
class Machine:
    """Seconds, and elements or floating-point operations per second.

    Attributes:
        start: of every case, whatever its size.
        draw, check: seconds for 1e9 logits, of the inputs with their float64 truth, and of each provider's check.
        sweep: seconds that this package takes for 1e9 logits.
        compile: seconds of ``torch.compile`` for one function; on a GPU of any other's kernels, too.
        flops: of a GEMM, per second.
        kernels: seconds to compile one variant of a kernel for one target; ``process``: until the first one is at work.
        tests: seconds until the first test runs.
    """

    start: float
    draw: float
    check: float
    sweep: float
    compile: float
    flops: float
    kernels: float
    process: float
    tests: float
    compiling: tuple[str, ...] = ("compile",)

    def round(self, case: Case, providers: Sequence[Provider]) -> float:
        """Of one case of logits."""
        passes = sum(PASSES.get(one.name, OTHERS) for one in providers) + COPIES
        softcap = SOFTCAP if case.shape.softcap is not None else 1.0
        return passes * softcap * self.sweep * case.tokens * case.shape.vocabulary / 1e9

    def fixed(self, case: Case, providers: Sequence[Provider]) -> float:
        """Everything before the first round of such a case."""
        elements = case.tokens * case.shape.vocabulary / 1e9
        return (
            self.start
            + (self.draw + self.check * len(providers)) * elements
            + CALLS * self.round(case, providers)
            + self.compile * sum(one.name in self.compiling for one in providers)
        )

    def linear_round(self, case: LinearCase, providers: Sequence[LinearProvider], shares: Sequence[float]) -> float:
        """Of one head at all its shares of inactive rows."""
        work = 0.0
        for one in providers:
            times = sum(1 - share for share in shares) if one.skips_inactive else 1.0
            work += GEMM_PASSES.get(one.name, OTHER_GEMMS) * times
        return work * 6 * case.tokens * case.shape.entries / self.flops

    def linear_fixed(self, case: LinearCase, providers: Sequence[LinearProvider], shares: Sequence[float]) -> float:
        """Everything before the first round of such a head."""
        elements = case.tokens * case.shape.vocabulary / 1e9
        drawing = self.draw * case.shape.entries / 1e9 / 4
        return (
            self.start
            + drawing
            + (2 * self.draw + self.check * len(providers) * len(shares)) * elements
            + CALLS * self.linear_round(case, providers, shares)
            + self.compile * sum(one.name in self.compiling for one in providers)
        )


MACHINES = {
    "cpu": Machine(
        start=1.0, draw=45.0, check=12.0, sweep=1.2, compile=8.0, flops=0.4e12, kernels=0.4, process=5.0, tests=10.0
    ),
    "cuda": Machine(
        start=2.0, draw=2.0, check=0.5, sweep=1.3e-3, compile=12.0, flops=600e12, kernels=0.1, process=8.0, tests=12.0
    ),
}  # fmt: skip
