"""What is divided over processes gives one process's result: each part of the modules ``distributed_<topic>.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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


# Rows of the document's table, by the parts that ran.
measured: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize("part", list(parts()))
def test_part(ranks: Ranks, part: str) -> None:
    measured[part] = ranks.run(part)


def test_the_document_has_every_split() -> None:
    """Of the parts that ran here; the figures may be another machine's."""
    document = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    table = document.split("<!-- python tests/ranks.py --table -->\n")[1].split("\n<!-- end of table -->")[0]
    shown: dict[str, dict[str, float]] = {name: {} for name in parts()}
    for line in table.splitlines()[2:]:
        row, ranks, name, difference = line.strip("| ").split(" | ")
        assert int(ranks) == parts()[name.strip("`")][0]
        shown[name.strip("`")][row] = float(difference)
    for name, rows in measured.items():
        assert shown[name].keys() == rows.keys()
        for row, difference in rows.items():
            assert difference <= 2 * shown[name][row] + 5e-7, row
