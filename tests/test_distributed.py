"""What is divided over processes gives one process's result: each part of the modules ``distributed_<topic>.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from torch import distributed

from .ranks import Ranks, parts

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not hasattr(os, "fork") or not distributed.is_gloo_available(), reason="needs fork and gloo"),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A process that forks the ranks of every test here once."""
    process = Ranks()
    yield process
    process.close()


@pytest.mark.parametrize("part", list(parts()))
def test_part(ranks: Ranks, part: str) -> None:
    ranks.run(part)
