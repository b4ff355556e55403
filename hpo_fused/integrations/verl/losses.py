"""The registered policy losses: verl's arguments and totals in, its loss and metrics out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from hpo_fused import BatchStatistics, Objective, logprob_policy_loss
from hpo_fused.metrics import COUNTS
from hpo_fused.objective import AdaptiveHysteretic, Normalization

from .counts import current_signs
from .settings import objective_of

# A preset's loss is registered under its name, unless verl has a loss of that name, and under this before it.
PREFIX = "hpo_fused_"

# "token-sum" and "seq-mean-token-sum-norm" are the ones before them with other totals.
_NORMALIZATIONS: dict[str, Normalization] = {
    "token-mean": "mean_length",
    "token-sum": "mean_length",
    "seq-mean-token-sum": "response_sum",
    "seq-mean-token-sum-norm": "response_sum",
    "seq-mean-token-mean": "response",
}


@dataclass(frozen=True)
class PolicyLoss:
    """A preset as verl's registry holds it: a function of one micro-batch, padded [B, T].

    Attributes:
        preset: which one; ``policy_loss.objective`` replaces fields of it, see :class:`HPOPolicyLossConfig`.
    """

    preset: str

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss, float32 scalar that verl may change in place, and metrics, which have the same names in every call.

        Args:
            old_log_prob, log_prob, advantages: floating [B, T]; anything where masked.
            response_mask: bool or 0/1 [B, T].
            loss_agg_mode: any of verl's five.
            config: verl's ActorConfig, with this micro-batch's ``global_batch_info``.
            rollout_is_weights: floating [B, T] or [B, 1], a factor of the tokens' losses.

        Raises:
            TypeError, ValueError: settings that contradict each other (see :func:`objective_of`), an unknown mode,
                dp_size above 1 without the totals that the mode divides by.
            RuntimeError: adaptive weighting outside of an optimiser batch (see :func:`optimiser_batch`).
        """
        if config is None:
            raise TypeError(f"config: expected verl's ActorConfig for policy loss {self.preset!r}, got None")
        if loss_agg_mode not in _NORMALIZATIONS:
            raise ValueError(f"loss_agg_mode: expected one of {', '.join(_NORMALIZATIONS)}, got {loss_agg_mode!r}")
        objective = objective_of(self.preset, config, _NORMALIZATIONS[loss_agg_mode])
        mask = response_mask.bool()
        info = config.get("global_batch_info") or {}
        out = logprob_policy_loss(
            log_prob,
            advantages,
            old_logprobs=old_log_prob,
            mask=mask,
            token_weights=rollout_is_weights,
            objective=objective,
            statistics=_statistics(info, loss_agg_mode, mask, isinstance(objective.weighting, AdaptiveHysteretic)),
        )
        sums = out.metric_sums()
        shown = sums.metrics()
        # What a micro-batch without tokens has no mean of is 0: verl wants the same names from every rank.
        names = [name for name in sums.names if name not in COUNTS]
        means = [shown.get(name, torch.zeros_like(out.loss)) for name in names]
        difference = torch.where(mask, old_log_prob - out.logprobs, 0.0).sum() / mask.sum().clamp(min=1)
        values = torch.stack([difference, *means]).tolist()
        return out.loss, dict(zip(["actor/ppo_kl", *(f"actor/hpo/{name}" for name in names)], values, strict=True))


def _statistics(info: Mapping[str, Any], mode: str, mask: Tensor, adaptive: bool) -> BatchStatistics:
    """What verl's ``agg_loss`` divides by, with the signs of the optimiser batch where alpha depends on them.

    Without totals of the optimiser batch verl counts those of this micro-batch, where a response without tokens is
    none.
    """
    ranks = info.get("dp_size") or 1
    tokens, responses = info.get("batch_num_tokens"), info.get("global_batch_size")
    needed = {"token-mean": "batch_num_tokens", "token-sum": None}.get(mode, "global_batch_size")
    if ranks > 1 and needed is not None and info.get(needed) is None:
        raise ValueError(f"global_batch_info: expected {needed} for loss_agg_mode={mode!r} and dp_size={ranks}")
    if tokens is None:
        tokens = mask.sum()
    if mode == "token-sum":
        tokens = 1
    if responses is None:
        responses = mask.any(-1).sum()
    if mode == "seq-mean-token-sum-norm":
        responses = responses * (info.get("loss_scale_factor") or mask.shape[-1])
    positive, negative = current_signs() if adaptive else (0, 0)
    return BatchStatistics(responses, tokens, positive, negative, gradient_average=float(ranks))


def register() -> None:
    """Put every preset into verl's registry; a loss of verl's own, or of another plug-in, is not replaced."""
    for preset in Objective.presets():
        for name in (PREFIX + preset, preset):
            POLICY_LOSS_REGISTRY.setdefault(name, PolicyLoss(preset))


def preset_of(loss_mode: str) -> str | None:
    """The preset that a loss mode runs, None where the loss is not one of ours."""
    loss = POLICY_LOSS_REGISTRY.get(loss_mode)
    return loss.preset if isinstance(loss, PolicyLoss) else None
