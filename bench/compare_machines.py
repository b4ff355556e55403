"""In what two results' machines, versions and settings differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .results import ResultFile

# What makes two machines one: times on others say nothing of the code. The processor stands for itself where there is
# no GPU.
MACHINE = ("cores", "threads", "device", "platform")
# What differs between any two runs.
INCIDENTAL = {"created"}

# A field, and what it is in the parts of the base and of the new file: nearly always one value each.
Difference = tuple[str, list[Any], list[Any]]
Fields = Callable[[ResultFile], Mapping[str, Any]]


def check(part: ResultFile) -> None:
    """Refuse what the functions below cannot read: files are edited by hand, too.

    Raises:
        ValueError: settings or an environment that hold no fields, or an environment without the machine's.
    """
    for name in ("environment", "settings"):
        if not isinstance(getattr(part, name), dict):
            raise ValueError(f"its field {name!r} must be an object, got {getattr(part, name)!r}")
    for name in _machine_fields(part.environment):
        if name not in part.environment:
            raise ValueError(f"its environment has no field {name!r}")


def _machine_fields(environment: Mapping[str, Any]) -> tuple[str, ...]:
    return ("gpu" if environment.get("gpu") else "cpu", *MACHINE)


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: environment[name] for name in _machine_fields(environment)}


def _values(parts: Sequence[ResultFile], name: str, of: Fields) -> list[Any]:
    """What a field is in any of the parts, once each."""
    found: list[Any] = []
    for part in parts:
        value = of(part).get(name)
        if value not in found:
            found.append(value)
    return found


def _differences(base: Sequence[ResultFile], new: Sequence[ResultFile], of: Fields) -> list[Difference]:
    """Fields that have a value in one file which they have in no part of the other."""
    found: list[Difference] = []
    for name in dict.fromkeys(name for part in [*base, *new] for name in of(part)):
        values = _values(base, name, of), _values(new, name, of)
        if any(value not in values[1] for value in values[0]) or any(value not in values[0] for value in values[1]):
            found.append((name, *values))
    return found


def machine_differences(base: Sequence[ResultFile], new: Sequence[ResultFile]) -> list[Difference]:
    """Fields in which the machines differ, with the values."""
    return _differences(base, new, lambda part: _machine(part.environment))


def other_differences(base: Sequence[ResultFile], new: Sequence[ResultFile]) -> list[Difference]:
    """Versions and whatever else the environments record, the machine left out, and when it was."""

    def rest(part: ResultFile) -> dict[str, Any]:
        left_out = {*INCIDENTAL, *_machine(part.environment)}
        return {name: value for name, value in part.environment.items() if name not in left_out}

    return _differences(base, new, rest)


def setting_differences(base: Sequence[ResultFile], new: Sequence[ResultFile]) -> list[tuple[str, Difference]]:
    """Settings of a command in both that differ."""
    both = {part.command for part in new}
    return [
        (command, difference)
        for command in dict.fromkeys(part.command for part in base if part.command in both)
        for difference in _differences(
            [part for part in base if part.command == command],
            [part for part in new if part.command == command],
            lambda part: part.settings,
        )
    ]
