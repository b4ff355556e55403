"""What other projects' adapters share: is the distribution installed, can it run here, which objectives it has."""

from __future__ import annotations

import os
import re
from importlib import metadata

import torch

from hpo_fused import Clip, Objective, SoftGate, TruncatedRatio
from hpo_fused.bench import plain
from hpo_fused.bench.inputs import Inputs

from .base import NEEDS_GPU, Output, Provider, Unavailable

LIGER_OBJECTIVES = "grpo, dapo, dr_grpo, gspo, luspo, sapo, cispo, hpo, ahpo"  # the last two by weighted advantages


def _numbers(version: str) -> list[int]:
    """The leading numbers of a version: 1.16.0.dev0 is [1, 16, 0]."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


class Peer(Provider):
    """A provider from another distribution.

    Attributes:
        distribution, version: its name on a package index, and the oldest version that the adapter is written for.
        needs_gpu: runs Triton kernels; Triton's interpreter will do for a check.
    """

    distribution: str
    version: str
    needs_gpu: bool = False
    slow_start = "compiling kernels"

    def available(self, device: torch.device) -> str:
        try:
            installed = metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            raise Unavailable("not installed (extra: peers)") from None
        if _numbers(installed) < _numbers(self.version):
            raise Unavailable(f"needs {self.distribution}>={self.version}, this is {installed}")
        if self.needs_gpu and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise Unavailable(NEEDS_GPU)
        return f"{self.distribution} {installed}"


def eager_loss(inputs: Inputs, values: Output) -> Output:
    """The loss in eager PyTorch of log-probabilities that another implementation gave."""
    assert values.logprobs is not None
    loss = plain.logprob_policy_loss(inputs.objective, values.logprobs, *inputs.batch)
    return Output(loss, values.logprobs.detach(), values.entropy)


def liger_shaping(objective: Objective) -> dict[str, object]:
    """Liger-Kernel's arguments for the objective's ratio and shaping; ``loss_type`` leaves the normaliser open.

    Raises:
        Unavailable: it has none.
    """
    shaping, token = objective.shaping, objective.ratio_level == "token"
    options: dict[str, object] | None = None
    if isinstance(shaping, Clip) and shaping.dual is None and (token or objective.ratio_level == "sequence"):
        options = {"loss_type": "grpo", "epsilon_low": shaping.low, "epsilon_high": shaping.high}
        options.update(delta=shaping.delta, importance_sampling_level=objective.ratio_level)
    elif token and isinstance(shaping, SoftGate):
        options = {"loss_type": "sapo"}
        options.update(sapo_temperature_pos=shaping.tau_pos, sapo_temperature_neg=shaping.tau_neg)
    elif token and isinstance(shaping, TruncatedRatio) and shaping == TruncatedRatio(shaping.high):
        options = {"loss_type": "cispo", "epsilon_high": shaping.high}
    if options is None or objective.kl_coef != 0 or objective.entropy_coef != 0:
        raise Unavailable(f"Liger-Kernel has {LIGER_OBJECTIVES} (clipped ratio, SAPO's gate, truncated ratio) only")
    return options
