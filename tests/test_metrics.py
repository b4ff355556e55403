"""Metrics as sums and counts: of one rule in every function, and right after micro-batches and ranks are added up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

from .samples import Sample, every_path, logits_arguments


def test_metrics(device: torch.device) -> None:
    logprobs = torch.full((3, 2), -1.0, device=device)
    old = torch.tensor([[-1.0, -1.5], [-0.5, -1.0], [-1.0, -9.0]], device=device)
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]], device=device)
    advantages = torch.tensor([1.0, -1.0, 0.0], device=device)
    objective = hf.Objective.preset("ahpo", kl_coef=0.1)
    out = hf.logprob_policy_loss(
        logprobs, advantages, old_logprobs=old, ref_logprobs=old, mask=mask, objective=objective
    )
    values = {key: value.item() for key, value in out.metrics().items()}
    close = 2e-6  # expm1 to two units of 0.65 in a difference of 0.15: 32 roundings
    x = torch.tensor([0.0, 0.5, -0.5, 0.0, 0.0], dtype=torch.float64)
    assert values.pop("ratio_mean") == pytest.approx(x.exp().mean().item(), rel=close)
    assert values.pop("clip_fraction") == pytest.approx(2 / 5)  # r = 1.65 with A > 0 and r = 0.61 with A < 0
    assert (values.pop("clip_high_fraction"), values.pop("clip_high_max")) == pytest.approx((1 / 5, 1 / 2))
    assert (values.pop("clip_low_fraction"), values.pop("clip_low_min")) == pytest.approx((1 / 5, 0.0))
    assert values.pop("clip_dual_fraction") == 0.0
    assert values.pop("approx_kl") == pytest.approx((x.exp() - x - 1).mean().item(), rel=close)
    assert values.pop("kl_ref") == pytest.approx(((-x).exp() + x - 1).mean().item(), rel=close)
    assert values.pop("hysteretic_weight") == 1.0
    assert values.pop("positive_fraction") == 0.5
    assert values.pop("rows") == 5
    assert values.pop("active_fraction") == 1.0  # the KL term reaches every unmasked row
    assert not values

    fidelity = hf.logprob_policy_loss(logprobs, advantages, old_logprobs=old, mask=mask, objective="mhpo").metrics()
    psi = 1.5 * torch.tanh(x[:4] / 1.5)  # the fifth has no advantage and is no active row
    zeta = torch.log1p(psi.exp()) ** 1.5 + (torch.log1p((-psi).exp()) / 0.8) ** 2
    assert fidelity["psi_mean"].item() == pytest.approx(psi.mean().item(), abs=1e-7)
    assert fidelity["hazard_mean"].item() == pytest.approx(zeta.mean().item(), rel=close)
    assert fidelity["survival_mean"].item() == pytest.approx((-zeta).exp().mean().item(), rel=close)
    assert fidelity["active_fraction"].item() == pytest.approx(4 / 5)
    assert {"clip_fraction", "kl_ref", "hysteretic_weight", "entropy"}.isdisjoint(fidelity)


def test_metrics_of_a_fused_call_skip_inactive_rows(backend: str, device: torch.device) -> None:
    logits, tokens, advantages, old = logits_arguments(device)
    out = hf.policy_loss(logits, tokens, advantages, old_logprobs=old, backend=backend)
    active = out.active
    ratio = (out.logprobs - old)[active].exp().mean()
    torch.testing.assert_close(out.metrics()["ratio_mean"], ratio)
    torch.testing.assert_close(out.metrics()["entropy"], out.entropy[active].mean())
    assert out.metrics()["active_fraction"].item() == pytest.approx(0.8)


def test_approx_kl_is_of_the_tokens_own_ratios() -> None:
    """At sequence level log-ratios 0.5 and -0.5 have mean 0, which is no reason to report that nothing moved."""
    old = torch.tensor([[-0.5, 0.5]])
    metrics = hf.logprob_policy_loss(torch.zeros(1, 2), torch.ones(1), old_logprobs=old, objective="gspo").metrics()
    assert metrics["approx_kl"].item() == pytest.approx(0.1276, abs=5e-5)
    assert metrics["ratio_mean"].item() == 1.0


@every_path
def test_what_was_not_computed_is_absent(path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    metrics = sample.loss(sample.values, advantages=torch.zeros(5, device=device), objective="grpo").metrics()
    assert {name: value.item() for name, value in metrics.items()} == {"rows": 0.0, "active_fraction": 0.0}


@every_path
def test_a_token_without_weight_is_in_no_mean(path: str, device: torch.device) -> None:
    """Its old log-probability may be anything; log-probabilities that are given follow the same rule."""
    sample = Sample(path, device)
    old = sample.logprobs(sample.values).logprobs.detach().clone()
    old[0, 1] = -99.0
    weights = torch.ones(5, 4, device=device)
    weights[0, 1] = 0.0
    out = sample.loss(sample.values, old_logprobs=old, token_weights=weights, objective="grpo")
    given = hf.logprob_policy_loss(
        out.logprobs.nan_to_num(), sample.advantages, old_logprobs=old, token_weights=weights, objective="grpo"
    )
    assert out.metrics()["ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)
    assert given.metrics()["ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)
    assert out.metrics()["rows"] == given.metrics()["rows"] == 15
    assert out.metrics()["active_fraction"].item() == pytest.approx(15 / 20)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kl", "right"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.10653), ("k3+", 0.10653), ("k3_ratio", 0.10653)]
)
def test_kl_ref_is_the_objectives(kl: str, right: float, kl_coef: float) -> None:
    """Of d = -0.5, whether it is in the loss or only watched."""
    objective = hf.Objective.preset("grpo", kl=kl, kl_coef=kl_coef)
    ref = torch.full((1, 2), -0.5)
    metrics = hf.logprob_policy_loss(torch.zeros(1, 2), torch.ones(1), ref_logprobs=ref, objective=objective).metrics()
    assert metrics["kl_ref"].item() == pytest.approx(right, rel=1e-4)


def test_micro_batches_add_up() -> None:
    """Of 12 tokens and of 4, 3 clipped each: 6 of 16, not the mean of a quarter and three quarters."""
    sums = []
    for tokens in (12, 4):
        old = torch.zeros(1, tokens)
        old[:, :3] = -1.0
        out = hf.logprob_policy_loss(torch.zeros(1, tokens), torch.ones(1), old_logprobs=old, objective="grpo")
        sums.append(out.metric_sums())
    metrics = (sums[0] + sums[1]).metrics()
    assert metrics["clip_fraction"].item() == 0.375
    assert metrics["clip_high_max"].item() == 0.75
    assert metrics["clip_low_min"].item() == 0.0
    other = hf.logprob_policy_loss(torch.zeros(1, 1), torch.ones(1), objective="mhpo").metric_sums()
    with pytest.raises(ValueError, match=r"names .*clip_fraction.*psi_mean"):
        _ = sums[0] + other
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = sums[0] + 1


UP, DOWN = 1.0, -1.0
SIDES: dict[str, tuple[Any, list[tuple[float, float]], tuple[int, int, int]]] = {
    # Shaping; ratios and advantages; tokens below the lower bound, above the upper one, and at delta or dual.
    "clip": (hf.Clip(0.2, 0.3), [(0.7, UP), (0.7, DOWN), (1.25, UP), (1.4, UP), (1.5, UP), (1.4, DOWN)], (1, 2, 0)),
    "delta": (hf.Clip(0.2, 0.3, delta=2.0), [(0.7, DOWN), (1.4, UP), (2.5, UP), (1.9, DOWN), (2.5, DOWN)], (1, 2, 1)),
    "dual": (hf.Clip(0.2, 0.3, dual=3.0), [(0.7, DOWN), (0.7, DOWN), (1.4, UP), (2.9, DOWN), (3.1, DOWN)], (2, 1, 1)),
    "truncated": (hf.TruncatedRatio(2.0, 0.5), [(0.4, UP), (0.4, DOWN), (1.0, UP), (2.1, DOWN)], (2, 1, 0)),
    "truncated-zero": (hf.TruncatedRatio(2.0, 0.5, "zero"), [(0.4, UP), (1.0, UP), (2.1, UP), (9.0, DOWN)], (1, 2, 0)),
    "per-sign": (hf.TruncatedRatio(1.0, 1.0, low_neg=0.0), [(0.4, UP), (9.0, UP), (0.4, DOWN), (9.0, DOWN)], (0, 1, 0)),
    "geometric": (hf.GeometricMean(0.4, 0.4), [(0.5, UP), (0.5, DOWN), (1.6, UP), (1.7, UP), (1.6, DOWN)], (1, 2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_clipping_by_side(name: str, backend: str) -> None:
    shaping, tokens, (low, high, dual) = SIDES[name]
    ratios, advantages = (torch.tensor(values) for values in zip(*tokens, strict=True))
    # A response of its own for each token, and one more that clips nothing.
    old = torch.cat([-ratios.log(), torch.zeros(1)])[:, None]
    objective = hf.Objective("token", shaping, None, "response")
    out = hf.logprob_policy_loss(
        torch.zeros_like(old), torch.cat([advantages, torch.ones(1)]), old_logprobs=old, objective=objective,
        backend=backend,
    )  # fmt: skip
    metrics, count = {key: value.item() for key, value in out.metrics().items()}, len(old)
    assert [metrics[f"clip_{side}_fraction"] * count for side in ("low", "high", "dual")] == pytest.approx(
        [low, high, dual]
    )
    assert metrics["clip_fraction"] * count == pytest.approx(low + high + dual)
    assert (metrics["clip_low_min"], metrics["clip_high_max"]) == (0.0, float(high > 0))


def test_extremes_are_of_responses() -> None:
    """Least share below the lower bound, greatest above the upper one, among responses with a computed row."""
    low, high, inside = 0.5, -0.5, 0.0
    old = torch.tensor([[low, low, high, inside], [low, inside, inside, 9.0], [high, high, 9.0, 9.0], [9.0] * 4])
    mask = old < 9.0
    advantages = torch.where(old > 0, -1.0, 1.0)  # those at which the bound is at work
    sums = []
    for part in (slice(0, 2), slice(2, 4), slice(0, 4)):
        out = hf.logprob_policy_loss(
            torch.zeros(4, 4)[part], advantages[part], old_logprobs=old[part], mask=mask[part], objective="grpo"
        )
        sums.append(out.metric_sums())
    for metrics in (sums[0] + sums[1], sums[2]):
        assert metrics.metrics()["clip_low_min"].item() == 0.0
        assert metrics.metrics()["clip_high_max"].item() == 1.0
    assert sums[0].metrics()["clip_low_min"].item() == pytest.approx(1 / 3)
    assert sums[0].metrics()["clip_high_max"].item() == 0.25


@pytest.mark.parametrize("name", ["ahpo", "mhpo", "gspo", "vespo", "gmpo"])
def test_names_depend_on_no_values(name: str) -> None:
    """Or ranks would add up different things: an idle call and a masked one have the names of any other."""
    logprobs, old = torch.zeros(2, 3), torch.full((2, 3), 0.1)
    names = {
        hf.logprob_policy_loss(
            logprobs, advantages, old_logprobs=old, ref_logprobs=old, mask=mask, objective=name
        ).metric_sums().names
        for advantages in (torch.ones(2), torch.zeros(2), torch.ones(2, 3))
        for mask in (None, torch.ones(2, 3), torch.zeros(2, 3))
    }  # fmt: skip
    assert len(names) == 1


@pytest.mark.parametrize("name", ["ahpo", "mhpo", "vespo", "gmpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_read_no_value(name: str, packed: bool) -> None:
    """Tensors of the meta device have none: what reads them raises, as means do."""
    with torch.device("meta"):
        shape, layout = ((6,), {"cu_seqlens": torch.zeros(4, dtype=torch.int32)}) if packed else ((3, 2), {})
        given: dict[str, Tensor] = {
            key: torch.zeros(shape) for key in ("old_logprobs", "ref_logprobs", "token_weights")
        }
        out = hf.logprob_policy_loss(
            torch.zeros(shape), torch.ones(3), entropy=torch.zeros(shape), mask=torch.ones(shape), objective=name,
            entropy_weights=torch.tensor(0.1), loss_scale=torch.tensor(0.5), backend="torch", **given, **layout,
        )  # fmt: skip
        sums = out.metric_sums()
        assert (sums + sums).values.shape == (len(sums.names),)
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            sums.metrics()


def test_a_response_s_ratio_counts_where_all_of_it_is_known(backend: str, device: torch.device) -> None:
    """Rows of an entropy bonus alone are known without the others, whose log-ratios the response's mean needs."""
    old = torch.tensor([[0.5, -0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], device=device)
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], device=device)
    logprobs = torch.zeros(2, 4, device=device)
    values = hf.logprob_policy_loss(
        logprobs, torch.zeros(2, device=device), entropy=logprobs, old_logprobs=old, entropy_weights=weights,
        objective="gspo", backend=backend,
    ).metrics()  # fmt: skip
    assert values["rows"].item() == 5
    assert values["ratio_mean"].item() == pytest.approx(math.exp(-1.0))
    assert values["approx_kl"].item() == pytest.approx((math.exp(-0.5) - 0.5 + 4 * math.exp(-1.0)) / 5)
