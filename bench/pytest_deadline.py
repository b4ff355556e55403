"""A pytest plugin that ends in time and tells each outcome at once: tests in an order that is mixed and always the
same, none after a deadline, and a line of JSON for whatever happens to one, so that a process that has to be ended
leaves what it found.

Loaded by ``-p hpo_fused.bench.pytest_deadline``; ``equivalence.DEADLINE`` and ``equivalence.OUTCOMES`` in the
environment are the deadline and the file.
"""

from __future__ import annotations

import json
import os
import random
import time

import pytest

from hpo_fused.bench.equivalence import DEADLINE, OUTCOMES

_outcome = {"worst": "passed"}  # of the test that is running, over its phases


def _tell(**what: object) -> None:
    """Append a line; opened anew each time, so that it is in the file whatever becomes of this process."""
    if OUTCOMES in os.environ:
        with open(os.environ[OUTCOMES], "a", encoding="utf-8") as lines:
            lines.write(json.dumps(what) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mixed, so that those which there is time for are a sample of all."""
    random.Random(0).shuffle(items)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, or that skips itself, is an outcome too."""
    if not report.passed:
        _tell(test=report.nodeid, outcome=report.outcome)


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many there are."""
    _tell(collected=len(session.items))


def pytest_runtest_logstart(nodeid: str) -> None:
    """This one is at work."""
    _outcome["worst"] = "passed"
    _tell(test=nodeid, outcome="running")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Too late for this one."""
    if time.time() > float(os.environ.get(DEADLINE, "inf")):
        _outcome["worst"] = "late"
        pytest.skip("no time left")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Setup, call or teardown: one that failed makes it a failure, one that was skipped a skip."""
    if report.failed:
        _outcome["worst"] = "failed"
    elif report.skipped and _outcome["worst"] == "passed":
        _outcome["worst"] = "skipped"


def pytest_runtest_logfinish(nodeid: str) -> None:
    """This one has ended."""
    _tell(test=nodeid, outcome=_outcome["worst"])
