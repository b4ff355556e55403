"""One case from its inputs to its rows: draw, check every provider, take its memory, time all in rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cases import Case, Inputs, draw
from .check import Oracle, fingerprint
from .measure import CpuUse, Failure, Task, available_bytes, clock_for, is_out_of_memory, peak_extra_bytes, rounds
from .providers import Output, Provider, Unavailable
from .results import COPY, COPY_NEW, Row, summarise

GIB = 1 << 30


class Progress(Protocol):
    """What the work tells while it goes on."""

    def stage(self, text: str, *, timing: bool = False) -> None:
        """What is being done now. While ``timing``, nothing may be drawn but in this call."""

    def advance(self, cases: float) -> None:
        """Another such part of a case is done."""


@dataclass(frozen=True)
class Settings:
    """How to measure. ``repeats`` rounds at most; none starts after ``budget`` seconds, but three are done."""

    device: torch.device
    repeats: int
    budget: float
    seed: int = 0


class Step(NamedTuple):
    """What one forward and backward pass gave."""

    output: Output
    gradient: Tensor


class _Produce(torch.autograd.Function):
    """Logits as an LM head's output: not a leaf, in a storage that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, storage: Tensor) -> Tensor:
        return storage.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


_produce: Callable[[Tensor, Tensor], Tensor] = _Produce.apply


class Bench:
    """A provider on a case's inputs: runs it, and restores the logits where it overwrites them.

    The gradient is taken by ``autograd.grad``: ``backward()`` on a leaf may copy it once more into ``.grad``, which
    does not happen in training, where logits are an intermediate result.
    """

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.provider, self.inputs = provider, inputs
        self.storage = torch.empty_like(inputs.logits).detach() if provider.inplace else None
        self.anchor = torch.empty(0, device=inputs.logits.device, requires_grad=True)
        loss_scale = inputs.case.upstream
        self.upstream = None if loss_scale == 1 else torch.tensor(loss_scale, device=inputs.logits.device)

    def before(self) -> None:
        """Restore what the last run overwrote."""
        if self.storage is not None:
            self.storage.copy_(self.inputs.logits.detach())

    def step(self) -> Step:
        """Forward and backward, once."""
        logits = self.inputs.logits
        if self.storage is not None:
            logits = _produce(self.anchor, self.storage)
        output = self.provider.forward(self.inputs, logits)
        (gradient,) = torch.autograd.grad(output.loss, logits, self.upstream)
        return Step(output, gradient)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _does_not_fit(needed: float, device: torch.device) -> str:
    """A reason not to try on the CPU, or "". A GPU refuses by itself; Linux kills the process instead."""
    available = available_bytes() if device.type == "cpu" else None
    if available is None or needed < 0.9 * available:
        return ""
    return f"needs about {needed / GIB:.1f} GiB of main memory, {available / GIB:.1f} GiB are free"


def _record_failure(row: Row, error: Exception) -> None:
    message = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, Unavailable):
        row.status, row.note = "skipped", message
    elif is_out_of_memory(error):
        row.status, row.note = "out_of_memory", message
    else:
        row.status, row.note = "failed", f"{type(error).__name__}: {message}"


def _first_call(bench: Bench, oracle: Oracle, row: Row, device: torch.device) -> None:
    """Compile, hold the result against the oracle, take the memory of a second call and compare its result."""
    inputs, provider = bench.inputs, bench.provider
    row.note = _does_not_fit(provider.memory_factor * inputs.logits.numel() * 4, device)
    if row.note:
        row.status = "out_of_memory"
        return
    provider.prepare(inputs.case, device)
    bench.before()
    start = time.perf_counter()
    step = bench.step()
    _synchronize(device)
    row.first_call_s = time.perf_counter() - start
    row.errors = oracle.judge(inputs, step.output, step.gradient, ours=provider.ours)
    if row.errors.complaint:
        row.status, row.note = "wrong", row.errors.complaint
        return
    row.gradient_bytes = step.gradient.numel() * step.gradient.element_size()
    first = [fingerprint(value) for value in (step.output.loss.reshape(1), step.gradient)]
    del step
    bench.before()
    kept: list[Step] = []
    row.peak_extra_bytes = peak_extra_bytes(lambda: kept.append(bench.step()), device)
    step = kept.pop()
    again = (fingerprint(value) for value in (step.output.loss.reshape(1), step.gradient))
    row.repeats = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _time(
    rows: dict[str, Row], tasks: dict[str, Task], settings: Settings, progress: Progress, label: str, share: float
) -> None:
    """Interleaved rounds into the rows' samples; ``share`` of a case is what they are worth on the progress bar."""
    clock = clock_for(settings.device)
    progress.stage(f"{label}: warming up", timing=True)
    warm_up = 3 if settings.device.type == "cuda" else 1
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample is nobody's time
    try:
        for outcome in rounds(tasks, clock, warm_up, 0.0, warm_up):
            if isinstance(outcome, Failure):
                _record_failure(rows[outcome.name], outcome.error)
        alive = {name: task for name, task in tasks.items() if rows[name].status == "ok"}
        done, use = 0, CpuUse()
        for outcome in rounds(alive, clock, settings.repeats, settings.budget):
            if isinstance(outcome, Failure):
                _record_failure(rows[outcome.name], outcome.error)
                continue
            for name, seconds in outcome.items():
                rows[name].samples_s.append(seconds)
            done += 1
            progress.advance(share / settings.repeats)
            progress.stage(f"{label}: timing, round {done} of at most {settings.repeats}", timing=True)
            if settings.device.type == "cpu":
                others = use.others()
                for row in rows.values():
                    row.others_cpu = others
        progress.advance(share * (1 - done / settings.repeats))
    finally:
        if collecting:
            gc.enable()


def run_case(
    case: Case, providers: Sequence[Provider], settings: Settings, rows: list[Row], progress: Progress
) -> None:
    """Measure ``case`` and append its rows, one for each provider and one for each copy, to ``rows``.

    Rows are complete and summarised however this ends: on Ctrl-C they hold the rounds that were finished.
    """
    device = settings.device
    copies = [COPY, COPY_NEW] if device.type == "cpu" else [COPY]
    mine = {name: Row(case, name) for name in [provider.name for provider in providers] + copies}
    rows.extend(mine.values())
    share = 1 / (len(providers) + 2)  # of the progress bar: drawing, each first call, timing
    label = case.shape.name
    try:
        progress.stage(f"{label}: drawing inputs")
        copied = len(copies) + sum(provider.inplace for provider in providers)
        note = _does_not_fit((1 + copied) * case.logits_bytes, device)
        if note:
            raise MemoryError(note)
        inputs = draw(case, device, settings.seed)
        oracle = Oracle.of(inputs)
        progress.advance(share)

        tasks: dict[str, Task] = {}
        for provider in providers:
            compiling = f" ({provider.slow_start})" if provider.slow_start else ""
            progress.stage(f"{label}: {provider.name}, first call and check{compiling}")
            row = mine[provider.name]
            try:
                bench = Bench(provider, inputs)
                _first_call(bench, oracle, row, device)
            except Exception as error:  # a provider's code: anything can come
                _record_failure(row, error)
            if row.status == "ok":
                tasks[provider.name] = Task(bench.step, bench.before)
            progress.advance(share)
        logits = inputs.logits.detach()
        destination = torch.empty_like(logits)
        tasks[COPY] = Task(lambda: destination.copy_(logits))
        if COPY_NEW in copies:
            tasks[COPY_NEW] = Task(logits.clone)
        _time(mine, tasks, settings, progress, label, share)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        for row in mine.values():
            if row.status == "ok" and not row.samples_s:
                _record_failure(row, error)
    finally:
        for row in mine.values():
            if row.status == "ok" and not row.samples_s:
                row.status, row.note = "skipped", "interrupted before it was timed"
        ours = next((provider.name for provider in providers if provider.ours), None)
        summarise(list(mine.values()), ours)
