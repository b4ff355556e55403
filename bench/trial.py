"""What every measurement does, whatever is measured: a first call with check and memory, then interleaved rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .check import fingerprint
from .measure import (
    CpuUse,
    Failure,
    Synchronises,
    Task,
    available_bytes,
    captured,
    clock_for,
    is_out_of_memory,
    peak_extra_bytes,
    rounds,
)
from .providers import Output, Unavailable
from .results import Measurement, Status

GIB = 1 << 30


class Progress(Protocol):
    """What the work tells while it goes on."""

    def stage(self, text: str, *, timing: bool = False) -> None:
        """What is being done now. While ``timing``, nothing may be drawn but in this call."""

    def advance(self, cases: float) -> None:
        """Another such part of a case is done."""


@dataclass(frozen=True)
class Settings:
    """How to measure. ``repeats`` rounds at most; none starts after ``budget`` seconds, but ``least`` are done.

    No repeats: results are checked and their memory taken, nothing is timed. ``cuda_graph``: what is timed is the
    replay of a CUDA graph, without the host's part of a step.
    """

    device: torch.device
    repeats: int
    budget: float
    seed: int = 0
    least: int = 3
    cuda_graph: bool = False

    @property
    def timed(self) -> bool:
        """Whether anything is."""
        return self.repeats > 0


class Step(NamedTuple):
    """What one forward and backward pass gave: its output, and the gradient of each input that has one."""

    output: Output
    gradients: tuple[Tensor, ...]

    def fingerprints(self) -> list[Tensor]:
        """Equal for steps that are equal bit by bit."""
        loss, logprobs, _ = self.output
        values = [*([] if loss is None else [loss.reshape(1)]), *([] if logprobs is None else [logprobs])]
        return [fingerprint(value) for value in (*values, *self.gradients)]

    def gradient_bytes(self) -> int:
        """Size of the gradients."""
        return sum(gradient.numel() * gradient.element_size() for gradient in self.gradients)


class Trial(Protocol):
    """A provider on a case's inputs."""

    def before(self) -> None:
        """Restore what the last run overwrote, and go forward where only the gradient is timed; not timed."""

    def step(self) -> Step:
        """What the case's mode asks for, once."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more, so that the next case has the whole of a GPU's memory.

    PyTorch keeps what it freed in pieces of the sizes that were asked for; a case of another shape would find little of
    it that fits. Collected first: tracebacks and compiled functions hold tensors in cycles.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def does_not_fit(needed: float, device: torch.device) -> str:
    """A reason not to try on the CPU, or "". A GPU refuses by itself; Linux kills the process instead."""
    available = available_bytes() if device.type == "cpu" else None
    if available is None or needed < 0.9 * available:
        return ""
    return f"needs about {needed / GIB:.1f} GiB of main memory, {available / GIB:.1f} GiB are free"


class Outcome(Protocol):
    """What became of a provider, and why."""

    status: Status
    note: str


def record_failure(row: Outcome, error: Exception) -> None:
    """What a provider raised, as a status and a note."""
    message = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, Unavailable):
        row.status, row.note = "skipped", message
    elif is_out_of_memory(error):
        row.status, row.note = "out_of_memory", message
    else:
        row.status, row.note = "failed", f"{type(error).__name__}: {message}"


def peak_of(trial: Trial, device: torch.device) -> tuple[int | None, Step]:
    """Peak memory beyond the inputs of one step, and the step.

    What comes before it counts: where the gradient alone is timed its forward, which may make the gradient already,
    and whose results are held while the gradient is taken. (Of other modes nothing before a step takes memory.)
    """
    kept: list[Step] = []

    def run() -> None:
        trial.before()
        kept.append(trial.step())

    peak = peak_extra_bytes(run, device)
    return peak, kept.pop()


def first_call(trial: Trial, row: Measurement, device: torch.device, judge: Callable[[Step], str]) -> None:
    """Compile, have the result judged, take the memory of a second call and compare its result.

    ``judge`` notes the errors where they belong and returns a complaint about a wrong result, or "".
    """
    trial.before()
    start = time.perf_counter()
    step = trial.step()
    synchronize(device)
    row.first_call_s = time.perf_counter() - start
    if complaint := judge(step):
        row.status, row.note = "wrong", complaint
        return
    row.gradient_bytes = step.gradient_bytes()
    first = step.fingerprints()
    del step
    row.peak_extra_bytes, second = peak_of(trial, device)
    again = second.fingerprints()
    row.repeats = _equal(first, again)


def time_in_rounds(
    rows: Mapping[str, Measurement],
    tasks: Mapping[str, Task],
    settings: Settings,
    progress: Progress,
    label: str,
    share: float,
) -> None:
    """Interleaved rounds into the rows' samples; ``share`` of a case is what they are worth on the progress bar."""
    if not settings.timed:
        return
    clock = clock_for(settings.device)
    progress.stage(f"{label}: warming up", timing=True)
    warm_up = 3 if settings.device.type == "cuda" else 1
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample is nobody's time
    try:
        for outcome in rounds(tasks, clock, warm_up, 0.0, warm_up):
            if isinstance(outcome, Failure):
                record_failure(rows[outcome.name], outcome.error)
        alive = {name: task for name, task in tasks.items() if rows[name].status == "ok"}
        if settings.cuda_graph:
            alive = dict(_captured(rows, alive))
        done, use = 0, CpuUse()
        for outcome in rounds(alive, clock, settings.repeats, settings.budget, settings.least):
            if isinstance(outcome, Failure):
                record_failure(rows[outcome.name], outcome.error)
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


def _captured(rows: Mapping[str, Measurement], tasks: Mapping[str, Task]) -> Iterator[tuple[str, Task]]:
    """Tasks whose run replays a CUDA graph of itself and gives the same; who has none says so in its row."""
    for name, task in tasks.items():
        row = rows[name]
        if row.repeats is False:
            row.status, row.note = "skipped", "does not repeat itself bit for bit, so a replay cannot be checked"
            continue
        try:
            expected = _fingerprints(task)
            graph = captured(task)
            replayed = _fingerprints(graph)
        except Exception as error:  # a provider's code: anything can come
            _record_uncaptured(row, error)
            continue
        if not _equal(expected, replayed):
            row.status, row.note = "wrong", "the replay of its CUDA graph gives other bits than the step itself"
            continue
        yield name, graph


def _record_uncaptured(row: Measurement, error: Exception) -> None:
    """No failure: nobody promised that it can be captured."""
    record_failure(row, error)
    if isinstance(error, Synchronises):
        row.status, row.note = "skipped", str(error)
    elif row.status == "failed":
        row.status, row.note = "skipped", f"cannot be captured in a CUDA graph: {row.note}"


def _fingerprints(task: Task) -> list[Tensor]:
    """Of what a run gives, a step or a copy, started from the inputs as they were."""
    task.before()
    result = task.run()
    if isinstance(result, Step):
        return result.fingerprints()
    assert isinstance(result, Tensor)
    return [fingerprint(result)]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def record_out_of_memory(rows: Mapping[str, Measurement], error: Exception) -> None:
    """What ended a case, in every row that has no sample; raises whatever is not a lack of memory."""
    if not is_out_of_memory(error):
        raise error
    for row in rows.values():
        if row.status == "ok" and not row.samples_s:
            record_failure(row, error)


def mark_untimed(rows: Mapping[str, Measurement], *, timed: bool = True) -> None:
    """Rows that an interruption left without a sample, or without a result where none is timed, say so."""
    for row in rows.values():
        if row.status == "ok" and not (row.samples_s if timed else row.first_call_s):
            row.status, row.note = "skipped", f"interrupted before it was {'timed' if timed else 'checked'}"
