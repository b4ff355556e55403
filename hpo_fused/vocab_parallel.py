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

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

import torch
from torch import Tensor, distributed

from . import ops
from .backend import implementation
from .checks import described, is_dtensor
from .interface import LogitTransform, SoftmaxStatistics
from .process_groups import GroupLike, all_gathered, check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

VocabGroup: TypeAlias = Union[GroupLike, "VocabShard", None]

# The maximum of a shard in which every logit is -inf (a kept set that has none of its ids), and of one without columns.
_LOWEST = -1e30

# Below this distance from probability 1 the token is the maximum, and the others' sum need not be a normal number.
_CERTAIN = 1e-30

# Columns of every rank, by group and by those of this one: asked once.
_columns: weakref.WeakKeyDictionary[Any, dict[int, tuple[int, ...]]] = weakref.WeakKeyDictionary()


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
        ValueError: this rank is not in the group; start outside [0, V]; V < 1.
    """

    group: ProcessGroup
    start: int
    vocabulary: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", check_group("group", self.group))
        for name in ("start", "vocabulary"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {described(value)}")
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary: expected a size >= 1, got {self.vocabulary}")
        if not 0 <= self.start <= self.vocabulary:
            raise ValueError(f"start: expected an id in [0, {self.vocabulary}], got {self.start}")

    @classmethod
    def of(cls, group: ProcessGroup, columns: int, device: torch.device) -> VocabShard:
        """This rank's shard where shards of any sizes follow each other in the ranks' order.

        One collective and one synchronisation at the first call with a group and a number of columns, none later.
        """
        known = _columns.setdefault(group, {})
        if columns not in known:
            known[columns] = tuple(all_gathered(torch.tensor([columns], device=device), group).flatten().tolist())
        sizes, rank = known[columns], distributed.get_rank(group)
        return cls(group, sum(sizes[:rank]), sum(sizes))

    @property
    def ranks(self) -> int:
        """Number of ranks that hold the vocabulary."""
        return distributed.get_world_size(self.group)

    def check(self, logits: Tensor) -> None:
        """Ask all ranks of the group whether their shards make up the vocabulary, and whether they have the same rows.

        A collective that waits for the device: for debugging, called by every rank of the group.

        Args:
            logits: this rank's, [B, T, columns] or [N, columns].

        Raises:
            ValueError: on every rank alike; ranges that overlap or leave gaps, another V or other rows elsewhere.
        """
        *rows, columns = logits.shape
        mine = torch.tensor([self.start, columns, self.vocabulary, *rows], device=logits.device)
        shards = all_gathered(mine, self.group).tolist()
        if any(shard[2:] != shards[0][2:] for shard in shards):
            seen = [f"V = {vocabulary}, {shape}" for _, _, vocabulary, *shape in shards]
            raise ValueError(f"vocab_group: expected the same vocabulary and rows on every rank, got {'; '.join(seen)}")
        ranges = [(start, start + width) for start, width, *_ in shards]
        filled = sorted(span for span in ranges if span[0] < span[1])
        ends = [0, *(end for _, end in filled)]
        if [*(start for start, _ in filled), self.vocabulary] != ends:
            raise ValueError(f"vocab_group: expected shards that cover [0, {self.vocabulary}) once, got {ranges}")

    def local(self, targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Targets as this rank's columns, 0 for a token of another rank's, codes as they are; and which are elsewhere.

        Args:
            targets: int32 [B, T], ids in [0, V) or codes.
            columns: number of this rank's columns.
        """
        inside = (targets >= self.start) & (targets < self.start + columns)
        elsewhere = (targets >= 0) & ~inside
        return torch.where(inside, targets - self.start, torch.where(elsewhere, 0, targets)), elsewhere

    def combined(
        self, statistics: SoftmaxStatistics, elsewhere: Tensor, backend: str
    ) -> tuple[Tensor, SoftmaxStatistics]:
        """Each token's log-probability, and this rank's statistics relative to the whole row: one all-gather.

        Args:
            statistics: of this rank's columns, their ``logprobs`` that of the token's column or of column 0.
            elsewhere: bool [B, T], rows whose token is another rank's.
            backend: whose statistics they are.

        Returns:
            Log-probabilities [B, T], and the statistics that the second sweep wants: ``maximum`` and ``entropy`` of the
            whole row, ``others`` all its exponentials but that of this rank's column, whose log-probability
            ``logprobs`` is.
        """
        unit = implementation(backend).MAXIMUM_UNIT
        logprobs, maximum, others = (entry.to(torch.float64) for entry in statistics[:3])
        whole = torch.where(-logprobs < _CERTAIN, 1.0, others / -torch.expm1(logprobs))
        empty = (maximum <= _LOWEST) | ((others == 0) & logprobs.isnan())
        whole, others = (torch.where(empty, 0.0, value) for value in (whole, others))
        maximum = torch.where(empty, _LOWEST, maximum)
        own = torch.where(elsewhere | empty, -torch.inf, logprobs)
        parts = [maximum, whole, own]
        if statistics.entropy is not None:
            parts.append(torch.where(empty, 0.0, statistics.entropy))
        message = torch.stack([part.to(torch.float32) for part in parts])
        every = all_gathered(message, self.group)

        maxima, sums, tokens, *entropies = every.to(torch.float64).unbind(1)  # [W, B, T]
        top = maxima.amax(0)
        drop = (maxima - top) * unit
        mass = drop.exp() * sums
        total = mass.sum(0)
        rank = distributed.get_rank(self.group)
        # Without the part itself, not the total less it: what little is left of a peaked row keeps its digits.
        holds = tokens > -torch.inf
        rest = torch.where(holds, 0.0, mass).sum(0)
        share = drop + sums.log() - total.log()
        share = torch.where(holds & (rest < mass), -torch.log1p(rest / mass), share)
        column = share[rank] + torch.where(empty, -torch.inf, logprobs)
        beside = mass[:rank].sum(0) + mass[rank + 1 :].sum(0) + drop[rank].exp() * others
        entropy = None
        if entropies:
            weight = share.exp()
            entropy = torch.where(weight == 0, 0.0, weight * (entropies[0] - share)).sum(0).to(torch.float32)
        found, column, top, beside = (
            value.to(torch.float32) for value in ((tokens + share).amax(0), column, top, beside)
        )
        return found, SoftmaxStatistics(column, top, beside, entropy)


def local_statistics(
    shard: VocabShard, logits: Tensor, targets: Tensor, transform: LogitTransform, statistics: SoftmaxStatistics,
    backend: str,
) -> Tensor:  # fmt: skip
    """First sweep over a shard's columns: writes ``statistics``, as :meth:`VocabShard.combined` takes them.

    ``targets``: int32 [B, T], ids of the whole vocabulary or codes. Returns which tokens are another rank's.
    """
    local, elsewhere = shard.local(targets, logits.shape[-1])
    if logits.shape[-1] > 0:
        ops.token_statistics(logits, local, transform, statistics, backend)
    else:
        for entry, value in zip(statistics, (torch.nan, _LOWEST, 0.0, 0.0), strict=True):
            if entry is not None:
                entry.fill_(value)
    return elsewhere


def token_gradient(
    shard: VocabShard | None, logits: Tensor, targets: Tensor, statistics: SoftmaxStatistics, c: Tensor,
    h: Tensor | None, transform: LogitTransform, out: Tensor, backend: str,
) -> None:  # fmt: skip
    """Second sweep: writes the gradient ``out`` of logits [B, T, V], or of a shard's columns.

    Args:
        shard: whose columns they are; None: the whole vocabulary.
        targets: int32 [B, T], ids of the whole vocabulary or codes.
        statistics: of the first sweep, for a shard as :meth:`VocabShard.combined` returns them.
        logits, c, h, transform, out: as :func:`hpo_fused.torch_backend.operations.token_gradient` takes them.
    """
    if shard is None:
        ops.token_gradient(logits, targets, statistics, c, h, transform, out, backend)
    elif logits.shape[-1] > 0:
        local, elsewhere = shard.local(targets, logits.shape[-1])
        first = logits[..., 0].to(torch.float64)  # before it is written over
        ops.token_gradient(logits, local, statistics, c, h, transform, out, backend)
        gradient = _column_gradient(first, statistics, c, h, transform).to(out.dtype)
        out[..., 0] = torch.where(elsewhere, gradient, out[..., 0])


def _column_gradient(
    z: Tensor, statistics: SoftmaxStatistics, c: Tensor, h: Tensor | None, transform: LogitTransform
) -> Tensor:
    """dloss/dz of a column that is not the token's: p (h (E[z'] - z') - c) dz'/dz, with E[z'] - z' = -H - log p."""
    logprob = statistics.logprobs.to(torch.float64)
    slope, live = -c.to(torch.float64), c != 0
    if h is not None:
        assert statistics.entropy is not None
        slope, live = slope - h * (statistics.entropy + logprob), live | (h != 0)
    if transform.softcap is not None:
        w = (z.abs() * (-2 / transform.softcap)).exp()
        slope = slope * 4 * w / (1 + w).square()
    slope = slope / (transform.temperature if transform.temperatures is None else transform.temperatures)
    return torch.where(live & (logprob > -torch.inf), logprob.exp() * slope, 0.0)


# ---------------------------------------------------------------------------------------------------------------
# who holds what


def _shard_of_dtensor(name: str, value: DTensor, dimension: int, group: VocabGroup) -> tuple[Tensor, VocabShard | None]:
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
    if group is not None:
        members = group.group if isinstance(group, VocabShard) else check_group("vocab_group", group)
        given, right = (distributed.get_process_group_ranks(ranks) for ranks in (members, own))
        if given != right:
            raise ValueError(f"vocab_group: expected the ranks {right} that {name} is sharded over, got {given}")
    size, ranks = value.shape[dimension], distributed.get_world_size(own)
    start = min(-(-size // ranks) * distributed.get_rank(own), size)  # as torch.chunk cuts
    return local, VocabShard(own, start, size)


def resolve_shard(name: str, value: Tensor, dimension: int, group: VocabGroup) -> tuple[Tensor, VocabShard | None]:
    """A tensor of which ``dimension`` is the vocabulary's as this rank's plain tensor, and its shard, if it is one.

    Raises:
        TypeError: group is neither a process group, a mesh nor a :class:`VocabShard`.
        ValueError: this rank is not in it; a mesh of several dimensions; a DTensor's layout that is not supported or
            is over other ranks; columns beyond the vocabulary.
    """
    if group is None and not is_dtensor(value):
        return value, None
    resolved: tuple[Tensor, VocabShard | None] = _resolved(name, value, dimension, group)
    return resolved


@torch.compiler.disable(reason="process groups are known only at run time; call it between compiled graphs")  # type: ignore[untyped-decorator]
def _resolved(name: str, value: Tensor, dimension: int, group: VocabGroup) -> tuple[Tensor, VocabShard | None]:
    if is_dtensor(value):
        return _shard_of_dtensor(name, cast("DTensor", value), dimension, group)
    if isinstance(group, VocabShard):
        stop = group.start + value.shape[dimension]
        if stop > group.vocabulary:
            raise ValueError(
                f"{name}: expected at most {group.vocabulary - group.start} columns from id {group.start} of "
                f"{group.vocabulary}, got {described(value)}"
            )
        return value, group
    assert group is not None
    return value, VocabShard.of(check_group("vocab_group", group), value.shape[dimension], value.device)


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
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Gathered(torch.autograd.Function):
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
        scatter(mine, parts.view(-1, *mine.shape[1:]), group=ctx.group)
        return mine, None


def hidden_before_shards(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """Hidden states [B, T, H] as a sharded head takes them: this rank's own, or all ranks' parts of the sequence.

    The gradient that the head's shards give is a sum over ranks, made in backward in the hidden states' dtype.
    """
    function = _Gathered if sequence_parallel else _Replicated
    return function.apply(hidden, shard.group)  # type: ignore[no-untyped-call, no-any-return]
