"""The public functions of the linear path: behaviour that no comparison with the oracle covers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

from .equivalence import worst
from .linear_cases import build_linear
from .samples import hidden_arguments, leaves
from .test_equivalence import PRESETS
from .test_linear_equivalence import small


@pytest.mark.parametrize("name", [*PRESETS, "group_mean_length"])
def test_same_as_from_logits(name: str, device: torch.device) -> None:
    """In float32 nothing lies between the two but the GEMMs' own rounding."""
    objective = hf.Objective.preset("ahpo", normalization=name) if name == "group_mean_length" else PRESETS[name]
    groups = torch.tensor([3, 3, 1, 1, 1], device=device) if name == "group_mean_length" else None
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    results = []
    for linear in (False, True):
        x, w = leaves(hidden, weight)
        options: dict[str, Any] = {"old_logprobs": old, "objective": objective, "groups": groups}
        if linear:
            out = hf.linear_policy_loss(x, w, tokens, advantages, **options, chunk_bytes=3 * 211 * 4)
        else:
            out = hf.policy_loss(x @ w.t(), tokens, advantages, **options)
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, out.active, x.grad, w.grad, out.metrics()))
    (*logits, logits_metrics), (*ours, metrics) = results
    assert metrics.keys() == logits_metrics.keys()
    for one, other in zip((*ours, *metrics.values()), (*logits, *logits_metrics.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------
# nothing to do


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["masked", "inactive", "no-rows", "no-steps", "packed"])
def test_no_active_row(name: str, dtype: torch.dtype, kind: str, backend: str, device: torch.device) -> None:
    """Loss 0, attached to every input; gradients of zeros, not None: data-parallel collectives must not hang."""
    shape = {"no-rows": (0, 4), "no-steps": (3, 0), "packed": (0,)}.get(kind, (3, 4))
    hidden, weight, bias = leaves(
        torch.randn(*shape, 8, device=device, dtype=dtype),
        torch.randn(11, 8, device=device, dtype=dtype),
        torch.randn(11, device=device, dtype=dtype),
    )
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    options: dict[str, Any] = {}
    if kind == "packed":
        options["cu_seqlens"] = torch.zeros(3, dtype=torch.long, device=device)
    if kind == "masked":
        options["mask"] = torch.zeros_like(tokens)
    advantages = torch.full((2 if kind == "packed" else shape[0],), 0.0 if kind == "inactive" else 1.0, device=device)
    out = hf.linear_policy_loss(
        hidden, weight, tokens, advantages, bias=bias, objective=name, backend=backend, **options
    )
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert not out.active.any()
    assert out.logprobs.shape == tokens.shape
    assert all(value.isfinite() for value in out.metrics().values())
    out.loss.backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_no_active_row_with_a_bound(name: str, backend: str, device: torch.device) -> None:
    """Rows that only fill up: GEMMs run, over zeros."""
    hidden, weight = leaves(torch.full((3, 4, 8), torch.nan, device=device), torch.randn(11, 8, device=device))
    tokens = torch.zeros(3, 4, dtype=torch.long, device=device)
    for count in (0, 5, 12):
        out = hf.linear_policy_loss(
            hidden, weight, tokens, torch.zeros(3, device=device), objective=name, active_count=count, backend=backend
        )
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        assert out.loss.item() == 0
        assert out.logprobs.isnan().all()
        assert not any(gradient.any() for gradient in gradients)


# ---------------------------------------------------------------------------------------------------------------
# rows counted by the caller


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_active_count_changes_nothing(name: str, backend: str, device: torch.device) -> None:
    """Exact or a bound, up to all rows, with NaN in every row that is not active."""
    made = build_linear(small(f"count-{name}", PRESETS[name], bias=True), device)
    count, total = int(made.active.sum()), made.active.numel()
    assert 0 < count < total
    results = []
    for given in (None, count, count + 1, total):
        hidden, weight, bias = leaves(made.hidden, made.weight, made.bias)
        out = hf.linear_policy_loss(
            hidden, weight, *made.positional, bias=bias, **made.keywords, active_count=given, backend=backend,
            chunk_bytes=3 * 97 * 4,
        )  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------
# float32 logits, float16


def test_float32_logits_match_a_float32_sampler(device: torch.device) -> None:
    """bfloat16 hidden states and head: log-probabilities of the product itself, not of its rounding."""
    hidden, weight, tokens, advantages, old = hidden_arguments(device, 997, torch.bfloat16)
    exact = hf.reference.token_logprobs(hidden.double() @ weight.double().t(), tokens)
    errors = []
    for logits_dtype in (torch.float32, None):
        out = hf.linear_policy_loss(
            hidden, weight, tokens, advantages, old_logprobs=old, logits_dtype=logits_dtype, skip_inactive=False,
        )  # fmt: skip
        alone = hf.linear_token_logprobs(hidden, weight, tokens, logits_dtype=logits_dtype)
        errors.append([(result.logprobs - exact.logprobs).abs() for result in (out, alone)])
    for unrounded, rounded in zip(*errors, strict=True):
        worst("logprobs", unrounded, 1e-5)  # LOGPROB_LIMIT, and a sum of 24 products of size 5 in all: 12 roundings
        assert rounded.max() > 1e-3  # what it is for


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_float16_survives_a_loss_scaler(name: str, chunks: int, device: torch.device) -> None:
    """Gradients of 1e-8 vanish in float16; multiplied by 2^16 first, they do not."""
    values, weights, tokens, _, _ = hidden_arguments(device, 53, torch.float16)
    advantages = 2e-5 * torch.ones(5, device=device)

    def gradients(dtype: torch.dtype, scale: float) -> list[Tensor]:
        hidden, weight = leaves(values.to(dtype), weights.to(dtype))
        out = hf.linear_policy_loss(
            hidden, weight, tokens, advantages, objective=name, chunk_bytes=-(-20 // chunks) * 53 * dtype.itemsize,
        )  # fmt: skip
        (out.loss * scale).backward()
        return [leaf.grad.double() / scale for leaf in (hidden, weight)]

    scaled, plain, right = gradients(torch.float16, 2**16), gradients(torch.float16, 1), gradients(torch.float32, 1)
    for good, lost, expected in zip(scaled, plain, right, strict=True):
        size = expected.square().mean().sqrt()
        # Three roundings of 2^-11, and the logits' own.
        assert (good - expected).square().mean().sqrt() < 5e-3 * size
        assert (lost - expected).square().mean().sqrt() > 5e-2 * size  # it would otherwise show nothing


def test_float16_inputs_under_bfloat16_autocast(device: torch.device) -> None:
    """The loss scaler's factor enters before a gradient is rounded to float16, whatever the GEMMs run in."""
    values, weights, tokens, advantages, _ = hidden_arguments(device, 7, torch.float16)
    low, exact = leaves(values, weights), leaves(values.float(), weights.float())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = hf.linear_policy_loss(*low, tokens, 1e-7 * advantages, objective="grpo").loss
    (loss * 65536).backward()
    hf.linear_policy_loss(*exact, tokens, 1e-7 * advantages, objective="grpo").loss.backward()
    for ours, expected in zip(low, exact, strict=True):
        # Roundings of 2^-9 of logits, gradient and factors.
        assert (ours.grad.float() / 65536 - expected.grad).norm() < 1e-2 * expected.grad.norm()


# ---------------------------------------------------------------------------------------------------------------
# log-probabilities and entropies


def masked_arguments(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states that are a strided view, weight, tokens and a mask."""
    hidden, weight, tokens, *_ = hidden_arguments(device, 101)
    mask = (torch.arange(3) < torch.tensor([3, 2, 1, 0, 3])[:, None]).to(device)
    return hidden[:, :-1], weight, torch.where(mask, tokens[:, 1:], -100), mask


def test_no_log_probability(backend: str, device: torch.device) -> None:
    for shape, mask in (((2, 3), torch.zeros(2, 3)), ((0, 3), None), ((0,), None)):
        hidden, weight = leaves(torch.randn(*shape, 8, device=device), torch.randn(11, 8, device=device))
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        out = hf.linear_token_logprobs(
            hidden, weight, tokens, mask=None if mask is None else mask.to(device), backend=backend
        )
        assert out.entropy is not None
        assert out.logprobs.shape == out.entropy.shape == tokens.shape
        assert not out.logprobs.any()
        (out.logprobs.sum() + out.entropy.sum()).backward()
        for leaf in (hidden, weight):
            assert leaf.grad is not None
            assert not leaf.grad.any()


def test_every_backward_of_log_probabilities_adds_to_main_grad(device: torch.device) -> None:
    values, weights, tokens, mask = masked_arguments(device)
    hidden, weight = leaves(values, weights)
    buffer = torch.zeros_like(weight)
    total = hf.linear_token_logprobs(hidden, weight, tokens, mask=mask, weight_grad=buffer).logprobs.sum()
    total.backward(retain_graph=True)
    once = buffer.clone()
    assert once.abs().max() > 0.1
    total.backward()
    torch.testing.assert_close(buffer, 2 * once, rtol=1e-6, atol=1e-6)


def test_feeds_a_loss_of_log_probabilities(device: torch.device) -> None:
    """logprob_policy_loss of them is linear_policy_loss."""
    values, weights, tokens, mask = masked_arguments(device)
    advantages, old = (
        torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0], device=device),
        torch.full(tokens.shape, -4.6).to(device),
    )
    options: dict[str, Any] = {"objective": hf.Objective.preset("gspo", entropy_coef=0.01), "mask": mask}
    results = []
    for whole in (True, False):
        hidden, weight = leaves(values, weights)
        if whole:
            out = hf.linear_policy_loss(hidden, weight, tokens, advantages, old_logprobs=old, **options)
        else:
            made = hf.linear_token_logprobs(hidden, weight, tokens, mask=mask)
            out = hf.logprob_policy_loss(made.logprobs, advantages, entropy=made.entropy, old_logprobs=old, **options)
        out.loss.backward()
        results.append((out.loss.detach(), hidden.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
