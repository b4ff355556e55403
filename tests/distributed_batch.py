"""A batch's totals and metrics over data-parallel ranks with unequal shares."""

from __future__ import annotations

import torch
from torch import distributed

import hpo_fused as hf

from .ranks import Part, worst


def shares(rank: int, world: int) -> dict[str, float]:
    """Logits; the gradient that DDP would average."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 31, generator=generator)
    tokens = torch.randint(31, (6, 5), generator=generator)
    old = -3 + torch.randn(6, 5, generator=generator)
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.0, -2.0, 0.3])
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 1])[:, None]
    groups = torch.tensor([10, 10, 3, 3, 10, 99])  # group 10 has responses on both ranks
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    statistics = hf.BatchStatistics.from_batch(
        advantages[mine],
        mask[mine],
        groups=groups[mine],
        process_group=distributed.group.WORLD,
        gradient_average=2,
    )
    difference = 0.0
    for normalization in ("mean_length", "response", "group_mean_length"):
        objective = hf.Objective.preset("ahpo", normalization=normalization)
        whole, part = (logits.clone().requires_grad_() for _ in range(2))
        hf.policy_loss(
            whole, tokens, advantages, old_logprobs=old, mask=mask, objective=objective, groups=groups
        ).loss.backward()
        hf.policy_loss(
            part[mine],
            tokens[mine],
            advantages[mine],
            old_logprobs=old[mine],
            mask=mask[mine],
            objective=objective,
            groups=groups[mine],
            statistics=statistics,
        ).loss.backward()
        distributed.all_reduce(part.grad)  # what DDP does: sum, then divide by the number of ranks
        # Rows are computed alike: the few roundings of the weights, 2^-24 each, are all that differs.
        torch.testing.assert_close(part.grad / 2, whole.grad, rtol=1e-6, atol=1e-9)
        difference = max(difference, worst(part.grad / 2, whole.grad))
    return {"data-parallel ranks, unequal shares": difference}


def metrics(rank: int, world: int) -> dict[str, float]:
    """Sums of both ranks, one of which has no active row, are those of their union."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old = -2 + 0.4 * torch.randn(2, 6, 5, generator=generator)
    advantages = torch.tensor([1.0, -0.5, -0.5, 2.0, 0.0, 0.0])
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 1])[:, None]
    for name in ("ahpo", "gspo", "mhpo_ahpo"):

        def sums(part: slice, name: str = name) -> hf.MetricSums:
            return hf.logprob_policy_loss(
                logprobs[part], advantages[part], old_logprobs=old[part], mask=mask[part], objective=name,
                statistics=hf.BatchStatistics.from_batch(advantages, mask),
            ).metric_sums()  # fmt: skip

        mine, whole = sums(slice(0, 4) if rank == 0 else slice(4, 6)), sums(slice(0, 6))
        assert mine.names == whole.names
        distributed.all_reduce(mine.values)
        distributed.all_reduce(mine.extremes, distributed.ReduceOp.MAX)
        ours, expected = mine.metrics(), whole.metrics()
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")
    return {}


PARTS: dict[str, Part] = {"shares": (2, shares), "metrics": (2, metrics)}
