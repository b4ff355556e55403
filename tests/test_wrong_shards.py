"""Wrong vocabularies in shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused.vocab_parallel import Shards

from .mutants import Mutants, of_backends

MUTANTS = Mutants()
wrong, mutant = MUTANTS.wrong, MUTANTS.mutant
SUITES = ("shards_in_torch", "shards")

wrong("column_left_as_swept", SUITES, of_backends("column_gradient"), lambda *_: None)
wrong(
    "column_without_the_entropy", SUITES, of_backends("column_gradient"),
    lambda f, first, targets, start, statistics, c, h, *rest: f(first, targets, start, statistics, c, None, *rest),
)  # fmt: skip
wrong(
    "column_of_the_shard_before", SUITES, of_backends("column_gradient"),
    lambda f, first, targets, start, *rest: f(first, targets, start - 1, *rest),
)  # fmt: skip
wrong(
    "column_in_another_softmax", SUITES, of_backends("column_gradient"),
    lambda f, first, targets, start, statistics, *rest: f(
        first, targets, start, statistics._replace(logprobs=statistics.logprobs - 0.01), *rest
    ),
)  # fmt: skip


@mutant(SUITES, *of_backends("combine_statistics"))
def last_rank_forgotten(f: Any, gathered: Tensor, *rest: Any) -> Any:
    gathered = gathered.clone()
    gathered[-1, 1], gathered[-1, 2] = -1e30, 0.0
    return f(gathered, *rest)


@mutant(SUITES, *of_backends("combine_statistics"))
def others_of_the_rank_alone(f: Any, gathered: Tensor, targets: Tensor, ranges: Tensor, rank: int) -> Any:
    logprobs, statistics = f(gathered, targets, ranges, rank)
    return logprobs, statistics._replace(others=gathered[rank, 2])


@mutant(SUITES, *of_backends("combine_statistics"))
def maximum_of_the_rank_alone(f: Any, gathered: Tensor, targets: Tensor, ranges: Tensor, rank: int) -> Any:
    logprobs, statistics = f(gathered, targets, ranges, rank)
    return logprobs, statistics._replace(maximum=gathered[rank, 1])


@mutant(SUITES, *of_backends("combine_statistics"))
def shares_without_their_own_entropy(f: Any, gathered: Tensor, targets: Tensor, ranges: Tensor, rank: int) -> Any:
    within = gathered.clone()
    within[:, 3] = torch.where(within[:, 3].isnan(), torch.nan, 0.0)
    return f(within, targets, ranges, rank)


@mutant(SUITES, (Shards, "local"))
def token_behind_the_last_column(f: Any, shards: Shards, targets: Tensor) -> Tensor:
    start, stop = shards.own
    last = (targets == stop) & (stop > start)
    return torch.where(last, stop - start - 1, f(shards, targets))


@pytest.mark.parametrize(("suite", "name"), MUTANTS.parameters())
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    MUTANTS.reject(suite, name, monkeypatch, device)
