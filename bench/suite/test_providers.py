"""Every provider on every case: held against float64, then timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hpo_fused.bench.measure import is_out_of_memory
from hpo_fused.bench.providers import Unavailable
from hpo_fused.bench.suite.problems import Latest, Problem
from hpo_fused.bench.trial import Step, synchronize


@pytest.mark.benchmark(disable_gc=True)
def test_provider(
    benchmark: Any, problem: Problem, provider: str, latest: Latest, rounds: int, machine: dict[str, Any]
) -> None:
    try:
        drawn = latest.of(problem)
        trial, row = drawn.checked(provider)
    except Unavailable as reason:
        pytest.skip(str(reason))
    except Exception as error:
        if is_out_of_memory(error):
            pytest.skip(f"out of memory: {error}")
        raise
    if row.status != "ok":
        pytest.fail(f"{row.status}: {row.note}", pytrace=False)
    if row.is_ours and row.repeats is False:
        pytest.fail("a second call gave another result", pytrace=False)

    # pytest-benchmark holds on to what the last round returned while the next one runs: it would never find the
    # memory that the last one used, as every step of a training does. Here it is freed before, and not timed.
    kept: list[Step] = []

    def setup() -> None:
        kept.clear()
        trial.before()
        synchronize(drawn.device)

    def run() -> None:
        kept.append(trial.step())
        synchronize(drawn.device)

    benchmark.group = problem.name
    case = dataclasses.asdict(problem.case)
    benchmark.extra_info.update(op=problem.op, case=case, provider=provider, environment=machine)
    benchmark.extra_info.update(peak_extra_bytes=row.peak_extra_bytes, gradient_bytes=row.gradient_bytes)
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=3 if drawn.device.type == "cuda" else 1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        unit, rate = drawn.rate(row, benchmark.stats.stats.median)
        benchmark.extra_info[unit] = rate
