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

pytest.importorskip("triton")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SWEEPS = {
    "fused_policy_loss": ["gradient", "statistics"],
    "token_statistics": ["statistics"],
    "token_gradient": ["gradient"],
    "scale_gradient": ["gradient"],
}


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


def name(record: dict[str, Any]) -> str:
    return f"{record['target']} {record['kernel']} {record['variant']}"


def spilling(records: list[dict[str, Any]]) -> list[str]:
    return [f"{name(r)}: {r['spills']} bytes or registers" for r in records if r["spills"]]


def expected_sweeps(record: dict[str, Any]) -> list[str]:
    return ["statistics"] if "loss_only" in record["variant"] else SWEEPS[record["kernel"]]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compile_report(*TARGETS)


def test_every_kernel_and_target_was_compiled(records: list[dict[str, Any]]) -> None:
    assert {(r["target"], r["kernel"]) for r in records} == {(t, k) for t in TARGETS for k in SWEEPS}
    unread = [name(r) for r in records if sorted(loop["role"] for loop in r["loops"]) != expected_sweeps(r)]
    assert not unread, "main loops not found as expected"


def test_nothing_spills(records: list[dict[str, Any]]) -> None:
    assert spilling(records) == []


def test_main_loops_access_memory_16_bytes_at_a_time(records: list[dict[str, Any]]) -> None:
    narrow = [
        f"{name(record)}: {loop}"
        for record in records
        for loop in record["loops"]
        if loop["load_bytes"] != 16
        or (loop["role"] == "gradient" and record["aligned_out"] and loop["store_bytes"] != 16)
    ]
    assert narrow == []


def test_special_function_operations_per_element(records: list[dict[str, Any]]) -> None:
    """One exp2 per element and sweep, and the rescaling of a thread's sums once per step."""
    limit = {
        "fused_policy_loss": 2.3,
        "token_statistics": 1.15,
        "token_gradient": 1.15,
        "scale_gradient": 0.0,
    }
    excessive = {
        name(record): total
        for record in records
        if not record["softcap"] and (total := sum(loop["mufu"] for loop in record["loops"])) > limit[record["kernel"]]
    }
    assert excessive == {}
    softcapped = [sum(loop["mufu"] for loop in r["loops"]) for r in records if r["softcap"]]
    assert min(softcapped) >= 3.0, "the count misses operations that softcap certainly needs"


def test_instructions_per_element(records: list[dict[str, Any]]) -> None:
    """The design's sketch for sm_90 and bfloat16, statistics with entropy: 9.1 + 6.4."""
    (record,) = [r for r in records if name(r) == "sm_90 fused_policy_loss bf16/entropy/log_fidelity"]
    counts = {loop["role"]: loop["instructions"] for loop in record["loops"]}
    assert counts["statistics"] <= 9.1
    assert counts["gradient"] <= 6.4


def test_a_spilling_configuration_is_noticed() -> None:
    assert spilling(compile_report("sm_90", "--only", "token_statistics/bf16/entropy", "--registers", "40"))
