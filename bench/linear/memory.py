"""Peak memory: against the number of tokens, with a fixed chunk budget, and at the size of a 7B model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hpo_fused.bench.results import MemoryRow, Prediction
from hpo_fused.bench.trial import Progress, Settings, does_not_fit, peak_of, record_failure, release

from .cases import HEADS, HeadShape, LinearCase
from .check import LinearOracle
from .draw import Problem, draw, draw_weight
from .exact import Exact
from .providers import LinearProvider
from .results import LinearResult
from .run import LinearTrial

TOKENS, BUDGET, SEVEN_B = "tokens", "budget", "7b"
BUDGET_TOKENS = (512, 1024, 2048)
BUDGET_ROWS = 256  # logits that the fixed chunk budget holds: less than any of the above

SEVEN_B_HEAD = HEADS["qwen2.5-7b"]
SEVEN_B_TOKENS = 16384
# What two CPU cores can do of it: the full head with few active rows in chunks so small that there are several, and
# all tokens, active, with a head of an eighth in each direction. (A GPU does all of it.)
FEW_INACTIVE, FEW_ROWS = 0.98, 64
EIGHTH = 8


def default_tokens(device_type: str, quick: bool) -> tuple[int, ...]:
    """Numbers of tokens that the memory is measured at."""
    if device_type == "cuda":
        return (1024, 2048, 4096) if quick else (1024, 2048, 4096, 8192, 16384, 32768)
    return (128, 256, 512) if quick else (256, 512, 1024, 2048, 4096)


def _predicted(case: LinearCase, device_type: str) -> Prediction:
    return Prediction(**case.memory(device_type)._asdict())


def _row(series: str, case: LinearCase, provider: LinearProvider, device_type: str) -> MemoryRow:
    row = MemoryRow(series, case, provider.name, device_type)
    if provider.ours:
        row.prediction = _predicted(case, device_type)
    return row


class MemoryBench:
    """Measures cases of one head after the other; all cases of a head share its weight.

    A provider's result is held against float64 in the first case that it is measured on; if it is wrong there, none is
    measured of it.
    """

    def __init__(
        self, device: torch.device, seed: int, rows: list[MemoryRow], progress: Progress,
        labelled: HeadShape | None = None, label: str = "",
    ) -> None:  # fmt: skip
        """``label``: what the progress is told of the head ``labelled``, where its name says too little."""
        self.device, self.seed, self.rows, self.progress = device, seed, rows, progress
        self._labels = {labelled: label} if labelled and label else {}
        self._of: tuple[HeadShape, torch.dtype] | None = None
        self._weight: Tensor | None = None
        self._called: set[tuple[str, HeadShape]] = set()
        self._verdicts: dict[str, str] = {}  # complaints about those that were checked
        self._exact: tuple[LinearCase, Exact] | None = None

    def _head(self, case: LinearCase) -> Tensor:
        of = case.shape, case.torch_dtype
        if self._weight is None or self._of != of:
            self._weight = None  # released before the next is made
            self._of, self._weight = of, draw_weight(*of, self.device, self.seed)
        return self._weight

    def _judge(self, trial: LinearTrial, problem: Problem) -> str:
        """A complaint about the result, or ""."""
        case = trial.inputs.case
        if self._exact is None or self._exact[0] != case:
            self._exact = None  # released before the next is made
            self._exact = case, Exact.of(problem, self.seed)
        exact = self._exact[1]
        # Old log-probabilities are those of the exact ones, as where times are taken.
        checked = LinearTrial(trial.provider, problem.inputs(case.inactive, exact.logprobs))
        checked.before()
        errors = trial.provider.judge(LinearOracle(checked.inputs, exact), checked.step())
        return "" if errors is None else errors.complaint

    def measure(self, series: str, case: LinearCase, providers: Iterable[LinearProvider], share: float) -> None:
        """A row for each provider; ``share`` is what each is worth on the progress bar."""
        for provider in providers:
            row = _row(series, case, provider, self.device.type)
            self.rows.append(row)
            head = self._labels.get(case.shape, case.shape.name)
            self.progress.stage(f"{head}: memory, {provider.name} at {case.tokens} tokens")
            try:
                self._measure(row, provider)
            except Exception as error:  # a provider's code: anything can come
                record_failure(row, error)
            except BaseException:
                row.status, row.note = "skipped", "interrupted before it was measured"
                raise
            self.progress.advance(share)

    def _measure(self, row: MemoryRow, provider: LinearProvider) -> None:
        case, device, name = row.case, self.device, provider.name
        if self._verdicts.get(name):
            row.status, row.note = "wrong", self._verdicts[name]
            return
        if provider.largest is not None and case.logits_bytes > provider.largest:
            size = provider.largest >> 20
            row.status, row.note = "skipped", f"{provider.slow_start}: measured up to {size} MiB of logits"
            return
        held = 2 * case.input_bytes  # drawing takes copies
        if note := does_not_fit(held + provider.memory_bytes(case, device), device):
            row.status, row.note = "out_of_memory", note
            return
        weight = self._head(case)
        problem = draw(case, [case.inactive], device, self.seed, weight)
        trial = LinearTrial(provider, problem.inputs(case.inactive))
        provider.prepare(case, device)
        called = (name, case.shape)
        if name not in self._verdicts:
            self._verdicts[name] = self._judge(trial, problem)
            self._called.add(called)
            if self._verdicts[name]:
                row.status, row.note = "wrong", self._verdicts[name]
                return
        elif provider.slow_start and (called not in self._called or provider.largest is not None):
            trial.before()
            trial.step()  # compiles, which takes memory of its own
            self._called.add(called)
        row.peak_extra_bytes, step = peak_of(trial, device)
        row.gradient_bytes = step.gradient_bytes()

    def predict(self, series: str, case: LinearCase, provider: LinearProvider, device_type: str) -> None:
        """A row that is not measured."""
        row = _row(series, case, provider, device_type)
        row.status = "predicted"
        self.rows.append(row)


def against_tokens(
    bench: MemoryBench, case: LinearCase, tokens: Sequence[int], providers: Sequence[LinearProvider], share: float
) -> None:
    """Every provider with its default settings, and ours with a fixed chunk budget."""
    providers = [provider for provider in providers if provider.measures_memory]
    sizes = [dataclasses.replace(_of_tokens(case, count, case.chunk_bytes), mode=case.mode) for count in tokens]
    counts = _budget_tokens(tokens)
    # In float32, where dweight is its own accumulator: in bfloat16 the peak comes when that is cast to the gradient,
    # the chunk already released, and would show nothing of it.
    single = dataclasses.replace(case, dtype="fp32")
    budget = min(BUDGET_ROWS, max(min(counts) // 2, 1)) * case.shape.vocabulary * single.torch_dtype.itemsize
    fixed = [_of_tokens(single, count, budget) for count in counts]
    ours = [provider for provider in providers if provider.ours][:1]
    part = share / max(len(sizes) * len(providers) + len(fixed) * len(ours), 1)
    for size in sizes:
        bench.measure(TOKENS, size, providers, part)
    for size in fixed:
        bench.measure(BUDGET, size, ours, part)


def _of_tokens(case: LinearCase, tokens: int, chunk_bytes: int | None) -> LinearCase:
    """A whole step, whatever the mode: that is what predictions and limits are about."""
    return LinearCase.of_tokens(case.shape, tokens, case.dtype, case.objective, case.inactive, chunk_bytes)


def _budget_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """512, 1024, 2048 tokens; the largest three that were asked for where that is less."""
    return BUDGET_TOKENS if max(tokens) >= max(BUDGET_TOKENS) else tuple(sorted(tokens)[-3:])


def measure_memory(
    result: LinearResult,
    case: LinearCase,
    tokens: Sequence[int],
    providers: Sequence[LinearProvider],
    settings: Settings,
    progress: Progress,
    share: float,
    *,
    quick: bool,
    label: str = "",
) -> None:
    """All of it, into ``result``; ``quick``: the 7B model's head is predicted only.

    ``label``: what the progress is told of the case; the head's name by default.
    """
    release(settings.device)
    bench = MemoryBench(settings.device, settings.seed, result.memory, progress, case.shape, label)
    ours = [provider for provider in providers if provider.ours]
    against_tokens(bench, case, tokens, providers, share * 0.7)
    if ours:
        seven_b(bench, case, ours[0], share * 0.3, measured=not quick)


def seven_b_cases(case: LinearCase, device: torch.device) -> Iterator[LinearCase]:
    """What is measured of the 7B model's head: all of it on a GPU, two cuts through it on a CPU."""
    full = _of_tokens(dataclasses.replace(case, shape=SEVEN_B_HEAD, inactive=0.0), SEVEN_B_TOKENS, None)
    if device.type == "cuda":
        yield full
        return
    head = SEVEN_B_HEAD
    few = dataclasses.replace(full, chunk_bytes=FEW_ROWS * head.vocabulary * full.torch_dtype.itemsize)
    yield few.at(FEW_INACTIVE)
    eighth = HeadShape(f"{head.name} ÷ {EIGHTH}", head.hidden // EIGHTH, head.vocabulary // EIGHTH)
    yield dataclasses.replace(full, shape=eighth)


def seven_b(bench: MemoryBench, case: LinearCase, ours: LinearProvider, share: float, *, measured: bool) -> None:
    """Predictions for the whole on a GPU and a CPU, and measurements beside theirs."""
    whole = _of_tokens(dataclasses.replace(case, shape=SEVEN_B_HEAD, inactive=0.0), SEVEN_B_TOKENS, None)
    for kind in ("cuda", "cpu"):
        if kind == "cpu" or kind != bench.device.type or not measured:
            bench.predict(SEVEN_B, whole, ours, kind)
    cases = list(seven_b_cases(case, bench.device)) if measured else []
    for one in cases:
        bench.measure(SEVEN_B, one, [ours], share / len(cases))
