"""Work that ends in a given time: fewer repetitions first, then less work, and whatever is left goes to repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ENOUGH, ONE = 3, 1  # rounds of everything where that fits, and of what there is before any of it is left out
# One measurement says this much about the next at most: what was skipped for lack of memory took no time.
SLOWEST, FASTEST = 20.0, 0.3


@dataclass(frozen=True)
class Spent:
    """What a unit's repetitions took: how many rounds, and their seconds in all."""

    rounds: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Args:
        name: what is told of it where it is left out.
        kind: whose costs are alike: one that is done tells how long the next will take. "": takes what it is given.
        priority: 0 is done in any case; of the others the highest numbers are left out first.
        fixed: seconds that it should take whatever the repetitions.
        run: does it, given the seconds for its rounds and how many there must be at least.
        round: seconds that one round should take; 0 where nothing is repeated.
    """

    name: str
    kind: str
    priority: int
    fixed: float
    run: Callable[[float, int], Spent]
    round: float = 0.0


@dataclass
class _Ratio:
    """Seconds taken over seconds expected."""

    taken: float = 0.0
    expected: float = 0.0

    def add(self, taken: float, expected: float) -> None:
        self.taken += taken
        self.expected += expected

    @property
    def value(self) -> float | None:
        return min(max(self.taken / self.expected, FASTEST), SLOWEST) if self.expected > 0 else None


@dataclass
class _Costs:
    """What units take, as far as those already done tell: of the same kind, or else of any."""

    fixed: dict[str, _Ratio] = field(default_factory=dict)
    rounds: dict[str, _Ratio] = field(default_factory=dict)

    @staticmethod
    def _scale(ratios: dict[str, _Ratio], kind: str) -> float:
        own = ratios[kind].value if kind in ratios else None
        if own is not None:
            return own
        every = _Ratio(sum(one.taken for one in ratios.values()), sum(one.expected for one in ratios.values()))
        return every.value or 1.0

    def fixed_of(self, unit: Unit) -> float:
        return unit.fixed * self._scale(self.fixed, unit.kind) if unit.kind else unit.fixed

    def round_of(self, unit: Unit) -> float:
        return unit.round * self._scale(self.rounds, unit.kind) if unit.kind else unit.round

    def of(self, unit: Unit, least: int) -> float:
        return self.fixed_of(unit) + least * self.round_of(unit)

    def learn(self, unit: Unit, wall: float, spent: Spent) -> None:
        if not unit.kind:
            return
        self.fixed.setdefault(unit.kind, _Ratio()).add(max(wall - spent.seconds, 0.0), unit.fixed)
        if spent.rounds and unit.round > 0:
            self.rounds.setdefault(unit.kind, _Ratio()).add(spent.seconds / spent.rounds, unit.round)


@dataclass
class Budget:
    """Runs units within ``seconds``.

    Before each unit it is decided anew what fits: every unit's fixed costs and three rounds; or one round at least; or,
    of the less important ones, not all. What remains is shared among those with rounds, equally many for each, and the
    last of them takes all of it.

    Args:
        seconds: of everything, from ``start`` on.
        reserve: seconds to keep for what comes after the last unit.
        clock: the time in seconds.

    Attributes:
        at_work: the unit that is being run, or that an exception ended.
        left_out: units that were not begun, and the seconds that each would have needed.
        reduced: units done with fewer rounds than three, and how many.
        least_needed: seconds that units of priority 0 took, or should take, with one round each.
    """

    seconds: float
    reserve: float = 0.0
    clock: Callable[[], float] = time.monotonic
    start: float | None = None
    at_work: Unit | None = None
    left_out: list[tuple[Unit, float]] = field(default_factory=list)
    reduced: list[tuple[Unit, int]] = field(default_factory=list)
    least_needed: float = 0.0
    _costs: _Costs = field(default_factory=_Costs)

    def run(self, units: Sequence[Unit]) -> None:
        """Do as many of them as fit, in their order."""
        self.start = self.clock() if self.start is None else self.start
        waiting = list(units)
        try:
            while waiting:
                left = self.start + self.seconds - self.reserve - self.clock()
                least, chosen = self._choose(waiting, left)
                if not chosen:
                    break
                unit = chosen[0]
                rounds = self._share(unit, chosen, left, least)
                begun = self.clock()
                waiting.remove(unit)
                self.at_work = unit
                spent = unit.run(rounds, least)
                self.at_work = None
                wall = self.clock() - begun
                self._costs.learn(unit, wall, spent)
                if unit.round > 0 and 0 < spent.rounds < ENOUGH:
                    self.reduced.append((unit, spent.rounds))
                if unit.priority == 0:
                    once = spent.seconds / spent.rounds if spent.rounds else 0.0
                    self.least_needed += wall - spent.seconds + once
        finally:
            self.left_out = [(unit, self._costs.of(unit, ONE)) for unit in waiting]
            self.least_needed += sum(needed for unit, needed in self.left_out if unit.priority == 0)

    def _choose(self, waiting: Sequence[Unit], left: float) -> tuple[int, list[Unit]]:
        """How many rounds at least, and which units, in the order in which they are to run."""
        if sum(self._costs.of(unit, ENOUGH) for unit in waiting) <= left:
            return ENOUGH, list(waiting)
        chosen: list[int] = []
        for index in sorted(range(len(waiting)), key=lambda index: waiting[index].priority):
            needed = self._costs.of(waiting[index], ONE)
            if waiting[index].priority == 0 or needed <= left:
                chosen.append(index)
                left -= needed
        return ONE, [waiting[index] for index in sorted(chosen)]

    def _share(self, unit: Unit, chosen: Sequence[Unit], left: float, least: int) -> float:
        """Seconds for the rounds of ``unit``. The round that starts last ends half a round later on average."""
        once = self._costs.round_of(unit)
        if once <= 0:
            return 0.0
        spare = max(left - sum(self._costs.of(one, least) for one in chosen), 0.0)
        share = once / sum(self._costs.round_of(one) for one in chosen)
        return max(least * once + spare * share - once / 2, 0.0)

    def notes(self) -> list[str]:
        """A line for each thing that the budget cost."""
        lines = []
        if self.seconds < self.least_needed + self.reserve:
            needed = self.least_needed + self.reserve
            lines.append(
                f"budget: {self.seconds:g} s are less than what is measured in any case takes here, about {needed:.0f} "
                "s; so it took longer"
            )
        for unit, needed in self.left_out:
            lines.append(f"{unit.name}: left out, as its about {needed:.0f} s did not fit the budget")
        names: dict[int, list[str]] = {}
        for unit, rounds in self.reduced:
            names.setdefault(rounds, []).append(unit.name)
        for rounds, those in sorted(names.items()):
            lines.append(f"{'; '.join(those)}: {rounds} round{'s' * (rounds > 1)} only, to fit the budget")
        return lines
