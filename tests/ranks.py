"""Run by test_batch.py as two processes: unequal shares of a batch, averaged gradients, the whole batch's result.

A script and not a function that multiprocessing spawns: tests are imported by path, and a child process could not
find this module again.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed

import hpo_fused as hf


def main(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
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
        torch.testing.assert_close(part.grad / 2, whole.grad, rtol=1e-6, atol=1e-9)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
