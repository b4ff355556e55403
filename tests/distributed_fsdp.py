"""FSDP2 and ZeRO-3: a head that lies in shards, against one process that holds everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn

import hpo_fused as hf

from .ranks import Part, worst

VOCABULARY, WIDTH = 31, 16  # 31 rows: shards of 16 and 15
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.3, -2.0, 0.3, 0.0, 0.0])
MASK = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 5, 2, 4])[:, None]
# Whose responses are in the two micro-batches of each rank. Nothing to learn from, nothing at all, a rank without any.
INACTIVE = ((slice(0, 2), slice(2, 4)), (slice(4, 6), slice(6, 8)))
EMPTY = ((slice(0, 5), slice(5, 6)), (slice(6, 8), slice(8, 8)))
ALONE = ((slice(0, 3), slice(3, 8)), (slice(8, 8), slice(8, 8)))
# Sums of up to 20 terms in another order, and of two ranks' parts: roundings of 2^-24 each.
LIMIT = 2e-6


class Model(nn.Module):
    """Embedding, one layer, and a head whose weight the forward hands to the loss; hidden states without a batch."""

    def __init__(self, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor, batch: dict[str, Any] | None = None) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return hidden if batch is None else loss_of(self, hidden, batch)


def loss_of(model: nn.Module, hidden: Tensor, batch: dict[str, Any], **options: Any) -> Tensor:
    """The loss of a batch's responses, eight rows of the head's at a time."""
    head: Any = model.lm_head
    given = {name: value for name, value in batch.items() if name != "ids"}
    return hf.linear_policy_loss(
        hidden, head.weight, bias=head.bias, chunk_bytes=8 * VOCABULARY * 4, **given, **options
    ).loss


def whole_batch(objective: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids, tokens = torch.randint(VOCABULARY, (2, 8, 5), generator=generator)
    old = -3.4 + 0.3 * torch.randn(8, 5, generator=generator)
    return {"ids": ids, "tokens": tokens, "advantages": ADVANTAGES, "old_logprobs": old, "mask": MASK} | {
        "objective": objective, "statistics": hf.BatchStatistics.from_batch(ADVANTAGES, MASK)
    }  # fmt: skip


def micro_batches(batch: dict[str, Any], shares: tuple[slice, ...], average: float) -> list[dict[str, Any]]:
    """Parts of a batch, with the whole one's counts."""
    counts = {"statistics": hf.BatchStatistics.from_batch(ADVANTAGES, MASK, gradient_average=average)}
    return [
        {name: value[part] if isinstance(value, Tensor) else value for name, value in batch.items()} | counts
        for part in shares
    ]


def gradients_of(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The gradients of one process, each micro-batch's of the model's dtype, their sums float32."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros(value.shape) for name, value in parameters.items()}
    for batch in batches:
        gradients = torch.autograd.grad(model(batch["ids"], batch), list(parameters.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient
    return sums


class Case(NamedTuple):
    """One way to shard the model and to call the loss."""

    row: str
    objective: str
    shares: tuple[tuple[slice, ...], tuple[slice, ...]]
    unit: bool = False  # the head a unit of its own
    tied: bool = False
    bias: bool = False
    reshard: bool | None = None  # reshard_after_forward; None: each unit's default
    outside: bool = False  # the loss called outside the model's forward
    used: bool = False  # the head's own forward called before, under no_grad
    mixed: bool = False


ROOT, UNIT, TIED, MIXED = (
    f"FSDP2, {what}"
    for what in ("head in the root unit", "head a unit of its own", "tied embeddings", "bfloat16 with float32 sums")
)
CASES = (
    Case(ROOT, "ahpo", INACTIVE, bias=True),
    Case(ROOT, "gspo", EMPTY, reshard=True),
    Case(ROOT, "ahpo", ALONE, outside=True, reshard=True, bias=True),
    Case(UNIT, "ahpo", EMPTY, unit=True, bias=True),
    Case(UNIT, "gspo", ALONE, unit=True, reshard=False),
    Case(UNIT, "ahpo", INACTIVE, unit=True, bias=True, outside=True, used=True),
    Case(UNIT, "gspo", EMPTY, unit=True, outside=True, reshard=False, used=True),
    Case(TIED, "gspo", EMPTY, tied=True, bias=True),
    Case(TIED, "ahpo", INACTIVE, tied=True, outside=True, reshard=True),
    Case(MIXED, "ahpo", EMPTY, unit=True, bias=True, mixed=True),
    Case(MIXED, "gspo", INACTIVE, unit=True, outside=True, mixed=True),
    Case(MIXED, "ahpo", INACTIVE, tied=True, mixed=True),
)


def fsdp2(rank: int, world: int) -> dict[str, float]:
    """Heads that fully_shard divides, read where they are whole and where they are DTensors; two micro-batches each."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    differences: dict[str, float] = {}
    for case in CASES:
        batch = whole_batch(case.objective)
        alone = Model(tied=case.tied, bias=case.bias)
        if case.mixed:  # what each rank rounds for each of its micro-batches
            shares = (*case.shares[0], *case.shares[1])
            expected = gradients_of(alone.bfloat16(), micro_batches(batch, shares, 1.0))
        else:
            expected = gradients_of(alone, [batch])

        model = Model(tied=case.tied, bias=case.bias)
        policy = MixedPrecisionPolicy()
        if case.mixed:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in (model.layer, *([model.lm_head] if case.unit else []), model):
            fully_shard(module, reshard_after_forward=case.reshard, mp_policy=policy)
        assert isinstance(model, FSDPModule)
        mine = micro_batches(batch, case.shares[rank], world)
        for micro in mine:
            model.set_requires_gradient_sync(micro is mine[-1])
            if case.unit and not case.used:  # else PyTorch looks for a gradient that this unit's parameters never had
                model.lm_head.set_requires_gradient_sync(True)
            if case.outside:
                hidden = model(micro["ids"])
                if case.used:
                    with torch.no_grad():
                        model.lm_head(hidden)
                loss_of(model, hidden, micro).backward()
            else:
                model(micro["ids"], micro).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, (case, name)
            assert gradient.placements == parameter.placements
            assert gradient.dtype == parameter.dtype == torch.float32
            difference = worst(gradient.full_tensor(), expected[name])
            assert difference <= LIMIT, f"{case}: {name} off by {difference}"
            differences[case.row] = max(differences.get(case.row, 0.0), difference)
    return differences


def over_tensor_parallel(rank: int, world: int) -> dict[str, float]:
    """FSDP2 over a head whose vocabulary is sharded: within the forward it leaves the DTensor of ColwiseParallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "vocabulary"))
    found = 0.0
    for objective, shares in (("ahpo", EMPTY), ("gspo", ALONE)):
        batch = whole_batch(objective)
        alone, model = Model(bias=True), Model(bias=True)
        expected = gradients_of(alone, [batch])
        parallelize_module(model.lm_head, mesh["vocabulary"], ColwiseParallel())
        fully_shard(model.layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        for micro in micro_batches(batch, shares[mesh.get_local_rank("data")], 2):
            model(micro["ids"], micro | {"vocab_group": mesh["vocabulary"]}).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            difference = worst(parameter.grad.full_tensor(), expected[name])
            assert difference <= LIMIT, f"{objective}: {name} off by {difference}"
            found = max(found, difference)
    return {"FSDP2 over a head sharded over the vocabulary": found}


class Partitioned:
    """A parameter as ZeRO-3 holds it: a shard, whole within ``whole()`` alone; its gradient is averaged as it comes."""

    def __init__(self, parameter: nn.Parameter, rank: int, world: int) -> None:
        self.parameter, self.world, self.entered = parameter, world, 0
        self.shape, self.size = parameter.shape, -(-parameter.numel() // world)
        flat = nn.functional.pad(parameter.detach().flatten(), (0, world * self.size - parameter.numel()))
        self.shard = flat[rank * self.size :][: self.size].clone()
        self.gradient = torch.zeros(self.shape)
        parameter.data = torch.empty(0)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(self.reduce)

    @contextmanager
    def whole(self) -> Iterator[None]:
        assert not self.entered, "entered twice, which DeepSpeed refuses"
        flat = torch.empty(self.world * self.size)
        distributed.all_gather(list(flat.chunk(self.world)), self.shard)
        self.parameter.data = flat[: self.shape.numel()].view(self.shape)
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1
            self.parameter.data = torch.empty(0)

    def reduce(self, parameter: Tensor) -> None:
        assert parameter.shape == self.shape, "released before its gradient was added"
        assert parameter.grad is not None
        distributed.all_reduce(parameter.grad)
        self.gradient += parameter.grad / self.world
        parameter.grad = None


def zero3(rank: int, world: int) -> dict[str, float]:
    """A head that is empty but within ``weight_context``: trained, tied to the embedding, frozen; and refusals."""
    rows = {name: f"ZeRO-3 (imitated), weight_context=, {name} head" for name in ("trained", "tied", "frozen")}
    differences = dict.fromkeys(rows.values(), 0.0)
    for kind, objective, shares in (
        ("trained", "ahpo", ALONE), ("trained", "gspo", EMPTY), ("tied", "ahpo", EMPTY), ("tied", "gspo", INACTIVE),
        ("frozen", "ahpo", INACTIVE), ("frozen", "gspo", ALONE),
    ):  # fmt: skip
        batch = whole_batch(objective)
        alone, model = (Model(tied=kind == "tied") for _ in range(2))
        for head in (alone.lm_head, model.lm_head):
            head.requires_grad_(kind != "frozen")
        alone(batch["ids"], batch).backward()
        head = Partitioned(model.lm_head.weight, rank, world)

        layers = [parameter for parameter in model.parameters() if parameter is not head.parameter]
        for micro in micro_batches(batch, shares[rank], world):
            if kind == "tied":
                with head.whole():  # as the embedding's own module would
                    hidden = model(micro["ids"])
            else:
                hidden = model(micro["ids"])
            old = hf.linear_token_logprobs(hidden.detach(), head.parameter, micro["tokens"], weight_context=head.whole)
            assert old.logprobs.shape == micro["tokens"].shape
            loss = torch.zeros(())
            for part in (slice(0, 1), slice(1, None)):  # two calls, whose backward must not enter twice
                own = {name: value[part] if isinstance(value, Tensor) else value for name, value in micro.items()}
                loss = loss + loss_of(model, hidden[part], own, weight_context=head.whole)
                assert head.entered == 0
            loss.backward()
            assert head.entered == 0
        for parameter in layers:
            if parameter.requires_grad:
                assert parameter.grad is not None
                distributed.all_reduce(parameter.grad)
                parameter.grad /= world
        for (name, expected), ours in zip(alone.named_parameters(), model.parameters(), strict=True):
            if expected.grad is not None:
                gradient = head.gradient if ours is head.parameter else ours.grad
                assert gradient is not None
                difference = worst(gradient, expected.grad)
                assert difference <= LIMIT, f"{kind}, {objective}: {name} off by {difference}"
                differences[rows[kind]] = max(differences[rows[kind]], difference)

    hidden = torch.randn(8, 5, WIDTH, requires_grad=True)
    head = Partitioned(Model().lm_head.weight, rank, world)
    for options, words in (
        ({}, r"^weight: expected shape \[V, 16\] .*\[0\].*weight_context=lambda: deepspeed"),
        ({"weight_context": head.whole, "mask": MASK[:2]}, "^mask: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            hf.linear_policy_loss(hidden, head.parameter, batch["tokens"], ADVANTAGES, **options)
        assert head.entered == 0
    for objective in ("ahpo", "gspo"):
        out = hf.linear_policy_loss(
            hidden, head.parameter, batch["tokens"], ADVANTAGES, objective=objective, weight_context=head.whole
        )
        out.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second"):
            out.loss.backward()
        assert head.entered == 0
    return differences


PARTS: dict[str, Part] = {"fsdp2": (2, fsdp2), "zero3": (2, zero3), "fsdp2_vocabulary": (4, over_tensor_parallel)}
