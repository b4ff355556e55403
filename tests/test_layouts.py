"""Per-token tensors in every layout that a trainer's slicing leaves them in: both backends see the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

Change = Callable[[Tensor], Tensor]


def _stretched(value: Tensor) -> Tensor:
    """Every second entry of a tensor twice as long."""
    return value.repeat_interleave(2, dim=-1)[..., ::2]


def _transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else value


def _sliced(value: Tensor) -> Tensor:
    """As ``mask[:, 1:]`` is: rows start off any boundary."""
    return torch.cat([value[..., :1], value], -1)[..., 1:]


def _last_of_three(value: Tensor) -> Tensor:
    return torch.stack([value, value, value], -1)[..., 2]


LAYOUTS: dict[str, Change] = {
    "stretched": _stretched, "transposed": _transposed, "sliced": _sliced, "last of three": _last_of_three,
}  # fmt: skip


def _batch(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -3 * torch.rand(4, 6, generator=generator)
    found = {
        "logprobs": logprobs,
        "advantages": torch.randn(4, 6, generator=generator),
        "old_logprobs": logprobs - 0.3 * torch.randn(4, 6, generator=generator),
        "ref_logprobs": logprobs + 0.1 * torch.randn(4, 6, generator=generator),
        "token_weights": torch.rand(4, 6, generator=generator),
        "entropy": torch.rand(4, 6, generator=generator),
        "mask": torch.rand(4, 6, generator=generator) < 0.7,
    }
    found["advantages"][2] = 0.0
    return {name: value.to(device) for name, value in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logprobs(level: Any, layout: str, backend: str, device: torch.device) -> None:
    objective = hf.Objective(ratio_level=level, kl_coef=0.1, entropy_coef=0.01)
    values = _batch(device)

    def run(change: Change, name: str) -> tuple[Tensor, ...]:
        given = {key: change(value) for key, value in values.items()}
        leaves = [given.pop(key).detach().requires_grad_() for key in ("logprobs", "entropy")]
        leaves = [change(leaf.detach().contiguous()).detach().requires_grad_() for leaf in leaves]
        out = hf.logprob_policy_loss(leaves[0], given.pop("advantages"), entropy=leaves[1], objective=objective,
                                     backend=name, **given)  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, leaves), out.logprobs, out.active

    expected = run(lambda value: value.contiguous(), "torch")
    for found, wanted in zip(run(LAYOUTS[layout], backend), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_logprobs_expanded_along_the_response(backend: str, device: torch.device) -> None:
    values = _batch(device)
    leaf = values["logprobs"][:, :1].clone().requires_grad_()
    out = hf.logprob_policy_loss(leaf.expand(4, 6), values["advantages"], objective="grpo", backend=backend)
    full = values["logprobs"][:, :1].repeat(1, 6).requires_grad_()
    wanted = hf.logprob_policy_loss(full, values["advantages"], objective="grpo", backend="torch")
    torch.testing.assert_close(out.loss, wanted.loss)
    (gradient,), (expected,) = torch.autograd.grad(out.loss, leaf), torch.autograd.grad(wanted.loss, full)
    torch.testing.assert_close(gradient, expected.sum(1, keepdim=True))


@pytest.mark.parametrize("skip_inactive", [True, False])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize(("objective", "dtype"), [("gspo", "float32"), ("grpo", "float16"), ("mhpo_ahpo", "float32")])
def test_logits(
    objective: str, dtype: str, layout: str, skip_inactive: bool, backend: str, device: torch.device
) -> None:
    values = _batch(device)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 6, 33, generator=generator).to(device, getattr(torch, dtype))
    tokens = torch.randint(33, (4, 6), generator=generator).to(device)
    mask = values["mask"]
    if layout == "expanded":
        mask = (torch.arange(6, device=device) < 4).expand(4, 6)

    def run(change: Change, name: str) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        given = {key: change(values[key]) for key in ("advantages", "old_logprobs", "token_weights")}
        out = hf.policy_loss(
            leaf, change(tokens), given.pop("advantages"), mask=mask if layout == "expanded" else change(mask),
            objective=objective, skip_inactive=skip_inactive, backend=name, **given,
        )  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, leaf), out.logprobs, out.active

    expected = run(lambda value: value.contiguous(), "torch")
    close = {"rtol": 2e-3, "atol": 1e-6} if dtype == "float16" else {"rtol": 2e-5, "atol": 1e-7}
    for found, wanted in zip(run(LAYOUTS.get(layout, _sliced), backend), expected, strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, **close)
