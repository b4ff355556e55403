"""A case's inputs and truth, drawn and computed once, and providers checked on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused.bench.cases import BatchCase, Case, Mode, draw
from hpo_fused.bench.check import Oracle
from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.draw import draw as draw_linear
from hpo_fused.bench.linear.draw import draw_weight
from hpo_fused.bench.linear.exact import Exact
from hpo_fused.bench.linear.providers import create as create_linear
from hpo_fused.bench.linear.providers import defaults as linear_defaults
from hpo_fused.bench.linear.results import LinearErrors, LinearRow
from hpo_fused.bench.linear.run import LinearTrial
from hpo_fused.bench.linear.run import check_first as check_linear_first
from hpo_fused.bench.matrix import Axes, Operation
from hpo_fused.bench.providers import DEFAULT, Output, create
from hpo_fused.bench.results import COPY, Errors, Measurement, Row
from hpo_fused.bench.run import Bench, check_first
from hpo_fused.bench.trial import Step, Trial, does_not_fit

LINEAR = "linear"
OBJECTIVE = "mhpo_ahpo"
SEED = 0
# Small on a CPU, of logits and of hidden states: the whole suite is to take less than two minutes on two cores.
CPU_TOKENS, GPU_TOKENS = (64, 32), 8192


@dataclass(frozen=True)
class Problem:
    """A case before its inputs are drawn: what is cheap to name, to sort and to print.

    Attributes:
        op: one of ``bench.matrix.OPERATIONS``.
        case: what is measured.
    """

    op: str
    case: BatchCase

    @property
    def name(self) -> str:
        """Without spaces, as pytest's identifiers are."""
        case = self.case
        return f"{self.op}-{case.shape.name}-{case.tokens}-{case.dtype}-{case.mode}"

    def draw(self, device: torch.device) -> Drawn:
        """The inputs; raises MemoryError with the reason where they would not fit."""
        if isinstance(self.case, Case):
            return DrawnLogits(self.case, device)
        assert isinstance(self.case, LinearCase)
        return DrawnLinear(self.case, device)


class Drawn(ABC):
    """Inputs and truth of one case."""

    device: torch.device

    @abstractmethod
    def checked(self, name: str) -> tuple[Trial, Measurement]:
        """The provider of that name, its result judged and its memory taken, and what was found.

        The row's status is "ok" or "wrong"; raises what the provider raises, ``Unavailable`` among it, and MemoryError
        where it would not fit.
        """

    @abstractmethod
    def rate(self, row: Measurement, seconds: float) -> tuple[str, float | None]:
        """The unit in which this operation's speed is told, and the speed; None where it has no meaning."""


class Latest:
    """The case in memory: tests of one follow one another, and the inputs of two might not fit."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._problem: Problem | None = None
        self._drawn: Drawn | None = None

    def of(self, problem: Problem) -> Drawn:
        """That problem, drawn unless it is the latest; raises as :meth:`Problem.draw` does."""
        if self._drawn is None or self._problem != problem:
            self._drawn = None  # released before the next is made
            self._problem, self._drawn = problem, problem.draw(self.device)
        return self._drawn


def _refuse(note: str) -> None:
    if note:
        raise MemoryError(note)


def _strictly(row: Measurement, errors: Errors | LinearErrors | None) -> Measurement:
    """The row, wrong where it misses this package's own limits; raises MemoryError where nothing was tried."""
    if row.status == "out_of_memory":
        raise MemoryError(row.note)
    if row.status == "ok" and errors is not None and errors.broken:
        row.status, row.note = "wrong", errors.broken
    return row


class _Copy:
    """The logits copied to memory in use: the limit that every time is held against."""

    def __init__(self, logits: Tensor) -> None:
        self.source, self.target = logits, torch.empty_like(logits)

    def before(self) -> None:
        """Nothing."""

    def step(self) -> Step:
        """One read and one write."""
        self.target.copy_(self.source)
        return Step(Output(None, None, None), ())


class DrawnLogits(Drawn):
    """Logits."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        _refuse(does_not_fit(2 * case.logits_bytes, device))
        self.inputs = draw(case, device, SEED)
        self.oracle = Oracle.of(self.inputs)

    def checked(self, name: str) -> tuple[Trial, Measurement]:
        row = Row(self.case, name)
        if name == COPY:
            return _Copy(self.inputs.logits.detach()), row
        bench = Bench(create(name), self.inputs)
        check_first(bench, self.oracle, row, self.device)
        return bench, _strictly(row, row.errors)

    def rate(self, row: Measurement, seconds: float) -> tuple[str, float | None]:
        assert isinstance(row, Row)
        return "gb_per_s", None if row.least_bytes is None else row.least_bytes / seconds / 1e9


class DrawnLinear(Drawn):
    """Hidden states and an LM head."""

    def __init__(self, case: LinearCase, device: torch.device) -> None:
        self.case, self.device = case, device
        _refuse(does_not_fit(2 * case.input_bytes, device))
        weight = draw_weight(case.shape, case.torch_dtype, device, SEED)
        problem = draw_linear(case, [case.inactive], device, SEED, weight)
        self.exact = Exact.of(problem, SEED)
        self.inputs = problem.inputs(case.inactive, self.exact.logprobs)

    def checked(self, name: str) -> tuple[Trial, Measurement]:
        row = LinearRow(self.case, name)
        trial = LinearTrial(create_linear(name), self.inputs)
        check_linear_first(trial, self.exact, row, self.device)
        return trial, _strictly(row, row.errors)

    def rate(self, row: Measurement, seconds: float) -> tuple[str, float | None]:
        # No row is inactive here, so everybody computes all of them.
        flops = self.case.flops(self.case.tokens)
        return "tflop_per_s", None if flops is None else flops / seconds / 1e12


def default_tokens(op: str, device: torch.device) -> int:
    """Rows where nothing was asked for."""
    if device.type == "cuda":
        return GPU_TOKENS
    return CPU_TOKENS[op == LINEAR]


def default_providers(op: str, device: torch.device) -> list[str]:
    """Providers, likewise; of logits with the copy that bounds them."""
    return linear_defaults(device.type) if op == LINEAR else [*DEFAULT, COPY]


def why_not(op: str, name: str) -> str:
    """Why :meth:`Drawn.checked` does not take that name, or ""."""
    if name == COPY and op != LINEAR:
        return ""
    try:
        _ = create_linear(name) if op == LINEAR else create(name)
    except ValueError as error:
        return str(error)
    return ""


def problems_of(
    op: Operation, shapes: Sequence[str], tokens: int, dtypes: Sequence[str], modes: Sequence[Mode],
    device: torch.device,
) -> list[Problem]:  # fmt: skip
    """An operation's cases of those shapes that it knows; no shapes: of its default ones."""
    axes = Axes([op], shapes, tokens, dtypes, [OBJECTIVE], [0.0], modes)
    return [Problem(op, case) for case in (*axes.cases(), *axes.heads(device))]
