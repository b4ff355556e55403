"""The objective that verl's settings say: a preset, verl's clip range, and fields replaced by the user."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpo_fused.objective import Normalization, Objective
from hpo_fused.shaping import Clip, SoftGate

# What verl decides by settings of its own: its penalties are added to whatever loss a policy loss returns, and the
# totals that it passes are those of its own mode.
_VERLS = {
    "preset": "policy_loss.loss_mode",
    "normalization": "loss_agg_mode",
    "max_length": "loss_scale_factor",
    "kl": "kl_loss_type",
    "kl_coef": "use_kl_loss and kl_loss_coef",
    "entropy_coef": "entropy_coeff",
}

# verl's defaults, which are in every configuration and say nothing about what its user wants.
_DEFAULT_RANGE = (0.2, 0.2)
_DEFAULT_DUAL = 3.0


def overrides_of(policy_loss: Any) -> dict[str, Any]:
    """``policy_loss.objective`` as a plain mapping, empty where there is none.

    Raises:
        TypeError, ValueError: not a mapping, or one with a field that verl has a setting for; the message names it.
    """
    given = policy_loss.get("objective")
    if isinstance(given, DictConfig):
        given = OmegaConf.to_container(given, resolve=True)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"policy_loss.objective: expected a mapping of fields of Objective, got {given!r}")
    for name, setting in _VERLS.items():
        if name in given:
            raise ValueError(
                f"policy_loss.objective.{name}: expected verl's own setting, {setting} of the actor, which applies to "
                f"every policy loss, got {given[name]!r} here"
            )
    return dict(given)


def objective_of(preset: str, config: Any, normalization: Normalization = "mean_length") -> Objective:
    """The objective of a preset's policy loss under verl's ActorConfig.

    Token-level clipping has verl's range and its ``clip_ratio_c``, as "vanilla" has; a response's ratio has verl's
    range. Where that is verl's default, 0.2 on both sides, it is the preset's; one side set alone leaves the other at
    0.2, as in verl. SAPO's gate has verl's temperatures.

    Raises:
        TypeError, ValueError: as :func:`overrides_of`; a field that :meth:`Objective.from_mapping` refuses; a shaping
            beside verl's settings of the same thing.
    """
    given = overrides_of(config.policy_loss)
    objective = Objective.from_mapping({"preset": preset, **given})
    shaping = objective.shaping
    if isinstance(shaping, Clip):
        both = {side: config.get(f"clip_ratio_{side}") for side in ("low", "high")}
        both = {side: config.clip_ratio if value is None else value for side, value in both.items()}
        chosen = tuple(both.values()) != _DEFAULT_RANGE
        dual = config.get("clip_ratio_c", _DEFAULT_DUAL)
        if "shaping" in given:
            if chosen or dual != _DEFAULT_DUAL:
                raise ValueError(
                    "policy_loss.objective.shaping: expected either a shaping or verl's clip_ratio_low, "
                    f"clip_ratio_high and clip_ratio_c, got {shaping} and {both['low']}, {both['high']} and {dual}"
                )
        else:
            if chosen:
                shaping = dataclasses.replace(shaping, low=float(both["low"]), high=float(both["high"]))
            if objective.ratio_level == "token":
                shaping = dataclasses.replace(shaping, dual=float(dual))
    elif isinstance(shaping, SoftGate) and "shaping" not in given:
        shaping = SoftGate(float(config.tau_pos), float(config.tau_neg))
    return dataclasses.replace(objective, shaping=shaping, normalization=normalization, max_length=None)
