"""The batch's totals over micro-batches, data-parallel and context-parallel ranks: one batch's gradient."""

from __future__ import annotations

import functools
import operator
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf

from .ranks import COLLECTIVE_SECONDS, Part, worst

LIMIT = 2e-6  # rows are computed alike; weights and sums of responses are rounded in another order
ADVANTAGES = torch.tensor([1.0, -0.5, -0.6, 0.3, -2.0, 0.8, 0.0, 0.0])
MASK = torch.arange(5) < torch.tensor([5, 2, 3, 4, 5, 1, 3, 0])[:, None]
GROUPS = torch.tensor([0, 0, 1, 1, 3, 0, 3, 3])  # group 2 of 4 has no response
PRESETS = {
    name: hf.Objective.preset(name, **({"max_length": 8} if name == "dr_grpo" else {}))
    for name in hf.Objective.presets()
}
BY_GROUP = hf.Objective.preset("grpo", normalization="group_mean_length")


class Batch:
    """Eight responses of up to five tokens, of which a call has some rows: (responses, columns)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(8, 5, 17, generator=generator)
        self.tokens = torch.randint(17, (8, 5), generator=generator)
        noise = 0.2 * torch.randn(8, 5, generator=generator)
        self.old = hf.token_logprobs(self.logits, self.tokens).logprobs + noise - (noise * MASK).sum(1, True) / 5
        self.ref = self.old + 0.3 * torch.randn(8, 5, generator=generator)
        self.per_token = torch.randn(8, 5, generator=generator) + ADVANTAGES[:, None]
        self.weights = torch.rand(8, 5, generator=generator)
        self.weights[0, :2] = 0  # no row that is live of itself in a part of this response

    def gradient(
        self, rows: slice, columns: slice, objective: hf.Objective, *, packed: bool = False, kind: str = "",
        backend: str = "torch", vocabulary: slice = slice(None), **options: Any,
    ) -> tuple[Tensor, hf.PolicyLossOutput]:  # fmt: skip
        """Of the logits of all tokens, of the loss of some of them; ``kind``: what is given per token."""
        leaf = self.logits.clone().requires_grad_()
        part = rows, columns
        mask, advantages = MASK[part], ADVANTAGES[rows]
        values = {"logits": leaf[part][..., vocabulary], "tokens": self.tokens[part], "old_logprobs": self.old[part]}
        if objective.kl_coef:
            values["ref_logprobs"] = self.ref[part]
        if "weights" in kind:
            values["token_weights"] = self.weights[part]
        if "entropy" in kind:
            values["entropy_weights"] = 0.1 * self.weights[part] * (self.weights[part] > 0.5)
        if "advantages" in kind:
            advantages = values["advantages"] = self.per_token[part]
        if packed:
            values = {name: value[mask] for name, value in values.items()}
            options["cu_seqlens"] = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
            if "advantages" in kind:
                options["advantage_level"] = "token"
        else:
            options["mask"] = mask
        if "advantages" not in kind:
            values["advantages"] = advantages[:, None] if packed else advantages
        if objective.normalization == "group_mean_length":
            options["groups"] = GROUPS[rows]
        out = hf.policy_loss(**values, objective=objective, backend=backend, **options)
        out.loss.backward()
        assert leaf.grad is not None
        return leaf.grad, out

    def counted(self, rows: slice, columns: slice, kind: str = "", **options: Any) -> hf.BatchStatistics:
        part = rows, columns
        return hf.BatchStatistics.from_batch(
            self.per_token[part] if "advantages" in kind else ADVANTAGES[rows], MASK[part], **options
        )


ALL = slice(None), slice(None)


def totals(statistics: hf.BatchStatistics) -> list[float]:
    return [float(getattr(statistics, name)) for name in ("responses", "tokens", "positive", "negative")]


def compared(label: str, ours: Tensor, whole: Tensor, ranks: int = 1) -> float:
    """The worst difference of the ranks' added gradients, averaged over ``ranks``."""
    distributed.all_reduce(ours)
    assert whole.abs().max() > 1e-3, label
    difference = worst(ours / ranks, whole)
    assert difference <= LIMIT, f"{label}: {difference}"
    return difference


def micro_batches(rank: int, world: int) -> dict[str, float]:
    """Four ranks with micro-batches counted one by one: five responses, one, none, two without an active row."""
    batch = Batch()
    mine = [[slice(0, 2), slice(2, 3), slice(3, 5)], [slice(5, 6)], [slice(0, 0)], [slice(6, 8)]][rank]
    columns, everyone, worse = slice(None), distributed.group.WORLD, {"data": 0.0, "groups": 0.0}

    def counted(count: int | None = None, groups: bool = True) -> tuple[hf.BatchStatistics, list[hf.BatchStatistics]]:
        parts = [
            batch.counted(
                rows, columns, gradient_average=world, group_count=count, groups=GROUPS[rows] if groups else None
            )
            for rows in mine
        ]
        return functools.reduce(operator.add, parts).all_reduced(everyone), parts

    statistics, parts = counted(groups=False)
    whole = batch.counted(*ALL)
    assert totals(statistics) == totals(whole) == [8, 23, 3, 3]
    assert statistics.lengths is not None
    assert statistics.lengths.tolist() == [n for rows in mine for n in MASK[rows].sum(1).tolist()]
    statistics.check(*parts, process_group=everyone)
    with pytest.raises(ValueError, match=r"statistics: expected tokens = 23, as in .*, got 24"):
        hf.BatchStatistics(8, 24, 3, 3).check(*parts, process_group=everyone)

    def added(objective: hf.Objective, statistics: hf.BatchStatistics, packed: bool) -> Tensor:
        options = {"objective": objective, "statistics": statistics, "packed": packed}
        return sum((batch.gradient(rows, columns, **options)[0] for rows in mine), torch.zeros(()))

    for name, objective in PRESETS.items():
        expected = batch.gradient(*ALL, objective)[0]
        for packed in (False, True):
            difference = compared(name, added(objective, statistics, packed), expected, world)
            worse["data"] = max(worse["data"], difference)
    # Without a number of groups, those without a response do not count.
    for count, number in ((4, 4), (None, 3)):
        statistics, parts = counted(count)
        statistics.check(*parts, process_group=everyone)
        expected = batch.gradient(*ALL, BY_GROUP)[0] * 3 / number
        worse["groups"] = max(
            worse["groups"], compared(str(count), added(BY_GROUP, statistics, False), expected, world)
        )
    wrong = hf.BatchStatistics(8, 23, 3, 3, group_lengths=torch.tensor([8, 7, 0, 9]))
    with pytest.raises(ValueError, match=r"expected 8 tokens of group 3, .*, got 9"):
        wrong.check(*counted(4)[1], process_group=everyone)
    return {
        "micro-batches on data-parallel ranks of unequal size, one empty": worse["data"],
        "micro-batches on such ranks, normalised by group": worse["groups"],
    }


NAMES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "reduce",
    "reduce_scatter_tensor", "all_to_all_single", "gather", "scatter", "barrier", "all_gather_single",
    "reduce_scatter_single",
)  # fmt: skip


@contextmanager
def collectives() -> Iterator[list[tuple[str, Any]]]:
    """Names and shapes of the collectives that are called inside."""
    made: list[tuple[str, Any]] = []

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append((name, tuple(getattr(arguments[0], "shape", ())) if arguments else ()))
            return function(*arguments, **options)

        return call

    there = {name: noted(name, getattr(distributed, name)) for name in NAMES if hasattr(distributed, name)}
    with mock.patch.multiple(distributed, **there):
        yield made


class _NoReading(TorchDispatchMode):
    """Refuses what would wait for a device: a tensor's value as Python's, or as a shape."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*args, **(kwargs or {}))


@contextmanager
def unreadable() -> Iterator[None]:
    """As on a device: no value is read."""
    modules = ("batch", "checks", "context_parallel", "layout", "ops")
    patches = [mock.patch(f"hpo_fused.{name}.values_readable", return_value=False) for name in modules]

    def refused(*_: Any) -> Any:
        raise AssertionError("a tensor's values were asked for")

    patches += [mock.patch.object(Tensor, name, refused) for name in ("tolist", "cpu", "numpy")]
    for patch in patches:
        patch.start()
    try:
        with _NoReading():
            yield
    finally:
        for patch in patches:
            patch.stop()


def collectives_of_a_step(rank: int, world: int) -> dict[str, float]:
    """How many, of which size, and that nothing waits for the device; the same on a rank without rows."""
    batch, both = Batch(), distributed.group.WORLD
    columns = slice(0, 5) if rank == 0 else slice(5, 5)
    advantages, mask, groups = ADVANTAGES.clone(), MASK[:, columns], GROUPS.clone()
    logprobs, old = (value[:, columns] for value in (batch.old + 0.1, batch.old))
    from_batch = functools.partial(hf.BatchStatistics.from_batch, advantages, mask)
    numbers = hf.BatchStatistics(4, 2.5, 1, 1)  # of no device

    def loss(name: str, statistics: hf.BatchStatistics) -> None:
        hf.logprob_policy_loss(
            logprobs.clone().requires_grad_(), advantages, old_logprobs=old, mask=mask, objective=name,
            statistics=statistics, lengths=statistics.lengths, context_group=both,
        ).loss.backward()  # fmt: skip

    with collectives() as made, unreadable():
        whole = from_batch(context_group=both)
        assert made == [("all_reduce", (2, 8))]
        for call, sizes in (
            (lambda: from_batch(process_group=both), [(4,)]),
            (lambda: from_batch(process_group=both, groups=groups, group_count=4), [(8,)]),
            (lambda: from_batch(process_group=both, context_group=both), [(2, 8), (4,)]),
            (lambda: (whole + whole).all_reduced(both), [(4,)]),
            (lambda: numbers.all_reduced(both), [(4,)]),
            (lambda: loss("grpo", whole), []),
            (lambda: loss("mhpo_ahpo", whole), []),
            (lambda: loss("gspo", whole), [(2, 8), (8,)]),
            (lambda: loss("gmpo", whole), [(2, 8), (8,)]),
            (lambda: loss("gspo_token", whole), [(2, 8)]),
            (lambda: loss("topr", whole), [(2, 8)]),
            (lambda: loss("vespo", whole), [(2, 8)]),
        ):
            made.clear()
            call()
            assert made == [("all_reduce", size) for size in sizes]
    assert totals(numbers.all_reduced(both)) == [8, 5, 2, 2]
    return {}


def missing_rank(rank: int, world: int) -> dict[str, float]:
    """Who waits for a rank that is gone gets torch.distributed's error, within the group's timeout."""
    group = distributed.new_group([0, 1], timeout=timedelta(seconds=1))
    started = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            hf.logprob_policy_loss(
                torch.zeros(2, 3), torch.ones(2), objective="gspo", lengths=torch.tensor([6, 6]),
                statistics=hf.BatchStatistics(2, 12, 2, 0), context_group=group,
            )  # fmt: skip
        with pytest.raises(RuntimeError):  # at once: a pair that has timed out is closed
            hf.token_logprobs(torch.zeros(1, 2, 5), torch.zeros(1, 2).long(), vocab_group=group)
        assert time.monotonic() - started < 10
    distributed.barrier()
    return {}


def dying_rank(rank: int, world: int) -> dict[str, float]:
    """Who waits for a rank that dies gets torch.distributed's error at once, long before the group's timeout."""
    distributed.barrier()
    if rank == 1:
        threading.Timer(0.5, os._exit, (1,)).start()  # its result is sent by then
        return {}
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        hf.logprob_policy_loss(
            torch.zeros(2, 3), torch.ones(2), objective="gspo", lengths=torch.tensor([6, 6]),
            statistics=hf.BatchStatistics(2, 12, 2, 0), context_group=distributed.group.WORLD,
        )  # fmt: skip
    assert time.monotonic() - started < COLLECTIVE_SECONDS / 3
    return {}


PARTS: dict[str, Part] = {
    "micro_batches": (4, micro_batches),
    "collectives_of_a_step": (2, collectives_of_a_step),
    "missing_rank": (2, missing_rank),
    "dying_rank": (2, dying_rank),
}
