"""The collectives that the profiler sees are those of the formulas in bench/wire.py: their kinds, sizes and order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import hpo_fused as hf
from hpo_fused.bench import wire

from .ranks import Part

RESPONSES, LENGTH, VOCABULARY, HIDDEN = 4, 6, 30, 8
ROWS = RESPONSES * LENGTH
SIZES = {"float": 4, "long int": 8, "int": 4, "double": 8, "c10::BFloat16": 2, "signed char": 1}


def seen(run: Callable[[], object]) -> list[tuple[str, int]]:
    """Kind and bytes of each collective of a call, in order.

    The kind stands in the event of the call, the size in that of the work: gloo's reduce_scatter is an all_reduce.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    record: Any = profile.profiler
    events = sorted(record.kineto_results.events(), key=lambda event: event.start_ns())
    kinds = {"all_gather": "allgather", "all_reduce": "allreduce", "reduce_scatter": "reduce_scatter"}
    calls = [
        next((kind for kind, word in kinds.items() if word in event.name()), event.name())
        for event in events
        if event.name().startswith("c10d::")
    ]
    works = [event for event in events if event.name().startswith("gloo:")]
    sizes = [torch.Size(event.shapes()[0]).numel() * SIZES[event.dtypes()[0]] for event in works]
    return list(zip(calls, sizes, strict=True))


def said(*forms: list[wire.Collective]) -> list[tuple[str, int]]:
    """The same of the formulas."""
    return [(one.kind, one.message) for form in forms for one in form]


def batch() -> dict[str, Any]:
    """Arguments of a loss of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(VOCABULARY, (RESPONSES, LENGTH), generator=generator),
        "advantages": torch.tensor([1.0, -0.5, -0.5, 2.0]),
        "old_logprobs": -3 + torch.randn(RESPONSES, LENGTH, generator=generator),
        "mask": torch.arange(LENGTH) < torch.tensor([6, 3, 4, 5])[:, None],
    }


def vocabulary(rank: int, world: int) -> dict[str, float]:
    """Logits, and hidden states before a sharded head: the same for every objective, dtype and split of the columns."""
    start, stop = ((0, 17), (17, VOCABULARY))[rank]
    computed = int(batch()["mask"].sum())
    shard = hf.VocabShard(distributed.group.WORLD, start, VOCABULARY)
    hf.token_logprobs(torch.zeros(1, 1, stop - start), torch.zeros(1, 1).long(), vocab_group=shard)  # asks who has what
    for objective, entropy in (("mhpo_ahpo", True), ("mhpo_ahpo", False), ("gspo", True)):
        logits = torch.randn(RESPONSES, LENGTH, stop - start, requires_grad=True)

        def of_logits(objective: str = objective, entropy: bool = entropy, logits: Any = logits) -> None:
            hf.policy_loss(logits, **batch(), objective=objective, entropy=entropy, vocab_group=shard).loss.backward()

        assert seen(of_logits) == said(wire.vocabulary_shards(ROWS, world, entropy=entropy))
        for dtype, parallel in ((torch.float32, False), (torch.bfloat16, True)):
            hidden = torch.randn(RESPONSES, LENGTH // (world if parallel else 1), HIDDEN).to(dtype).requires_grad_()
            weight = torch.randn(stop - start, HIDDEN).to(dtype).requires_grad_()

            def of_hidden(
                objective: str = objective, entropy: bool = entropy, hidden: Any = hidden, weight: Any = weight,
                parallel: bool = parallel,
            ) -> None:  # fmt: skip
                hf.linear_policy_loss(
                    hidden, weight, **batch(), objective=objective, entropy=entropy, vocab_group=shard,
                    sequence_parallel=parallel,
                ).loss.backward()  # fmt: skip

            assert seen(of_hidden) == said(
                wire.head_shards(
                    ROWS, HIDDEN, dtype.itemsize, world, computed=computed, entropy=entropy, sequence_parallel=parallel
                )
            )
    return {}


def statistics(rank: int, world: int) -> dict[str, float]:
    """Totals of a step over data-parallel and over context ranks; response-level ratios over context ranks."""
    given, group = batch(), distributed.group.WORLD
    counted = {"groups": torch.tensor([0, 0, 1, 1]), "group_count": 2}

    def count(**options: Any) -> hf.BatchStatistics:
        return hf.BatchStatistics.from_batch(given["advantages"], mine["mask"], **counted, **options)

    mine = given
    assert seen(lambda: count(process_group=group)) == said(wire.counts(2, world))
    columns = slice(0, 2) if rank == 0 else slice(2, LENGTH)
    mine = {name: value if value.dim() == 1 else value[:, columns] for name, value in given.items()}
    assert seen(lambda: count(process_group=group, context_group=group)) == said(
        wire.context_counts(RESPONSES, world), wire.counts(2, world)
    )
    whole = count(process_group=group, context_group=group)
    for objective, form in (
        ("mhpo_ahpo", []),
        ("gspo", wire.context(RESPONSES, world)),
        ("cispo", []),
        ("topr", wire.context(RESPONSES, world, spread=False)),
    ):
        logits = torch.randn(RESPONSES, mine["tokens"].shape[1], VOCABULARY, requires_grad=True)

        def loss(objective: str = objective, logits: Any = logits) -> None:
            hf.policy_loss(
                logits, **mine, objective=objective, statistics=whole, lengths=whole.lengths, context_group=group
            ).loss.backward()

        assert seen(loss) == said(form), objective
    return {}


def gathered_head(rank: int, world: int) -> dict[str, float]:
    """FSDP2's head outside its module: gathered for the call, its gradient scattered in backward."""
    head = distribute_tensor(torch.randn(VOCABULARY, HIDDEN), init_device_mesh("cpu", (world,)), [Shard(0)])
    hidden, weight = torch.randn(RESPONSES, LENGTH, HIDDEN), torch.nn.Parameter(head)

    def loss() -> None:
        hf.linear_policy_loss(hidden, weight, **batch()).loss.backward()

    assert seen(loss) == said(wire.gathered_head(VOCABULARY, HIDDEN, 4, world))
    return {}


PARTS: dict[str, Part] = {
    "wire_vocabulary": (2, vocabulary), "wire_statistics": (2, statistics), "wire_gathered_head": (2, gathered_head),
}  # fmt: skip
