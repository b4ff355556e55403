"""token_logprobs against log_softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference

from .equivalence import (
    GRADIENT_LIMIT,
    LOGPROB_LIMIT,
    gradient_errors,
    hold_values,
    logit_gradient,
    softcap_error,
    worst,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "transform",
    [
        {}, {"temperature": 0.6}, {"softcap": 4.0}, {"temperature": 1.7, "softcap": 9.0},
        {"temperature": torch.tensor([0.6, 1.7, 1.0]), "softcap": 9.0},
    ],
    ids=["plain", "temperature", "softcap", "both", "temperatures"],
)  # fmt: skip
@pytest.mark.parametrize("outputs", ["logprobs", "entropy", "both"])
def test_matches_the_oracle(
    dtype: torch.dtype, transform: dict[str, Any], outputs: str, backend: str, device: torch.device
) -> None:
    transform = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in transform.items()}
    generator = torch.Generator().manual_seed(1)
    base = (3 * torch.randn(3, 5, 101, generator=generator)).to(device, dtype).requires_grad_()
    tokens = torch.randint(101, (3, 4), generator=generator).to(device)
    mask = (torch.rand(3, 4, generator=generator) < 0.8).to(device)
    c, h = 1e3 * torch.randn(2, 3, 4, generator=generator).to(device)
    if outputs == "entropy":
        c = torch.zeros_like(c)
    out = hf.token_logprobs(base[:, :-1], tokens, mask=mask, **transform, backend=backend)
    totals = {"logprobs": (out.logprobs * c).sum(), "entropy": (out.entropy * h).sum()}
    (totals[outputs] if outputs in totals else sum(totals.values())).backward()
    z = base.detach()[:, :-1].double()
    exact = reference.token_logprobs(z, tokens, mask=mask, **transform)
    hold_values(exact, mask, out.logprobs, out.entropy, mask, transform)
    assert base.grad is not None
    assert not base.grad[:, -1].any()
    gradient = base.grad[:, :-1]
    assert not gradient[~mask].any()
    expected = logit_gradient(z, tokens, mask, c.double(), None if outputs == "logprobs" else h.double(), transform)
    for name, error in zip(("sampled", "other"), gradient_errors(gradient, expected, tokens), strict=True):
        worst(f"gradient of the {name} tokens", error, GRADIENT_LIMIT + softcap_error(transform))


def test_peaked_rows_keep_their_digits(backend: str, device: torch.device) -> None:
    """log p of a near-certain token, computed as z - lse, is 0 in float32; -log1p(rest) has all its digits."""
    logits = torch.zeros(1, 6, 997, device=device)
    tokens = torch.full((1, 6), 400, device=device)
    heights = torch.tensor([8.0, 12.0, 17.0, 20.0, 25.0, 30.0], device=device)
    logits[0, :, 400] = heights
    ours = hf.token_logprobs(logits, tokens, backend=backend)
    # In closed form: at the last height even float64's log_softmax is off by 8e-5.
    expected = -torch.log1p(996 * torch.exp(-heights.double()))
    # An argument of 30 is known to half a unit of 43 binary digits' worth, 30 roundings; 54 are left for exp and sums.
    worst("relative error of log p", ((ours.logprobs[0] - expected) / expected).abs(), 5e-6)


def test_real_vocabulary_precision(backend: str, device: torch.device) -> None:
    """The stated limit: 4e-6 absolute on float32 logits over 151,936 entries."""
    generator = torch.Generator().manual_seed(2)
    for spread in (1.0, 4.0, 8.0):
        logits = (spread * torch.randn(1, 4, 151936, generator=generator)).to(device)
        tokens = torch.tensor([[0, 75000, 151935, int(logits[0, 3].argmax())]], device=device)
        ours = hf.token_logprobs(logits, tokens, backend=backend)
        expected = reference.token_logprobs(logits.double(), tokens)
        worst(f"logprobs at spread {spread}", (ours.logprobs - expected.logprobs).abs(), LOGPROB_LIMIT)


@pytest.mark.parametrize("scale", [0.0625, 8.0])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.7, 1.6])], ids=["number", "tensor"])
def test_models_that_scale_their_logits(
    temperature: float | Tensor, scale: float, backend: str, device: torch.device
) -> None:
    """Cohere multiplies its logits by a number, Granite divides: temperature / scale and softcap / scale say so."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(97, 8, generator=generator)
    tokens = torch.randint(97, (2, 3), generator=generator)
    expected = reference.token_logprobs(
        scale * (hidden.double() @ weight.double().t()), tokens, temperature=temperature, softcap=5.0
    )
    divided = temperature / scale
    ours = hf.linear_token_logprobs(
        hidden.to(device), weight.to(device), tokens.to(device), softcap=5.0 / scale,
        temperature=divided.to(device) if isinstance(divided, Tensor) else divided, backend=backend,
    )  # fmt: skip
    # A logit is a float32 sum of eight terms; its slope after scale and temperature is at most scale / 0.7.
    size = (hidden.abs() @ weight.abs().t()).max().item()
    limit = 8 * 2**-24 * size * scale / 0.7 * 2 + LOGPROB_LIMIT + 4e-7 * 5.0 / 0.7
    worst("log-probabilities", (ours.logprobs.cpu() - expected.logprobs).abs(), limit)
