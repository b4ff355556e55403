"""Two processes: unequal shares of a batch, averaged gradients, the whole batch's result.

A script and not a function that multiprocessing spawns: tests are imported by path, and a child process could not
find this module again.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import distributed

import hpo_fused as hf


def run_ranks(part: str) -> None:
    """Run a part of this script on both ranks, and fail with the first one that does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(port), part], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors


def shares(rank: int) -> None:
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


def metrics(rank: int) -> None:
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


def sharded_heads(rank: int) -> None:
    """Hidden states and a head that FSDP2 shards or replicates; refusals of what cannot be gathered."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.placement_types import _StridedShard

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, 16, generator=generator)
    weight = torch.randn(31, 16, generator=generator) / 3  # 31 rows: shards of 16 and 15
    bias = torch.randn(31, generator=generator)
    tokens = torch.randint(31, (6, 5), generator=generator)
    old = -3.4 + 0.3 * torch.randn(6, 5, generator=generator)
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.0, -2.0, 0.3])
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 1])[:, None]
    mine = slice(0, 3) if rank == 0 else slice(3, 6)
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    nothing = mask & (torch.arange(6) < 3)[:, None]  # the second rank has no active row, and must not miss a collective
    for name, mesh, placements, kept in (
        ("ahpo", line, [Shard(0)], mask),
        ("gspo", line, [Shard(0)], mask),
        ("ahpo", line, [Shard(0)], nothing),
        ("gspo", line, [Shard(0)], nothing),
        ("ahpo", line, [Replicate()], mask),
        ("ahpo", square, [Replicate(), Shard(0)], mask),  # hybrid sharding
    ):
        whole = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
        options = {"objective": name, "chunk_bytes": 4 * 31 * 4}
        hf.linear_policy_loss(
            *whole[:2], tokens, advantages, bias=whole[2], old_logprobs=old, mask=kept, **options
        ).loss.backward()
        statistics = hf.BatchStatistics.from_batch(
            advantages[mine], kept[mine], process_group=distributed.group.WORLD, gradient_average=2
        )
        x = hidden[mine].clone().requires_grad_()
        head, offset = (
            torch.nn.Parameter(distribute_tensor(value.clone(), mesh, placements)) for value in (weight, bias)
        )
        out = hf.linear_policy_loss(
            x, head, tokens[mine], advantages[mine], bias=offset, old_logprobs=old[mine], mask=kept[mine],
            statistics=statistics, **options,
        )  # fmt: skip
        out.loss.backward()
        # Sums of up to 15 terms below 0.5 in another order: 15 roundings of 2^-24.
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(x.grad / 2, whole[0].grad[mine], **close)
        for parameter, expected in ((head, whole[1].grad), (offset, whole[2].grad)):
            assert parameter.grad is not None
            assert parameter.grad.placements == parameter.placements
            assert parameter.grad.to_local().shape == parameter.to_local().shape
            gathered = parameter.grad.full_tensor()
            if placements == [Replicate()]:  # left to whoever replicated it
                distributed.all_reduce(gathered)
                gathered = gathered / 2
            torch.testing.assert_close(gathered, expected, **close)

    head = distribute_tensor(weight, line, [Shard(0)])
    logprobs = hf.linear_token_logprobs(hidden, head, tokens).logprobs
    torch.testing.assert_close(logprobs, hf.linear_token_logprobs(hidden, weight, tokens).logprobs, rtol=0, atol=1e-6)

    replicated, split = distribute_tensor(hidden, line, [Replicate()]), distribute_tensor(weight, line, [Shard(1)])
    sums = type(split).from_local(weight, line, [Partial()])
    refusals = [
        ((hidden, split), {}, ValueError, r"weight: expected .*DTensor.*Shard\(0\).*Shard\(dim=1\)"),
        ((hidden, sums), {}, ValueError, "weight: expected .*Partial"),
        ((replicated, weight), {}, TypeError, "hidden: expected a plain tensor.*to_local"),
        (
            (hidden, weight),
            {"bias": type(split).from_local(bias, line, [Partial()])},
            ValueError,
            "bias: expected .*Partial",
        ),
    ]
    shards = torch.nn.Parameter(distribute_tensor(weight, line, [Shard(0)]))
    refusals.append(
        ((hidden, shards), {"weight_grad": torch.zeros(31, 16)}, ValueError, "weight_grad: expected None for a DTensor")
    )
    # FSDP2 over tensor parallelism. PyTorch 2.8 takes this kind of shard for Shard(0).
    strided = type(split).from_local(weight[:16], square, [_StridedShard(0, split_factor=1), Shard(0)])
    refusals.append(((hidden, strided), {}, ValueError, "weight: expected a tensor, or a DTensor"))
    for (x, w), options, error, words in refusals:
        for call in (
            lambda x=x, w=w, options=options: hf.linear_policy_loss(x, w, tokens, advantages, **options),
            lambda x=x, w=w, options=options: hf.linear_token_logprobs(x, w, tokens, **options),
        ):
            with pytest.raises(error, match=words):
                call()


def main(rank: int, port: str, part: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    {"shares": shares, "metrics": metrics, "sharded_heads": sharded_heads}[part](rank)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
