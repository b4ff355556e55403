"""Temperatures in a tensor: every form is the same number to every row. The tables hold them against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference

from .samples import Sample, every_path, hidden_arguments

SHAPE = (5, 4)  # of a Sample's tokens


def results(sample: Sample, temperature: float | Tensor, objective: str) -> list[Tensor]:
    """Log-probabilities, entropy and gradients of a loss, and log-probabilities alone."""
    inputs = sample.leaves()
    out = sample.loss(inputs, temperature=temperature, objective=objective)
    out.loss.backward()
    alone = sample.logprobs(sample.values, temperature=temperature)
    return [out.logprobs, out.entropy, *alone, *(leaf.grad for leaf in inputs)]


@every_path
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_forms(objective: str, path: str, device: torch.device) -> None:
    """A half divides exactly: where all rows have it, the bits are those of the number."""
    sample = Sample(path, device)
    half = torch.tensor(0.5, device=device)
    forms = (half, half.expand(5), half.expand(5, 1), half.expand(SHAPE).bfloat16(), half.double().repeat(4, 5).t())
    expected = results(sample, 0.5, objective)
    for form in forms:
        for ours, right in zip(results(sample, form, objective), expected, strict=True):
            assert torch.equal(ours.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize("linear", [False, True])
def test_packed_forms(linear: bool, device: torch.device) -> None:
    """Three responses of three tokens in all, so that only [B, 1] and [1, N] tell whose a temperature is."""
    boundaries = torch.tensor([0, 2, 2, 3], device=device)
    of_responses, of_tokens = torch.tensor([0.5, 9.0, 2.0]), torch.tensor([0.5, 0.5, 2.0])
    hidden, weight, tokens, _, _ = hidden_arguments(device)
    inputs = (hidden[0, :3], weight) if linear else (hidden[0, :3] @ weight.t(),)
    made = []
    for temperature in (of_responses.unsqueeze(1), of_tokens.unsqueeze(0)):
        given = temperature.to(device)
        function = hf.linear_policy_loss if linear else hf.policy_loss
        advantages = torch.tensor([[1.0], [1.0], [-2.0]], device=device)
        out = function(*inputs, tokens[0, :3], advantages, cu_seqlens=boundaries, temperature=given)
        rows = reference.token_temperatures(given, tokens[0, :3], boundaries)
        assert rows.tolist() == of_tokens.tolist()
        made.append(out.logprobs)
    assert torch.equal(*made)
    function = hf.linear_token_logprobs if linear else hf.token_logprobs
    assert torch.equal(made[0], function(*inputs, tokens[0, :3], temperature=of_tokens.to(device)).logprobs)


@every_path
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
def test_may_change_before_backward(objective: str, path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    gradients = []
    for change in (False, True):
        temperature, inputs = torch.linspace(0.5, 2.0, 20, device=device).view(SHAPE), sample.leaves()
        loss = sample.loss(inputs, temperature=temperature, objective=objective).loss
        if change:
            temperature.fill_(7.0)
        loss.backward()
        gradients.append([leaf.grad for leaf in inputs])
    for ours, right in zip(*gradients, strict=True):
        assert torch.equal(ours, right)
