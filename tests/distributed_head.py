"""An LM head that FSDP2 shards or replicates, gathered for the linear functions."""

from __future__ import annotations

import pytest
import torch
from torch import distributed

import hpo_fused as hf

from .ranks import Part, worst


def sharded_heads(rank: int, world: int) -> dict[str, float]:
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
    sharded, replicated, hybrid = (f"head {how}" for how in ("in shards, gathered", "replicated", "in hybrid shards"))
    differences = {sharded: 0.0, replicated: 0.0, hybrid: 0.0}
    for row, name, mesh, placements, kept in (
        (sharded, "ahpo", line, [Shard(0)], mask),
        (sharded, "gspo", line, [Shard(0)], mask),
        (sharded, "ahpo", line, [Shard(0)], nothing),
        (sharded, "gspo", line, [Shard(0)], nothing),
        (replicated, "ahpo", line, [Replicate()], mask),
        (hybrid, "ahpo", square, [Replicate(), Shard(0)], mask),
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
        differences[row] = max(differences[row], worst(x.grad / 2, whole[0].grad[mine]))
        for parameter, expected in ((head, whole[1].grad), (offset, whole[2].grad)):
            assert parameter.grad is not None
            assert parameter.grad.placements == parameter.placements
            assert parameter.grad.to_local().shape == parameter.to_local().shape
            gathered = parameter.grad.full_tensor()
            if placements == [Replicate()]:  # left to whoever replicated it
                distributed.all_reduce(gathered)
                gathered = gathered / 2
            torch.testing.assert_close(gathered, expected, **close)
            differences[row] = max(differences[row], worst(gathered, expected))

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
    narrow = distribute_tensor(weight.bfloat16(), line, [Shard(0)])
    refusals.append(((hidden, narrow), {}, TypeError, "weight: expected hidden's dtype float32.*bfloat16"))
    for (x, w), options, error, words in refusals:
        for call in (
            lambda x=x, w=w, options=options: hf.linear_policy_loss(x, w, tokens, advantages, **options),
            lambda x=x, w=w, options=options: hf.linear_token_logprobs(x, w, tokens, **options),
        ):
            with pytest.raises(error, match=words):
                call()
    return differences


PARTS: dict[str, Part] = {"sharded_heads": (2, sharded_heads)}
