"""Bytes that the hardware counted for one step, beside the traffic model's: the profilers' commands and their output.

NVIDIA: Nsight Compute (``ncu``), whose CSV has a row per kernel and metric with the columns "Kernel Name", "Metric
Name", "Metric Unit" and "Metric Value" (Nsight Compute CLI documentation, "Command Line Options", --csv and
--print-units base). AMD: ``rocprofv3``, whose counter_collection.csv has a row per dispatch and counter with columns
Dispatch_Id, Kernel_Name, Counter_Name and Counter_Value (ROCprofiler-SDK documentation, "Kernel counter collection");
FETCH_SIZE and WRITE_SIZE are in kilobytes of 1024 bytes, L2CacheHit in per cent.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .traffic import row_traffic

KERNEL = "fused_policy_loss_kernel"
NVIDIA_METRICS = {
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "hit": "lts__t_sector_hit_rate.pct",
}
AMD_METRICS = {"read": "FETCH_SIZE", "written": "WRITE_SIZE", "hit": "L2CacheHit"}
TOOLS = {"nvidia": "ncu", "amd": "rocprofv3"}
_UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 1}


@dataclass(frozen=True)
class Counted:
    """Of one launch: bytes of device memory read and written, and the L2's hit rate over all accesses, 0 to 1."""

    read: float
    written: float
    hit: float


class CountersFailed(Exception):
    """The profiler did not deliver; the message says what it said."""


def predicted(V: int, itemsize: int, tokens: int, rows_in_flight: int, cache_bytes: int) -> Counted:
    """The traffic model's figures of a whole call.

    ``hit`` is over all accesses, as counters have it: of the two reads and the write of each byte, the second read's
    hits, and the write, which the L2 takes without asking memory.
    """
    row = row_traffic(V, itemsize, rows_in_flight, cache_bytes)
    return Counted(
        tokens * (row.first_read + row.second_read), tokens * row.written, (row.hit * V * itemsize + row.written)
        / (3 * V * itemsize),
    )  # fmt: skip


def step_command(V: int, dtype: str, tokens: int) -> list[str]:
    """A process that launches the fused kernel twice: the first launch compiles."""
    step = ["-m", "hpo_fused.bench.counters_step"]
    return [sys.executable, *step, "--vocabulary", str(V), "--dtype", dtype, "--tokens", str(tokens)]


def profiler_command(vendor: str, tool: str, step: list[str], directory: Path) -> list[str]:
    """``step`` under the profiler, which writes CSV to standard output (NVIDIA) or into ``directory`` (AMD)."""
    if vendor == "nvidia":
        metrics = ["--metrics", ",".join(NVIDIA_METRICS.values())]
        which = ["--kernel-name", f"regex:{KERNEL}", "--launch-skip", "1", "--launch-count", "1"]
        return [tool, "--csv", "--print-units", "base", "--target-processes", "all", *metrics, *which, *step]
    return [
        tool, "--pmc", *AMD_METRICS.values(), "--kernel-include-regex", KERNEL,
        "--output-format", "csv", "--output-directory", str(directory), "--output-file", "step", "--", *step,
    ]  # fmt: skip


def _counted(found: dict[str, float], metrics: dict[str, str], what: str) -> Counted:
    missing = [name for name in metrics.values() if name not in found]
    if missing:
        raise CountersFailed(f"{what} has no {', '.join(missing)}")
    return Counted(found[metrics["read"]], found[metrics["written"]], found[metrics["hit"]] / 100)


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))  # ncu groups digits where the locale does
    except ValueError:
        raise CountersFailed(f"expected a number, got {text!r}") from None


def parse_ncu(text: str) -> Counted:
    """From what ``ncu --csv`` prints: lines of its own that start with ==, of the program's, and the table."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"') and '"Metric Name"' in line), None)
    if start is None:
        raise CountersFailed("\n".join(lines[-10:]) or "ncu printed nothing")
    found = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if KERNEL in row["Kernel Name"]:
            unit = row["Metric Unit"]
            if unit not in _UNITS:
                raise CountersFailed(f"{row['Metric Name']} in an unknown unit, {unit!r}")
            found[row["Metric Name"]] = _number(row["Metric Value"]) * _UNITS[unit]
    return _counted(found, NVIDIA_METRICS, "ncu's output")


def parse_rocprof(text: str) -> Counted:
    """From a counter_collection.csv; the last dispatch of the kernel, since the first one's follows a compilation."""
    rows = [row for row in csv.DictReader(text.splitlines()) if KERNEL in (row.get("Kernel_Name") or "")]
    if not rows:
        raise CountersFailed(f"rocprofv3's output has no dispatch of {KERNEL}")
    last = max(int(row["Dispatch_Id"]) for row in rows)
    found = {row["Counter_Name"]: _number(row["Counter_Value"]) for row in rows if int(row["Dispatch_Id"]) == last}
    counted = _counted(found, AMD_METRICS, "rocprofv3's output")
    return Counted(counted.read * 1024, counted.written * 1024, counted.hit)


def count(vendor: str, tool: str, step: list[str]) -> Counted:
    """Run ``step`` under the profiler.

    Raises:
        CountersFailed: it failed (without the permission to read counters, for one), or its output was not understood.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        command = profiler_command(vendor, tool, step, directory)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            told = (done.stdout + done.stderr).strip().splitlines()[-10:]
            raise CountersFailed("\n".join([f"{Path(tool).name} ended with {done.returncode}", *told]))
        if vendor == "nvidia":
            return parse_ncu(done.stdout)
        files = sorted(directory.rglob("*counter_collection.csv"))
        if not files:
            raise CountersFailed("rocprofv3 wrote no counter_collection.csv")
        return parse_rocprof(files[0].read_text(encoding="utf-8"))
