"""Description of the machine and software of a measurement, enough to judge or repeat it; nothing about the user."""

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
NVIDIA_SMI = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"


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
    return _output(["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"])


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and settings that the numbers depend on."""
    found: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hpo_fused": hpo_fused.__version__, "commit": git_commit(), "python": platform.python_version(),
        "torch": torch.__version__, "platform": f"{platform.system()} {platform.machine()}", "device": str(device),
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "thp_mem_alloc_enable": os.environ.get("THP_MEM_ALLOC_ENABLE"),  # or a page fault per 4 KiB of new memory
    }  # fmt: skip
    for name in DISTRIBUTIONS:
        try:
            found["triton" if "triton" in name else name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "gpu_memory_bytes": properties.total_memory,
            "gpu_architecture": getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda, "hip": torch.version.hip,
        }  # fmt: skip
        # By UUID: an index would not survive CUDA_VISIBLE_DEVICES' renumbering.
        gpu = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else str(device.index or 0)
        found[NVIDIA_SMI] = _output(["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader", f"--id={gpu}"])
        if hpo_fused.backend_for(torch.empty(0, device=device)) == "triton":
            from hpo_fused.kernels.launch import origin

            found["launch_parameters"] = origin(torch.cuda.current_device())
    return found
