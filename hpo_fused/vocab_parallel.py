"""Logits or an LM head sharded over the vocabulary: which columns are whose, and how the rows' statistics meet.

The ranks of a group have the same rows, and each a part of every row's columns. A rank's first sweep gives the softmax
statistics of its own columns; one all-gather hands everyone's to everyone, and every rank combines them alike. With
w_r the part of a row's probability that lies on rank r,

    log w_r = lse_r - lse        log p_y = log p_y|r + log w_r        H = sum_r w_r (H_r - log w_r)

(r the rank that holds y; H by the chain rule of entropy). Everything between the sweeps is then computed by all ranks
alike, and the second sweep is local again, relative to the whole row's maximum and sum. So the loss is one number, the
same on every rank, and a rank's gradient is that of its own columns.

A row whose token lies on another rank is swept with this rank's first column in the token's place: the sweeps treat
one column apart, and what they write to it is corrected afterwards. So they need not know that there are other ranks.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, Union, cast

import torch
from torch import Tensor, distributed

from . import ops
from .backend import implementation
from .checks import check_integer, described, is_dtensor, plain_numbers
from .interface import LogitTransform, SoftmaxStatistics
from .process_groups import GroupLike, all_gathered, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

VocabGroup: TypeAlias = Union[GroupLike, "VocabShard", None]

# The maximum in a shard without columns: as where every logit is -inf.
_LOWEST = -1e30

# What the ranks of a group hold, by the size of the vocabulary where a VocabShard says it: asked once, and so by all
# ranks at the same call.
_known: weakref.WeakKeyDictionary[Any, dict[int | None, tuple[tuple[int, int], ...]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class VocabShard:
    """A rank's columns [start, start + columns) of a vocabulary that is sharded over a process group.

    A plain process group as ``vocab_group=`` says the same where the shards follow each other in the ranks' order.

    Args:
        group: the ranks that hold the vocabulary together, this one among them; a mesh of one dimension is its group.
        start: id of this rank's first column.
        vocabulary: size V of the whole vocabulary.

    Raises:
        TypeError: group is neither of these, start or vocabulary no int.
        ValueError: this rank is not in the group; start outside [0, V]; V < 1. The first loss call with a group and V
            raises it as well, on every rank, where the ranks' shards do not cover [0, V) once; later calls with them do
            on a rank whose shard is another than then.
    """

    group: GroupLike
    start: int
    vocabulary: int

    def __post_init__(self) -> None:
        check_group("group", self.group)
        plain_numbers(self)
        for name in ("start", "vocabulary"):
            check_integer(name, getattr(self, name))
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary: expected a size >= 1, got {self.vocabulary}")
        if not 0 <= self.start <= self.vocabulary:
            raise ValueError(f"start: expected an id in [0, {self.vocabulary}], got {self.start}")


class Shards(NamedTuple):
    """Which ids [start, stop) of a vocabulary each rank of a group has; this rank is number ``rank`` of them."""

    group: ProcessGroup
    rank: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def vocabulary(self) -> int:
        """Size of the whole vocabulary."""
        return max(stop for _, stop in self.ranges)

    @property
    def own(self) -> tuple[int, int]:
        """This rank's ids."""
        return self.ranges[self.rank]

    @classmethod
    def asked(cls, group: ProcessGroup, columns: int, device: torch.device, shard: VocabShard | None = None) -> Shards:
        """What the ranks have: where a shard says, or one after the other in the ranks' order.

        One collective and one synchronisation at the first call with a group (and, where shards say it, a vocabulary),
        none later: whether one is asked must not depend on what a single rank has.

        Raises:
            ValueError: on every rank alike; ranges that overlap or leave gaps, or another V on another rank. Later, on
                a rank whose shard is another than at the first call.
        """
        mine = (-1, columns, -1) if shard is None else (shard.start, columns, shard.vocabulary)
        known, key = _known.setdefault(group, {}), None if shard is None else shard.vocabulary
        rank = distributed.get_rank(group)
        if key not in known:
            every = all_gathered(torch.tensor(mine, device=device), group).tolist()
            sizes = [width for _, width, _ in every]
            vocabulary = every[0][2] if shard is not None else sum(sizes)
            starts = [start for start, _, _ in every] if shard is not None else [0, *accumulate(sizes)][:-1]
            ranges = tuple((start, start + width) for start, width in zip(starts, sizes, strict=True))
            filled = sorted(span for span in ranges if span[0] < span[1])
            ends = [0, *(end for _, end in filled)]
            if len({size for *_, size in every}) > 1 or [*(start for start, _ in filled), vocabulary] != ends:
                said = [f"[{start}, {start + width}) of {size}" for start, width, size in every]
                raise ValueError(
                    "vocab_group: expected shards that cover a vocabulary once, on every rank of the same size, got "
                    f"{', '.join(said)}"
                )
            known[key] = ranges
        first, stop = known[key][rank]
        if columns != stop - first or (shard is not None and shard.start != first):
            place = "" if shard is None else f" from {shard.start} on"
            raise ValueError(
                f"vocab_group: expected ids [{first}, {stop}) on this rank, as in the first call with the group, got "
                f"{columns} columns{place}; a VocabShard tells vocabularies of different sizes apart"
            )
        return cls(group, rank, known[key])

    def local(self, targets: Tensor) -> Tensor:
        """Targets, int32 [B, T], as this rank's columns: 0 for a token of another rank's, codes as they are."""
        start, stop = self.own
        inside = (targets >= start) & (targets < stop)
        return torch.where(inside, targets - start, targets.clamp(max=0))

    def combined(
        self, statistics: SoftmaxStatistics, targets: Tensor, backend: str
    ) -> tuple[Tensor, SoftmaxStatistics]:
        """Each token's log-probability, and this rank's statistics relative to the whole row: one all-gather.

        Args:
            statistics: of this rank's columns, their ``logprobs`` that of the token's column or of column 0.
            targets: int32 [B, T], ids of the whole vocabulary or codes.
            backend: whose statistics they are.

        Returns:
            Log-probabilities [B, T], and the statistics that the second sweep wants: ``maximum`` and ``entropy`` of the
            whole row, ``others`` all its exponentials but that of this rank's column, whose log-probability
            ``logprobs`` is.
        """
        message = torch.stack([entry for entry in statistics if entry is not None])
        combined: tuple[Tensor, SoftmaxStatistics] = implementation(backend).combine_statistics(
            all_gathered(message, self.group), targets, _on_device(self.ranges, message.device), self.rank
        )
        return combined


@functools.lru_cache(maxsize=64)
def _on_device(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The ranks' ranges, int32 [W, 2]."""
    return torch.tensor(ranges, dtype=torch.int32, device=device)


def local_statistics(
    shards: Shards, logits: Tensor, targets: Tensor, transform: LogitTransform, statistics: SoftmaxStatistics,
    backend: str,
) -> None:  # fmt: skip
    """First sweep over a rank's columns: writes ``statistics``, as :meth:`Shards.combined` takes them.

    ``targets``: int32 [B, T], ids of the whole vocabulary or codes.
    """
    if logits.shape[-1] > 0:
        ops.token_statistics(logits, shards.local(targets), transform, statistics, backend)
        return
    for entry, value in zip(statistics, (torch.nan, _LOWEST, 0.0, 0.0), strict=True):
        if entry is not None:
            entry.fill_(value)


def token_gradient(
    shards: Shards | None, logits: Tensor, targets: Tensor, statistics: SoftmaxStatistics, c: Tensor,
    h: Tensor | None, transform: LogitTransform, out: Tensor, backend: str,
) -> None:  # fmt: skip
    """Second sweep: writes the gradient ``out`` of logits [B, T, V], or of a rank's columns.

    Args:
        shards: whose columns they are; None: the whole vocabulary.
        targets: int32 [B, T], ids of the whole vocabulary or codes.
        statistics: of the first sweep, for a shard as :meth:`Shards.combined` returns them.
        logits, c, h, transform, out: as :func:`hpo_fused.torch_backend.operations.token_gradient` takes them.
    """
    if shards is None:
        ops.token_gradient(logits, targets, statistics, c, h, transform, out, backend)
    elif logits.shape[-1] > 0:
        first = None
        if transform.softcap is not None:  # its slope; before it is written over, in the rows' order and not memory's
            first = logits[..., 0].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        ops.token_gradient(logits, shards.local(targets), statistics, c, h, transform, out, backend)
        implementation(backend).column_gradient(first, targets, shards.own[0], statistics, c, h, transform, out)


# ---------------------------------------------------------------------------------------------------------------
# who holds what


def _shards_of_dtensor(name: str, value: DTensor, dimension: int, group: VocabGroup) -> tuple[Tensor, Shards | None]:
    """A DTensor's local part, and its shard where its placements say that ``dimension`` is the vocabulary's."""
    from torch.distributed.tensor import Replicate, Shard

    dimension %= value.ndim
    # By exact type: FSDP2 over tensor parallelism has a subclass of Shard.
    sharded = [i for i, place in enumerate(value.placements) if type(place) is Shard and place.dim == dimension]
    if len(sharded) > 1 or any(
        type(place) is not Replicate for i, place in enumerate(value.placements) if i not in sharded
    ):
        raise ValueError(
            f"{name}: expected a tensor, or a DTensor with placements Replicate() and one Shard({dimension}) only, got "
            f"{tuple(value.placements)}; pass this rank's rows as a plain tensor, or a DTensor of the mesh's "
            "vocabulary dimension alone"
        )
    local = value.to_local()
    if not sharded:
        if group is not None:
            raise ValueError(
                f"{name}: expected a DTensor with Shard({dimension}) for vocab_group, got Replicate() only"
            )
        return local, None
    own = value.device_mesh.get_group(sharded[0])
    if isinstance(group, VocabShard):
        raise ValueError(f"vocab_group: expected a group or None beside a DTensor, which says its place, got {group}")
    if group is not None:
        members = check_group("vocab_group", group)
        given, right = (distributed.get_process_group_ranks(ranks) for ranks in (members, own))
        if given != right:
            raise ValueError(f"vocab_group: expected the ranks {right} that {name} is sharded over, got {given}")
    size, ranks = value.shape[dimension], distributed.get_world_size(own)
    edges = [min(-(-size // ranks) * rank, size) for rank in range(ranks + 1)]  # as torch.chunk cuts
    shards = Shards(own, distributed.get_rank(own), tuple(pairwise(edges)))
    if local.shape[dimension] != shards.own[1] - shards.own[0]:
        raise ValueError(
            f"{name}: expected a DTensor cut as torch.chunk does, ids {shards.own} on this rank, got "
            f"{described(local)} of {tuple(value.shape)}; pass it as a plain tensor with a VocabShard"
        )
    return local, shards


def resolve_shards(name: str, value: Any, dimension: int, group: VocabGroup) -> tuple[Tensor, Shards | None]:
    """A tensor of which ``dimension`` is the vocabulary's as this rank's plain tensor, and the ranks' shards, if any.

    Raises:
        TypeError: group is neither a process group, a mesh nor a :class:`VocabShard`.
        ValueError: this rank is not in it; a mesh of several dimensions; a DTensor's layout that is not supported or
            is over other ranks; shards that do not cover the vocabulary once, or are others than at the first call.
    """
    # What is no tensor is refused by whoever asked.
    if (group is None and not is_dtensor(value)) or not isinstance(value, Tensor) or value.dim() == 0:
        return value, None
    resolved: tuple[Tensor, Shards | None] = _resolved(name, value, dimension, group)
    return resolved


@torch.compiler.disable(reason="process groups are known only at run time; call it between compiled graphs")  # type: ignore[untyped-decorator]
def _resolved(name: str, value: Tensor, dimension: int, group: VocabGroup) -> tuple[Tensor, Shards | None]:
    if is_dtensor(value):
        return _shards_of_dtensor(name, cast("DTensor", value), dimension, group)
    assert group is not None
    shard, members = (group, group.group) if isinstance(group, VocabShard) else (None, group)
    return value, Shards.asked(check_group("vocab_group", members), value.shape[dimension], value.device, shard)


# ---------------------------------------------------------------------------------------------------------------
# hidden states before a sharded head


class _Replicated(torch.autograd.Function):
    """Hidden states that every rank has, as they are; their gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Where it lies: it was made for this function alone.
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _GatheredSequence(torch.autograd.Function):
    """All ranks' parts [B, T / W, H] of a sequence as [B, T, H]; the gradient's parts are summed and handed back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        batch, steps, width = hidden.shape
        every = all_gathered(hidden.contiguous(), group)
        return every.transpose(0, 1).reshape(batch, len(every) * steps, width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        batch, length, width = gradient.shape
        ranks = distributed.get_world_size(ctx.group)
        parts = gradient.view(batch, ranks, length // ranks, width).transpose(0, 1).contiguous()
        mine = torch.empty_like(parts[0])
        scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
        scatter(mine, parts.flatten(0, 1), group=ctx.group)
        return mine, None


def hidden_before_shards(hidden: Tensor, shards: Shards, sequence_parallel: bool) -> Tensor:
    """Hidden states [B, T, H] as a sharded head takes them: this rank's own, or all ranks' parts of the sequence.

    The gradient that the head's shards give is a sum over ranks, made in backward in the hidden states' dtype.
    """
    function = _GatheredSequence if sequence_parallel else _Replicated
    return function.apply(hidden, shards.group)  # type: ignore[no-untyped-call, no-any-return]
