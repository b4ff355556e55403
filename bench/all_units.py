"""What makes the whole evidence for one machine: its units of work, their priorities, and their order."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from .all_costs import MACHINES, Machine
from .budget import Spent, Unit
from .cases import SHAPES, Case, Shape
from .compile_document import document
from .compile_plan import TARGETS, plan
from .compile_report import Report, ReportFailed, run_report
from .environment import nvidia_clocks, nvidia_name
from .equivalence import run_tests, test_files
from .evidence import CLOCKS, Evidence, Tests
from .gpus import GPUS
from .labels import labels
from .linear.cases import HEADS, HeadShape, LinearCase
from .linear.memory import measure_memory
from .linear.results import LinearResult
from .linear.run import run_linear
from .matrix import Contestants
from .memory import logits_memory
from .providers import Candidate, Provider, Unavailable
from .results import Measurement, Result
from .run import run_case
from .trial import Progress, Settings

# The first of each is measured whatever the budget.
LOGITS = tuple(SHAPES)
CPU_HEADS = ("qwen3-0.6b", "llama3.2-1b", "gemma3-270m", "gpt2")
GPU_HEADS = ("qwen3-8b", "llama3-8b", "gemma2-9b", "gpt2")
TOKENS = {"cpu": 1024, "cuda": 8192}
CPU_HEAD_TOKENS = 256
# The linear path's limits on a CPU are stated for this head and these tokens.
LIMIT_HEAD, LIMIT_HEAD_TOKENS = "qwen2.5-0.5b", 1024
INACTIVE = 0.75
MEMORY_TOKENS = {"cpu": (64, 128, 256), "cuda": (1024, 2048, 4096, 8192, 16384)}
MOST_ROUNDS = 1000
# Of the budget, for the tests; and seconds that they are given at most.
TESTS_SHARE, TESTS_MOST = 0.12, 120.0
LIMITED = ["sm_90", "gfx942"]  # one target of each vendor, where there is no time for all
KERNELS, MEMORY = "machine code", "memory against tokens"

One = TypeVar("One", bound=Candidate)


@dataclass(frozen=True)
class Choice:
    """What the command line narrows it to.

    Attributes:
        shapes, heads: of logits and of the linear path, the most important first.
        tokens, head_tokens: rows of each.
        who: the providers.
        tests, kernels: whether these are wanted.
        stated: whether the linear path is measured at the size that its limits are stated for on a CPU, too.
    """

    shapes: Sequence[Shape]
    heads: Sequence[HeadShape]
    tokens: int
    head_tokens: int
    who: Contestants
    tests: bool = True
    kernels: bool = True
    stated: bool = False

    @classmethod
    def of(
        cls, device: torch.device, who: Contestants, shapes: Sequence[Shape] | None, heads: Sequence[HeadShape] | None,
        tokens: int | None, *, tests: bool, kernels: bool,
    ) -> Choice:  # fmt: skip
        """None: the device's defaults."""
        on_cpu = device.type == "cpu"
        stated = on_cpu and heads is None and tokens is None
        if shapes is None:
            shapes = [SHAPES[name] for name in LOGITS]
        if heads is None:
            heads = [HEADS[name] for name in (CPU_HEADS if on_cpu else GPU_HEADS)]
        head_tokens = tokens or (CPU_HEAD_TOKENS if on_cpu else TOKENS["cuda"])
        return cls(shapes, heads, tokens or TOKENS[device.type], head_tokens, who, tests, kernels, stated)


def _available(providers: Iterable[One], device: torch.device) -> list[One]:
    found = []
    for provider in providers:
        try:
            provider.available(device)
        except Unavailable:
            continue
        found.append(provider)
    return found


def _spent(rows: Sequence[Measurement]) -> Spent:
    rounds = max((len(row.samples_s) for row in rows), default=0)
    return Spent(rounds, sum(sum(row.samples_s) for row in rows))


@dataclass
class Work:
    """Makes units that measure into an evidence.

    Args:
        choice: what.
        device, seed: where, and of the random inputs.
        into: takes what is finished, however this ends.
        progress: each unit is worth 1 on it.
        budget: seconds of everything, of which tests get their share.

    Attributes:
        compiled, targets: the machine code so far, and for what.
        clocks: what was read after each timing.
        without: whose compilation was too slow for what.
    """

    choice: Choice
    device: torch.device
    seed: int
    into: Evidence
    progress: Progress
    budget: float
    compiled: Report = field(default_factory=Report)
    targets: list[str] = field(default_factory=list)
    clocks: list[tuple[float, list[str]]] = field(default_factory=list)
    without: dict[str, list[str]] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        """Its costs."""
        return MACHINES[self.device.type]

    @property
    def logits(self) -> Result:
        """The part of the evidence that is about logits."""
        if self.into.logits is None:
            self.into.logits = Result(self.into.environment, self.into.settings, self.into.command)
        return self.into.logits

    def _settings(self, seconds: float, least: int, repeats: int = MOST_ROUNDS) -> Settings:
        return Settings(self.device, repeats, seconds, self.seed, least)

    def _read_clock(self) -> None:
        """Into the settings what the GPU's clock is right after a timing: before everything it is idle."""
        read = nvidia_clocks(nvidia_name(self.device)) if self.device.type == "cuda" else None
        if read is None:
            return
        self.clocks.append(read)
        speeds = [speed for speed, _ in self.clocks]
        self.into.settings[CLOCKS] = {
            "sm_mhz_min": min(speeds), "sm_mhz_median": statistics.median(speeds),
            "held_down_by": sorted({reason for _, reasons in self.clocks for reason in reasons}),
        }  # fmt: skip

    def _quick_to_start(self, providers: Sequence[One], of: str) -> list[One]:
        """On a CPU without torch.compile: of what is measured once it would take most of the time. That is told."""
        if self.device.type == "cuda":
            return list(providers)
        quick = [one for one in providers if one.name not in self.machine.compiling]
        for one in _available(providers, self.device):
            if one not in quick and of not in (places := self.without.setdefault(one.name, [])):
                places.append(of)
        return quick

    def _part(self, case: LinearCase, shares: Sequence[float]) -> LinearResult:
        of_head = {"tokens": case.tokens, "dtype": case.dtype, "objective": case.objective, "mode": case.mode}
        settings = {**self.into.settings, **of_head, "inactive": list(shares)}
        self.into.linear.append(LinearResult(self.into.environment, settings, self.into.command))
        return self.into.linear[-1]

    def _case(self, shape: Shape, tokens: int | None = None, **changes: object) -> Case:
        case = Case.of_tokens(shape, tokens or self.choice.tokens, "bf16", "mhpo_ahpo", 0.0, False)
        return replace(case, **changes)  # type: ignore[arg-type]

    def timed(self, name: str, priority: int, case: Case, providers: Sequence[Provider]) -> Unit:
        """Errors, memory and times of one case of logits."""

        def run(seconds: float, least: int) -> Spent:
            self.into.work_on(self.logits)
            rows = self.logits.rows
            before = len(rows)
            run_case(case, providers, self._settings(seconds, least), rows, self.progress)
            self._read_clock()
            return _spent(rows[before:])

        there, machine = _available(providers, self.device), self.machine
        return Unit(name, "logits", priority, machine.fixed(case, there), run, machine.round(case, there))

    def checked(self, name: str, priority: int, case: Case, providers: Sequence[Provider]) -> Unit:
        """Errors of one case of logits alone."""

        def run(seconds: float, least: int) -> Spent:
            self.into.work_on(self.logits)
            run_case(case, providers, self._settings(0.0, 0, repeats=0), self.logits.rows, self.progress)
            return Spent()

        return Unit(name, "logits", priority, self.machine.fixed(case, _available(providers, self.device)), run)

    def linear(self, priority: int, head: HeadShape, tokens: int, shares: Sequence[float]) -> Unit:
        """Errors, memory and times of one head, at shares of inactive rows."""
        case = LinearCase.of_tokens(head, tokens, "bf16", "mhpo_ahpo", 0.0, None)
        shares = sorted({case.at(share).inactive_share for share in shares})
        providers = self.choice.who.linear

        def run(seconds: float, least: int) -> Spent:
            part = self._part(case, shares)
            self.into.work_on(part)
            rows = part.rows
            run_linear(case, shares, providers, self._settings(seconds, least), rows, self.progress)
            self._read_clock()
            return _spent(rows)

        there, machine = _available(providers, self.device), self.machine
        fixed, once = (of(case, there, shares) for of in (machine.linear_fixed, machine.linear_round))
        return Unit(f"linear path of {head.name}, {tokens} tokens", "linear", priority, fixed, run, once)

    def memory(self, priority: int) -> Iterator[Unit]:
        """Peak memory against the number of tokens, of logits and of a head."""
        choice, device, machine = self.choice, self.device, self.machine
        sizes = [size for size in MEMORY_TOKENS[device.type] if size < 2 * choice.tokens] or [choice.tokens]
        if choice.shapes and choice.who.logits:
            shape = choice.shapes[0]
            case = self._case(shape, max(sizes))
            providers = self._quick_to_start(choice.who.able(case), MEMORY)
            there = _available(providers, device)
            fixed = machine.start + machine.draw * max(sizes) * shape.vocabulary / 1e9
            fixed += sum(3 * machine.round(self._case(shape, size), there) for size in sizes)

            def measure(seconds: float, least: int) -> Spent:
                self.into.work_on(self.logits)
                logits_memory(case, sizes, providers, device, self.seed, self.logits.memory, self.progress, 1.0)
                return Spent()

            yield Unit(f"{MEMORY}, logits of {shape.name}", "memory", priority, fixed, measure)
        if choice.heads and choice.who.linear:
            head, heads = choice.heads[0], self._quick_to_start(choice.who.linear, MEMORY)
            one = LinearCase.of_tokens(head, max(sizes), "bf16", "mhpo_ahpo", 0.0, None)
            ready = _available(heads, device)
            fixed = machine.start + machine.draw * head.entries / 1e9 / 4
            for size in sizes:  # the fixed budget of chunks is measured in float32, at each size once more
                work = LinearCase.of_tokens(head, size, "bf16", "mhpo_ahpo", 0.0, None)
                fixed += 2 * machine.linear_round(work, ready, [0.0]) + machine.draw * size * head.vocabulary / 1e9

            def measure_head(seconds: float, least: int) -> Spent:
                part = next((part for part in self.into.linear if _is_of(part, head)), None) or self._part(one, [0.0])
                self.into.work_on(part)
                settings = self._settings(0.0, 0, repeats=0)
                on_gpu = device.type == "cuda"
                measure_memory(part, one, sizes, heads, settings, self.progress, 1.0, quick=not on_gpu)
                return Spent()

            yield Unit(f"{MEMORY}, linear path of {head.name}", "memory", priority, fixed, measure_head)

    def tests(self, priority: int) -> Unit:
        """The equivalence suite, or why there is none."""
        seconds = min(TESTS_SHARE * self.budget, TESTS_MOST)

        def run(_: float, least: int) -> Spent:
            where = "natively" if self.device.type == "cuda" else "in Triton's interpreter"
            self.progress.stage(f"equivalence tests, kernels {where}")
            self.into.work_on()
            self.into.tests = Tests()
            run_tests(seconds, self.device, into=self.into.tests)
            self.progress.advance(1.0)
            return Spent()

        needed = max(seconds, 2 * self.machine.tests) if test_files() else 0.0
        return Unit("equivalence tests", "", priority, needed, run)

    def kernels(self, priority: int, targets: Sequence[str]) -> Unit:
        """The kernels' machine code for GPUs that need not be there."""

        def run(_: float, least: int) -> Spent:
            self.into.work_on()
            title = f"compiling kernels for {', '.join(targets)}"
            self.progress.stage(title)
            told = 0.0

            def tell(done: int, total: int) -> None:
                nonlocal told
                self.progress.advance(done / total - told)
                self.progress.stage(title)
                told = done / total

            try:
                self._add_kernels(run_report(targets, progress=tell), targets)
            except ReportFailed as error:
                self.into.dropped.append(f"{KERNELS}: {str(error).splitlines()[0]}")
            return Spent()

        seconds = self.machine.process + self.machine.kernels * len(plan(targets))
        return Unit(f"{KERNELS} for {', '.join(targets)}", "kernels", priority, seconds, run)

    def _add_kernels(self, report: Report, targets: Sequence[str]) -> None:
        whole = self.compiled
        whole.records += report.records
        whole.failures += report.failures
        whole.unavailable |= report.unavailable
        whole.tools |= report.tools
        self.targets += targets
        self.into.kernels = document(whole, self.targets, gpus=list(GPUS.values())).as_dict()

    def units(self) -> list[Unit]:
        """In the order in which they run.

        First one of each kind, from which the others' costs are learnt; then what takes as long as it takes; then
        what is repeated, the quickest rounds last, so that the end is met.
        """
        choice, who = self.choice, self.choice.who
        first: list[Unit] = []
        fixed: list[Unit] = []
        repeated: list[Unit] = []
        if who.logits:
            for index, shape in enumerate(choice.shapes):
                case = self._case(shape)
                unit = self.timed(f"logits of {shape.name}", min(index, 1), case, who.able(case))
                (repeated if index else first).append(unit)
        if who.linear:
            for index, head in enumerate(choice.heads):
                unit = self.linear(2 if index else 0, head, choice.head_tokens, [0.0, INACTIVE])
                (repeated if index else first).append(unit)
        if choice.tests:
            fixed.append(self.tests(1))
        fixed += self.memory(3)
        if choice.kernels:
            fixed += [self.kernels(3, LIMITED), self.kernels(5, [name for name in TARGETS if name not in LIMITED])]
        if who.logits and choice.shapes:
            repeated += self._variants(choice.shapes[0], fixed)
        head = HEADS[LIMIT_HEAD]
        if choice.stated and who.linear:
            repeated.append(self.linear(5, head, LIMIT_HEAD_TOKENS, [0.0, INACTIVE]))
        self.into.dropped += [
            f"{name}: left out of {', '.join(places)}, where compiling takes most of the time"
            for name, places in self.without.items()
        ]
        return first + fixed + sorted(repeated, key=lambda unit: -unit.round)

    def _variants(self, shape: Shape, fixed: list[Unit]) -> Iterator[Unit]:
        """One shape in other ways: what has no rounds goes to ``fixed``."""
        case, who = self._case(shape), self.choice.who
        few = self._case(shape, min(self.choice.tokens, CPU_HEAD_TOKENS), dtype="fp32")
        some = self._quick_to_start(who.able(few), f"accuracy in fp32, {shape.name}")
        fixed.append(self.checked(f"accuracy in fp32, {shape.name}", 3, few, some))
        ways: tuple[dict[str, Any], ...] = (
            {"inactive": INACTIVE}, {"mode": "forward"}, {"op": "logprobs"},
            # What old and reference policies are asked for, and all that some have.
            {"op": "logprobs", "mode": "forward"},
        )  # fmt: skip
        for changes in ways:
            other = replace(case, **changes)
            name = labels([case, other])[other]
            some = self._quick_to_start(who.able(other), f"logits of {name}")
            yield self.timed(f"logits of {name}", 4, other, some)


def _is_of(part: LinearResult, head: HeadShape) -> bool:
    return bool(part.rows) and part.rows[0].case.shape == head
