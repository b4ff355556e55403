"""Every provider on every case: held against float64, then timed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from hpo_fused.bench.cases import Case
from hpo_fused.bench.check import judge
from hpo_fused.bench.environment import environment
from hpo_fused.bench.measure import synchronize
from hpo_fused.bench.providers import Step, create
from hpo_fused.bench.run import Trial, check_first, draw_case, new_row, record_failure

latest = functools.lru_cache(maxsize=1)(draw_case)  # tests of one case follow one another; two might not fit
described = functools.cache(environment)


@pytest.mark.benchmark(disable_gc=True)
def test_provider(benchmark: Any, case: Case, provider: str, device: torch.device, rounds: int) -> None:
    one = create(provider)
    row = new_row(case, one)
    try:
        inputs, truth = latest(case, device, 0)
        trial = Trial(one, inputs)
        check_first(trial, functools.partial(judge, inputs, truth, provider=one), row, device)
    except Exception as error:  # a provider's code: anything can come
        record_failure(row, error)
        if row.status == "failed":
            raise
    if row.complaint:
        pytest.fail(row.complaint, pytrace=False)
    if row.status != "ok":
        pytest.skip(row.note)

    # pytest-benchmark holds the last round's result while the next one runs: that would never find the memory of the
    # last one, as every step of a training does. Here it is freed before, and not timed.
    kept: list[Step] = []

    def setup() -> None:
        kept.clear()
        trial.before()
        synchronize(device)

    def run() -> None:
        kept.append(trial.step())
        synchronize(device)

    benchmark.group = " ".join(
        str(value) for value in (case.operation, case.shape.name, case.tokens, case.dtype, case.mode)
    )
    benchmark.extra_info.update(case=dataclasses.asdict(case), provider=provider, environment=described(device))
    benchmark.extra_info.update(peak_bytes=row.peak_bytes, gradient_bytes=row.gradient_bytes)
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=3 if device.type == "cuda" else 1)
