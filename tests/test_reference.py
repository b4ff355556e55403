"""The oracle itself: differentiated right, and equal to textbook formulas where there are any."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hpo_fused as hf
from hpo_fused import reference

from .test_equivalence import PRESETS

STOPPED = ("cispo", "mhpo", "vespo", "topr", "gspo_token")  # gradients, on purpose: see the next test


@pytest.mark.parametrize(
    ("name", "kl"),
    [(name, "k3") for name in PRESETS if name not in (*STOPPED, "mhpo_ahpo")]
    + [(name, kl) for name in ("grpo", "gspo") for kl in ("k3_ratio", "k2", "k1")],
)
def test_gradcheck(name: str, kl: Any) -> None:
    """Finite differences in float64."""
    torch.manual_seed(0)
    objective = hf.Objective.preset(
        name, kl_coef=0.1, kl=kl, entropy_coef=0.05, max_length=4 if name == "dr_grpo" else None
    )
    tokens, advantages = torch.randint(7, (3, 4)), torch.tensor([1.0, -0.5, 0.0])
    old, ref = torch.randn(3, 4).double() - 2, torch.randn(3, 4).double() - 2
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return reference.policy_loss(
            logits,
            tokens,
            advantages,
            old_logprobs=old,
            ref_logprobs=ref,
            mask=mask,
            objective=objective,
            temperature=0.8,
            softcap=4.0,
        ).loss

    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STOPPED)
def test_gradcheck_with_stopped_factor(name: str) -> None:
    """What is under the stop-gradient, held constant by hand, leaves a function that finite differences agree with."""
    torch.manual_seed(0)
    wide = {"shaping": hf.Clip(1.0, 50.0)} if name == "gspo_token" else {}
    objective = hf.Objective.preset(name, **wide)
    advantages, old = torch.tensor([1.0, -0.5]), torch.randn(2, 3).double() - 1
    logp = (torch.randn(2, 3).double() - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(
        reference.logprob_policy_loss(logp, advantages, old_logprobs=old, objective=objective), logp
    )
    x0 = (logp - old).detach()

    def frozen(value: torch.Tensor) -> torch.Tensor:
        signal, total = advantages[:, None], x0.sum(-1, keepdim=True)
        if name == "cispo":
            s = x0.exp().clamp(max=5.0) * signal * value
        elif name == "vespo":  # arXiv 2602.10693: phi(W) = W^k e^(lambda (1 - W)), k and lambda by the sign
            k, rate = torch.tensor([[2.0], [3.0]]), torch.tensor([[3.0], [2.0]])
            s = total.exp() ** k * (rate * (1 - total.exp())).exp() * signal * value
        elif name == "topr":  # arXiv 2503.14286: weight 1 for A > 0, the response's ratio up to 1 for A < 0
            s = torch.stack([torch.ones(1), total[1].exp().clamp(max=1.0)]) * signal * value
        elif name == "gspo_token":  # arXiv 2507.18071, eq. 14
            s = x0.mean(-1, keepdim=True).exp() * (value - old - x0).exp() * signal
        else:
            psi0, psi = 1.5 * torch.tanh(x0 / 1.5), 1.5 * torch.tanh((value - old) / 1.5)
            zeta = torch.log1p(psi0.exp()) ** 1.5 + (torch.log1p((-psi0).exp()) / 0.8) ** 2
            s = (psi - zeta).exp() * signal
        return -s.sum() / 6

    assert torch.autograd.gradcheck(frozen, (logp,), eps=1e-6, atol=1e-8)
    (expected,) = torch.autograd.grad(frozen(logp), logp)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_textbook_grpo() -> None:
    """GRPO's equation 3 (arXiv 2402.03300), written for two responses of different lengths."""
    logp = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.4, 0.1]], dtype=torch.float64))
    old = torch.log(torch.tensor([[0.4, 0.3, 0.9], [0.2, 0.4, 0.5]], dtype=torch.float64))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    first = min(0.5 / 0.4, 1.2) * 2 + min(0.2 / 0.3, 1.2) * 2 + 1.0 * 2  # ratios 1.25, 2/3, 1 with A = 2
    second = max(0.3 / 0.2, 0.8) * -1 + 1.0 * -1  # ratios 1.5, 1 with A = -1
    loss = reference.logprob_policy_loss(logp, torch.tensor([2.0, -1.0]), old_logprobs=old, mask=mask, objective="grpo")
    assert loss.item() == pytest.approx(-(first / 3 + second / 2) / 2, rel=1e-12)


def test_textbook_ahpo() -> None:
    """Three negative responses against one positive: alpha = 1/3 (arXiv 2605.30201), divided by the total length."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5, 0.0])
    logp = torch.full((5, 3), -2.0, dtype=torch.float64)
    loss = reference.logprob_policy_loss(logp, advantages, mask=mask, objective="ahpo")
    assert loss.item() == pytest.approx(-(3 * 1.5 - 4 * 0.5 / 3) / 10, rel=1e-12)


def test_textbook_gspo() -> None:
    """One ratio per response: the geometric mean of its tokens' ratios (arXiv 2507.18071, eq. 7)."""
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0, -2.0004]], dtype=torch.float64)
    loss = reference.logprob_policy_loss(logp, torch.tensor([1.0]), old_logprobs=old, objective="gspo")
    (gradient,) = torch.autograd.grad(loss, logp)
    ratio = torch.tensor(2e-4, dtype=torch.float64).exp().item()
    assert loss.item() == pytest.approx(-ratio, rel=1e-12)
    assert gradient.tolist() == [pytest.approx([-ratio / 2, -ratio / 2], rel=1e-10)]
