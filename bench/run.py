"""One case from its inputs to its rows: draw, check every provider, take its memory, time all in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import measure
from .cases import Case
from .check import Errors, fingerprint, judge
from .inputs import Inputs
from .measure import Task
from .providers import Output, Provider, Step, Unavailable, limits
from .results import Row, summarise
from .truth import Truth, draw

GIB = 1 << 30
DEVICE_ROUNDS = 20


@dataclass(frozen=True)
class Settings:
    """Ways of measuring.

    Args:
        device: of the inputs.
        repeats: rounds at most; 0: results are checked and their memory taken, nothing is timed.
        budget: seconds of timing for a case, after which no round starts once three are done.
        seed: of the random inputs.
        device_time: replays of a CUDA graph are timed as well.
    """

    device: torch.device
    repeats: int
    budget: float
    seed: int = 0
    device_time: bool = False


class _Produce(torch.autograd.Function):
    """Logits as an LM head's output: not a leaf, in a storage that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, storage: Tensor) -> Tensor:
        return storage.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


produce: Callable[[Tensor, Tensor], Tensor] = _Produce.apply


class Trial:
    """A provider on a case's inputs: runs the case's mode, and restores the logits where they were overwritten.

    The gradient is taken by ``autograd.grad``: ``backward()`` on a leaf may copy it once more into ``.grad``, which
    does not happen in training, where logits are an intermediate result.
    """

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.provider, self.inputs = provider, inputs
        self.storage = provider.room(inputs) if inputs.case.inplace and provider.can_inplace else None
        self.anchor = torch.empty(0, device=inputs.tokens.device, requires_grad=True)
        scale = inputs.case.gradient_factor / (inputs.case.loss_scale if provider.takes_loss_scale else 1.0)
        self.upstream: Tensor | None = None if scale == 1 else torch.tensor(scale, device=inputs.tokens.device)
        if not inputs.case.gives_loss:
            self.upstream = inputs.upstream * scale
        self.begun: tuple[Output, tuple[Tensor, ...]] | None = None

    def before(self) -> None:
        """Restore what the last run overwrote; where backward alone is timed, go forward."""
        self.begun = None
        if self.storage is not None:
            self.storage.copy_(self.inputs.leaves[0].detach())
        if self.inputs.case.mode == "backward" and not self.provider.limit:
            with self.provider.context():
                self.begun = self._forward()

    def step(self) -> Step:
        """Forward, backward or both, once."""
        with self.provider.context():
            if self.inputs.case.mode == "forward" or self.provider.limit:
                with torch.no_grad():
                    return Step(self._forward()[0], ())
            (output, leaves), self.begun = self.begun or self._forward(), None
            root = output.loss if self.inputs.case.gives_loss else output.logprobs
            if root is None:
                return Step(output, ())  # which the check complains about
            gradients = torch.autograd.grad(root, leaves, self.upstream)
        logprobs = None if output.logprobs is None else output.logprobs.detach()
        return Step(output._replace(logprobs=logprobs), gradients)

    def _forward(self) -> tuple[Output, tuple[Tensor, ...]]:
        inputs = self.inputs
        if self.storage is not None:
            inputs = replace(inputs, leaves=(produce(self.anchor, self.storage),))
        return self.provider.run(inputs), inputs.leaves


def fingerprints(step: Step) -> list[Tensor]:
    """Equal for steps whose loss, log-probabilities and gradients are equal bit by bit."""
    loss, logprobs, _ = step.output
    return [fingerprint(value) for value in (loss, logprobs, *step.gradients) if value is not None]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether these are fingerprints of equal steps."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def peak_of(trial: Trial, device: torch.device) -> tuple[int | None, Step]:
    """Peak memory beyond the inputs of one step, and the step.

    Memory of what comes before it counts: where backward alone is timed its forward may make the gradient already, and
    its results are held while the gradient is taken. (Of other modes nothing before a step takes memory.)
    """
    kept: list[Step] = []

    def run() -> None:
        trial.before()
        kept.append(trial.step())

    peak = measure.peak_extra_bytes(run, device)
    return peak, kept.pop()


def does_not_fit(needed: float, device: torch.device) -> str:
    """The reason why a CPU is not tried, or "". A GPU refuses by itself; Linux kills the process instead."""
    available = measure.available_bytes() if device.type == "cpu" else None
    if available is None or needed < 0.9 * available:
        return ""
    return f"needs about {needed / GIB:.1f} GiB of main memory, {available / GIB:.1f} GiB are free"


def record_failure(row: Row, error: Exception) -> None:
    """Set the row's status and note from what a provider raised."""
    message = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, Unavailable):
        row.status, row.note = "skipped", message
    elif measure.is_out_of_memory(error):
        row.status, row.note = "out_of_memory", message
    else:
        row.status, row.note = "failed", f"{type(error).__name__}: {message}"


def record_failures(rows: Mapping[str, Row], outcome: Mapping[str, float | Exception]) -> dict[str, float]:
    """Errors of a round into their rows; the seconds of the others."""
    for name, value in outcome.items():
        if isinstance(value, Exception):
            record_failure(rows[name], value)
    return {name: value for name, value in outcome.items() if not isinstance(value, Exception)}


def check_first(trial: Trial, judged: Callable[[Step], Errors] | None, row: Row, device: torch.device) -> None:
    """The first call into ``row``: compiled, judged, its memory taken by a second call whose result is compared.

    Raises whatever the provider raises. A limit's result is nothing to judge; ``judged`` may be None for another's.
    """
    provider, case = trial.provider, trial.inputs.case
    row.version = provider.available(device)
    provider.prepare(case, device)
    if note := does_not_fit(provider.peak_bytes(case, device), device):
        raise MemoryError(note)
    trial.before()
    start = time.perf_counter()
    step = trial.step()
    measure.synchronize(device)
    row.first_call_s = time.perf_counter() - start
    if provider.limit:
        return
    row.errors = judged and judged(step)
    if row.errors and row.errors.complaint:
        row.status, row.note = "wrong", row.errors.complaint
        return
    row.gradient_bytes = sum(gradient.nbytes for gradient in step.gradients)
    first = fingerprints(step)
    del step
    row.peak_bytes, second = peak_of(trial, device)
    row.repeats = equal(first, fingerprints(second))


def draw_case(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Truth]:
    """The case's inputs and truth; raises MemoryError with the reason where they would not fit."""
    if device.type == "cuda":
        # The next case is to have the whole memory: PyTorch keeps freed pieces in the sizes that were asked for.
        # Collected first, since tracebacks and compiled functions hold tensors in cycles.
        gc.collect()
        torch.cuda.empty_cache()
    if note := does_not_fit(2 * case.input_bytes, device):
        raise MemoryError(note)
    return draw(case, device, seed)


def new_row(case: Case, provider: Provider) -> Row:
    """An empty row of the provider."""
    return Row(case, provider.name, provider.ours, provider.limit, leaves_out=provider.leaves_out)


def run_case(
    case: Case, providers: Sequence[Provider], settings: Settings, rows: list[Row], tell: Callable[[str], object]
) -> None:
    """Measure ``case`` and append its rows to ``rows``: one for each provider and, where something is timed, limit.

    Rows are complete however this ends: on Ctrl-C they hold the finished rounds. ``tell`` gets a line for each step.
    """
    bounds = limits(case.operation) if settings.repeats else []
    everybody = {provider.name: provider for provider in (*providers, *bounds)}
    mine = {name: new_row(case, provider) for name, provider in everybody.items()}
    rows.extend(mine.values())
    samples: dict[str, list[float]] = {name: [] for name in mine}
    try:
        tell("drawing inputs and their float64 values")
        inputs, truth = draw_case(case, settings.device, settings.seed)
        tasks: dict[str, Task] = {}
        for provider in everybody.values():
            tell(f"{provider.name}, first call and check{provider.slow_start and f' ({provider.slow_start})'}")
            row = mine[provider.name]
            try:
                trial = Trial(provider, inputs)
                check_first(trial, partial(judge, inputs, truth, provider=provider), row, settings.device)
            except Exception as error:  # a provider's code: anything can come
                record_failure(row, error)
            if row.status == "ok":
                tasks[provider.name] = Task(trial.step, trial.before)
        if settings.repeats:
            tell(f"timing at most {settings.repeats} rounds")
            _time(mine, tasks, samples, settings, case.cuda_graph)
            if settings.device_time:
                tell("timing replays of CUDA graphs")
                graphed = replace(inputs, case=replace(case, cuda_graph=True))
                alive = [name for name in tasks if mine[name].status == "ok"]
                _time_device(mine, {name: Trial(everybody[name], graphed) for name in alive}, settings.device)
    except Exception as error:
        if not measure.is_out_of_memory(error):
            raise
        for row in mine.values():
            if row.status == "ok" and not samples[row.provider]:
                record_failure(row, error)
    finally:
        for row in mine.values():
            if row.status == "ok" and not (samples[row.provider] if settings.repeats else row.first_call_s):
                row.status, row.note = "skipped", "interrupted before it was measured"
        named = {provider.name for provider in providers}
        rows[:] = [row for row in rows if row.status != "skipped" or not row.limit or row.provider in named]
        summarise(list(mine.values()), samples)


def _time(
    rows: Mapping[str, Row], tasks: Mapping[str, Task], samples: Mapping[str, list[float]], settings: Settings,
    cuda_graph: bool,
) -> None:  # fmt: skip
    """Interleaved rounds into the samples."""
    clock = measure.clock_for(settings.device)
    warm_up = 3 if settings.device.type == "cuda" else 1
    with _uncollected():
        for outcome in measure.rounds(tasks, clock, warm_up, 0.0, warm_up):
            record_failures(rows, outcome)
        alive = {name: task for name, task in tasks.items() if rows[name].status == "ok"}
        if cuda_graph:
            alive = dict(_captured(rows, alive))
        for outcome in measure.rounds(alive, clock, settings.repeats, settings.budget):
            for name, seconds in record_failures(rows, outcome).items():
                samples[name].append(seconds)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: one in the middle of a sample is nobody's time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _time_device(rows: Mapping[str, Row], trials: Mapping[str, Trial], device: torch.device) -> None:
    """Each one's ``device_s``, one after the other, since a graph keeps the memory of its step.

    None stays where a step cannot be captured; one whose replay gives other bits is wrong.
    """
    clock = measure.clock_for(device)

    def median_replay(row: Row, task: Task) -> float | None:
        graphs = dict(_captured({row.provider: row}, {row.provider: task}))
        with _uncollected():
            outcomes = list(measure.rounds(graphs, clock, DEVICE_ROUNDS, 1.0)) if graphs else []
        seconds = [value for outcome in outcomes for value in outcome.values() if not isinstance(value, Exception)]
        return statistics.median(seconds) if seconds else None

    for name, trial in trials.items():
        tried = replace(rows[name])
        rows[name].device_s = median_replay(tried, Task(trial.step, trial.before))
        if tried.status == "wrong":
            rows[name].status, rows[name].note = "wrong", tried.note


def _captured(rows: Mapping[str, Row], tasks: Mapping[str, Task]) -> Iterator[tuple[str, Task]]:
    """Tasks whose run replays a CUDA graph of itself and gives the same; the rows of the others say why not."""

    def results_of(task: Task) -> list[Tensor]:
        task.before()
        step = task.run()
        assert isinstance(step, Step)
        return fingerprints(step)

    for name, task in tasks.items():
        row = rows[name]
        if row.repeats is False:
            row.status, row.note = "skipped", "does not repeat itself bit for bit, so a replay cannot be checked"
            continue
        try:
            expected, graph = results_of(task), measure.captured(task)
            if equal(expected, results_of(graph)):
                yield name, graph
            else:
                row.status, row.note = "wrong", "the replay of its CUDA graph gives other bits than the step itself"
        except Exception as error:  # a provider's code: anything can come
            record_failure(row, error)
            if row.status == "failed":  # nobody promised that it can be captured
                row.status, row.note = "skipped", f"cannot be captured in a CUDA graph: {row.note}"
