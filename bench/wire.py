"""Bytes that a call puts on the wire when its work is split over ranks: the formulas, and their time on given links.

Each function below gives the collectives of one call (or step) of one form, with the size that a profiler shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from .cases import Shape
from .tables import NOTHING, Table, number

BFLOAT16, FLOAT, DOUBLE = 2, 4, 8  # bytes


class Link(NamedTuple):
    """Bytes per second of one GPU in one direction, and seconds of latency for each doubling of the ranks."""

    speed: float
    latency: float


RESPONSES, GROUPS = 64, 8  # of a rank
GPUS, LAYOUTS = (8, 64, 512, 4096), ((1, 1), (2, 1), (8, 1), (8, 8))  # vocabulary shards and context ranks
NODE = 8  # GPUs
NVLINK, NETWORK = Link(450e9, 4e-6), Link(50e9, 8e-6)  # of an H100 or H200; 400 Gb/s InfiniBand for each GPU
# An H200, measured (docs/kernels.md, docs/linear.md): a copy, what a loss of logits takes over it; GEMMs, and
# what one of hidden states takes over them. Of shards the sweeps are kernels apart, 0.55 and 1.07 copies, and the GEMMs
# four.
COPY, OVER_COPY, OVER_COPY_APART, GEMM, OVER_GEMM = 4.3e12, 1.27, 1.62, 790e12, 1.06


class Collective(NamedTuple):
    """One collective.

    Attributes:
        kind: "all_reduce", "all_gather" or "reduce_scatter".
        message: bytes of a rank's input, which is what a profiler shows: its own part for all_gather.
        ranks: size of the group.
        formula: of the message, in words of the document.
    """

    kind: str
    message: int
    ranks: int
    formula: str

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, in a ring."""
        whole = self.message * (self.ranks if self.kind == "all_gather" else 1)
        return (2 if self.kind == "all_reduce" else 1) * whole * (self.ranks - 1) / self.ranks

    def seconds(self, link: Link) -> float:
        """Time on a link by the ring's bytes and a tree's latency."""
        return self.sent / link.speed + link.latency * math.ceil(math.log2(self.ranks))


def counts(groups: int, ranks: int) -> list[Collective]:
    """Totals of the optimiser batch, once a step."""
    return [Collective("all_reduce", DOUBLE * (4 + groups), ranks, "8 (4 + G)")]


def context_counts(responses: int, ranks: int) -> list[Collective]:
    """Lengths and signs of responses that context ranks share, once a step."""
    return [Collective("all_reduce", DOUBLE * 2 * responses, ranks, "8 · 2 B")]


def context(responses: int, ranks: int, *, spread: bool = True) -> list[Collective]:
    """Response-level ratios over context ranks: sums and counts, and the derivative where it is spread."""
    found = [Collective("all_reduce", FLOAT * 2 * responses, ranks, "4 · 2 B")]
    return [*found, Collective("all_reduce", FLOAT * responses, ranks, "4 B")] if spread else found


def vocabulary_shards(rows: int, ranks: int, *, entropy: bool = True) -> list[Collective]:
    """Rows of logits over their vocabulary's shards: the softmax statistics of each."""
    count = 4 if entropy else 3
    return [Collective("all_gather", FLOAT * count * rows, ranks, "4 k n")]


def head_shards(
    rows: int, hidden: int, itemsize: int, ranks: int, *, computed: int | None = None, entropy: bool = True,
    sequence_parallel: bool = False,
) -> list[Collective]:  # fmt: skip
    """Hidden states times a head sharded over the vocabulary, forward and backward; ``computed``: None, or fewer rows.

    Those of which statistics are gathered; hidden states and their gradient are those of all rows.
    """
    statistics, size = (
        vocabulary_shards(rows if computed is None else computed, ranks, entropy=entropy),
        rows * hidden * itemsize,
    )
    if not sequence_parallel:
        return [*statistics, Collective("all_reduce", size, ranks, "s n H")]
    gathered = Collective("all_gather", size // ranks, ranks, "s n H ÷ W")
    return [gathered, *statistics, Collective("reduce_scatter", size, ranks, "s n H")]


def gathered_head(vocabulary: int, hidden: int, itemsize: int, ranks: int) -> list[Collective]:
    """FSDP2's head: gathered for a call, its gradient scattered."""
    size = vocabulary * hidden * itemsize
    gathered = Collective("all_gather", size // ranks, ranks, "s V H ÷ W")
    return [gathered, Collective("reduce_scatter", size, ranks, "s V H")]


def gathered_logits(rows: int, vocabulary: int, itemsize: int, ranks: int) -> list[Collective]:
    """What this package does not do: every rank gets every shard's logits."""
    return [Collective("all_gather", rows * vocabulary * itemsize // ranks, ranks, "s n V ÷ W")]


def seconds(collectives: Sequence[Collective], link: Link) -> float:
    """Time of collectives one after the other; none where a group has one rank."""
    return sum(one.seconds(link) for one in collectives if one.ranks > 1)


def link(ranks: int, inner: int = 1) -> Link:
    """What joins a group whose ranks are ``inner`` apart: its share of a node's links where it leaves the node."""
    if ranks * inner <= NODE:
        return NVLINK
    return Link(min(NVLINK.speed, NETWORK.speed * max(1, NODE // inner)), NETWORK.latency)


def tables(shape: Shape, rows: int) -> tuple[Table, Table]:
    """Messages of every form, and their time beside the local work on 8 to 4,096 GPUs; bfloat16.

    Raises:
        ValueError: the shape has no hidden size.
    """
    if not shape.hidden:
        raise ValueError(f"shape: expected a hidden size (H=N), got {shape.name!r}")
    return _messages(shape, rows), _times(shape, rows)


def _messages(shape: Shape, rows: int) -> Table:
    size, ranks, call = shape.hidden, NODE, "a call"
    forms = {
        (call, "logits"): vocabulary_shards(rows, ranks),
        (call, "hidden states"): head_shards(rows, size, BFLOAT16, ranks),
        (call, "sequence_parallel"): head_shards(rows, size, BFLOAT16, ranks, sequence_parallel=True),
        (call, "ratios of responses"): context(RESPONSES, ranks),
        (call, "FSDP2's head"): gathered_head(shape.vocabulary, size, BFLOAT16, ranks),
        ("a step", "totals"): counts(GROUPS, ranks),
        ("a step", "whole lengths"): context_counts(RESPONSES, ranks),
        ("never", "logits gathered"): gathered_logits(rows, shape.vocabulary, BFLOAT16, ranks),
    }
    view = Table("Messages", ("in", "of", "collective", "message", "bytes", "÷ n", "sent ÷ n"), left=4)
    for (when, form), collectives in forms.items():
        for one in collectives:
            sizes = f"{one.message:,}", number(one.message / rows), number(one.sent / rows)
            view.add(when, form, one.kind, one.formula, *sizes)
            form = ""
    view.notes = [
        "Message: what a rank hands in, as a profiler shows it. ÷ n: for each token. Sent: by each rank in a ring, "
        "(W − 1) ÷ W of the whole, twice that for all_reduce.",
        f"{shape.name}: V = {shape.vocabulary}, H = {size}; n = {rows} rows, s = {BFLOAT16} bytes, W = {ranks} ranks, "
        f"B = {RESPONSES} responses, G = {GROUPS} groups; k = 4 numbers of a row, 3 without entropy.",
    ]
    return view


def _times(shape: Shape, rows: int) -> Table:
    size, headings = shape.hidden, ("GPUs", "TP·CP·DP", *("logits", "wire", "share"), *("hidden", "wire", "share"))
    view = Table("Time, ms", (*headings, "gathered", "FSDP2", "totals"))
    for gpus, (shards, parts) in product(GPUS, LAYOUTS):
        if not (replicas := gpus // (shards * parts)):
            continue
        entries, rest = rows * shape.vocabulary / shards, gpus // shards
        of_parts, of_rest = link(parts, shards), link(rest, shards)
        ratios = seconds(context(RESPONSES, parts), of_parts)
        copies, gemms = (OVER_COPY, 3) if shards == 1 else (OVER_COPY_APART, 4)
        forms = (
            (copies * 2 * BFLOAT16 * entries / COPY, vocabulary_shards(rows, shards)),
            (OVER_GEMM * gemms * 2 * size * entries / GEMM, head_shards(rows, size, BFLOAT16, shards)),
        )
        cells: list[str] = []
        for local, collectives in forms:
            wire = ratios + seconds(collectives, NVLINK)
            cells += [number(1e3 * local), number(1e3 * wire or None), f"{wire / local:.1%}" if wire else NOTHING]
        others = (
            seconds(gathered_logits(rows, shape.vocabulary, BFLOAT16, shards), NVLINK),
            seconds(gathered_head(shape.vocabulary // shards, size, BFLOAT16, rest), of_rest),
            seconds(context_counts(RESPONSES, parts), of_parts) + seconds(counts(GROUPS * replicas, rest), of_rest),
        )
        view.add(
            f"{gpus:,} GPUs", f"{shards}·{parts}·{replicas}", *cells, *(number(1e3 * one or None) for one in others)
        )
    view.notes = [
        f"Computed, not measured. {rows} rows a call of each vocabulary group, {RESPONSES} responses and {GROUPS} "
        f"groups of each data rank. Wire: the ring's bytes ÷ speed, {NVLINK.speed / 1e9:g} GB/s in a node of {NODE}, "
        f"between nodes {NETWORK.speed / 1e9:g} for each GPU that the group has in one; and "
        f"{1e6 * NVLINK.latency:g} or {1e6 * NETWORK.latency:g} µs for every doubling of the ranks. Nothing overlaps.",
        f"Logits: {OVER_COPY} × a copy at {COPY / 1e12:g} TB/s, of shards {OVER_COPY_APART}; hidden: {OVER_GEMM} × "
        f"three GEMMs at {GEMM / 1e12:g} TFLOP/s, of shards four. Wire: vocabulary shards, and over context ranks the "
        "ratios of responses. FSDP2: the head's gather and its gradient's scatter over CP × DP ranks. Totals: once a "
        "step.",
    ]
    return view
