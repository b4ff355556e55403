"""A pytest plugin that ends in time: tests in an order that is mixed and always the same, and none after a deadline.

Loaded by ``-p hpo_fused.bench.pytest_deadline``; the deadline is ``equivalence.DEADLINE`` in the environment.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from hpo_fused.bench.equivalence import DEADLINE, NO_TIME


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mixed, so that those which there is time for are a sample of all."""
    random.Random(0).shuffle(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Too late for this one."""
    if time.time() > float(os.environ.get(DEADLINE, "inf")):
        pytest.skip(NO_TIME)
