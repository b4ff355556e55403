"""Totals of the optimiser batch, layouts and weights: any split into calls gives the gradient of one big call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

from .ranks import run_ranks
from .samples import Sample
from .test_equivalence import PRESETS

ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.0, -2.0, 0.3])
MASK = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 1])[:, None]
GROUPS = torch.tensor([10, 10, 3, 3, 99, 99])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 31, generator=generator)
    tokens = torch.randint(31, (6, 5), generator=generator)
    return logits, tokens, -3 + torch.randn(6, 5, generator=generator)


def test_counts() -> None:
    statistics = hf.BatchStatistics.from_batch(ADVANTAGES, MASK)
    assert [int(statistics.responses), int(statistics.tokens)] == [6, 15]
    # The fifth response is negative but has no token left: it counts as a response, with neither sign.
    assert [int(statistics.positive), int(statistics.negative)] == [2, 2]
    assert statistics.gradient_average == 1.0


def test_counts_by_masked_sum() -> None:
    per_token = torch.tensor([[1.0, -3.0, 1.0], [1.0, -3.0, 9.0], [0.0, 0.0, 0.0], [-1.0, 1.0, torch.nan]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    statistics = hf.BatchStatistics.from_batch(per_token, mask)
    assert [int(statistics.positive), int(statistics.negative)] == [0, 2]


@pytest.mark.parametrize("advantages", [ADVANTAGES, ADVANTAGES[:, None], ADVANTAGES[:, None].expand(6, 5)])
def test_layouts_count_alike(advantages: Tensor) -> None:
    padded = hf.BatchStatistics.from_batch(advantages, MASK, groups=GROUPS)
    lengths = MASK.sum(1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    packed_advantages = advantages.reshape(-1) if advantages.numel() == 6 else advantages[MASK]
    packed = hf.BatchStatistics.from_batch(packed_advantages, cu_seqlens=cu_seqlens, groups=GROUPS)
    for name in ("responses", "tokens", "positive", "negative"):
        assert int(getattr(padded, name)) == int(getattr(packed, name))
    assert padded.group_lengths.tolist() == packed.group_lengths.tolist() == lengths.tolist()


@pytest.mark.parametrize(
    ("positive", "negative", "alpha"), [(0, 5, 0.1), (1, 4, 0.25), (5, 4, 1.0), (3, 0, 1.0), (0, 0, 1.0)]
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_hysteretic_weight(positive: int, negative: int, alpha: float, as_tensor: bool) -> None:
    """As the statistics tell it, and as the metrics report it."""
    wrap = torch.tensor if as_tensor else int
    statistics = hf.BatchStatistics(9, 9, wrap(positive), wrap(negative))
    for weighting, expected in ((hf.AdaptiveHysteretic(0.1), alpha), (hf.Hysteretic(0.6), 0.6)):
        out = hf.logprob_policy_loss(
            torch.zeros(6, 5), ADVANTAGES, objective=hf.Objective(weighting=weighting), statistics=statistics
        )
        assert out.metrics()["hysteretic_weight"].item() == pytest.approx(expected, rel=1e-6)
        assert float(statistics.alpha(weighting)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", ["torch", "linear"])
@pytest.mark.parametrize("name", [*PRESETS, "group_mean_length"])
@pytest.mark.parametrize("splits", [[3, 2], [1, 3, 1]])
def test_micro_batches_add_up(name: str, splits: list[int], path: str, device: torch.device) -> None:
    """Accumulated over calls with the totals of the optimiser batch, in one .grad: one big call's gradient."""
    objective = hf.Objective.preset("mhpo_ahpo", normalization=name) if name == "group_mean_length" else PRESETS[name]
    sample = Sample(path, device)
    mask = (torch.arange(4) < torch.tensor([4, 2, 3, 0, 1])[:, None]).to(device)
    groups = torch.tensor([10, 10, 3, 3, 10], device=device) if name == "group_mean_length" else None
    statistics = hf.BatchStatistics.from_batch(sample.advantages, mask, groups=groups)
    results = []
    for parts in ([5], splits):
        inputs, total = sample.leaves(), torch.zeros((), device=device)
        for rows in torch.arange(5, device=device).split(parts):
            out = sample.loss(
                [inputs[0][rows], *inputs[1:]], tokens=sample.tokens[rows], advantages=sample.advantages[rows],
                old_logprobs=sample.old[rows], mask=mask[rows], groups=None if groups is None else groups[rows],
                objective=objective, statistics=statistics if parts == splits else None,
            )  # fmt: skip
            out.loss.backward()
            total += out.loss.detach()
        results.append((total, *(leaf.grad for leaf in inputs)))
    for whole, added in zip(*results, strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-6)


def test_gradient_average_multiplies() -> None:
    logits, tokens, old = batch()
    statistics = hf.BatchStatistics.from_batch(ADVANTAGES, MASK, gradient_average=4)
    losses = [
        hf.policy_loss(logits, tokens, ADVANTAGES, old_logprobs=old, mask=MASK, statistics=s).loss
        for s in (None, statistics)
    ]
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_mean_length_is_daposs_token_mean() -> None:
    logprobs = torch.randn(6, 5) - 2
    loss = hf.logprob_policy_loss(logprobs, ADVANTAGES, mask=MASK, objective="dapo").loss
    expected = -(ADVANTAGES[:, None] * MASK).sum() / MASK.sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.distributed
def test_ranks_add_up() -> None:
    """Two processes with unequal shares and averaged gradients give the gradient of the whole batch."""
    run_ranks("shares")


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hf.BatchStatistics.from_batch(ADVANTAGES), ValueError, "mask: expected .*lengths"),
        (lambda: hf.BatchStatistics.from_batch([1.0]), TypeError, "advantages.*list"),
        (lambda: hf.BatchStatistics.from_batch(ADVANTAGES, [1]), TypeError, "mask.*list"),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES[:2], MASK),
            ValueError,
            r"advantages: .*\[6\].*\[2\]",
        ),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES, MASK, groups=GROUPS[:3]),
            ValueError,
            r"groups: .*\[6\].*\[3\]",
        ),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES, MASK, gradient_average=0),
            ValueError,
            "gradient_average",
        ),
        (lambda: hf.BatchStatistics(1, 2, 3, "4"), TypeError, "negative.*str"),
        (lambda: hf.BatchStatistics(-1, 2, 3, 4), ValueError, "responses.*-1"),
        (lambda: hf.BatchStatistics(torch.ones(2), 2, 3, 4), ValueError, "responses.*0-d"),
        (lambda: hf.BatchStatistics(1, 1, 1, 1, group_ids=GROUPS), ValueError, "group_lengths"),
    ],
)
def test_bad_statistics(build, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        build()
