"""Logits and heads sharded over the vocabulary: every rank's columns against the whole."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import hpo_fused as hf
from hpo_fused.vocab_parallel import resolve_shards

from .distributed_statistics import ALL, Batch, collectives
from .equivalence import Case, build, check
from .linear_equivalence import LinearCase, build_linear, options_of
from .ranks import Part, worst
from .test_equivalence import PRESETS

CPU = torch.device("cpu")
BOTH = {"kl_coef": 0.05, "entropy_coef": 0.01}


def columns_of(rank: int, world: int, vocabulary: int) -> slice:
    """Uneven shards, the second of which is empty where there are more than two."""
    sizes = [41, vocabulary - 41] if world == 2 else [vocabulary // 3, 0, 5, vocabulary - vocabulary // 3 - 5]
    edges = [0, *itertools.accumulate(sizes)]
    return slice(edges[rank], edges[rank + 1])


def case_of(name: str, **changes: Any) -> Case:
    """A preset's case, with entropy and KL terms in every second one."""
    objective = PRESETS[name]
    if len(name) % 2:
        objective = dataclasses.replace(objective, **BOTH)
    size = {"responses": 4, "length": 3}  # every rank computes all rows, and the interpreter is slow
    return Case(f"shards-{name}", objective, small_ratios=objective.ratio_level != "token", **size, **changes)


def _presets(rank: int, world: int, names: Iterable[str]) -> float:
    """The presets' gradients, both backends in turn, against one process's."""
    differences, group = [], distributed.new_group()
    for i, name in enumerate(names):
        backend, inplace = ("triton" if i % 4 == 0 else "torch"), i % 3 < 2
        inputs = build(case_of(name, layout=("padded", "packed")[i // 2 % 2]), CPU)
        gradients = []
        for columns, options in (
            (slice(None), {}),
            (columns_of(rank, world, 97), {"vocab_group": group, "inplace": inplace}),
        ):
            whole = inputs.logits.detach().requires_grad_()
            logits = whole[..., columns].clone()  # in place, and no view of the leaf
            hf.policy_loss(
                logits, *inputs.positional, **inputs.keywords, **options, backend=backend
            ).loss.backward()  # fmt: skip
            gradients.append(whole.grad)
        distributed.all_reduce(gradients[1])  # zeros outside a rank's columns
        differences.append(worst(gradients[1], gradients[0]))
    # Float32 on both sides: a dozen roundings of 2^-24 of an entry's terms, whose size is that of the largest entry.
    assert max(differences) <= 3e-6
    return max(differences)


def presets(rank: int, world: int) -> dict[str, float]:
    """Every preset."""
    return {"logits over the vocabulary": _presets(rank, world, PRESETS)}


def with_context(rank: int, world: int) -> dict[str, float]:
    """Two vocabulary shards by two parts of each response."""
    ranks = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "vocabulary"))
    context, vocabulary = ranks["context"], ranks["vocabulary"]
    batch, part = Batch(), (slice(0, 3), slice(3, 5))[context.get_local_rank()]
    columns = (slice(0, 11), slice(11, 17))[vocabulary.get_local_rank()]
    statistics = batch.counted(ALL[0], part, context_group=context)
    differences = []
    for name in ("gspo", "mhpo_ahpo", "gmpo"):
        objective = hf.Objective.preset(name)
        expected, _ = batch.gradient(*ALL, objective)
        ours, _ = batch.gradient(
            ALL[0], part, objective, vocabulary=columns, vocab_group=vocabulary, context_group=context,
            statistics=statistics, lengths=statistics.lengths,
        )  # fmt: skip
        distributed.all_reduce(ours)  # zeros outside a rank's rows and columns
        differences.append(worst(ours, expected))
    assert max(differences) <= 3e-6
    return {"logits over the vocabulary, responses over context-parallel ranks": max(differences)}


ROWS = [
    ("grpo", torch.float32, "peaked", {}, {}),
    ("mhpo_ahpo", torch.bfloat16, "minus_inf", {"softcap": 30.0, "temperature": 0.7}, {}),
    ("gspo", torch.float32, "flat", {}, {"skip_inactive": False}),
    ("reinforce", torch.float32, "minus_inf", {}, {}),
    ("sapo", torch.float16, "negative", {}, {}),
    ("dapo", torch.bfloat16, "random", {"softcap": 4.0}, {}),
]


def rows(rank: int, world: int) -> dict[str, float]:
    """Loss, log-probabilities, entropies and gradients against the oracle: peaked rows, -inf, softcap, dtypes."""
    group = distributed.new_group()
    for i, (name, dtype, kind, options, call) in enumerate(ROWS):
        for backend in ("torch", "triton")[: 2 if i < 2 else 1]:
            own = columns_of(rank, world, 97)
            case = case_of(name, dtype=dtype, rows=kind, temperature="" if options else "token", options=options)
            check(case, backend, CPU, columns=own, vocab_group=group, **call)
    found = _presets(rank, world, ("grpo", "gspo", "vespo", "mhpo_ahpo"))
    return {"logits over the vocabulary, uneven shards and an empty one": found}


def dtensor(rank: int, world: int) -> dict[str, float]:
    """DTensor logits say themselves how they are sharded; log-probabilities, an empty batch; refusals."""
    line, square = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), init_device_mesh("cpu", (1, 2))
    generator = torch.Generator().manual_seed(3)
    logits, tokens = torch.randn(3, 4, 31, generator=generator), torch.randint(31, (3, 4), generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    tokens[0] = torch.tensor([0, 15, 16, 30])  # the shards' edges
    whole = logits.clone().requires_grad_()
    expected = hf.policy_loss(whole, tokens, advantages, objective="ahpo")
    expected.loss.backward()
    assert whole.grad is not None
    differences = []
    for mesh, placements in ((line, [Shard(-1)]), (square, [Replicate(), Shard(2)])):
        ours = distribute_tensor(logits.clone(), mesh, placements).requires_grad_()
        out = hf.policy_loss(ours, tokens, advantages, objective="ahpo")
        torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=0, atol=1e-6)
        out.loss.backward()
        assert isinstance(ours.grad, DTensor)
        assert ours.grad.placements == ours.placements
        differences.append(worst(ours.grad.full_tensor(), whole.grad))
    assert max(differences) <= 3e-6

    with torch.no_grad():
        local = distribute_tensor(logits, line, [Shard(-1)])
        exact = hf.token_logprobs(logits, tokens)
        for given, group in ((local, None), (local, line), (local.to_local(), line["tp"])):
            ours = hf.token_logprobs(given, tokens, vocab_group=group)
            for value, right in zip(ours, exact, strict=True):
                torch.testing.assert_close(value, right, rtol=0, atol=2e-6)
        alike = hf.token_logprobs(distribute_tensor(logits, line, [Replicate()]), tokens).logprobs
        assert torch.equal(alike, exact.logprobs)
        empty = hf.token_logprobs(local.to_local()[:0], tokens[:0], vocab_group=line)
        assert empty.logprobs.shape == (0, 4)

    # Rows as Megatron has them, [T, B, V]: what is taken of a column follows the rows, not their memory.
    for backend in ("torch", "triton"):
        across = []
        for columns, options in ((slice(None), {}), (slice(16 * rank, 16 * rank + 16), {"vocab_group": line})):
            turned = logits.transpose(0, 1).contiguous().requires_grad_()
            given = turned.transpose(0, 1)[..., columns]
            hf.policy_loss(given, tokens, advantages, softcap=3.0, backend=backend, **options).loss.backward()
            across.append(turned.grad)
        distributed.all_reduce(across[1])
        assert worst(across[1], across[0]) <= 3e-6

    part, group = local.to_local(), line.get_group()
    start, alone = 16 * rank, distributed.new_group([0])
    other = logits[..., : 21 - 11 * rank]
    uneven = DTensor.from_local(other, line, [Shard(2)], shape=logits.shape, stride=logits.stride())
    batches, copies = (distribute_tensor(logits, line, [place]) for place in (Shard(0), Replicate()))
    refused: list[tuple[Any, Any, type[Exception], str]] = [
        (batches, None, ValueError, r"logits: expected .*Shard\(2\) only, got .*dim=0"),
        (copies, line, ValueError, r"logits: expected a DTensor with Shard\(2\)"),
        (part, "tp", TypeError, "vocab_group: expected a torch.distributed process group or .*, got str 'tp'"),
        (part, square, ValueError, "vocab_group: expected a .* or a DeviceMesh of one dimension, got DeviceMesh"),
        (local, hf.VocabShard(group, start, 31), ValueError, "vocab_group: expected a group or None beside a DTensor"),
        (part[..., :9], group, ValueError, r"vocab_group: expected ids .* as in the first call .*got 9 columns"),
        (uneven, None, ValueError, "logits: expected a DTensor cut as torch.chunk does"),
        (None, group, TypeError, "logits: expected a float16, bfloat16 or float32 tensor, got NoneType"),
        (logits[0, 0, 0], group, ValueError, "logits: expected shape"),
    ]  # fmt: skip
    if rank == 1:
        refused.append((part, alone, ValueError, "vocab_group: expected a group that this process belongs to"))
    else:
        refused.append((local, alone, ValueError, r"vocab_group: expected the ranks \[0, 1\] that logits .* got \[0\]"))
    for given, members, error, words in refused:
        with pytest.raises(error, match=words):
            hf.token_logprobs(given, tokens, vocab_group=members)
    for wrong, size in ((0, 31), (17 * rank, 32), (start, 31 + rank)):  # twice the first; a gap; another V
        with pytest.raises(
            ValueError, match=r"vocab_group: expected shards that cover .* once, .*, got \[0, 16\) of 3"
        ):
            hf.token_logprobs(part, tokens, vocab_group=hf.VocabShard(group, wrong, size))
    there = hf.VocabShard(group, 15 - 15 * rank, 31)  # the other way round
    swapped = hf.token_logprobs(logits[..., 15:] if rank == 0 else logits[..., :15], tokens, vocab_group=there)
    torch.testing.assert_close(swapped.logprobs, exact.logprobs, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match=r"start: expected an id in \[0, 31\], got 32"):
        hf.VocabShard(group, 32, 31)
    return {"DTensor logits, Shard(-1)": max(differences)}


HEADS = [
    LinearCase(f"head-{name}", objective, responses=4, **fields)
    for name, objective, fields in (
        ("ids", hf.Objective.preset("grpo", **BOTH), {"keep": "ids", "chunk_rows": 7, "bias": True}),
        ("bits", PRESETS["gspo"], {"small_ratios": True, "layout": "packed", "keep": "bits", "chunk_rows": 4}),
        ("capped", PRESETS["ahpo"], {"options": {"softcap": 4.0, "temperature": 0.6}, "weight_grad": True}),
        ("bfloat16", PRESETS["mhpo_ahpo"], {"dtype": torch.bfloat16, "frozen": ("weight",), "slack": 2}),
        ("frozen", PRESETS["topr"], {"small_ratios": True, "frozen": ("hidden",), "bias": True}),
    )
] + [
    LinearCase(f"head-{name}", objective, responses=4, small_ratios=objective.ratio_level != "token")
    for name, objective in PRESETS.items()
]


def _head_gradients(
    case: LinearCase, backend: str, own: slice, *, sequence: bool = False, **options: Any
) -> list[Tensor]:
    """Gradients of hidden states, weight and bias, put together from the ranks' ``own`` rows of the head."""
    inputs = build_linear(case, CPU)
    keywords = options_of(case, inputs, inputs.active)
    hidden = inputs.hidden.detach().requires_grad_(inputs.base.requires_grad)
    whole = [value for value in (inputs.weight, inputs.bias) if value is not None]
    head = [value.detach()[own].requires_grad_(value.requires_grad) for value in whole]
    if "weight_grad" in keywords:
        keywords["weight_grad"] = keywords["weight_grad"][own].clone()
    given = hidden
    if sequence:
        steps = hidden.shape[-2] // distributed.get_world_size()
        given = hidden.narrow(-2, distributed.get_rank() * steps, steps)
    hf.linear_policy_loss(
        given, head[0], *inputs.positional, bias=head[1] if case.bias else None, backend=backend, **inputs.keywords,
        **keywords, **options, sequence_parallel=sequence,
    ).loss.backward()  # fmt: skip
    if sequence and hidden.grad is not None:
        distributed.all_reduce(hidden.grad)  # zeros outside a rank's part of the sequence
    gradients = [] if hidden.grad is None else [hidden.grad]
    found = [keywords.get("weight_grad", head[0].grad), *(value.grad for value in head[1:])]
    for value, part in zip(whole, found, strict=True):
        if part is not None:
            every = part.new_zeros(value.shape)
            every[own] = part
            if options:
                distributed.all_reduce(every)
            gradients.append(every)
    return gradients


def heads(rank: int, world: int) -> dict[str, float]:
    """Hidden states and a head's shard: kept sets, bias, softcap, dtypes, a buffer of the caller's own."""
    difference = {"": 0.0, "sequence": 0.0}
    groups = [distributed.new_group() for _ in range(2)]  # for each way to cut the vocabulary
    for case in HEADS:
        backend = "triton" if case.keep == "ids" else "torch"
        expected = _head_gradients(case, backend, slice(None))
        halves = columns_of(rank, world, case.vocabulary)
        nothing = slice(0, case.vocabulary) if rank == 0 else slice(0, 0)  # the second rank has no row of the head
        ways = [("", halves, groups[0]), ("sequence", halves, groups[0]), ("", nothing, groups[1])]
        for kind, own, group in ways:
            sequence = kind != ""
            if sequence and case.layout == "packed":
                continue
            with torch.backends.mkldnn.flags(enabled=own is not nothing):  # where bfloat16 is widened
                ours = _head_gradients(case, backend, own, sequence=sequence, vocab_group=group)
            assert len(ours) == len(expected)
            for value, right in zip(ours, expected, strict=True):
                # The ranks' parts of a sum over the vocabulary are rounded to bfloat16 before they are added.
                found = worst(value, right)
                assert found <= (8e-3 if right.dtype == torch.bfloat16 else 3e-6), (case.name, kind, value.shape, found)
                if right.dtype == torch.float32:
                    difference[kind] = max(difference[kind], found)
    return {
        "head over the vocabulary": difference[""],
        "head over the vocabulary, hidden states over the sequence": difference["sequence"],
    }


def colwise(rank: int, world: int) -> dict[str, float]:
    """A head as ``ColwiseParallel`` leaves it, a DTensor with Shard(0); log-probabilities; refusals."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(4)
    x, tokens = torch.randn(2, 4, 8, generator=generator), torch.randint(31, (2, 4), generator=generator)
    advantages, plain = torch.tensor([1.0, -1.0]), torch.nn.Linear(8, 31)
    with torch.no_grad():
        for value in plain.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    sharded = torch.nn.Linear(8, 31)
    sharded.load_state_dict(plain.state_dict())
    sharded = parallelize_module(sharded, mesh, ColwiseParallel())
    gradients = []
    for head, group in ((plain, None), (sharded, mesh)):
        hidden = x.clone().requires_grad_()
        out = hf.linear_policy_loss(hidden, head.weight, tokens, advantages, bias=head.bias, vocab_group=group)
        out.loss.backward()
        logprobs = hf.linear_token_logprobs(x, head.weight, tokens, bias=head.bias, vocab_group=group)
        gradients.append((hidden.grad, head.weight.grad, head.bias.grad, logprobs.logprobs, logprobs.entropy))
    found = 0.0
    for right, ours in zip(*gradients, strict=True):
        assert right is not None
        assert ours is not None
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        found = max(found, worst(ours, right))
    assert found <= 3e-6
    for options, words in (
        ({"sequence_parallel": True}, "sequence_parallel: expected a vocab_group beside it"),
        ({"sequence_parallel": 1, "vocab_group": mesh}, "sequence_parallel: expected a bool"),
        ({"sequence_parallel": True, "vocab_group": mesh}, r"tokens: expected shape \[2, 8\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            hf.linear_policy_loss(x, sharded.weight, tokens, advantages, **options)
    return {"head as ColwiseParallel leaves it": found}


def order_of_asking(rank: int, world: int) -> dict[str, float]:
    """A vocabulary is asked for once on every rank, where all ask for the same; later calls ask in any order."""
    group, sizes = distributed.new_group(), (31, 17)

    def asked(size: int) -> Any:
        half = size // 2
        shard = hf.VocabShard(group, rank * half, size)
        columns = torch.zeros(1, size - half if rank else half)
        return resolve_shards("logits", columns, -1, shard)[1]

    with pytest.raises(ValueError, match=r"got \[0, 15\) of 31, \[8, 17\) of 17$"):  # on both, and nothing is known
        asked(sizes[rank])
    with collectives() as made:
        found = [asked(size) for size in sizes]
        assert len(made) == 2
        assert [asked(size) for size in sizes[:: 1 - 2 * rank]] == found[:: 1 - 2 * rank]
        assert len(made) == 2
    assert [shards.ranges for shards in found] == [((0, 15), (15, 31)), ((0, 8), (8, 17))]
    return {}


PARTS: dict[str, Part] = {
    "vocabulary_presets": (2, presets),
    "vocabulary_rows": (4, rows),
    "vocabulary_context": (4, with_context),
    "vocabulary_dtensor": (2, dtensor),
    "vocabulary_heads": (2, heads),
    "vocabulary_colwise": (2, colwise),
    "vocabulary_order_of_asking": (2, order_of_asking),
}
