"""Responses in parts, as context parallelism has them: the parts' gradients are those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hpo_fused as hf

from .samples import Sample, every_path

PARTS = (slice(0, 1), slice(1, 4))
WIDE = hf.Clip(0.9, 9.0)  # no ratio of the sample is cut, or nothing would be left to compare
OBJECTIVES = {
    "grpo": hf.Objective.preset("grpo", kl_coef=0.1, entropy_coef=0.01),
    "reinforce": hf.Objective.preset("reinforce"),
    "gspo": hf.Objective.preset("gspo", shaping=WIDE, kl_coef=0.1),
    "gspo_token": hf.Objective.preset("gspo_token", shaping=WIDE, kl_coef=0.1, kl="k3_ratio"),
    "sequence-mhpo_ahpo": hf.Objective("sequence", kl_coef=0.1, kl="k2"),
    "sequence_sum": hf.Objective("sequence_sum", hf.TruncatedRatio(3.0, 0.2, "zero"), normalization="response"),
    "vespo": hf.Objective.preset("vespo", kl_coef=0.1, kl="k3_ratio"),
    "topr": hf.Objective.preset("topr"),
}


def test_slices_of_one_and_three_tokens() -> None:
    """Each token of a response of four weighs a quarter, in whichever slice it is."""
    statistics = hf.BatchStatistics.from_batch(torch.ones(1), torch.ones(1, 4))
    gradients = []
    for part in PARTS:
        logprobs = torch.zeros(1, 4)[:, part].requires_grad_()
        hf.logprob_policy_loss(
            logprobs, torch.ones(1), objective="grpo", statistics=statistics, lengths=torch.tensor([4])
        ).loss.backward()
        assert logprobs.grad is not None
        gradients += logprobs.grad[0].tolist()
    assert gradients == [-0.25] * 4


@every_path
@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_have_the_whole_gradient(name: str, path: str, device: torch.device) -> None:
    """Ratios of responses are given then, from a sweep over all parts."""
    objective, sample = OBJECTIVES[name], Sample(path, device)
    mask = torch.ones(5, 4, device=device)
    mask[1, 2:] = mask[3, 0] = 0
    old, ref = sample.old, sample.old - 0.3
    statistics = hf.BatchStatistics.from_batch(sample.advantages, mask)
    given: dict[str, Any] = {"objective": objective, "statistics": statistics}
    whole, leaves = sample.leaves(), sample.leaves()
    out = sample.loss(whole, mask=mask, ref_logprobs=ref if objective.kl_coef else None, skip_inactive=False, **given)
    out.loss.backward()
    lengths = mask.sum(-1).long()
    if objective.ratio_level != "token":
        given["response_mean_log_ratios"] = ((out.logprobs - old) * mask).sum(-1) / lengths
    total = torch.zeros((), device=device)
    for part in PARTS:
        rows, *head = leaves
        result = sample.loss(
            [rows[:, part], *head], tokens=sample.tokens[:, part], old_logprobs=old[:, part], mask=mask[:, part],
            ref_logprobs=ref[:, part] if objective.kl_coef else None, lengths=lengths, **given,
        )  # fmt: skip
        result.loss.backward()
        total += result.loss.detach()
    torch.testing.assert_close(total, out.loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, expected in zip(leaves, whole, strict=True):
        assert expected.grad.abs().max() > 1e-4
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-5 * expected.grad.abs().max().item())


@pytest.mark.parametrize("objective", [hf.Objective.preset("gspo", shaping=WIDE), hf.Objective.preset("vespo")])
def test_given_ratios_of_any_strides(objective: hf.Objective, backend: str, device: torch.device) -> None:
    """A column of a table, or one number for all: what lies between its entries is nobody's ratio."""
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(5, 3, generator=generator).to(device)
    logprobs, advantages = torch.full((5, 2), -1.0, device=device), torch.ones(5, device=device)
    statistics, lengths = hf.BatchStatistics(5, 20, 5, 0), torch.full((5,), 4, device=device)
    for means in (table[:, 1], table[0, :1].expand(5)):
        ours, right = (
            hf.logprob_policy_loss(
                logprobs, advantages, objective=objective, statistics=statistics, lengths=lengths,
                response_mean_log_ratios=given, backend=backend,
            ).loss
            for given in (means, means.contiguous())
        )  # fmt: skip
        assert torch.equal(ours, right)


def parts(**options: Any) -> dict[str, Any]:
    """Arguments for two tokens of a response of four, and ``options``."""
    given = {
        "logprobs": torch.zeros(1, 2), "advantages": torch.ones(1), "old_logprobs": torch.zeros(1, 2),
        "lengths": torch.tensor([4]), "statistics": hf.BatchStatistics(1, 4, 1, 0),
        "response_mean_log_ratios": torch.zeros(1), "objective": "gspo",
    }  # fmt: skip
    return {**given, **options}


MEANS = "response_mean_log_ratios: expected "
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "without-means": ({"response_mean_log_ratios": None}, MEANS + "each response's mean.*'sequence'.*None"),
    "token-level": ({"objective": "grpo"}, MEANS + "None for ratio_level='token'"),
    "without-lengths": ({"lengths": None}, "lengths: expected those of the whole.*got None"),
    "shape": ({"response_mean_log_ratios": torch.zeros(2)}, r"response_mean_log_ratios: .*\[1\].*\[2\]"),
    "per-token-advantages": ({"advantages": torch.ones(1, 2)}, MEANS + ".*per token"),
    "per-token-weights": ({"token_weights": torch.ones(1, 2)}, MEANS + ".*per token"),
    "product-of-ratios": (
        {"objective": hf.Objective("sequence_sum", hf.Clip(), None)}, MEANS + "None for Clip at .*'sequence_sum'",
    ),
    "geometric-mean": ({"objective": "gmpo"}, "lengths: expected None for GeometricMean"),
    "corrected-kl": (
        {"objective": hf.Objective.preset("gspo", kl="k3_ratio", kl_coef=0.1), "ref_logprobs": torch.zeros(1, 2)},
        MEANS + "None for kl='k3_ratio'",
    ),
    "no-statistics": ({"statistics": None}, "lengths: expected .*statistics"),
    "lengths-too-short": ({"lengths": torch.tensor([1])}, r"lengths: expected at least.*\[1\].*\[2\]"),
    "lengths-shape": ({"lengths": torch.tensor([4, 4])}, r"lengths: .*\[1\].*\[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_cannot_tell_is_refused(name: str) -> None:
    hf.logprob_policy_loss(**parts())
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        hf.logprob_policy_loss(**parts(**options))
    if "token" in name and name != "token-level":  # each token has its own there
        hf.logprob_policy_loss(**parts(**options, objective="gspo_token"))


def test_lengths_have_to_be_integers() -> None:
    with pytest.raises(TypeError, match=r"lengths: expected .*integer"):
        hf.logprob_policy_loss(**parts(lengths=torch.tensor([4.0])))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_lengths_do_not_overflow(dtype: torch.dtype) -> None:
    """Their product with the number of responses need not fit in their type."""
    responses = hf.BatchStatistics(2**26, 2**28, 1, 0)
    losses = [
        hf.logprob_policy_loss(
            **parts(
                logprobs=torch.full((1, 2), -1.0), old_logprobs=None, lengths=torch.tensor([100], dtype=kind),
                statistics=responses, objective="grpo", response_mean_log_ratios=None,
            )
        ).loss.item()
        for kind in (dtype, torch.int64)
    ]  # fmt: skip
    assert losses[0] == losses[1] < 0
