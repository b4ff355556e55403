"""What a rank sends by the formulas, and how long it takes on given links: numbers by hand."""

from __future__ import annotations

import pytest

from hpo_fused.bench import wire
from hpo_fused.bench.cases import parse_shape

# Four ranks in a ring: each sends its part of 12 bytes on three times; all_reduce does so twice, with sums and without.
SENT = {"all_gather": (3, 9), "reduce_scatter": (12, 9), "all_reduce": (12, 18)}


@pytest.mark.parametrize("kind", SENT)
def test_rings(kind: str) -> None:
    message, sent = SENT[kind]
    one = wire.Collective(kind, message, 4, "")
    assert one.sent == sent
    assert one.seconds(wire.Link(10.0, 0.5)) == sent / 10 + 2 * 0.5
    assert wire.seconds([one, one, one._replace(ranks=1)], wire.Link(10.0, 0.5)) == 2 * (sent / 10 + 1)


def test_links() -> None:
    """A group that leaves a node shares the links of as many of its GPUs as it has there, at most NVLink's speed."""
    speeds = [wire.link(ranks, apart).speed for ranks, apart in ((8, 1), (2, 4), (2, 8), (64, 1), (16, 2), (8, 8))]
    assert speeds == [450e9, 450e9, 50e9, 400e9, 200e9, 50e9]


def test_tables_hold_for_a_head_of_one_s_own() -> None:
    """By hand: 3 GEMMs on one rank, 4 of an eighth on eight; the gather of a head over the GPUs of a node."""
    messages, times = wire.tables(parse_shape("custom:V=80000,H=1000"), 1000)
    assert ["a call", "", "all_reduce", "s n H", "2,000,000", "2000", "3500"] in messages.rows
    first, _, eighth, *_ = times.rows
    assert first[:6] == ["8 GPUs", "1·1·8", "0.095", "–", "–", "0.644"]
    assert eighth[:2] == ["8 GPUs", "8·1·1"]
    assert float(eighth[5]) == pytest.approx(4 / 3 / 8 * 0.644, rel=0.01)
    assert float(first[9]) == pytest.approx(2 * 160e6 * 7 / 8 / 450e9 * 1e3 + 2 * 0.012, abs=5e-4)
