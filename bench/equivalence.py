"""The numerical-equivalence suite in a process of its own, as much of it as there is time for.

On a GPU the kernels run natively. On a CPU they run in Triton's interpreter, which has to be chosen before Triton is
imported: one more reason for the process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from .evidence import Tests

# The public functions against the float64 oracle: losses and log-probabilities, from logits and from hidden states.
FILES = (
    "test_equivalence.py",
    "test_token_logprobs.py",
    "test_linear_policy_loss.py",
    "test_linear_token_logprobs.py",
    "test_properties.py",
)
# What the plugin pytest_deadline goes by, which needs pytest: seconds since the epoch in the environment, and what it
# says of tests that come after.
DEADLINE, NO_TIME = "HPO_FUSED_TESTS_UNTIL", "no time left"
GRACE = 30.0  # seconds beyond its limit after which pytest, in one long test, is ended
POLL = 0.2


def test_files(root: Path | None = None) -> list[Path]:
    """Those of ``FILES`` that the checkout around this package (or ``root``) has; none for an installed package."""
    folder = (root or Path(__file__).resolve().parents[1]) / "tests"
    return [folder / name for name in FILES if (folder / name).is_file()]


def run_tests(
    seconds: float, device: torch.device, files: Sequence[Path] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Tests:  # fmt: skip
    """Run the suite for about ``seconds``; no test starts after them.

    Args:
        seconds: from the start of the process to its last test.
        device: "cuda" runs the kernels natively.
        files: instead of the checkout's.
        tick: called several times a second meanwhile.
    """
    files = test_files() if files is None else files
    if not files:
        return Tests(note="not run: no checkout with tests/ around this package")
    if importlib.util.find_spec("pytest") is None:
        return Tests(note="not run: needs pytest: pip install 'hpo-fused[test]'")
    begun = time.time()
    variables = {**os.environ, DEADLINE: str(begun + seconds)}
    variables.pop("TRITON_INTERPRET", None)
    if device.type != "cuda":
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        ended = False
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "hpo_fused.bench.pytest_deadline", "-p", "no:cacheprovider",
            "--disable-warnings", f"--junitxml={report}", f"--rootdir={files[0].parents[1]}", *map(str, files),
        ]  # fmt: skip
        with (
            open(Path(folder) / "output", "w+", encoding="utf-8") as output,
            subprocess.Popen(
                # From an empty folder: `-m` puts the working directory on the path, where a checkout's kernels/ would
                # shadow a library.
                command,
                cwd=folder,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process,
        ):
            try:
                while process.poll() is None and time.time() < begun + seconds + GRACE:
                    time.sleep(POLL)
                    tick()
            finally:
                if process.poll() is None:
                    ended = True
                    process.kill()
            output.seek(0)
            said = output.read().strip().splitlines()
        if not report.is_file():
            spent = time.time() - begun
            if ended:
                return Tests(seconds=spent, note=f"no outcome: a test was still running {GRACE:g} s after their time")
            last = said[-1] if said else "nothing said"
            return Tests(failed=1, seconds=spent, note=f"pytest ended without a report: {last}")
        return read_junit(report, device)


def read_junit(report: Path, device: torch.device) -> Tests:
    """Outcomes in a JUnit file of pytest's; what there was no time for is in the note and not counted."""
    found, late = Tests(), 0
    root = ElementTree.parse(report).getroot()
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found.failed += 1
            found.failures.append(name)
        elif skipped is None:
            found.passed += 1
        elif NO_TIME in (skipped.get("message") or ""):
            late += 1
        else:
            found.skipped += 1
    found.seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    if late:
        ran = found.passed + found.failed + found.skipped
        found.note = f"{ran} of {ran + late} tests, a mixed sample: there was no time for the others"
    elif not found.passed and not found.failed:
        found.note = "no test ran"
    if device.type != "cuda":
        found.note += ("; " if found.note else "") + "kernels in Triton's interpreter, there being no GPU"
    return found
