"""The presets are what TRL's GRPOTrainer computes; skipped where TRL is not installed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hpo_fused as hf
import hpo_fused.reference

TRAINER_OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "sapo": {"loss_type": "sapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}


@pytest.mark.parametrize("objective", TRAINER_OPTIONS)
def test_presets_are_what_trls_trainer_computes(objective: str) -> None:
    """GRPOTrainer's own loss, called with log-probabilities in the place of a model."""
    pytest.importorskip("trl", minversion="1.16")
    from trl.trainer.grpo_trainer import GRPOTrainer

    generator = torch.Generator().manual_seed(0)
    values = -torch.rand(8, 5, generator=generator, dtype=torch.float64)
    old = values + 0.3 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 1, 5, 2, 5, 4])[:, None]).long()
    logprobs, exact = (values.clone().requires_grad_() for _ in range(2))
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda value, reduction: value, gather=lambda value: value, gather_for_metrics=None
    )
    arguments = SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1)
    attributes = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "_metrics": {"train": defaultdict(list)}, "_entropy_bonus_enabled": False, "accelerator": accelerator,
        "args": arguments, "aux_loss_enabled": False, "beta": 0.0, "current_gradient_accumulation_steps": 1,
        "epsilon_high": 0.2, "epsilon_low": 0.2, "importance_sampling_level": "token",
        "max_completion_length": 5, "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0, "use_vllm": False,
    }  # fmt: skip
    trainer = SimpleNamespace(**{**attributes, **TRAINER_OPTIONS[objective]})
    batch = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    length = {"max_length": 5} if objective == "dr_grpo" else {}
    preset = hf.Objective.preset(objective, **length)
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    expected = hf.reference.logprob_policy_loss(exact, advantages, old_logprobs=old, mask=mask.bool(), objective=preset)
    limit = 1e-7 if objective == "sapo" else 1e-14  # TRL keeps SAPO's temperatures in float32
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=limit)
    (got,), (wanted,) = torch.autograd.grad(loss, logprobs), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=limit)
