"""The loss from log-probabilities, by either backend, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference

from .equivalence import worst

SHAPINGS: dict[str, Any] = {
    "clip": hf.Clip(0.2, 0.3, dual=3.0), "fidelity": hf.LogFidelity(), "gate": hf.SoftGate(2.0, 3.0),
    "truncated": hf.TruncatedRatio(1.5, 0.8, "zero", high_neg=1.1), "gamma": hf.GammaGate(),
    "geometric": hf.GeometricMean(0.3, 0.5), "dro": hf.DRO(0.13),
}  # fmt: skip


def made(layout: str, level: str, per_token: bool, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Log-probabilities, advantages and keywords; lengths beyond one step of the kernel, a response fully masked."""
    generator = torch.Generator().manual_seed(int(per_token))
    shape = (5, 300) if layout == "padded" else (5, 60)
    logprobs = -3 * torch.rand(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[2] = False
    advantages = torch.randn(shape, generator=generator) if per_token else torch.tensor([1.0, -1.0, 0.0, -0.5, 2.0])
    # The mean of a response's log-ratios reaches both clip bounds, single ones the clamp.
    x = 0.3 * torch.randn(shape, generator=generator) + torch.tensor([0.4, -0.4, 0.0, 0.1, -0.1])[:, None]
    x[:, 3] = 25.0
    if level == "sequence_sum":  # of up to 230 tokens: as large as a mean is at the others
        x = torch.where(x == 25.0, 0.0, 0.01 * x)
    keywords = {
        "old_logprobs": logprobs - x, "ref_logprobs": logprobs + 0.1 * torch.randn(shape, generator=generator),
        "mask": mask, "token_weights": torch.rand(shape, generator=generator),
        "entropy": torch.rand(shape, generator=generator),
    }  # fmt: skip
    for key in ("old_logprobs", "ref_logprobs", "token_weights"):
        keywords[key][~mask] = torch.nan
    if layout == "packed":
        keywords = {key: value.flatten() for key, value in keywords.items()}
        logprobs, advantages = logprobs.flatten(), advantages.flatten()
        keywords["cu_seqlens"] = torch.tensor([0, 4, 4, 290, 299, 300])
    keywords = {key: value.to(device) for key, value in keywords.items()}
    return logprobs.to(device), advantages.to(device), keywords


def check(
    layout: str, level: Any, normalization: Any, shaping: str, kl: Any, full: bool, backend: str, device: torch.device
) -> None:
    """Loss, both gradients and the rest of the output; ``full``: KL, entropy term and advantages per token."""
    logprobs, advantages, keywords = made(layout, level, full, device)
    coefficients = {"kl_coef": 0.05, "entropy_coef": 0.02, "kl": kl} if full else {}
    weighting = hf.AdaptiveHysteretic(0.1) if full else hf.Hysteretic(0.6)
    objective = hf.Objective(level, SHAPINGS[shaping], weighting, normalization, 300, **coefficients)
    if normalization == "group_mean_length":
        keywords["groups"] = torch.tensor([3, 3, 1, 1, 1], device=device)
    entropy = keywords.pop("entropy").requires_grad_()
    leaf = logprobs.clone().requires_grad_()
    out = hf.logprob_policy_loss(leaf, advantages, entropy=entropy, objective=objective, backend=backend, **keywords)
    (out.loss * 2).backward()
    exact, exact_entropy = (value.detach().double().requires_grad_() for value in (logprobs, entropy))
    loss = reference.logprob_policy_loss(exact, advantages, entropy=exact_entropy, objective=objective, **keywords)
    (loss * 2).backward()
    mask = keywords["mask"]
    pairs = [("loss", out.loss, loss), ("gradient of log-probabilities", leaf.grad, exact.grad)]
    if full:
        pairs.append(("gradient of entropies", entropy.grad, exact_entropy.grad))
    for name, ours, expected in pairs:
        assert ours is not None
        assert expected is not None
        assert expected.abs().max() > 0
        # Not below a tenth of the largest: KL and surrogate partly cancel, in float32 in either backend.
        error = (ours.double() - expected).abs() / expected.abs().clamp(min=0.1 * expected.abs().max().item())
        worst(name, error.reshape(1) if error.dim() == 0 else error, 1e-5)
    assert torch.equal(out.logprobs, torch.where(mask, logprobs, 0.0))
    assert torch.equal(out.entropy, torch.where(mask, entropy.detach(), 0.0))
    twin = hf.logprob_policy_loss(leaf, advantages, entropy=entropy, objective=objective, backend="torch", **keywords)
    assert torch.equal(out.active, twin.active)
    assert out.active.any()
    assert not out.active[~mask].any()


CASES = [
    (layout, *form, full)
    for layout in ("padded", "packed")
    for form in (
        ("token", "response", "clip", "k3_ratio"), ("token", "group_mean_length", "dro", "k2"),
        ("sequence", "response", "clip", "k3_ratio"), ("sequence", "mean_length", "fidelity", "k3"),
        ("sequence", "response_sum", "geometric", "k3+"), ("sequence_token", "constant", "gate", "k3_ratio"),
        ("sequence_token", "mean_length", "dro", "k1"), ("sequence_sum", "response", "truncated", "k3"),
        ("sequence_sum", "mean_length", "gamma", "k3_ratio"), ("sequence_sum", "constant", "gate", "k1"),
    )
    for full in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("layout", "level", "normalization", "shaping", "kl", "full"), CASES)
def test_matches_the_oracle(
    layout: str, level: str, normalization: str, shaping: str, kl: str, full: bool, backend: str, device: torch.device
) -> None:
    check(layout, level, normalization, shaping, kl, full, backend, device)
