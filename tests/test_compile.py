"""The kernels' machine code, read without a GPU: no spills, wide accesses, few special-function operations.

The compiler runs in a subprocess: interpreter and compiler cannot share a process, and the other tests may be using
the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpo_fused.bench.compile_report import SWEEPS, TARGETS, broken_limits, record_name

pytest.importorskip("triton")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]


def compile_report(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hpo_fused.bench.compile_report", "--json", *arguments]
    # Not from the checkout's root, which `-m` would put on sys.path.
    finished = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    records: list[dict[str, Any]] = json.loads(finished.stdout)
    return records


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compile_report(*TARGETS)


def test_every_kernel_and_target_was_compiled(records: list[dict[str, Any]]) -> None:
    assert {(r["target"], r["kernel"]) for r in records} == {(t, k) for t in TARGETS for k in SWEEPS}


def test_limits_hold(records: list[dict[str, Any]]) -> None:
    """No spills, 16-byte accesses in every main loop, at most 2.3 special-function operations per element."""
    assert broken_limits(records) == []


def test_softcap_is_seen(records: list[dict[str, Any]]) -> None:
    """The counting itself: operations that softcap certainly needs are found."""
    assert min(sum(loop["mufu"] for loop in r["loops"]) for r in records if r["softcap"]) >= 3.0


def test_instructions_per_element(records: list[dict[str, Any]]) -> None:
    """The design's sketch for sm_90 and bfloat16, statistics with entropy: 9.1 + 6.4."""
    (record,) = [r for r in records if record_name(r) == "sm_90 fused_policy_loss/bf16/entropy/log_fidelity"]
    counts = {loop["role"]: loop["instructions"] for loop in record["loops"]}
    assert counts["statistics"] <= 9.1
    assert counts["gradient"] <= 6.4


def test_a_spilling_configuration_is_noticed() -> None:
    records = compile_report("sm_90", "--only", "token_statistics/bf16/entropy", "--registers", "40")
    assert any("spills" in line for line in broken_limits(records))
