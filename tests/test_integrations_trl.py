"""HPOTrainer against TRL's own GRPOTrainer: loss, every parameter's gradient, and every metric that TRL logs.

``pytest -m slow_trainers tests/test_integrations_trl*.py`` runs what takes minutes: all combinations of options, whole
trainings. LoRA needs peft.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.15", reason="needs the trl extra")

import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused.integrations.trl import HPOTrainer
from hpo_fused.integrations.trl import head as head_module
from hpo_fused.integrations.trl import trainer as trainer_module

from .trl_stock import GRADIENT, LOSS, SEQUENCE, assert_like_stock, slow, with_sampler, wrong_statistics
from .trl_tiny import differences, generation_batch, gradients, make_trainer, prompts, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on the disk."""
    return save_tiny(str(tmp_path_factory.mktemp("tiny")))


def rows() -> list[Any]:
    """(options, data) by name. Half of them run in CI: each loss type and each kind of argument once."""
    losses = {
        "grpo": {"loss_type": "grpo", "epsilon_high": 0.28},
        "dapo": {"loss_type": "dapo"},
        "bnpo": {"loss_type": "bnpo"},
        "dr_grpo": {"loss_type": "dr_grpo"},
        "sapo": {"loss_type": "sapo"},
        "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
        "vespo": {"loss_type": "vespo"},
        "luspo": {"loss_type": "luspo", "epsilon": 0.05, **SEQUENCE},
        "gspo": {"loss_type": "grpo", "epsilon": 0.05, "epsilon_high": 0.08, **SEQUENCE},
        "delta": {"loss_type": "grpo", "delta": 1.5},
    }
    rare = {
        "luspo-token": {"loss_type": "luspo"},
        "dapo-sequence": {"epsilon": 0.05, **SEQUENCE},
        "sapo-sequence": {"loss_type": "sapo", **SEQUENCE},
        "cispo-sequence": {"loss_type": "cispo", **SEQUENCE},
        "vespo-sequence": {"loss_type": "vespo", **SEQUENCE},
    }
    chosen: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    others: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, options in losses.items():
        chosen[f"{name}-kl"] = options | {"beta": 0.1}
        others[name] = options
    for name, options in rare.items():
        others |= {name: options, f"{name}-kl": options | {"beta": 0.1}}
    chosen = {name: (options, {}) for name, options in chosen.items()}
    others = {name: (options, {}) for name, options in others.items()}
    chosen |= {
        "plain-kl": ({"beta": 0.1, "use_bias_correction_kl": False}, {}),
        "on-policy-kl": ({"beta": 0.1}, {"on_policy": True}),
        "tools": ({}, {"tools": True}),
        "per-token": (losses["gspo"], {"per_token": True}),
        "entropy": ({"loss_type": "grpo", "entropy_coef": 0.02}, {}),
        "adaptive-entropy": ({"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.01}, {}),
        "token_truncate": ({"loss_type": "grpo"}, {"sampler": "token_truncate"}),
        "vespo-sequence_mask-kl": (losses["vespo"] | {"beta": 0.1}, {"sampler": "sequence_mask"}),
        "everything-first": (
            {"loss_type": "grpo", "entropy_coef": 0.01, "top_entropy_quantile": 0.3, "off_policy_mask_threshold": 0.01},
            {"sampler": "token_mask"},
        ),
        "window": ({"steps_per_generation": 4}, {}),
    }
    others |= {
        "vespo-on-policy": (losses["vespo"], {"on_policy": True}),
        "cispo-on-policy": (losses["cispo"], {"on_policy": True}),
        "grpo-tools": (losses["grpo"], {"tools": True}),
        "vespo-tools": (losses["vespo"], {"tools": True, "sampler": "token_truncate"}),
        "grpo-per-token": (losses["grpo"], {"per_token": True}),
        "quantile": ({"top_entropy_quantile": 0.3}, {}),
        "gspo-quantile": (losses["gspo"] | {"top_entropy_quantile": 0.3}, {}),
        "off-policy-mask": ({"loss_type": "grpo", "off_policy_mask_threshold": 0.01}, {}),
        "bnpo-entropy": (losses["bnpo"] | {"entropy_coef": 0.01}, {}),
        "fp32-head": ({"cast_lm_head_to_fp32": True}, {}),
        "vespo-token_truncate-kl": (losses["vespo"] | {"beta": 0.1}, {"sampler": "token_truncate"}),
        "far-off": ({}, {"spread": 3.0}),
    }
    for mode in ("token_mask", "sequence_truncate", "sequence_mask"):
        others |= {mode: ({}, {"sampler": mode}), f"vespo-{mode}": (losses["vespo"], {"sampler": mode})}
        others[f"gspo-{mode}"] = (losses["gspo"], {"sampler": mode})
    everything = [pytest.param(*row, id=name) for name, row in chosen.items()]
    return everything + [pytest.param(*row, id=name, marks=slow) for name, row in others.items()]


@pytest.mark.parametrize(("options", "data"), rows())
def test_every_option_is_stocks(path: str, options: dict[str, Any], data: dict[str, Any]) -> None:
    ours, logs = assert_like_stock(path, options, data)
    first = ("top_entropy_quantile", "off_policy_mask_threshold")
    ours.args.head = "linear"
    penalty_apart = isinstance(ours.objective.shaping, hf.GammaGate) and ours.beta != 0
    needed = any(name in options for name in first) or (
        penalty_apart and ("sampler" in data or "importance_sampling_level" in options)
    )
    assert (ours._two_step_because() is not None) == needed
    if isinstance(ours.objective.shaping, hf.Clip) and not data:  # ratios on both sides of both bounds
        assert 0 < logs["clip_ratio/low_mean"] < 1
        assert 0 < logs["clip_ratio/high_mean"] < 1


MUTANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "statistics": ({}, {}),
    "accumulation": ({"loss_type": "grpo"}, {}),
    "mask": ({}, {"tools": True}),
    "temperature": ({}, {}),
    "kl-ratio": ({"beta": 0.1}, {}),
    "rounded-old": ({}, {"spread": 0.02}),
    "advantage-sign": ({}, {}),
    "vespo-weight": ({"loss_type": "vespo"}, {"sampler": "token_truncate"}),
    "entropy-mean": ({"entropy_coef": 0.5, "loss_type": "grpo"}, {}),
    "shifted": ({}, {}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_rule_is_noticed(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, data = MUTANTS[name]
    stock = with_sampler(make_trainer(path, stock=True, **options), data)
    batches = generation_batch(stock.model, **data)
    _, expected, _ = gradients(stock, batches)
    if name == "statistics":
        monkeypatch.setattr(HPOTrainer, "_statistics", wrong_statistics)
    elif name == "accumulation":
        monkeypatch.setattr(HPOTrainer, "_steps", lambda self: 1)
    elif name == "mask":
        monkeypatch.setattr(trainer_module, "_loss_mask", lambda batch: batch["completion_mask"])
    elif name == "temperature":
        options = options | {"temperature": 1.0}
    elif name == "kl-ratio":
        options = options | {"use_bias_correction_kl": False}
    elif name == "rounded-old":
        for batch in batches:
            batch["old_per_token_logps"] = batch["old_per_token_logps"].bfloat16().float()
    elif name == "advantage-sign":
        for batch in batches:
            batch["advantages"] = batch["advantages"].clamp(min=0)
    elif name == "vespo-weight":
        monkeypatch.setattr(trainer_module, "_corrected", lambda old, ratio, mask: old)
    elif name == "entropy-mean":
        monkeypatch.setattr(
            HPOTrainer, "_entropy_weights", lambda self, chosen, statistics: chosen * (self.entropy_coef / 16 / 12)
        )
    elif name == "shifted":
        whole = head_module.LossCall.__init__
        monkeypatch.setattr(
            head_module.LossCall,
            "__init__",
            lambda self, n, run: whole(self, n, lambda h, w, **kw: run(h.roll(1, 1), w, **kw)),
        )
    ours = with_sampler(make_trainer(path, **options), data)
    _, found, _ = gradients(ours, batches)
    assert differences(found, expected) > 100 * GRADIENT


@pytest.mark.parametrize("preset", list(hf.Objective.presets()))
def test_presets_are_the_losses_of_whole_batches(generated: tuple[Any, dict[str, Any], Tensor], preset: str) -> None:
    """From TRL's generation to the gradient: one micro-batch, and the same loss on logits without any statistics."""
    trainer, inputs, logits = generated
    trainer.args.objective = preset
    trainer.objective = objective = hf.Objective.preset(preset, kl_coef=0.05, **LENGTH.get(preset, {}))
    check_against_logits(trainer, inputs, logits, objective)


def check_against_logits(
    trainer: Any, inputs: dict[str, Any], logits: Tensor, objective: hf.Objective, **given: Any
) -> None:
    """The trainer's loss and gradient of the head are those of policy_loss on the logits."""
    expected = hf.policy_loss(
        logits, inputs["completion_ids"], inputs["advantages"], old_logprobs=inputs["old_per_token_logps"],
        ref_logprobs=inputs["ref_per_token_logps"], mask=inputs["completion_mask"], objective=objective,
        temperature=trainer.temperature, **given,
    ).loss  # fmt: skip
    weight = trainer.model.lm_head.weight
    (gradient,) = torch.autograd.grad(expected, weight, retain_graph=True)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    (found,) = torch.autograd.grad(loss, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS, abs=LOSS)
    assert float((found - gradient).norm() / gradient.norm()) < GRADIENT


LENGTH = {"dr_grpo": {"max_length": 12}}


@pytest.fixture(scope="module")
def generated(path: str) -> tuple[Any, dict[str, Any], Tensor]:
    """A trainer, one generation batch of it (old log-probabilities a step away), and its logits."""
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    trainer = make_trainer(path, objective="ahpo", beta=0.05, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.objective = dataclasses.replace(trainer.objective, normalization="group_mean_length")
    inputs = trainer._generate_and_score_completions(
        [{"prompt": row} for row in prompts(4)["prompt"] for _ in range(4)]
    )
    g = torch.Generator().manual_seed(0)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = inputs[name] + 0.2 * torch.randn(inputs[name].shape, generator=g)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    return trainer, inputs, logits


def test_group_mean_length_counts_prompts(generated: tuple[Any, dict[str, Any], Tensor]) -> None:
    trainer, inputs, logits = generated
    objective = hf.Objective.preset("ahpo", kl_coef=0.05, normalization="group_mean_length")
    trainer.args.objective, trainer.objective = "ahpo", objective
    lengths = inputs["completion_mask"].sum(-1)
    assert len(lengths.unique()) > 3
    check_against_logits(trainer, inputs, logits, objective, groups=torch.arange(4).repeat_interleave(4))


@pytest.mark.parametrize(("normalization", "of_micro_batch"), [
    ("response", 1), ("response_sum", 1), ("group_mean_length", 1), ("mean_length", 1 / 2),
])  # fmt: skip
def test_policy_loss_is_logged_as_trl_does(
    generated: tuple[Any, dict[str, Any], Tensor], normalization: Any, of_micro_batch: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A micro-batch's own mean, whatever the window; of a mean over the window's tokens, its part."""
    trainer, inputs, logits = generated
    objective = hf.Objective.preset("ahpo", kl_coef=0.05, normalization=normalization)
    expected = hf.policy_loss(
        logits, inputs["completion_ids"], inputs["advantages"], old_logprobs=inputs["old_per_token_logps"],
        ref_logprobs=inputs["ref_per_token_logps"], mask=inputs["completion_mask"], objective=objective,
        temperature=trainer.temperature, groups=torch.arange(4).repeat_interleave(4),
    ).loss  # fmt: skip
    monkeypatch.setattr(trainer.args, "objective", "ahpo")
    for name, value in {"objective": objective, "entropy_coef": 0.1, "_entropy_bonus_enabled": True}.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 2)
    trainer._take("train")
    trainer.compute_loss(trainer.model, dict(inputs))
    trainer._take("train")
    assert trainer._metrics["train"]["policy_loss"][-1] == pytest.approx(of_micro_batch * expected.item(), rel=1e-5)
