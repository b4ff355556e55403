"""Peak memory: against the number of tokens, with a fixed chunk budget, and at the size of a 7B model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hpo_fused.bench.measure import peak_extra_bytes
from hpo_fused.bench.results import MemoryRow, Prediction
from hpo_fused.bench.trial import Progress, Settings, Step, does_not_fit, record_failure, synchronize

from .cases import HEADS, HeadShape, LinearCase
from .draw import draw, draw_weight
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
    """Measures cases of one head after the other; all cases of a head share its weight."""

    def __init__(self, device: torch.device, seed: int, rows: list[MemoryRow], progress: Progress) -> None:
        self.device, self.seed, self.rows, self.progress = device, seed, rows, progress
        self._of: tuple[HeadShape, torch.dtype] | None = None
        self._weight: Tensor | None = None
        self._called: set[tuple[str, HeadShape]] = set()

    def _head(self, case: LinearCase) -> Tensor:
        of = case.shape, case.torch_dtype
        if self._weight is None or self._of != of:
            self._weight = None  # released before the next is made
            self._of, self._weight = of, draw_weight(*of, self.device, self.seed)
        return self._weight

    def measure(self, series: str, case: LinearCase, providers: Iterable[LinearProvider], share: float) -> None:
        """A row for each provider; ``share`` is what each is worth on the progress bar."""
        for provider in providers:
            row = _row(series, case, provider, self.device.type)
            self.rows.append(row)
            self.progress.stage(f"{case.shape.name}: memory, {provider.name} at {case.tokens} tokens")
            try:
                self._measure(row, provider)
            except Exception as error:  # a provider's code: anything can come
                record_failure(row, error)
            except BaseException:
                row.status, row.note = "skipped", "interrupted before it was measured"
                raise
            self.progress.advance(share)

    def _measure(self, row: MemoryRow, provider: LinearProvider) -> None:
        case, device = row.case, self.device
        if provider.largest is not None and case.logits_bytes > provider.largest:
            size = provider.largest >> 20
            row.status, row.note = "skipped", f"{provider.slow_start}: measured up to {size} MiB of logits"
            return
        held = 2 * case.input_bytes  # drawing takes copies
        if note := does_not_fit(held + provider.memory_bytes(case, device), device):
            row.status, row.note = "out_of_memory", note
            return
        weight = self._head(case)
        trial = LinearTrial(provider, draw(case, [case.inactive], device, self.seed, weight).inputs(case.inactive))
        provider.prepare(case, device)
        called = (provider.name, case.shape)
        if provider.slow_start and (called not in self._called or provider.largest is not None):
            trial.before()
            trial.step()  # compiles, which takes memory of its own
            synchronize(device)
            self._called.add(called)
        trial.before()
        kept: list[Step] = []
        row.peak_extra_bytes = peak_extra_bytes(lambda: kept.append(trial.step()), device)
        row.gradient_bytes = kept.pop().gradient_bytes()

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
    sizes = [_of_tokens(case, count, case.chunk_bytes) for count in tokens]
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
) -> None:
    """All of it, into ``result``; ``quick``: the 7B model's head is predicted only."""
    bench = MemoryBench(settings.device, settings.seed, result.memory, progress)
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
