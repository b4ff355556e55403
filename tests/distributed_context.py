"""Responses whose rows are divided over context-parallel ranks: one batch's totals, gradient and metrics."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import hpo_fused as hf

from .distributed_statistics import (
    ADVANTAGES,
    ALL,
    BY_GROUP,
    GROUPS,
    MASK,
    PRESETS,
    Batch,
    collectives,
    compared,
    totals,
)
from .ranks import Part

WIDE = hf.Clip(0.9, 9.0)  # no ratio is cut
GSPO = hf.Objective.preset("gspo", shaping=WIDE)
# Beyond the presets: every way in which a response's rows depend on each other, on other ranks too.
CONTEXT: dict[str, tuple[hf.Objective, str]] = {
    "gspo-wide": (GSPO, ""),
    "per-token-advantages": (GSPO, "advantages"),
    "per-token-weights": (hf.Objective.preset("luspo", shaping=WIDE), "weights"),
    "signs-of-whole-responses": (hf.Objective("sequence", weighting=hf.AdaptiveHysteretic()), "advantages"),
    "sequence_sum": (hf.Objective("sequence_sum", hf.LogFidelity(), None, "response"), ""),
    "k3_ratio": (hf.Objective.preset("gspo", shaping=WIDE, kl_coef=0.1, kl="k3_ratio"), ""),
    "k3_ratio-truncated": (hf.Objective("sequence", hf.TruncatedRatio(5.0), None, kl_coef=0.1, kl="k3_ratio"), ""),
    "geometric-mean": (hf.Objective.preset("gmpo", shaping=hf.GeometricMean(0.1, 0.1)), "advantages"),
    "dro": (hf.Objective("sequence", hf.DRO(0.5), None), "weights"),
    "entropy": (GSPO, "entropy"),
    "token-entropy-kl": (hf.Objective.preset("grpo", kl_coef=0.1, entropy_coef=0.01), "advantages"),
}


def mesh() -> Any:
    """Two data-parallel by two context-parallel ranks."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))


def share(rank: int) -> tuple[slice, slice]:
    """This rank's rows: of responses in halves, and of three and five responses of which one rank has no row."""
    return [
        (slice(0, 3), slice(0, 2)),
        (slice(0, 3), slice(2, 5)),
        (slice(3, 8), slice(0, 5)),
        (slice(3, 8), slice(5, 5)),
    ][rank]


def context(rank: int, world: int) -> dict[str, float]:
    """Two ranks share each response, one of them with no row; two pairs share the batch."""
    batch, ranks, mine = Batch(), mesh(), share(rank)
    both, everyone = ranks["context"], distributed.group.WORLD
    worse = {"token": 0.0, "response": 0.0}
    counts = {
        kind: batch.counted(*mine, kind, process_group=everyone, context_group=both) for kind in ("", "advantages")
    }
    for kind, statistics in counts.items():
        whole = batch.counted(*ALL, kind)
        assert totals(statistics) == totals(whole)
        # A data-parallel group has one rank of each response; without one, the context group is everything.
        data = batch.counted(*mine, kind, process_group=ranks["data"], context_group=both.get_group())
        assert totals(data) == totals(whole)
        alone = batch.counted(*mine, kind, context_group=both)
        assert totals(alone) == totals(batch.counted(mine[0], slice(None), kind))
        assert totals(alone.all_reduced(everyone, both)) == totals(whole)
        assert statistics.lengths is not None
        assert statistics.lengths.tolist() == MASK[mine[0]].sum(1).tolist()
        statistics.check(alone, process_group=everyone, context_group=both)
    cases = {name: (objective, "") for name, objective in PRESETS.items()} | CONTEXT
    for name, (objective, kind) in cases.items():
        statistics = counts["advantages" if "advantages" in kind else ""]
        options = {"statistics": statistics, "lengths": statistics.lengths, "context_group": both, "kind": kind}
        expected, _ = batch.gradient(*ALL, objective, kind=kind)
        level = "token" if objective.ratio_level == "token" else "response"
        for packed in (False, True):
            ours, _ = batch.gradient(*mine, objective, packed=packed, **options)
            worse[level] = max(worse[level], compared(f"{name}, packed={packed}", ours, expected))
    for count, number in ((4, 4), (None, 3)):
        statistics = batch.counted(
            *mine, process_group=everyone, context_group=both, groups=GROUPS[mine[0]], group_count=count
        )
        options = {"statistics": statistics, "lengths": statistics.lengths, "context_group": both}
        expected = batch.gradient(*ALL, BY_GROUP)[0] * 3 / number
        ours, _ = batch.gradient(*mine, BY_GROUP, **options)
        worse["token"] = max(worse["token"], compared("groups", ours, expected))
    return {
        "context-parallel by data-parallel ranks, ratios of tokens": worse["token"],
        "context-parallel by data-parallel ranks, ratios of responses": worse["response"],
    }


def context_of_two(rank: int, world: int) -> dict[str, float]:
    """Hidden states of two ranks' rows; both have the head, whose gradients add up. And the kernels."""
    batch, both = Batch(), distributed.group.WORLD
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(17, 6, generator=generator)
    hidden = torch.randn(8, 5, 6, generator=generator)
    old = hf.linear_token_logprobs(hidden, head, batch.tokens).logprobs + 0.1 * torch.randn(8, 5, generator=generator)
    worse = 0.0
    for name in ("ahpo", "gspo", "gmpo", "vespo"):
        gradients = []
        for columns in (slice(None), (slice(0, 2), slice(2, 5))[rank]):
            inputs = [value.clone().requires_grad_() for value in (hidden, head)]
            options: dict[str, Any] = {}
            if columns != slice(None):
                statistics = batch.counted(slice(None), columns, context_group=both)
                options = {"statistics": statistics, "lengths": statistics.lengths, "context_group": both}
            hf.linear_policy_loss(
                inputs[0][:, columns], inputs[1], batch.tokens[:, columns], ADVANTAGES, mask=MASK[:, columns],
                old_logprobs=old[:, columns], objective=name, chunk_bytes=6 * 17 * 4, **options,
            ).loss.backward()  # fmt: skip
            gradients.append([value.grad for value in inputs])
        for expected, ours in zip(*gradients, strict=True):
            worse = max(worse, compared(name, ours, expected))
    few = slice(0, 2)  # the kernels' sweeps, in the interpreter
    columns = (slice(0, 1), slice(1, 3))[rank]
    statistics = batch.counted(few, columns, context_group=both)
    options = {"statistics": statistics, "lengths": statistics.lengths, "context_group": both}
    expected = batch.gradient(few, slice(0, 3), GSPO)[0]
    ours = batch.gradient(few, columns, GSPO, backend="triton", **options)[0]
    kernels = compared("triton", ours, expected)
    return {
        "context-parallel ranks, from hidden states and a head on each": worse,
        "context-parallel ranks, logits in the Triton kernels": kernels,
    }


def context_metrics(rank: int, world: int) -> dict[str, float]:
    """Sums add up over ranks to those of whole responses, as far as a rank knows; asking for them is no collective."""
    batch, ranks, mine = Batch(), mesh(), share(rank)
    statistics = batch.counted(*mine, process_group=distributed.group.WORLD, context_group=ranks["context"])
    options = {"statistics": statistics, "lengths": statistics.lengths, "context_group": ranks["context"]}
    narrow = hf.Objective.preset("ahpo", shaping=hf.Clip(0.05, 0.05))
    for objective in (PRESETS["gspo"], PRESETS["gmpo"], narrow, hf.Objective("sequence", kl_coef=0.1)):
        with collectives() as made:
            _, out = batch.gradient(*mine, objective, **options)
            before = len(made)
            sums = out.metric_sums()
            assert len(made) == before
        whole = batch.gradient(*ALL, objective)[1].metric_sums()
        distributed.all_reduce(sums.values)
        distributed.all_reduce(sums.extremes, distributed.ReduceOp.MAX)
        ours, expected = sums.metrics(), whole.metrics()
        assert ours.keys() == expected.keys()
        for key in expected.keys() - ({"clip_high_max"} if objective is narrow else set()):
            torch.testing.assert_close(ours[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")
        for name, value, right in zip(sums.names, sums.values, whole.values, strict=True):
            assert name in ("calls", "hysteretic_weight") or abs(value - right) < 1e-5, name
        if objective is narrow:  # one of the three tokens that a rank has of a response
            assert (ours["clip_high_max"], expected["clip_high_max"]) == (pytest.approx(1 / 3), 1 / 4)
    return {}


def refusals(rank: int, world: int) -> dict[str, float]:
    """Groups that cannot be meant, and lengths that are not the ranks'."""
    ones, mask, everyone = torch.ones(2), torch.ones(2, 3), distributed.group.WORLD
    first, three = distributed.new_group([0, 1]), distributed.new_group([0, 1, 2])
    square = mesh()

    def count(**options: Any) -> Any:
        return hf.BatchStatistics.from_batch(ones, mask, **options)

    def lose(**options: Any) -> Any:
        given = {"statistics": hf.BatchStatistics(2, 6, 2, 0), "objective": "gspo", "old_logprobs": torch.zeros(2, 3)}
        return hf.logprob_policy_loss(torch.zeros(2, 3), ones, **{**given, **options})

    lengths = torch.tensor([12, 12])
    lose(lengths=lengths, context_group=everyone)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: count(process_group=3), TypeError, "process_group: expected a torch.distributed process group.*int 3"),
        (lambda: count(context_group=square), ValueError, "context_group: expected .* one dimension.*take mesh"),
        (lambda: lose(context_group=[0]), TypeError, "context_group: expected a torch.distributed process group.*list"),
        (lambda: lose(context_group=everyone), ValueError, "lengths: expected .*beside context_group, got None"),
        (
            lambda: lose(context_group=everyone, lengths=lengths, statistics=None), ValueError,
            "lengths: expected .*statistics",
        ),
        (
            lambda: lose(context_group=everyone, lengths=lengths, response_mean_log_ratios=ones), ValueError,
            "response_mean_log_ratios: expected None beside context_group",
        ),
        (
            lambda: lose(context_group=everyone, lengths=torch.tensor([12, 13])), ValueError,
            re.escape("on all ranks of context_group, [12, 12], got [12, 13]"),
        ),
    ]  # fmt: skip
    if rank < 2:
        cases.append((
            lambda: count(process_group=first, context_group=three), ValueError,
            rf"process_group: expected all ranks \[0, 1, 2\] of context_group, or this one \({rank}\).*\[0, 1\]",
        ))  # fmt: skip
    else:
        cases.append((lambda: count(process_group=first), ValueError, "process_group: .*belongs to.*other ranks"))
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
    return {}


PARTS: dict[str, Part] = {
    "context": (4, context),
    "context_of_two": (2, context_of_two),
    "context_metrics": (4, context_metrics),
    "context_refusals": (4, refusals),
}
