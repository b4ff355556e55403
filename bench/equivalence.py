"""The numerical-equivalence suite in a process of its own, as much of it as there is time for.

On a GPU the kernels run natively. On a CPU they run in Triton's interpreter, which has to be chosen before Triton is
imported: one more reason for the process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
# What the plugin pytest_deadline, which needs pytest, goes by in the environment: seconds since the epoch after which
# no test starts, and the file that takes the outcomes.
DEADLINE, OUTCOMES = "HPO_FUSED_TESTS_UNTIL", "HPO_FUSED_TESTS_OUTCOMES"
GRACE = 30.0  # seconds beyond its limit after which pytest, in one long test, is ended
POLL = 0.2
COUNTED = ("passed", "failed", "skipped")
# pytest's exit statuses for a run that came to its end: all passed, some failed, nothing collected.
ENDED_WELL = (0, 1, 5)


def test_files(root: Path | None = None) -> list[Path]:
    """Those of ``FILES`` that the checkout around this package (or ``root``) has; none for an installed package."""
    folder = (root or Path(__file__).resolve().parents[1]) / "tests"
    return [folder / name for name in FILES if (folder / name).is_file()]


def visible(device: torch.device, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that leaves a process that one GPU: the entry of a list that there is already, or its UUID."""
    name = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    index = device.index or 0
    for variable in dict.fromkeys((name, "CUDA_VISIBLE_DEVICES")):
        entries = [entry.strip() for entry in environ.get(variable, "").split(",") if entry.strip()]
        if index < len(entries):  # an entry can be a MIG device, which has another UUID than its GPU
            return {variable: entries[index]}
    uuid = None if torch.version.hip else getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return {name: f"GPU-{uuid}" if uuid else str(index)}


def _variables(device: torch.device, until: float, outcomes: Path) -> dict[str, str]:
    found = {**os.environ, DEADLINE: str(until), OUTCOMES: str(outcomes)}
    found.pop("TRITON_INTERPRET", None)
    if device.type == "cuda":
        return found | visible(device, os.environ)
    return found | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_tests(
    seconds: float, device: torch.device, files: Sequence[Path] | None = None,
    tick: Callable[[], object] = lambda: None, into: Tests | None = None,
) -> Tests:  # fmt: skip
    """Run the suite for about ``seconds``; no test starts after them.

    Args:
        seconds: from the start of the process to its last test.
        device: "cuda" runs the kernels natively, on that GPU alone.
        files: instead of the checkout's.
        tick: called several times a second meanwhile.
        into: takes the outcome, on Ctrl-C too.

    Returns:
        ``into``, or a new one.
    """
    found = Tests() if into is None else into
    files = test_files() if files is None else files
    if not files:
        found.note = "not run: no checkout with tests/ around this package"
        return found
    if importlib.util.find_spec("pytest") is None:
        found.note = "not run: needs pytest: pip install 'hpo-fused[test]'"
        return found
    if device.type == "cuda":  # the tests need the memory that this process keeps for later
        gc.collect()
        torch.cuda.empty_cache()
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "hpo_fused.bench.pytest_deadline", "-p", "no:cacheprovider",
            "--disable-warnings", f"--rootdir={files[0].parents[1]}", *map(str, files),
        ]  # fmt: skip
        ending, said = "interrupted", [""]
        status: int | None = None
        try:
            with (
                open(Path(folder) / "output", "w+", encoding="utf-8") as output,
                subprocess.Popen(
                    # From an empty folder: `-m` puts the working directory on the path, where a checkout's kernels/
                    # would shadow a library.
                    command,
                    cwd=folder,
                    env=_variables(device, begun + seconds, outcomes),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                ) as process,
            ):
                try:
                    while process.poll() is None and time.time() < begun + seconds + GRACE:
                        time.sleep(POLL)
                        tick()
                    ending = "hung" if process.poll() is None else "ended"
                finally:
                    if process.poll() is None:
                        process.kill()
                status = process.wait()
                output.seek(0)
                said = output.read().strip().splitlines() or ["nothing said"]
        finally:
            found.seconds = time.time() - begun
            _take(list(_lines(outcomes)), found, ending, status, said[-1])
            if device.type != "cuda":
                found.note += ("; " if found.note else "") + "kernels in Triton's interpreter, there being no GPU"
    return found


def _lines(outcomes: Path) -> Iterator[dict[str, Any]]:
    if not outcomes.is_file():
        return
    for line in outcomes.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one, of a process that was killed in writing it
            yield json.loads(line)


def _take(lines: Sequence[Mapping[str, Any]], found: Tests, ending: str, status: int | None, said: str) -> None:
    """Count what the plugin told. A test that was running when pytest hung or died has failed.

    Args:
        lines: of the plugin.
        found: where it goes.
        ending: "ended", "hung" or "interrupted".
        status: pytest's exit status.
        said: its last line.
    """
    last: dict[str, str] = {line["test"]: line["outcome"] for line in lines if "test" in line}
    collected = max((line["collected"] for line in lines if "collected" in line), default=0)
    notes = []
    running = [name for name, outcome in last.items() if outcome == "running"]
    died = ending == "ended" and status not in ENDED_WELL and (running or "failed" not in last.values())
    if ending == "hung":
        what = ", ".join(running) or "pytest"
        notes.append(f"{what} was still running {GRACE:g} s after their time and was ended")
    elif died:
        where = f" in {', '.join(running)}" if running else ""
        notes.append(f"pytest ended with status {status}{where}: {said}")
    if ending == "hung" or died:
        last |= dict.fromkeys(running or ["pytest"], "failed")
    found.failures = [name for name, outcome in last.items() if outcome == "failed"]
    outcomes = list(last.values())
    found.passed, found.failed, found.skipped = (outcomes.count(outcome) for outcome in COUNTED)
    ran = found.passed + found.failed + found.skipped
    if ending == "interrupted":
        notes.append(f"interrupted after {ran} of {collected} tests" if collected else "interrupted")
    elif ran < collected and (ending == "hung" or "late" in outcomes):
        notes.append(f"{ran} of {collected} tests, a mixed sample: there was no time for the others")
    elif not found.passed and not found.failed:
        notes.append("no test ran")
    found.note = "; ".join(notes)
