"""What the adapters of other projects share: are they installed, can they run here, which objectives do they have."""

from __future__ import annotations

import os
from importlib import metadata

import torch
from torch import Tensor

from hpo_fused.objective import Clip, Objective, SoftGate, TruncatedRatio

from .base import NEEDS_GPU, Unavailable

LIGER_OBJECTIVES = "grpo, dapo, dr_grpo, gspo, sapo, cispo, hpo, ahpo"  # the last two by weighted advantages


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 1.16.0.dev0 is (1, 16, 0)."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def require(distribution: str, version: str) -> str:
    """The name and installed version of a distribution.

    Raises:
        Unavailable: not installed, or older than ``version``.
    """
    try:
        installed = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        # The same words for all of them, so that a report says it once.
        raise Unavailable("not installed (extra: peers)") from None
    if _numbers(installed) < _numbers(version):
        raise Unavailable(f"needs {distribution}>={version}, this is {installed}")
    return f"{distribution} {installed}"


def require_gpu(device: torch.device) -> None:
    """Raise :class:`Unavailable` where Triton kernels cannot run: on a CPU, unless under Triton's interpreter."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(NEEDS_GPU)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """What a model does where the loss has no softcap; in float32, or the log-probabilities would not be exact."""
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def liger_shaping(objective: Objective) -> dict[str, object]:
    """Liger-Kernel's arguments for the objective's ratio and shaping; ``loss_type`` leaves the normaliser open.

    Raises:
        Unavailable: it has none.
    """
    shaping = objective.shaping
    options: dict[str, object] | None = None
    if isinstance(shaping, Clip) and shaping.dual is None:
        options = {"loss_type": "grpo", "epsilon_low": shaping.low, "epsilon_high": shaping.high}
        options.update(delta=shaping.delta, importance_sampling_level=objective.ratio_level)
    elif objective.ratio_level == "token" and isinstance(shaping, SoftGate):
        options = {"loss_type": "sapo"}
        options.update(sapo_temperature_pos=shaping.tau_pos, sapo_temperature_neg=shaping.tau_neg)
    elif objective.ratio_level == "token" and isinstance(shaping, TruncatedRatio) and shaping.low is None:
        options = {"loss_type": "cispo", "epsilon_high": shaping.high}
    if options is None or objective.kl_coef != 0 or objective.entropy_coef != 0:
        raise Unavailable(f"Liger-Kernel has {LIGER_OBJECTIVES} (clipped ratio, SAPO's gate, truncated ratio) only")
    return options
