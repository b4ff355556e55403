"""verl's configuration of a policy loss, checked when it is made, and what a worker needs before it trains with one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from hpo_fused.objective import AdaptiveHysteretic, Objective

from .counts import optimiser_batch
from .head import use_fused_head
from .losses import preset_of
from .settings import objective_of, overrides_of


@dataclass
class HPOPolicyLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """verl's PolicyLossConfig with two settings more; named as ``policy_loss._target_``.

    Naming it imports this package in every worker, also where verl does not look for plug-ins.

    Args:
        objective: mapping of fields of :class:`Objective` that replace those of the preset that ``loss_mode`` names,
            such as ``{"weighting": {"kind": "adaptive_hysteretic", "alpha_min": 0.2}}``.
        fused_head: call :func:`use_fused_head` in every process that reads this configuration.

    Raises:
        TypeError, ValueError: an objective beside a loss of verl's own; a field that does not exist, that refuses its
            value, or that verl has a setting of its own for.
    """

    objective: Any = None
    fused_head: bool = False

    def __post_init__(self) -> None:
        given = overrides_of(self)
        preset = preset_of(self.loss_mode)
        if preset is not None:
            Objective.from_mapping({"preset": preset, **given})
        elif given:
            names = ", ".join(Objective.presets())
            raise ValueError(
                f"policy_loss.objective: expected none for loss_mode={self.loss_mode!r}, which is not a loss of "
                f"hpo_fused, got {given}; its losses are {names}"
            )
        if self.fused_head:
            use_fused_head()


def chosen_objective(config: Any) -> Objective | None:
    """The objective that an ActorConfig chooses; None where it chooses a loss of verl's own, or is no ActorConfig.

    Raises:
        TypeError, ValueError: as :func:`objective_of`.
    """
    policy_loss = getattr(config, "policy_loss", None)
    preset = None if policy_loss is None else preset_of(policy_loss.get("loss_mode", "vanilla"))
    return None if preset is None else objective_of(preset, config)


def watch_configurations() -> None:
    """Check each ActorConfig when it is made, and let the engines count where its objective wants it; idempotent.

    A worker makes one before it trains. Until then no engine is imported, which takes longer than all the rest.
    """
    original = ActorConfig.__post_init__
    if hasattr(original, "hpo_fused"):
        return

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        objective = chosen_objective(self)
        if objective is not None and isinstance(objective.weighting, AdaptiveHysteretic):
            count_in_train_batch()

    post_init.hpo_fused = True  # type: ignore[attr-defined]
    ActorConfig.__post_init__ = post_init


def count_in_train_batch() -> None:
    """Let ``BaseEngine.train_batch``, which every engine of verl's inherits, enter :func:`optimiser_batch`; idempotent.

    It is the last place that sees a rank's whole mini-batch, and it takes one optimiser step. A loss function without
    adaptive weighting costs nothing.
    """
    from verl.utils.device import get_device_name
    from verl.workers.engine.base import BaseEngine

    original = BaseEngine.train_batch
    if hasattr(original, "hpo_fused"):
        return

    @functools.wraps(original)
    def train_batch(self: Any, data: Any, loss_function: Any) -> Any:
        objective = chosen_objective(getattr(loss_function, "keywords", {}).get("config"))
        if objective is None or not isinstance(objective.weighting, AdaptiveHysteretic):
            return original(self, data, loss_function)
        # verl takes a machine without an accelerator for one with an NVIDIA GPU.
        device = get_device_name() if torch.accelerator.is_available() else "cpu"
        fields = data.select("advantages", "response_mask").to_padded_tensor().to(device)
        with optimiser_batch(fields["advantages"], fields["response_mask"].bool(), self.get_data_parallel_group()):
            return original(self, data, loss_function)

    train_batch.hpo_fused = True  # type: ignore[attr-defined]
    BaseEngine.train_batch = train_batch
