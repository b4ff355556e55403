"""HPOTrainer against TRL's own GRPOTrainer: loss, every parameter's gradient, and every metric that TRL logs.

``pytest -m slow_trainers tests/test_integrations_trl.py`` runs what takes minutes: all combinations of options, the
other architectures, whole trainings, FSDP2. LoRA needs peft.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import re
import types
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")  # before imports
pytest.importorskip("trl", minversion="1.15", reason="needs the trl extra")

import torch
import transformers
import trl
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

import hpo_fused as hf
from hpo_fused.integrations.trl import HPOConfig, HPOTrainer, versions
from hpo_fused.integrations.trl import head as head_module
from hpo_fused.integrations.trl import trainer as trainer_module

from .trl_ranks import run_trl_ranks
from .trl_tiny import (
    SIZES,
    differences,
    generation_batch,
    gradients,
    make_trainer,
    prompts,
    rare_success,
    save_tiny,
    tiny_model,
    tokenizer,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = ("linear", "two_step", "logprobs")
SEQUENCE = {"importance_sampling_level": "sequence"}
slow = pytest.mark.slow_trainers

# Float32 against float32: logits of size 3 are rounded to 2e-7, the sum of a response's 12 log-ratios in VESPO's gate
# to 1e-6 times k. A wrong rule is off by 1e-3 and more, as the mutants show.
LOSS, GRADIENT, METRIC = 5e-6, 1e-5, 1e-5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on the disk."""
    return save_tiny(str(tmp_path_factory.mktemp("tiny")))


def with_sampler(trainer: Any, data: dict[str, Any]) -> Any:
    """What use_vllm=True sets, without vLLM."""
    if data.get("sampler"):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    return trainer


def assert_like_stock(path: str, options: dict[str, Any], data: dict[str, Any], heads: tuple[str, ...] = HEADS) -> Any:
    """The last trainer, once loss, gradients and metrics are stock's with every head."""
    stock = with_sampler(make_trainer(path, stock=True, **options), data)
    batches = generation_batch(stock.model, **data)
    loss, expected, logs = gradients(stock, batches)
    for head in heads:
        ours = with_sampler(make_trainer(path, head=head, **options), data)
        total, found, own = gradients(ours, batches)
        assert total == pytest.approx(loss, rel=LOSS, abs=LOSS), head
        assert differences(found, expected) < GRADIENT, head
        for key, value in logs.items():
            assert own[key] == pytest.approx(value, rel=METRIC, abs=METRIC, nan_ok=True), (head, key)
    return ours, logs


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


def wrong_statistics(self: Any, inputs: dict[str, Any], mask: Tensor) -> hf.BatchStatistics:
    """The micro-batch taken for the optimiser batch, as without ``statistics``."""
    return hf.BatchStatistics.from_batch(inputs["advantages"], mask)


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


OWN = {
    "ahpo": "ahpo",
    "groups": {"preset": "hpo", "normalization": "group_mean_length"},
    "mhpo_ahpo": "mhpo_ahpo",
    "gspo": "gspo",
}


@pytest.mark.parametrize(
    "name", [*list(OWN)[:2], *(pytest.param(n, marks=slow) for n in [*list(OWN)[2:], *hf.Objective.presets()])]
)
def test_batches_split_anyhow_train_alike(path: str, name: str) -> None:
    """16 x 1, 8 x 2 and 4 x 4 through generation, shuffling and cutting: the same parameters after a step."""
    ends = []
    for size, steps in ((16, 1), (8, 2), (4, 4)):
        ours = trained(
            path, objective=OWN.get(name, name), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=1, learning_rate=1.0, num_iterations=1,
        )  # fmt: skip
        ends.append({n: p.detach() for n, p in ours.model.named_parameters()})
        if isinstance(ours.objective.weighting, hf.AdaptiveHysteretic):
            assert ours.state.log_history[0]["hpo/hysteretic_weight"] < 0.8
    begin = dict(tiny_model(path).named_parameters())
    moved = [{n: p - begin[n] for n, p in end.items()} for end in ends]
    assert all(float(p.norm()) > 0 for p in moved[0].values())
    for other in moved[1:]:
        # A parameter of size 1 is rounded to 6e-8, a step moves it by 1e-2.
        assert differences(other, moved[0]) < 1e-4


def test_counts_of_micro_batches_train_differently(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HPOTrainer, "_statistics", wrong_statistics)
    with pytest.raises(AssertionError):
        test_batches_split_anyhow_train_alike(path, "ahpo")


TRAININGS = {
    "dapo": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 1,
        "mask_truncated_completions": True,
    },
    "kl": {"loss_type": "grpo", "beta": 0.1},
    "gspo": {"loss_type": "grpo", "epsilon": 0.003, **SEQUENCE},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0, "mask_truncated_completions": True},
    "long-window": {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 1},
    "short-last-window": {
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 2,
        "num_train_epochs": 1,
        "max_steps": -1,
    },
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("head", ["linear", *(pytest.param(head, marks=slow) for head in HEADS[1:])])
def test_trains_and_evaluates_as_stock(path: str, name: str, head: str) -> None:
    options = {"max_steps": 6, **TRAININGS[name]}
    stock, ours = trained(path, stock=True, **options), trained(path, head=head, **options)
    assert differences(dict(ours.model.named_parameters()), dict(stock.model.named_parameters())) < 2e-5
    skipped = ("time", "runtime", "per_second", "total_flos", "epoch", "step")
    for found, expected in zip(ours.state.log_history, stock.state.log_history, strict=True):
        for key, value in expected.items():
            if isinstance(value, float) and not any(part in key for part in skipped):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    evaluated = []
    for each in (stock, ours):
        torch.manual_seed(0)
        evaluated.append(each.evaluate(prompts(4))["eval_loss"])
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4, abs=1e-6)


def test_metrics_cost_one_collective_per_logging(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_trainer(path, objective="mhpo_ahpo")
    batches = generation_batch(ours.model)
    calls: list[str] = []
    for name in ("gather", "reduce", "gather_for_metrics"):
        method = getattr(ours.accelerator, name)

        def counted(*args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(ours.accelerator, name, counted)
    _, _, logs = gradients(ours, batches)
    assert calls == ["gather"]
    # Those of both micro-batches together, against both calls' own.
    positive = sum(((b["advantages"] > 0) & b["completion_mask"].any(-1)).sum() for b in batches)
    signed = sum(((b["advantages"] != 0) & b["completion_mask"].any(-1)).sum() for b in batches)
    assert logs["hpo/positive_fraction"] == pytest.approx(float(positive / signed))
    assert logs["hpo/hysteretic_weight"] == pytest.approx(
        float((batches[0]["hpo_positive"] / batches[0]["hpo_negative"]).clamp(0.1, 1))
    )


def test_metrics_of_other_names_are_taken_first(path: str) -> None:
    """On-policy calls have no approx_kl: the two kinds are not added up."""
    ours = make_trainer(path, objective="ahpo")
    first, second = generation_batch(ours.model)[0], generation_batch(ours.model, on_policy=True, seed=1)[1]
    _, _, logs = gradients(ours, [first, second, second])
    ratios = {}
    for name, batch in (("off", first), ("on", second)):
        ratios[name] = gradients(ours, [batch])[2]
    assert logs["hpo/approx_kl"] == pytest.approx(ratios["off"]["hpo/approx_kl"])
    entropies = [ratios[name]["hpo/entropy"] for name in ("off", "on")]
    assert logs["hpo/entropy"] == pytest.approx(sum(entropies) / 2)
    assert logs["entropy"] == pytest.approx((ratios["off"]["entropy"] + 2 * ratios["on"]["entropy"]) / 3)


def test_long_waits_for_a_logging_are_cut(path: str) -> None:
    """Sums in float32 count no further than 2^24, and nothing grows without end where nobody logs."""
    ours = make_trainer(path)
    ours.model.train()
    batch = generation_batch(ours.model)[0]
    with torch.no_grad():
        for _ in range(257):
            ours.compute_loss(ours.model, dict(batch))
    assert len(ours._metrics["train"]["entropy"]) == 256


def test_skip_inactive_changes_metrics_alone(path: str) -> None:
    whole, part = (make_trainer(path, objective="ahpo", skip_inactive=skip) for skip in (False, True))
    batches = generation_batch(whole.model)
    (loss, expected, logs), (other, found, own) = gradients(whole, batches), gradients(part, batches)
    assert loss == other
    assert differences(found, expected) == 0
    assert "entropy" in logs
    assert "entropy" not in own
    assert own["hpo/entropy"] != logs["hpo/entropy"]
    for key in logs.keys() - {"entropy"}:
        assert key.startswith("hpo/") or own[key] == pytest.approx(logs[key]), key


def test_nothing_to_learn_from_is_a_zero_with_a_gradient(path: str) -> None:
    for head in HEADS:
        ours = make_trainer(path, objective="ahpo", head=head)
        batches = generation_batch(ours.model)
        batches[0]["completion_mask"] = torch.zeros_like(batches[0]["completion_mask"])
        batches[1]["advantages"] = torch.zeros_like(batches[1]["advantages"])
        total, found, logs = gradients(ours, batches)
        assert total == 0
        assert len(found) == len(list(ours.model.parameters()))
        assert not any(value.any() for value in found.values())
        assert "clip_ratio/low_min" in logs


def test_options_that_need_log_probabilities_first_say_so_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    ours = make_trainer(path, top_entropy_quantile=0.5, skip_inactive=True)
    gradients(ours, generation_batch(ours.model))
    gradients(make_trainer(path, entropy_coef=0.1, beta=0.1), generation_batch(ours.model))
    sentence = "head='linear' runs as 'two_step', with one GEMM more, for top_entropy_quantile"
    assert said == [f"{sentence}; skip_inactive has no effect there"]


def test_forward_keeps_the_classes_signature(path: str) -> None:
    ours = make_trainer(path)
    expected = list(inspect.signature(type(ours.model).forward).parameters)[1:]
    assert list(inspect.signature(ours.model.forward).parameters) == expected
    assert "logits_to_keep" in expected  # without it generate() would make the whole prompt's logits


GIVEN = "expected its default"
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "preset": ({"objective": "ppo"}, "objective: expected one of grpo, .*got 'ppo'"),
    "key": ({"objective": {"preset": "ahpo", "eps": 0.1}}, "objective: expected keys among .*got 'eps'"),
    "value": ({"objective": {"shaping": {"kind": "clip", "low": 2.0}}}, "shaping.low: expected a number in"),
    "head": ({"head": "fused"}, "head: expected one of linear, two_step, logprobs, got 'fused'"),
    "loss_type": ({"objective": "ahpo", "loss_type": "grpo"}, f"loss_type: {GIVEN} .'dapo'. beside objective='ahpo'"),
    "epsilon": ({"objective": "ahpo", "epsilon": 0.1}, f"epsilon: {GIVEN}"),
    "epsilon_high": ({"objective": "ahpo", "epsilon_high": 0.1}, f"epsilon_high: {GIVEN}"),
    "delta": ({"objective": "ahpo", "delta": 2.0}, f"delta: {GIVEN}"),
    "sapo": ({"objective": "sapo", "sapo_temperature_neg": 2.0}, f"sapo_temperature_neg: {GIVEN}"),
    "vespo": ({"objective": "vespo", "vespo_k_pos": 1.0}, f"vespo_k_pos: {GIVEN}"),
    "level": ({"objective": "gspo", **SEQUENCE}, f"importance_sampling_level: {GIVEN}"),
    "beta": ({"objective": {"preset": "ahpo", "kl_coef": 0.1}, "beta": 0.1}, f"beta: {GIVEN} .*objective.kl_coef"),
    "kl": (
        {"objective": {"kl": "k2"}, "beta": 0.1, "use_bias_correction_kl": False},
        f"use_bias_correction_kl: {GIVEN} .*objective.kl",
    ),
    "entropy": (
        {"objective": {"entropy_coef": 0.1}, "entropy_coef": 0.1},
        f"entropy_coef: {GIVEN} .*objective.entropy_coef",
    ),
    "adaptive": ({"objective": {"entropy_coef": 0.1}, "use_adaptive_entropy": True}, f"use_adaptive_entropy: {GIVEN}"),
    "gmpo": ({"objective": "gmpo", "beta": 0.1}, "kl: expected another kind than 'k3_ratio' for GeometricMean"),
    "unknown loss": ({"loss_type": "ppo"}, "loss_type: expected one of .*got 'ppo'"),
    "skip head": ({"skip_inactive": True, "head": "two_step"}, "skip_inactive: expected False beside head='two_step'"),
    "skip": ({"skip_inactive": True, "use_adaptive_entropy": True}, "skip_inactive: expected False beside use_adapt"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_settings_are_refused_by_name(name: str) -> None:
    options, message = REFUSALS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        HPOConfig("out", use_cpu=True, bf16=False, **options)


def test_models_and_versions_are_refused_by_name(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    headless, doubled = tiny_model(path), tiny_model(path)
    monkeypatch.setattr(headless, "get_output_embeddings", lambda: None)
    with pytest.raises(TypeError, match=r"model: expected an LM head .*Qwen2ForCausalLM.*got none"):
        make_trainer(path, model=headless)

    def louder(*args: Any, **kwargs: Any) -> Any:
        output = type(doubled).forward(doubled, *args, **kwargs)
        output.logits = 1.1 * output.logits
        return output

    doubled.forward = louder
    with pytest.raises(ValueError, match=r"model: expected Qwen2ForCausalLM.forward to give the LM head's logits"):
        make_trainer(path, model=doubled)
    make_trainer(path, model=doubled, head="logprobs")
    with pytest.raises(TypeError, match="args: expected an HPOConfig, got a GRPOConfig"):
        HPOTrainer(model=tiny_model(path), args=trl.GRPOConfig("out", use_cpu=True, bf16=False))
    for found, expected in (
        ("1.14.2", ImportError),
        ("2.0.0", ImportError),
        ("1.15.0", None),
        ("1.99.0", "newer than"),
    ):
        monkeypatch.setattr(versions, "version", lambda name, found=found: found)
        if expected is ImportError:
            with pytest.raises(ImportError, match=rf"expected trl >= 1.15, < 2.0, found trl {found}"):
                versions.check_trl()
        else:
            assert expected is None or expected in str(versions.check_trl())


def test_a_batch_that_nobody_counted_is_refused(path: str) -> None:
    ours = make_trainer(path, objective="ahpo")
    batch = generation_batch(ours.model)[0]
    del batch["hpo_negative"]
    with pytest.raises(ValueError, match="inputs: expected 'hpo_negative'"):
        ours.compute_loss(ours.model, batch)


@pytest.mark.parametrize(
    "value", ["ahpo", {"preset": "mhpo", "kl_coef": 0.01, "shaping": {"kind": "log_fidelity", "c": 2.0}}]
)
def test_objectives_come_from_command_lines_and_files(tmp_path: Any, value: Any) -> None:
    import yaml
    from transformers import HfArgumentParser

    text = value if isinstance(value, str) else json.dumps(value)
    common = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    parsed = HfArgumentParser(HPOConfig).parse_args_into_dataclasses(
        [*common, "--objective", text, "--head", "two_step"]
    )
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"objective": value, "head": "two_step", "output_dir": "out", "use_cpu": True, "bf16": False})
    )
    read = trl.TrlParser(HPOConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    given = HPOConfig("out", use_cpu=True, bf16=False, objective=hf.Objective.from_mapping(value), head="two_step")
    for config in (*parsed, *read, given):
        assert hf.Objective.from_mapping(config.objective) == hf.Objective.from_mapping(value)
        assert config.head == "two_step"
        assert json.loads(config.to_json_string())["objective"] == config.objective


def test_objectives_take_what_trl_says_elsewhere(path: str) -> None:
    def objective(**options: Any) -> hf.Objective:
        return trainer_module.objective_of(HPOConfig("out", use_cpu=True, bf16=False, **options))

    clip = {"kind": "clip", "low": 0.2, "high": 0.28}
    for loss_type, same in {
        "grpo": {"preset": "grpo", "shaping": clip},
        "dapo": {"preset": "dapo", "shaping": clip},
        "dr_grpo": {"preset": "dr_grpo", "shaping": clip},
        "cispo": {"preset": "cispo", "shaping": {"kind": "truncated_ratio", "high": 0.28}},
        "sapo": "sapo",
        "vespo": "vespo",
    }.items():
        assert objective(objective=same) == objective(loss_type=loss_type, epsilon_high=0.28)
    assert objective(objective={"preset": "gspo", "shaping": clip}) == objective(
        loss_type="grpo", epsilon_high=0.28, **SEQUENCE
    )
    assert objective(objective="dr_grpo", max_completion_length=77).max_length == 77
    assert objective(objective={"preset": "dr_grpo", "max_length": 9}).max_length == 9
    assert (objective(objective="ahpo", beta=0.1).kl, objective(objective="ahpo", beta=0.1).kl_coef) == (
        "k3_ratio",
        0.1,
    )
    assert objective(objective="ahpo", beta=0.1, use_bias_correction_kl=False).kl == "k3"
    for beta in ({"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False}):
        assert objective(objective=hf.Objective.preset("ahpo"), **beta) == objective(objective="ahpo", **beta)
    assert objective(objective=hf.Objective.preset("ahpo", kl="k2"), beta=0.1).kl == "k2"
    assert objective(objective={"preset": "ahpo", "kl": "k2"}, beta=0.1).kl == "k2"
    ours = make_trainer(path, objective={"preset": "ahpo", "kl_coef": 0.1})
    assert ours.ref_model is not None
    assert ours.beta == 0.1


def test_two_lines_of_a_script_change(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """docs/trl.md's example, on a model that trains in a second."""
    text = (Path(__file__).parent.parent / "docs" / "trl.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "max_steps" not in block
    quick = ", max_steps=2, max_completion_length=8, use_cpu=True, report_to='none', logging_steps=1, num_generations=4"
    ours = block.replace('output_dir="out"', f'output_dir="{tmp_path}"{quick}')
    model = tiny_model(path)
    scope = {"model": model, "reward": rare_success, "dataset": prompts()}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer())
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer())
    with contextlib.redirect_stdout(io.StringIO()):
        exec(ours, scope)
    history = scope["trainer"].state.log_history
    assert {"clip_ratio/low_mean", "entropy", "hpo/hysteretic_weight"} <= history[0].keys()


def test_two_processes(path: str) -> None:
    run_trl_ranks("ddp", path)


@pytest.mark.parametrize("part", ["every_head", "fsdp2"])
def test_two_processes_any_way(path: str, part: str) -> None:
    run_trl_ranks(part, path)


def architectures() -> list[Any]:
    """Heads with a softcap, a scale, a bias, tied to the embeddings; mixtures of experts with their balancing loss."""
    softcap = {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}
    made = {
        "Gemma2": softcap,
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 3.0},
        "Phi": {},
        "Qwen2Moe": {**experts, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    }
    return [pytest.param(*row, id=row[0]) for row in made.items()]


@pytest.mark.parametrize(("name", "changes"), architectures())
def test_other_heads(tmp_path: Any, name: str, changes: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "eos_token_id": 1, "bos_token_id": 1, **changes})
    path = save_tiny(str(tmp_path), getattr(transformers, f"{name}ForCausalLM"), config)
    experts = {"router_aux_loss_coef": 0.1} if "num_experts_per_tok" in changes else {}
    for options in ({"beta": 0.1}, {"loss_type": "grpo", "epsilon": 0.05, **SEQUENCE}):
        _, logs = assert_like_stock(path, options | experts, {})
        assert ("aux_loss" in logs) == bool(experts)


def test_a_head_without_its_cap_is_noticed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    path = save_tiny(str(tmp_path), transformers.Gemma2ForCausalLM, config)
    monkeypatch.setattr(head_module, "_transform", lambda config, temperature: {"temperature": temperature})
    with pytest.raises(ValueError, match=r"model: expected Gemma2ForCausalLM.forward to give the LM head's logits"):
        make_trainer(path)


def test_a_model_on_one_gpu_is_probed() -> None:
    """accelerate calls the only process's GPU "cuda", its parameters say "cuda:0"."""

    def lies(device: str, *places: str, size: int = 1) -> bool:
        parts = [types.SimpleNamespace(device=torch.device(place), numel=lambda: size) for place in places]
        return head_module.lies_on(types.SimpleNamespace(parameters=lambda: parts), torch.device(device))

    assert lies("cuda", "cuda:0", "cuda:0")
    assert lies("cuda:1", "cuda:1")
    assert lies("cpu", "cpu")
    assert not lies("cuda", "cuda:0", "cuda:1")
    assert not lies("cuda:1", "cuda:0")
    assert not lies("cuda", "cpu")
    assert not lies("cuda", "cuda:0", size=0)  # ZeRO-3's parts


@pytest.mark.parametrize("precise", [False, pytest.param(True, marks=slow)])
def test_bfloat16_is_as_near_as_stock(path: str, precise: bool) -> None:
    """The whole gradient's distance from float32's, under autocast."""
    options = {"beta": 0.1, "cast_lm_head_to_fp32": precise}
    batches = generation_batch(tiny_model(path))

    def whole(**more: Any) -> Tensor:
        return torch.cat([g.flatten() for g in gradients(make_trainer(path, **options, **more), batches)[1].values()])

    exact = whole(stock=True)
    stock, *ours = (float((whole(**more) - exact).norm()) for more in (
        {"stock": True, "bf16": True}, *({"bf16": True, "head": head} for head in HEADS)
    ))  # fmt: skip
    assert all(error < 1.1 * stock for error in ours), (stock, ours)


@pytest.mark.parametrize("kind", ["lora", "lora-tied", "saved-head", "prompt", "prefix"])
def test_adapters(tmp_path: Any, kind: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    path = save_tiny(str(tmp_path), tie=kind == "lora-tied")
    task = {"task_type": "CAUSAL_LM"}
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
        **task,
    }
    adapter = {
        "lora": lambda: peft.LoraConfig(**lora),
        "lora-tied": lambda: peft.LoraConfig(**lora),
        "saved-head": lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
    }[kind]

    def made(**more: Any) -> Any:
        torch.manual_seed(0)
        return make_trainer(path, peft_config=adapter(), beta=0.1 if "lora" in kind else 0.0, **more)

    stock = made(stock=True)
    batches = generation_batch(stock.model)
    loss, expected, _ = gradients(stock, batches)
    for head in HEADS:
        total, found, _ = gradients(made(head=head), batches)
        assert total == pytest.approx(loss, rel=LOSS, abs=LOSS)
        assert differences(found, expected) < GRADIENT


def test_tied_and_checkpointed_and_compiled(tmp_path: Any) -> None:
    path = save_tiny(str(tmp_path), tie=True)
    assert_like_stock(path, {"beta": 0.1, "gradient_checkpointing": True}, {})
    expected, batches = None, generation_batch(tiny_model(path))
    for compiled in (False, True):
        ours = make_trainer(path, objective="ahpo")
        model = torch.compile(ours.model, backend="eager") if compiled else ours.model
        _, found, _ = gradients(ours, batches, model)
        found = {name.removeprefix("_orig_mod."): g for name, g in found.items()}
        expected = expected or found
        assert differences(found, expected) < GRADIENT


@slow
@pytest.mark.parametrize("preset", list(hf.Objective.presets()))
def test_fifty_steps(path: str, preset: str) -> None:
    ours = trained(path, objective=preset, max_steps=50, learning_rate=3e-2, max_grad_norm=1.0)
    assert all(p.isfinite().all() for p in ours.model.parameters())
    assert all(math.isfinite(row["loss"]) for row in ours.state.log_history if "loss" in row)
