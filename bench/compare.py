"""Two results, row by row: what became slower, larger or wrong from a base to a new one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .cases import BatchCase, Case
from .linear.results import GEMMS, LinearResult
from .results import COPY, Measurement, Result, median_ratio

MIB = 1 << 20
FLOORS = (COPY, GEMMS)
FEW_SAMPLES = 3  # below, a 20–80 % band is no measure of noise

Verdict = Literal["worse", "better", "noise", "same"]


@dataclass(frozen=True)
class Key:
    """What a row measured.

    Attributes:
        op: logits, logprobs or linear, what was timed; or "memory of" one of these.
        case: the case, without the words that say why its shape is measured.
        provider: who ran it.
        variant: what else decides what was measured: "in place", "CUDA graph", a memory row's series and device, and
            which of several such rows it is, from the second on.
        ours: whether the row says that its provider belongs to this package; not part of what is matched.
    """

    op: str
    case: Any
    provider: str
    variant: str = ""
    ours: bool = field(default=False, compare=False)

    @property
    def is_ours(self) -> bool:
        """Whether it is a row of a provider of this package; older files tell by the name alone."""
        return self.ours or self.provider == "hpo_fused" or self.provider.startswith("hpo_fused:")

    @property
    def is_memory(self) -> bool:
        """Whether its peak is all that was measured."""
        return self.op.startswith("memory of ")

    @property
    def name(self) -> str:
        """The provider, and the variant if there is one."""
        return f"{self.provider} {self.variant}".strip()


@dataclass(frozen=True)
class Quantiles:
    """Seconds: 20 %, 50 % and 80 % quantile."""

    q20: float
    median: float
    q80: float

    def overlaps(self, other: Quantiles) -> bool:
        """Whether the two 20–80 % bands have a point in common."""
        return self.q20 <= other.q80 and other.q20 <= self.q80


@dataclass(frozen=True)
class Entry:
    """What one file says of a key.

    Attributes:
        status, note: as in the file.
        time: None where it was not timed.
        samples: how many rounds ``time`` is of.
        over_floor: median over rounds of this time / the floor's in the same round; None without a floor.
        peak: peak memory beyond the inputs, bytes; None where it was not measured.
        broken: limits of this package's own that it misses.
        repeats: whether a second call gave the same bits; None if there was none.
    """

    status: str
    note: str = ""
    time: Quantiles | None = None
    samples: int = 0
    over_floor: float | None = None
    peak: int | None = None
    broken: str = ""
    repeats: bool | None = None


@dataclass(frozen=True)
class Change:
    """One key in both files.

    Attributes:
        base, new: the entries.
        time_ratio, time: new median / base median, and what is thought of it; None where one was not timed.
        memory_ratio, memory: of the peaks.
        faults: what was right and is not any more, a line each.
        fixes: the reverse.
    """

    key: Key
    base: Entry
    new: Entry
    time_ratio: float | None = None
    time: Verdict | None = None
    memory_ratio: float | None = None
    memory: Verdict | None = None
    faults: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()

    @property
    def regressed(self) -> bool:
        """Whether anything became worse."""
        return bool(self.faults) or "worse" in (self.time, self.memory)

    @property
    def is_judged(self) -> bool:
        """Whether the base says anything that the new file could fall short of."""
        return self.base.status == "ok"

    @property
    def is_compared(self) -> bool:
        """Whether the new file says it as well, well or badly."""
        if not self.is_judged or self.new.status in ("skipped", "predicted"):
            return False
        untold = (self.base.time and not self.new.time) or (self.base.peak is not None and self.new.peak is None)
        return self.new.status != "ok" or not untold


@dataclass
class Comparison:
    """Two files.

    Attributes:
        changes: of the keys in both, in the base's order.
        only_base, only_new: the others' entries.
        cut_short: whether the new file is of a run that was interrupted.
    """

    changes: list[Change] = field(default_factory=list)
    only_base: dict[Key, Entry] = field(default_factory=dict)
    only_new: dict[Key, Entry] = field(default_factory=dict)
    cut_short: bool = False

    @property
    def regressions(self) -> list[Change]:
        """Of this package's providers; others' are no fault of its code."""
        return [change for change in self.changes if change.key.is_ours and change.regressed]

    @property
    def judged(self) -> list[Change]:
        """This package's rows that could have regressed."""
        return [change for change in self.changes if change.key.is_ours and change.is_judged]

    @property
    def compared(self) -> list[Change]:
        """Those of them that were."""
        return [change for change in self.judged if change.is_compared]

    @property
    def cut_off(self) -> list[Key]:
        """This package's rows that the base has and an interruption kept from the new file."""
        if not self.cut_short:
            return []
        absent = [key for key, entry in self.only_base.items() if key.is_ours and entry.status == "ok"]
        return absent + [change.key for change in self.judged if not change.is_compared]


def _number(row: object, name: str, where: str, least: float) -> float | None:
    """A number of a row, or None; files are edited by hand, too."""
    value = getattr(row, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{where}: {name} must be a number of at least {least:g} or null, got {value!r}")
    return float(value)


def _time(row: Measurement, where: str) -> Quantiles | None:
    q20, median, q80 = (_number(row, name, where, math.ulp(0.0)) for name in ("q20_s", "median_s", "q80_s"))
    if q20 is None or median is None or q80 is None:
        return None
    return Quantiles(q20, median, q80)


def _plain(case: BatchCase) -> BatchCase:
    """The case without prose: a shape that is described in other words is the same shape."""
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, why=""))


def _op(case: BatchCase) -> str:
    return case.op if isinstance(case, Case) else "linear"


def _of_part(part: Result | LinearResult) -> Iterable[tuple[Key, Entry]]:
    floors = {_plain(row.case): row.samples_s for row in part.measurements if row.provider in FLOORS}
    in_place = ["in place"] if part.settings.get("inplace") else []
    graph = ["CUDA graph"] if part.settings.get("cuda_graph") else []
    for row in part.measurements:
        # Others that can write the gradient over the logits are not told from those that cannot: they are context.
        variant = " ".join([*(in_place if row.is_ours else []), *graph])
        key = Key(_op(row.case), _plain(row.case), row.provider, variant, row.is_ours)
        where = f"{key.op}, {describe(key.case)}, {key.name}"
        peak = _number(row, "peak_extra_bytes", where, 0)
        errors = getattr(row, "errors", None)
        yield (
            key,
            Entry(
                row.status,
                row.note,
                _time(row, where) if row.status == "ok" else None,
                len(row.samples_s),
                median_ratio(row.samples_s, floors.get(key.case, [])),
                None if peak is None else int(peak),
                errors.broken if errors is not None else "",
                row.repeats,
            ),
        )
    for memory in part.memory:
        variant = " ".join([memory.series, memory.device, *in_place])
        key = Key(f"memory of {_op(memory.case)}", _plain(memory.case), memory.provider, variant)
        peak = _number(memory, "peak_extra_bytes", f"{key.op}, {describe(key.case)}, {key.name}", 0)
        yield key, Entry(memory.status, memory.note, peak=None if peak is None else int(peak))


def entries(parts: Sequence[Result | LinearResult]) -> dict[Key, Entry]:
    """Everything that a file's parts hold. What several of them measured is told apart by its order.

    Raises:
        ValueError: a field that is no number.
    """
    found: dict[Key, Entry] = {}
    for part in parts:
        for first, entry in _of_part(part):
            key, ordinal = first, 1
            while key in found:
                ordinal += 1
                key = dataclasses.replace(first, variant=f"{first.variant} #{ordinal}".strip())
            found[key] = entry
    return found


def _judge_time(base: Quantiles, new: Quantiles, threshold: float) -> Verdict:
    ratio = new.median / base.median
    if 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return "same"
    # The bands hold what a machine does to the same code from round to round. Where they overlap, rounds of the one
    # run took as long as rounds of the other, and medians that differ are noise as likely as anything else.
    if base.overlaps(new):
        return "noise"
    return "worse" if ratio > 1 else "better"


def _judge_memory(base: int, new: int, threshold: float) -> Verdict:
    # A peak is nearly exact, so there is no band; but small ones are workspaces of libraries, which come and go.
    if abs(new - base) <= MIB:
        return "same"
    if new > (1 + threshold) * base:
        return "worse"
    return "better" if base > (1 + threshold) * new else "same"


def _lost(base: Entry, new: Entry) -> tuple[str, ...]:
    """What was right in ``base`` and is not in ``new``."""
    lost = []
    if base.status == "ok" and new.status in ("wrong", "failed", "out_of_memory"):
        lost.append(f"{new.status.replace('_', ' ')}: {new.note}" if new.note else new.status.replace("_", " "))
    if new.broken and not base.broken:
        lost.append(f"misses its own limits: {new.broken}")
    if base.repeats is True and new.repeats is False:
        lost.append("a second call gave another result")
    return tuple(lost)


def change_of(key: Key, base: Entry, new: Entry, threshold: float) -> Change:
    """The judgement of one key: times by their medians and bands, memory by its peak, and what is right."""
    time = time_ratio = memory = memory_ratio = None
    if base.time is not None and new.time is not None:
        time_ratio = new.time.median / base.time.median
        time = _judge_time(base.time, new.time, threshold)
    if base.peak is not None and new.peak is not None:
        memory_ratio = new.peak / base.peak if base.peak else None
        memory = _judge_memory(base.peak, new.peak, threshold)
    return Change(key, base, new, time_ratio, time, memory_ratio, memory, _lost(base, new), _lost(new, base))


def compare(
    base: Mapping[Key, Entry], new: Mapping[Key, Entry], threshold: float, *, cut_short: bool = False
) -> Comparison:
    """Match the entries of two files and judge those in both.

    Args:
        base, new: from :func:`entries`.
        threshold: share by which a time or a peak may grow, ≥ 0.
        cut_short: whether the new one was interrupted.
    """
    return Comparison(
        [change_of(key, entry, new[key], threshold) for key, entry in base.items() if key in new],
        {key: entry for key, entry in base.items() if key not in new},
        {key: entry for key, entry in new.items() if key not in base},
        cut_short,
    )


def moved_floors(comparison: Comparison, threshold: float) -> list[Change]:
    """Floors that took longer or shorter by more than the threshold: no code of this package runs in them."""
    return [
        change
        for change in comparison.changes
        if change.key.provider in FLOORS
        and change.time_ratio is not None
        and not 1 / (1 + threshold) <= change.time_ratio <= 1 + threshold
    ]


def texts(case: BatchCase) -> dict[str, str]:
    """What a case is besides its shape and operation, each thing by its name, in a word or two; "" says nothing."""
    words = {
        "tokens": f"N={case.tokens}",
        "layout": f"{case.responses}×{case.length}",
        "inactive": f"{100 * case.inactive:.3g}% inactive" if case.inactive else "",
    }
    for one in dataclasses.fields(case):
        value = getattr(case, one.name)
        if one.name in ("shape", "responses", "length", "op") or one.name in words:
            continue
        if value is None or value is False:
            words[one.name] = ""
        elif value is True:
            words[one.name] = one.name
        elif isinstance(value, str):
            words[one.name] = value
        elif one.name.endswith("_bytes"):
            words[one.name] = f"{one.name.removesuffix('_bytes')}={value / MIB:.3g}MiB"
        else:
            words[one.name] = f"{one.name}={value}"
    return words


def describe(case: BatchCase) -> str:
    """All of a case, in a line."""
    sizes = {one.name: getattr(case.shape, one.name) for one in dataclasses.fields(case.shape)}
    shape = [f"{name} {value:g}" for name, value in sizes.items() if isinstance(value, int | float)]
    return f"{case.shape.name} ({', '.join(shape)}) {' '.join(filter(None, texts(case).values()))}"
