"""Operation × objective × dtype × shape × inactive × mode: which cases these make, and everybody measured on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, TypeVar

import torch

from . import providers as of_logits
from .cases import DEFAULT_SHAPES, BatchCase, Case, Mode, Shape, parse_shape
from .environment import environment
from .evidence import Evidence
from .linear import providers as of_heads
from .linear.cases import DEFAULT_HEAD, HeadShape, LinearCase, parse_head
from .linear.memory import measure_memory
from .linear.providers import LinearProvider
from .linear.results import LinearResult
from .linear.run import run_linear
from .memory import logits_memory
from .providers import Provider
from .results import Result
from .run import run_case
from .trial import Progress, Settings

Operation = Literal["logits", "linear", "logprobs"]
OPERATIONS: tuple[Operation, ...] = ("logits", "linear", "logprobs")
Found = TypeVar("Found")


def _recognised(names: Sequence[str], parse: Callable[[str], Found]) -> dict[str, Found]:
    """Those of ``names`` that ``parse`` knows."""
    found = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = parse(name)
        except ValueError:
            continue
    return found


def _refuse_unknown(names: Sequence[str], known: Collection[str], parses: Sequence[Callable[[str], Any]]) -> None:
    """Raise ValueError, with what each of ``parses`` says, for the first name that is not known to any."""
    for name in names:
        if name not in known:
            reasons = []
            for parse in parses:
                try:
                    parse(name)
                except ValueError as error:
                    reasons.append(str(error))
            raise ValueError("; or, of the linear path: ".join(reasons))


@dataclass(frozen=True)
class Axes:
    """What is combined with what.

    Attributes:
        operations: some of ``OPERATIONS``.
        shapes: names, each for every operation that knows it; none: each operation's default.
        tokens: rows of every case.
        dtypes, objectives, inactive, modes: values of these; log-probabilities know neither objective nor inactivity.
        ragged: responses of different lengths; of logits only.
    """

    operations: Sequence[Operation]
    shapes: Sequence[str]
    tokens: int
    dtypes: Sequence[str]
    objectives: Sequence[str]
    inactive: Sequence[float]
    modes: Sequence[Mode]
    ragged: bool = False

    @classmethod
    def operations_for(cls, shapes: Sequence[str], operations: Sequence[Operation]) -> list[Operation]:
        """Those of ``operations`` that know at least one of the shapes; all of them where none is named.

        Raises:
            ValueError: a shape that none of them knows.
        """
        if not shapes:
            return list(operations)
        known = {one: _recognised(shapes, parse_head if one == "linear" else parse_shape) for one in operations}
        named = [name for found in known.values() for name in found]
        parses: list[Callable[[str], Any]] = [
            *([parse_shape] if any(one != "linear" for one in operations) else []),
            *([parse_head] if "linear" in operations else []),
        ]
        _refuse_unknown(shapes, named, parses)
        return [one for one, found in known.items() if found]

    def cases(self) -> list[Case]:
        """Of logits and of log-probabilities, those of one shape together: its kernels stay warm."""
        shapes: Sequence[Shape] = list(_recognised(self.shapes or DEFAULT_SHAPES, parse_shape).values())
        found = []
        for shape in shapes:
            if "logits" in self.operations:
                for dtype, objective, inactive, mode in product(
                    self.dtypes, self.objectives, self.inactive, self.modes
                ):
                    case = Case.of_tokens(shape, self.tokens, dtype, objective, inactive, self.ragged)
                    found.append(replace(case, mode=mode))
            if "logprobs" in self.operations:
                for dtype, mode in product(self.dtypes, self.modes):
                    case = Case.of_tokens(shape, self.tokens, dtype, self.objectives[0], 0.0, self.ragged)
                    found.append(replace(case, mode=mode, op="logprobs"))
        return list(dict.fromkeys(found))

    def heads(self, device: torch.device) -> list[LinearCase]:
        """Of the linear path, whatever the share of inactive rows."""
        if "linear" not in self.operations:
            return []
        heads: Sequence[HeadShape] = list(_recognised(self.shapes or [DEFAULT_HEAD[device.type]], parse_head).values())
        return [
            replace(LinearCase.of_tokens(head, self.tokens, dtype, objective, 0.0, None), mode=mode)
            for head, dtype, objective, mode in product(heads, self.dtypes, self.objectives, self.modes)
        ]

    def shares(self, case: LinearCase) -> list[float]:
        """Shares of inactive rows; whole responses are inactive or not, so what comes to the same is one."""
        return sorted({case.at(share).inactive_share: share for share in sorted(set(self.inactive))}.values())


@dataclass
class Contestants:
    """Who is measured.

    Attributes:
        logits, linear: for logits and log-probabilities, and for the linear path.
        absent: a line for each name that an operation does not have.
        usual: nobody was named: who does not have an operation is not missed there.
    """

    logits: list[Provider] = field(default_factory=list)
    linear: list[LinearProvider] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    usual: bool = False

    def able(self, case: Case) -> list[Provider]:
        """Who is measured on a case of logits or log-probabilities."""
        return [provider for provider in self.logits if not self.usual or case.op in provider.ops()]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        operations: Sequence[Operation],
        device_type: str,
        *,
        inplace: bool = False,
        every: bool = False,
    ) -> Contestants:
        """Those named; no names: each operation's defaults on such a device, or ``every`` one that it has.

        Raises:
            ValueError: a name that none of the operations has.
        """

        def of_logit(name: str) -> Provider:
            return of_logits.create(name, inplace=inplace)

        parses: list[Callable[[str], Any]] = []
        logits: dict[str, Provider] = {}
        heads: dict[str, LinearProvider] = {}
        if any(one != "linear" for one in operations):
            parses.append(of_logit)
            logits = _recognised(names or (list(of_logits.PROVIDERS) if every else of_logits.DEFAULT), of_logit)
        if "linear" in operations:
            parses.append(of_heads.create)
            usual = list(of_heads.PROVIDERS) if every else of_heads.defaults(device_type)
            heads = _recognised(names or usual, of_heads.create)
        _refuse_unknown(names, {*logits, *heads}, parses)
        absent: list[str] = []
        if len(parses) == 2:
            absent += [f"{name}: no provider of logits" for name in names if name not in logits]
            absent += [f"{name}: no provider of the linear path" for name in names if name not in heads]
        return cls(list(logits.values()), list(heads.values()), absent, not names)


def _titles(cases: Sequence[BatchCase]) -> dict[BatchCase, str]:
    """What progress is told of: the shape, and as much as tells the work on it apart from the other cases."""

    def operation(case: BatchCase) -> str:
        return case.op if isinstance(case, Case) else "linear"

    kinds: list[Callable[[BatchCase], str]] = [
        operation,
        lambda case: case.dtype,
        lambda case: case.objective,
        lambda case: f"{case.inactive:.0%}",
        lambda case: case.mode,
    ]
    several = [kind for kind in kinds if len({kind(case) for case in cases}) > 1]
    return {case: " ".join([case.shape.name, *(kind(case) for kind in several)]) for case in cases}


def measure(axes: Axes, who: Contestants, settings: Settings, into: Evidence, progress: Progress) -> None:
    """Every case into ``into``, which holds what is finished however this ends."""
    cases, heads = axes.cases(), axes.heads(settings.device)
    titles = _titles([*cases, *heads])
    into.dropped += who.absent
    if cases:
        into.logits = Result(into.environment, into.settings, into.command)
        for case in cases:
            run_case(case, who.able(case), settings, into.logits.rows, progress, titles[case])
    for head in heads:
        shares = axes.shares(head)
        of_head = {"tokens": head.tokens, "dtype": head.dtype, "objective": head.objective, "mode": head.mode}
        part = LinearResult(into.environment, {**into.settings, **of_head, "inactive": shares}, into.command)
        into.linear.append(part)
        run_linear(head, shares, who.linear, settings, part.rows, progress, titles[head])


def measure_peaks(
    axes: Axes,
    who: Contestants,
    settings: Settings,
    tokens: Sequence[int],
    into: Evidence,
    progress: Progress,
    *,
    chunk_bytes: int | None = None,
    quick: bool = False,
) -> None:
    """Peak memory of every case at each number of tokens, into ``into``."""
    cases, heads = axes.cases(), axes.heads(settings.device)
    titles = _titles([*cases, *heads])
    into.dropped += who.absent
    if cases:
        into.logits = Result(into.environment, into.settings, into.command)
    for case in cases:
        assert into.logits is not None
        rows = into.logits.memory
        able, title = who.able(case), titles[case]
        logits_memory(case, tokens, able, settings.device, settings.seed, rows, progress, 1.0, title)
    for head in heads:
        shares = axes.shares(head)
        for share in shares:
            one = replace(head.at(share), chunk_bytes=chunk_bytes)
            of_case = {"dtype": one.dtype, "objective": one.objective, "mode": one.mode, "chunk_bytes": chunk_bytes}
            part = LinearResult(into.environment, {**into.settings, **of_case}, into.command)
            into.linear.append(part)
            title = titles[head] if len(shares) == 1 else f"{titles[head]} {share:.0%}"
            measure_memory(part, one, tokens, who.linear, settings, progress, 1.0, quick=quick, label=title)


def new_evidence(command: str, device: torch.device, **settings: object) -> Evidence:
    """An empty one of this machine."""
    return Evidence(environment(device), dict(settings), command)
