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

# Distributions whose versions the numbers depend on, where they are installed.
DISTRIBUTIONS = ("triton", "pytorch-triton-rocm", "trl", "liger-kernel", "cut-cross-entropy", "transformers")
# Fields by their names at nvidia-smi and in a result; the clocks are those of the moment, and the highest.
NVIDIA_SMI = {
    "driver_version": "driver", "power.limit": "power_limit_w", "clocks.current.sm": "clock_sm_mhz",
    "clocks.max.sm": "clock_sm_max_mhz", "clocks.max.memory": "clock_memory_max_mhz",
}  # fmt: skip


def _output(command: Sequence[str]) -> str | None:
    """Standard output of a command; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor's model, or the architecture where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, "+" appended where files differ from it; None for an installed package.

    An installed package can lie inside somebody else's repository: only a checkout that holds this very folder at
    its top counts.
    """
    here = Path(__file__).resolve().parent
    top = _output(["git", "-C", str(here), "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != here.parent:
        return None
    commit = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    return commit and commit + "+" * bool(_output(["git", "-C", str(here), "status", "--porcelain"]))


def nvidia_state(device: torch.device) -> dict[str, str | None]:
    """Driver, power limit and clocks of one GPU; None for fields that cannot be read."""
    # By UUID: an index would not survive CUDA_VISIBLE_DEVICES' renumbering.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    gpu = f"GPU-{uuid}" if uuid else str(device.index or 0)
    query = f"--query-gpu={','.join(NVIDIA_SMI)}"
    said = (_output(["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={gpu}"]) or "").split(",")
    values = [value.strip() for value in said] if len(said) == len(NVIDIA_SMI) else [None] * len(NVIDIA_SMI)
    return dict(zip(NVIDIA_SMI.values(), values, strict=True))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and settings that the numbers depend on."""
    found: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hpo_fused": hpo_fused.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "thp_mem_alloc_enable": os.environ.get("THP_MEM_ALLOC_ENABLE"),  # or a page fault per 4 KiB of new memory
    }
    for name in DISTRIBUTIONS:
        try:
            found["triton" if "triton" in name else name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
        found |= nvidia_state(device)
        if hpo_fused.backend_for(torch.empty(0, device=device)) == "triton":
            from hpo_fused.kernels.launch import origin

            found["launch_parameters"] = origin(torch.cuda.current_device())
    return found
