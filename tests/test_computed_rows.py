"""Which rows the first of two sweeps computes: the kernel decides as ``batch.prepare`` does."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import eager
from hpo_fused.backend import kernels
from hpo_fused.loss_batch import LossBatch

pytestmark = pytest.mark.skipif(kernels is None, reason="needs Triton")

RESPONSES = 6
SILENT = 4  # the response whose tokens all weigh 0 or have no advantage


def made(layout: str, per_token: bool, normalization: Any, device: torch.device, **objective: Any) -> LossBatch:
    """Responses without advantage, without tokens, with one active token, with none; one longer than a step."""
    generator = torch.Generator().manual_seed(3)
    T = 1100 if layout == "padded" else 300
    shape = (RESPONSES, T)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[2] = False
    advantages = torch.tensor([1.0, 0.0, 1.0, -0.5, 2.0, -1.0])
    weights = torch.ones(shape)
    weights[0, ::3] = 0
    weights[3] = 0
    weights[3, 5], mask[3, 5] = 1.0, True
    weights[SILENT] = 0
    if per_token:
        advantages = advantages[:, None] * (torch.rand(shape, generator=generator) < 0.9)
        advantages[3, 5] = -0.5
    advantages[5:] = torch.nan  # not 0: a signal
    weights[~mask] = torch.nan
    keywords: dict[str, Any] = {"mask": mask, "token_weights": weights}
    tokens = torch.randint(50, shape, generator=generator)
    tokens[~mask] = -7
    if layout == "packed":
        keywords = {key: value.flatten() for key, value in keywords.items()}
        keywords["cu_seqlens"] = torch.tensor([0, T, 2 * T, 2 * T, 4 * T, 5 * T, 6 * T], dtype=torch.int32)
        advantages, tokens = advantages.flatten(), tokens.flatten()
    if normalization == "group_mean_length":
        keywords["groups"] = torch.tensor([3, 3, 1, 1, 1, 3])
    keywords = {key: value.to(device) for key, value in keywords.items()}
    absent = dict.fromkeys(["old_logprobs", "ref_logprobs", "cu_seqlens", "groups", "statistics"])
    if objective.get("kl_coef"):
        absent["ref_logprobs"] = torch.zeros(tokens.shape, device=device)
    resolved = hf.Objective(
        weighting=hf.AdaptiveHysteretic(0.1), normalization=normalization, max_length=300, **objective
    )
    return LossBatch(
        resolved, "tokens", tokens.shape, device, tokens.to(device), advantages.to(device), **{**absent, **keywords}
    )


def both(batch: LossBatch, skip_inactive: bool) -> tuple[Tensor, Tensor]:
    """The kernel's rows and the twin's."""
    options = {"skip_inactive": skip_inactive, "sequence_level": batch.objective.ratio_level == "sequence"}
    assert kernels is not None
    found, expected = (
        module.computed_rows(batch, 50, batch.objective.lowered, **options).compute for module in (kernels, eager)
    )
    return found, expected


CASES = [
    (layout, level, normalization, per_token, skip)
    for layout in ("padded", "packed")
    for level in ("token", "sequence")
    for normalization in ("response", "mean_length", "group_mean_length", "constant")
    for per_token in (False, True)
    for skip in ((False, True) if normalization == "response" else (True,))
]


def check(layout: str, level: str, normalization: str, per_token: bool, skip: bool, device: torch.device) -> None:
    batch = made(layout, per_token, normalization, device, ratio_level=level)
    found, expected = both(batch, skip)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    mask = batch.prepared.layout.mask
    assert found.any()
    assert torch.equal(found, mask) == (not skip)


@pytest.mark.parametrize(("layout", "level", "normalization", "per_token", "skip"), CASES)
def test_as_the_twin_decides(
    layout: str, level: str, normalization: str, per_token: bool, skip: bool, device: torch.device
) -> None:
    check(layout, level, normalization, per_token, skip, device)


@pytest.mark.parametrize("coefficients", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}], ids=["kl", "entropy"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_penalties_make_every_unmasked_row_active(level: str, coefficients: dict[str, float], device: Any) -> None:
    batch = made("padded", False, "response", device, ratio_level=level, **coefficients)
    found, expected = both(batch, True)
    assert torch.equal(found, expected)
    assert torch.equal(found, batch.prepared.layout.mask)


def test_statistics_are_the_batch_s_own(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What the loss kernel is handed is what it would have made, and it then makes none."""
    assert kernels is not None
    batch = made("packed", True, "response", device, ratio_level="sequence")
    options: dict[str, Any] = {"sequence_level": True}
    rows = kernels.computed_rows(batch, 50, batch.objective.lowered, skip_inactive=True, **options)
    logprobs = torch.rand(batch.shape, device=device)
    expected = kernels.logprob_policy_loss(logprobs, None, batch, batch.objective.lowered, **options)
    module = importlib.import_module("hpo_fused.kernels.logprob_policy_loss")
    monkeypatch.setattr(module, "response_statistics", None)
    found = kernels.logprob_policy_loss(
        logprobs, None, batch, batch.objective.lowered, **options, statistics=rows.statistics
    )
    for ours, other in zip(found, expected, strict=True):
        assert (ours is None) == (other is None)
        assert ours is None or torch.equal(ours.nan_to_num(7.0), other.nan_to_num(7.0))


def _fails(device: torch.device) -> bool:
    for case in CASES:
        try:
            check(*case, device)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("mutant", ["weights_ignored", "mask_ignored", "first_block_only"])
def test_mistakes_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Needs the interpreter: a compiled kernel takes no replaced function."""
    assert kernels is not None
    if not kernels.interpreting():
        pytest.skip("needs Triton's interpreter")
    module = importlib.import_module("hpo_fused.kernels.computed_rows")
    weights, rows, tl = module.row_weights, module.response_rows, module.tl

    def spoiled(*arguments: Any) -> tuple[Any, ...]:
        unmasked, advantage, policy, penalty = weights(*arguments)
        if mutant == "weights_ignored":
            return unmasked, advantage, penalty, penalty
        return arguments[1], advantage, policy, penalty

    def shortened(*arguments: Any) -> tuple[Any, Any]:
        first, last = rows(*arguments)
        return first, tl.minimum(last, first + 1024)

    if mutant == "first_block_only":
        # What is not written must not look right by chance.
        monkeypatch.setattr(module.torch, "empty", torch.ones)
        monkeypatch.setattr(module, "response_rows", shortened)
    else:
        monkeypatch.setattr(module, "row_weights", spoiled)
    assert _fails(device)
