"""Objectives: presets, equality, validation; every shaping against an independent table (make_objectives.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import hpo_fused as hf
from hpo_fused import reference
from hpo_fused.interface import ADVANTAGE, OLD_LOGPROB, POLICY_WEIGHT, TERMS
from hpo_fused.surrogate import token_loss

VECTORS = json.loads((Path(__file__).parent / "objectives.json").read_text())


TABLED = {name: hf.Objective.preset(name) for name in ("grpo", "dapo", "sapo", "cispo", "mhpo")}
TABLED["clip_delta_dual"] = hf.Objective(shaping=hf.Clip(0.2, 0.2, delta=1.5, dual=3.0), weighting=None)


def preset_vectors(name: str) -> list[torch.Tensor]:
    rows = [row for row in VECTORS["rows"] if row["objective"] == name]
    assert len(rows) == 84
    return [
        torch.tensor([row[key] for row in rows], dtype=torch.float64)
        for key in ("log_ratio", "advantage", "loss", "dloss_dlogp")
    ]


def terms(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Of tokens of weight 1 whose log-probability is -1."""
    values = log_ratio.new_full((TERMS, *log_ratio.shape), torch.nan)
    values[ADVANTAGE], values[POLICY_WEIGHT], values[OLD_LOGPROB] = advantages, 1.0, -1 - log_ratio
    return values


@pytest.mark.parametrize("name", TABLED)
def test_shapings_match_the_table(name: str) -> None:
    x, advantage, loss, derivative = preset_vectors(name)
    ours = token_loss(TABLED[name].lower(off_policy=True), terms(x, advantage), torch.full_like(x, -1.0), None)
    torch.testing.assert_close(ours.losses, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.logprob_coefficients, derivative, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", TABLED)
def test_reference_matches_the_table(name: str) -> None:
    x, advantage, loss, derivative = preset_vectors(name)
    for i in range(len(x)):
        logp = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
        # One token: every normaliser is 1.
        value = reference.logprob_policy_loss(
            logp, advantage[i : i + 1], old_logprobs=logp.detach() - x[i], objective=TABLED[name]
        )
        (gradient,) = torch.autograd.grad(value, logp)
        torch.testing.assert_close(value, loss[i], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient.squeeze(), derivative[i], rtol=1e-11, atol=1e-14)


def test_presets_are_the_published_settings() -> None:
    presets = hf.Objective.presets()
    assert presets["grpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), None, "response")
    assert presets["dapo"] == hf.Objective("token", hf.Clip(0.2, 0.28), None, "mean_length")
    assert presets["dr_grpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), None, "constant")
    assert presets["gspo"] == hf.Objective("sequence", hf.Clip(3e-4, 4e-4), None, "response")
    assert presets["sapo"] == hf.Objective("token", hf.SoftGate(1.0, 1.05), None, "response")
    assert presets["cispo"] == hf.Objective("token", hf.TruncatedRatio(5.0), None, "mean_length")
    assert presets["mhpo"] == hf.Objective(
        "token", hf.LogFidelity(1.5, hf.Hazard(1.5, 1.0, 2.0, 0.8)), None, "response"
    )
    assert presets["hpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), hf.Hysteretic(0.6), "mean_length")
    assert presets["ahpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), hf.AdaptiveHysteretic(0.1), "mean_length")
    assert presets["mhpo_ahpo"] == hf.Objective()


def test_equal_objectives_hash_equal() -> None:
    one, two = (hf.Objective.preset("mhpo", kl_coef=0.1) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != hf.Objective.preset("mhpo")
    with pytest.raises(AttributeError):
        one.kl_coef = 0.2  # type: ignore[misc]


def test_mhpo_on_policy_carries_a_quarter_of_the_gradient() -> None:
    # zeta(0) = (ln 2)^1.5 + (ln 2 / 0.8)^2: the published formula's property, stated in the README.
    zeta = math.log(2) ** 1.5 + (math.log(2) / 0.8) ** 2
    assert zeta == pytest.approx(1.32779, abs=5e-6)
    assert math.exp(-zeta) == pytest.approx(0.26506, abs=5e-6)
    logits = torch.randn(1, 4, 9, dtype=torch.float64).float()
    gradients = {}
    for name in ("grpo", "mhpo"):
        leaf = logits.clone().requires_grad_()
        hf.policy_loss(leaf, torch.arange(4).reshape(1, 4), torch.tensor([1.0]), objective=name).loss.backward()
        gradients[name] = leaf.grad
    torch.testing.assert_close(gradients["mhpo"], math.exp(-zeta) * gradients["grpo"], rtol=1e-5, atol=0)


def test_mhpo_multiplier_peaks_near_a_ratio_of_1_78() -> None:
    x = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    spec = hf.Objective.preset("mhpo").lower(off_policy=True)
    out = token_loss(spec, terms(x, torch.ones_like(x)), torch.full_like(x, -1.0), None)
    peak = (-out.logprob_coefficients).max(0)
    assert peak.values.item() == pytest.approx(0.396, abs=5e-4)
    assert x[peak.indices].exp().item() == pytest.approx(1.78, abs=5e-3)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hf.Objective.preset("ppo2"), ValueError, "objective: expected one of grpo, .*'ppo2'"),
        (lambda: hf.Objective.preset("grpo", klcoef=1), TypeError, "expected fields of Objective.*klcoef"),
        (lambda: hf.Objective(ratio_level="word"), ValueError, "ratio_level.*'word'"),
        (lambda: hf.Objective(normalization="max"), ValueError, "normalization.*'max'"),
        (lambda: hf.Objective(shaping="clip"), TypeError, "shaping.*'clip'"),
        (lambda: hf.Objective(weighting=0.5), TypeError, "weighting.*0.5"),
        (lambda: hf.Objective(kl_coef=-0.1), ValueError, "kl_coef.*-0.1"),
        (lambda: hf.Objective(kl_coef="0.1"), TypeError, "kl_coef.*str"),
        (lambda: hf.Objective(entropy_coef=math.nan), ValueError, "entropy_coef.*nan"),
        (lambda: hf.Objective(max_log_ratio=0.0), ValueError, "max_log_ratio.*0.0"),
        (lambda: hf.Objective(max_log_ratio=1e3), ValueError, "max_log_ratio.*1000"),
        (lambda: hf.Objective(max_length=0), ValueError, "max_length.*0"),
        (lambda: hf.Objective(max_length=1.5), TypeError, "max_length.*1.5"),
        (
            lambda: hf.Objective("sequence", hf.TruncatedRatio()),
            ValueError,
            "shaping: TruncatedRatio.*sequence",
        ),
        (lambda: hf.Clip(low=1.5), ValueError, r"Clip.low.*\[0, 1\].*1.5"),
        (lambda: hf.Clip(high=-0.1), ValueError, "Clip.high"),
        (lambda: hf.Clip(delta=0.0), ValueError, "Clip.delta"),
        (lambda: hf.Clip(dual=0.5), ValueError, "Clip.dual"),
        (lambda: hf.LogFidelity(c=0), ValueError, "LogFidelity.c"),
        (lambda: hf.LogFidelity(hazard=1.0), TypeError, "LogFidelity.hazard"),
        (lambda: hf.Hazard(k_pos=-1), ValueError, "Hazard.k_pos"),
        (lambda: hf.Hazard(lambda_neg=math.inf), ValueError, "Hazard.lambda_neg"),
        (lambda: hf.SoftGate(tau_pos=0.0), ValueError, "SoftGate.tau_pos"),
        (lambda: hf.TruncatedRatio(high=0.0), ValueError, "TruncatedRatio.high"),
        (lambda: hf.TruncatedRatio(high=1.0, low=2.0), ValueError, "TruncatedRatio.low"),
        (lambda: hf.Hysteretic(1.2), ValueError, r"Hysteretic.alpha.*\[0, 1\].*1.2"),
        (lambda: hf.Hysteretic(True), TypeError, "Hysteretic.alpha"),
        (lambda: hf.AdaptiveHysteretic(-0.1), ValueError, "AdaptiveHysteretic.alpha_min"),
    ],
)
def test_bad_settings(build, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        build()
