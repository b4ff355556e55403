"""Hidden states and head through every provider and share of inactive rows: draw, check, memory, rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpo_fused.bench.measure import Task
from hpo_fused.bench.providers import Output
from hpo_fused.bench.results import first_of_ours
from hpo_fused.bench.trial import (
    Progress,
    Settings,
    Step,
    does_not_fit,
    first_call,
    mark_untimed,
    record_failure,
    record_out_of_memory,
    release,
    time_in_rounds,
)

from .cases import LinearCase
from .check import LinearOracle
from .draw import LinearInputs, draw, draw_weight
from .exact import Exact
from .providers import LinearProvider
from .results import LinearRow, summarise


@dataclass
class LinearTrial:
    """A provider on a case's inputs, which nobody overwrites."""

    provider: LinearProvider
    inputs: LinearInputs
    begun: Output | None = None

    def before(self) -> None:
        """Go forward where the gradient alone is timed."""
        self.begun = self.provider.begin(self.inputs) if self.inputs.case.mode == "gradient" else None

    def step(self) -> Step:
        """Forward, backward or both, once."""
        begun, self.begun = self.begun, None
        return self.provider.step(self.inputs, begun)


def check_first(trial: LinearTrial, exact: Exact, row: LinearRow, device: torch.device) -> None:
    """The first call into ``row``: compiled, judged, its memory taken; raises what the provider raises."""
    provider, inputs = trial.provider, trial.inputs
    row.note = does_not_fit(provider.memory_bytes(inputs.case, device), device)
    if row.note:
        row.status = "out_of_memory"
        return
    row.version = provider.available(device)
    provider.prepare(inputs.case, device)
    oracle = LinearOracle(inputs, exact)

    def judge(step: Step) -> str:
        row.errors = provider.judge(oracle, step)
        return row.errors.complaint if row.errors is not None else ""

    first_call(trial, row, device, judge)
    if not provider.measures_memory:
        row.peak_extra_bytes, row.gradient_bytes, row.repeats = None, 0, None


def _pairs(
    case: LinearCase, providers: Sequence[LinearProvider], fractions: Sequence[float]
) -> dict[str, tuple[LinearProvider, LinearRow]]:
    """Who is measured on what: those whom inactive rows make no difference to only once."""
    found = {}
    for inactive in fractions:
        for provider in providers:
            if provider.skips_inactive or inactive == min(fractions):
                row = LinearRow(case.at(inactive), provider.name, ours=provider.ours, leaves_out=provider.leaves_out)
                found[f"{provider.name} at {inactive:g}"] = provider, row
    return found


def run_linear(
    case: LinearCase,
    fractions: Sequence[float],
    providers: Sequence[LinearProvider],
    settings: Settings,
    rows: list[LinearRow],
    progress: Progress,
    label: str = "",
) -> None:
    """Measure ``case`` with each share of inactive rows and append a row for each provider and share to ``rows``.

    Rows are complete and summarised however this ends: on Ctrl-C they hold the rounds that were finished.

    Args:
        label: what the progress is told of; the head's name by default.
    """
    device, label = settings.device, label or case.shape.name
    release(device)
    for provider in providers:
        provider.told_active = settings.cuda_graph
    pairs = _pairs(case, providers, fractions)
    mine = {name: row for name, (_, row) in pairs.items()}
    rows.extend(mine.values())
    share = 1 / (len(pairs) + 3)  # of the progress bar: drawing, the truth, each first call, timing
    try:
        progress.stage(f"{label}: drawing inputs")
        if note := does_not_fit(2 * case.input_bytes, device):
            raise MemoryError(note)
        weight = draw_weight(case.shape, case.torch_dtype, device, settings.seed)
        problem = draw(case, fractions, device, settings.seed, weight)
        progress.advance(share)
        progress.stage(f"{label}: float64 oracle")
        exact = Exact.of(problem, settings.seed)
        progress.advance(share)
        tasks: dict[str, Task] = {}
        for name, (provider, row) in pairs.items():
            compiling = f" ({provider.slow_start})" if provider.slow_start and row.case.inactive == fractions[0] else ""
            progress.stage(f"{label}: {name}, first call and check{compiling}")
            trial = LinearTrial(provider, problem.inputs(row.case.inactive, exact.logprobs))
            try:
                check_first(trial, exact, row, device)
            except Exception as error:  # a provider's code: anything can come
                record_failure(row, error)
            if row.status == "ok":
                tasks[name] = Task(trial.step, trial.before)
            progress.advance(share)
        time_in_rounds(mine, tasks, settings, progress, label, share)
    except Exception as error:
        record_out_of_memory(mine, error)
    finally:
        mark_untimed(mine, timed=settings.timed)
        for provider in providers:
            provider.release()
        skipping = {provider.name: provider.skips_inactive for provider in providers}
        summarise(list(mine.values()), first_of_ours(mine.values()), skipping)
