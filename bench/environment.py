"""Where a measurement was taken: everything somebody needs to judge or repeat it, and nothing about the user."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hpo_fused
from hpo_fused.backend import kernels


def cpu_name() -> str:
    """The processor's model, or the architecture where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, "+" appended where files differ from it; None for an installed package.

    An installed package can lie inside somebody else's repository: only a checkout that holds this very folder at
    its top counts.
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parent:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _huge_pages() -> str | None:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
        return text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return None


# What nvidia-smi calls them, and how they are recorded. The clocks are those of the moment, and the highest.
NVIDIA_SMI = {
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "clocks.current.sm": "clock_sm_mhz",
    "clocks.max.sm": "clock_sm_max_mhz",
    "clocks.current.memory": "clock_memory_mhz",
    "clocks.max.memory": "clock_memory_max_mhz",
}


# Whose versions are recorded where they are installed: they are what is compared with.
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "transformers")

# Of a GPU at work: NVML's bits of what holds its clocks down (nvmlClocksEventReasons).
CLOCK_LIMITS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "thermal, software", 0x40: "thermal, hardware", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def _nvidia_smi(gpu: str, fields: Sequence[str]) -> list[str] | None:
    """What nvidia-smi says of these fields of one GPU; None where it is not there or knows one of them not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in said.strip().split(",")]
    return values if len(values) == len(fields) else None


def _float(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:  # [N/A], [Not Supported]
        return None


def nvidia_state(gpu: str) -> dict[str, Any]:
    """Driver, power limit and clocks of one GPU, by index or UUID; None for what cannot be read."""
    values = _nvidia_smi(gpu, list(NVIDIA_SMI))
    if values is None:
        return dict.fromkeys(NVIDIA_SMI.values())
    return {
        name: value if name == "driver" else _float(value)
        for name, value in zip(NVIDIA_SMI.values(), values, strict=True)
    }


def nvidia_name(device: torch.device) -> str:
    """What nvidia-smi knows the GPU by: an index would miss what CUDA_VISIBLE_DEVICES renumbers."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


def nvidia_clocks(gpu: str) -> tuple[float, list[str]] | None:
    """The clock of the multiprocessors now, MHz, and what holds it down; None where it cannot be read."""
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the newer name, the older one
        values = _nvidia_smi(gpu, ["clocks.current.sm", reasons])
        if values is not None and (clock := _float(values[0])) is not None:
            try:
                bits = int(values[1], 16)
            except ValueError:
                bits = 0
            return clock, [name for bit, name in CLOCK_LIMITS.items() if bits & bit]
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and settings that the numbers depend on."""
    found: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hpo_fused": hpo_fused.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or _version("pytorch-triton-rocm"),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Fresh memory costs a page fault per 4 KiB unless PyTorch asks for huge pages.
        "transparent_huge_pages": _huge_pages(),
        "thp_mem_alloc_enable": os.environ.get("THP_MEM_ALLOC_ENABLE"),
    }
    found |= {name: installed for name in PEERS if (installed := _version(name)) is not None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
        found |= nvidia_state(nvidia_name(device))
        if kernels is not None:
            found["launch_parameters"] = kernels.launch.origin(torch.cuda.current_device())
    return found
