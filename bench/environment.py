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


# Fields by their names at nvidia-smi and in a result. The clocks are those of the moment, and the highest.
NVIDIA_SMI = {
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "clocks.current.sm": "clock_sm_mhz",
    "clocks.max.sm": "clock_sm_max_mhz",
    "clocks.current.memory": "clock_memory_mhz",
    "clocks.max.memory": "clock_memory_max_mhz",
}


# Distributions that are compared with: their versions are recorded where they are installed.
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "transformers")


def _nvidia_smi(gpu: str, fields: Sequence[str]) -> list[str] | None:
    """Values that nvidia-smi gives for these fields of one GPU; None where it is missing or does not know one."""
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
    """Name by which nvidia-smi knows the GPU: an index would not survive CUDA_VISIBLE_DEVICES' renumbering."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


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
        if hpo_fused.backend_for(torch.empty(0, device=device)) == "triton":
            from hpo_fused.kernels.launch import origin

            found["launch_parameters"] = origin(torch.cuda.current_device())
    return found
