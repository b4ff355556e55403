"""The kernels' machine code, read without a GPU: no spills, wide accesses, few special-function operations.

The compiler runs in a subprocess: interpreter and compiler cannot share a process, and the other tests may be using
the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpo_fused.bench.compile_document import predictions
from hpo_fused.bench.compile_limits import SWEEPS, broken_limits, record_name
from hpo_fused.bench.compile_plan import DEFAULT, TARGETS, plan
from hpo_fused.bench.compile_report import Report
from hpo_fused.bench.gpus import GPUS

pytest.importorskip("triton")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]


def compile_report(*arguments: str) -> Report:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hpo_fused.bench.compile_report", *arguments]
    # Not from the checkout's root, which `-m` would put on sys.path.
    finished = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return Report(**json.loads(finished.stdout))


# Of the session: other tests of this group would end a module in between.
@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    report = compile_report(*TARGETS)
    assert report.failures == []
    assert report.unavailable == {}
    assert len(report.records) == len(plan(TARGETS))
    return report.records


def test_every_kernel_and_target_was_compiled(records: list[dict[str, Any]]) -> None:
    wanted = {(target, kernel) for target in TARGETS for kernel in SWEEPS}
    assert {(r["target"], r["kernel"]) for r in records} >= wanted


def test_limits_hold(records: list[dict[str, Any]]) -> None:
    """No spills, 16-byte accesses in every main loop, at most 2.3 special functions and 22 instructions per element."""
    assert broken_limits(records) == []


@pytest.mark.parametrize(("file", "option"), [("README.md", "--summary"), ("docs/kernels.md", "--markdown")])
def test_documented_predictions_are_the_command_s(records: list[dict[str, Any]], file: str, option: str) -> None:
    """Of the assembler that they were printed with; another one's counts differ in the second digit."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.7."):
        pytest.skip("the documentation's counts are of Triton 3.7")
    compile_table = pytest.importorskip("hpo_fused.bench.compile_table", reason="needs the bench extra")
    text = (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
    (block,) = re.findall(rf"<!-- compile {option} -->\n(.*?)\n<!-- end of compile -->", text, flags=re.DOTALL)
    found = predictions(records, list(GPUS.values()))
    printed = {"--summary": compile_table.summary, "--markdown": compile_table.prediction_markdown}[option](found)
    assert block.strip() == printed.strip()


def test_softcap_is_seen(records: list[dict[str, Any]]) -> None:
    """The counting itself: operations that softcap certainly needs are found."""
    assert min(sum(loop["counts"]["mufu"] for loop in r["loops"]) for r in records if r["softcap"] and r["loops"]) >= 3


def test_classes_add_up(records: list[dict[str, Any]]) -> None:
    for loop in (loop for record in records for loop in record["loops"]):
        assert sum(loop["counts"].values()) == pytest.approx(loop["instructions"], abs=0.01)
        assert loop["counts"]["control"] < loop["instructions"] / 4  # or a mnemonic is in no class


def test_instructions_per_element(records: list[dict[str, Any]]) -> None:
    """The design's sketch for sm_90 and bfloat16, statistics with entropy: 9.1 + 6.4."""
    (record,) = [r for r in records if record_name(r) == f"sm_90 {DEFAULT.full_name}"]
    counts = {loop["role"]: loop["instructions"] for loop in record["loops"]}
    assert counts["statistics"] <= 9.1
    assert counts["gradient"] <= 6.4


def test_occupancy_is_what_the_launch_means(records: list[dict[str, Any]]) -> None:
    assert all(r["occupancy"]["programs"] >= r["programs_per_processor"] for r in records)


def test_a_spilling_configuration_is_noticed() -> None:
    report = compile_report("sm_90", "--only", "token_statistics/bf16/entropy", "--registers", "40")
    assert any("spills" in line for line in broken_limits(report.records))
