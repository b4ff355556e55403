"""``hpo-fused-bench counters``: the profilers' output as documented, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from hpo_fused.bench import counters, counters_command, counters_step  # noqa: E402
from hpo_fused.bench.commands import app  # noqa: E402
from hpo_fused.bench.counters import Counted, CountersFailed, parse_ncu, parse_rocprof, predicted  # noqa: E402

# As Nsight Compute's documentation has it; made by hand, not recorded.
NCU = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "fused_policy_loss_kernel" - 0: 0%....50%....100% - 3 passes
something that the program printed
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","python3.12","127.0.0.1","fused_policy_loss_kernel","1","7","(1024, 1, 1)","(132, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","622,985,216"
"0","4711","python3.12","127.0.0.1","fused_policy_loss_kernel","1","7","(1024, 1, 1)","(132, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_write.sum","{unit}","{written}"
"0","4711","python3.12","127.0.0.1","fused_policy_loss_kernel","1","7","(1024, 1, 1)","(132, 1, 1)","0","9.0",\
"Command line profiler metrics","lts__t_sector_hit_rate.pct","%","66.25"
"""
GOOD = NCU.replace("{unit}", "byte").replace("{written}", "5")

ROCPROF = """"Correlation_Id","Dispatch_Id","Agent_Id","Queue_Id","Process_Id","Thread_Id","Grid_Size","Kernel_Id",\
"Kernel_Name","Workgroup_Size","LDS_Block_Size","Scratch_Size","VGPR_Count","SGPR_Count","Counter_Name","Counter_Value",\
"Start_Timestamp","End_Timestamp"
1,1,1,1,9,9,311296,17,"fused_policy_loss_kernel",512,512,0,64,96,"FETCH_SIZE",1.0,1,2
1,1,1,1,9,9,311296,17,"fused_policy_loss_kernel",512,512,0,64,96,"WRITE_SIZE",1.0,1,2
1,1,1,1,9,9,311296,17,"fused_policy_loss_kernel",512,512,0,64,96,"L2CacheHit",1.0,1,2
2,2,1,1,9,9,1024,18,"vectorized_elementwise_kernel",256,0,0,8,16,"FETCH_SIZE",77.0,3,4
3,3,1,1,9,9,311296,17,"fused_policy_loss_kernel",512,512,0,64,96,"FETCH_SIZE",1215488.0,5,6
3,3,1,1,9,9,311296,17,"fused_policy_loss_kernel",512,512,0,64,96,"WRITE_SIZE",607744.0,5,6
3,3,1,1,9,9,311296,17,"fused_policy_loss_kernel",512,512,0,64,96,"L2CacheHit",12.5,5,6
"""


@pytest.mark.parametrize(("unit", "written"), [("byte", "622329856"), ("Mbyte", "622.329856")])
def test_ncu_s_table_is_read(unit: str, written: str) -> None:
    found = parse_ncu(NCU.replace("{unit}", unit).replace("{written}", written))
    assert found == Counted(622985216, pytest.approx(622329856), 0.6625)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "ERR_NVGPUCTRPERM"),
        ("", "ncu printed nothing"),
        (GOOD.replace("dram__bytes_read.sum", "other"), "ncu's output has no dram__bytes_read.sum"),
        (GOOD.replace("fused_policy_loss_kernel", "other"), "ncu's output has no dram__bytes_read.sum, dram__bytes_wr"),
        (NCU.replace("{unit}", "sector"), "dram__bytes_write.sum in an unknown unit, 'sector'"),
        (NCU.replace("{unit}", "byte").replace("{written}", "n/a"), "expected a number, got 'n/a'"),
    ],
)
def test_what_ncu_does_not_deliver_is_told(text: str, told: str) -> None:
    with pytest.raises(CountersFailed, match=told):
        parse_ncu(text)


def test_rocprof_s_table_is_read() -> None:
    assert parse_rocprof(ROCPROF) == Counted(1215488 * 1024, 607744 * 1024, 0.125)
    with pytest.raises(CountersFailed, match="no dispatch"):
        parse_rocprof(ROCPROF.replace("fused_policy_loss", "other"))
    with pytest.raises(CountersFailed, match="no L2CacheHit"):
        parse_rocprof(ROCPROF.replace("L2CacheHit", "other"))


def test_prediction_of_a_call() -> None:
    fits = predicted(151936, 2, 2048, 132, 50 << 20)
    assert fits.read == fits.written == 2048 * 151936 * 2
    assert fits.hit == pytest.approx(2 / 3)
    misses = predicted(262144, 2, 2048, 132, 50 << 20)
    assert misses.read / misses.written == pytest.approx(2 - 0.85 * 50 / 66, rel=1e-3)


@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_the_profiler_s_command(vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the profiler checks its arguments and answers as one would."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        seen.append(command)
        if vendor == "amd":
            directory = Path(command[command.index("--output-directory") + 1])
            (directory / "step_counter_collection.csv").write_text(ROCPROF)
        return SimpleNamespace(returncode=0, stdout=GOOD, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    step = counters.step_command(151936, "bf16", 64)
    found = counters.count(vendor, "/opt/tool", step)
    assert found.written == (5 if vendor == "nvidia" else 607744 * 1024)
    (command,) = seen
    assert command[0] == "/opt/tool"
    assert command[-len(step) :] == step
    for metric in (counters.NVIDIA_METRICS if vendor == "nvidia" else counters.AMD_METRICS).values():
        assert any(metric in word for word in command)


def test_a_failing_profiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('==ERROR== ERR_NVGPUCTRPERM'); sys.exit(3)"
    monkeypatch.setattr(counters, "profiler_command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(CountersFailed, match=r"(?s)ended with 3.*ERR_NVGPUCTRPERM"):
        counters.count("nvidia", "ncu", [])


def test_the_step_launches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("hpo_fused.kernels", reason="needs Triton")
    real, launched = kernels.fused_policy_loss, []
    monkeypatch.setattr(kernels, "fused_policy_loss", lambda *a, **k: launched.append(a[0].shape) or real(*a, **k))
    counters_step.main(["--vocabulary", "301", "--dtype", "bf16", "--tokens", "2"])
    assert launched == [(1, 2, 301)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    done = testing.CliRunner().invoke(app, ["counters"])
    assert done.exit_code == 2
    assert "hardware counters are a GPU's, and PyTorch sees none here" in done.output


def test_without_the_profiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("PATH", "")
    done = testing.CliRunner().invoke(app, ["counters"])
    assert done.exit_code == 2
    assert "ncu is not on the PATH" in done.output


@pytest.mark.parametrize("fails", [False, True])
def test_the_command_on_a_false_machine(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("hpo_fused.kernels.launch", reason="needs Triton")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(counters_command, "_missing", lambda tool: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(launch, "machine", lambda index: launch.Machine("sm_90", 132, 50 << 20, 32))
    launch.forget_parameters()

    def count(*_: Any) -> Counted:
        if fails:
            raise CountersFailed("no permission")
        return Counted(2048 * 151936 * 2 * 1.07, 2048 * 151936 * 2, 0.61)

    monkeypatch.setattr(counters, "count", count)
    done = testing.CliRunner().invoke(app, ["counters"])
    launch.forget_parameters()
    assert done.exit_code == (1 if fails else 0), done.output
    if fails:
        assert "no permission" in done.output
    else:
        model, counted = (line.split() for line in done.output.splitlines() if line.startswith(("model", "counted")))
        assert (model[2], counted[2]) == ("1.000", "1.070")
        assert (model[5], counted[5]) == ("66.7%", "61.0%")
