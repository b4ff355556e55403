"""Frozen dataclasses as plain mappings and back: what JSON, YAML and command lines can say.

A part that may be one of several dataclasses carries the class's name in snake case as its "kind"; one that may be a
single dataclass needs none. Which those are is read from the fields' types: a class is known here once it is part of
the union.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_type_hints


def kind_of(part: type) -> str:
    """The name of a dataclass in a mapping: its own in snake case."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", part.__name__).lower()


def as_mapping(whole: Any) -> dict[str, Any]:
    """Every field of a dataclass by name, of the types that JSON has."""
    return {name: _plain(getattr(whole, name), len(kinds) > 1) for name, kinds in _fields(whole.__class__).items()}


def arguments_of(whole: type, given: Mapping[Any, Any], path: str, tag: str | None) -> dict[str, Any]:
    """What to build a dataclass from, where a mapping names some of its fields: its parts are built already.

    Args:
        whole: the dataclass. What its own checks refuse is left to them.
        given: values by field; parts may be mappings or instances.
        path: where the mapping stands, to begin messages with; "" for the outermost.
        tag: the key that says which ``whole`` is meant and is no field of it, if there is one.

    Raises:
        TypeError, ValueError: a key or kind that does not exist (the message lists those that do), a number in quotes,
            or a part that is refused; messages begin with the path, as in ``shaping.low: ``.
    """
    fields, arguments = _fields(whole), {}
    for name, value in given.items():
        if name == tag:
            continue
        if name not in fields:
            known = ", ".join(fields if tag is None else [tag, *fields])
            raise ValueError(f"{path or 'objective'}: expected keys among {known}, got {name!r}")
        where = f"{path}.{name}" if path else name
        if isinstance(value, str) and _is_number(value):
            raise TypeError(
                f"{where}: expected a number, got the string {value!r} (YAML 1.1 takes 3e-4 for one: write 3.0e-4)"
            )
        arguments[name] = _part(fields[name], value, where) if fields[name] else value
    return arguments


def _part(kinds: tuple[type, ...], value: object, path: str) -> Any:
    """An instance of one of the dataclasses from a mapping; None and instances are left as they are."""
    if value is None or isinstance(value, kinds):
        return value
    named, tag = {kind_of(kind): kind for kind in kinds}, "kind" if len(kinds) > 1 else None
    if not isinstance(value, Mapping):
        expected = f"with a kind, one of {', '.join(named)}" if tag else f"of {', '.join(_fields(kinds[0]))}"
        raise TypeError(f"{path}: expected a mapping {expected}, got {value!r}")
    kind = kinds[0]
    if tag:
        name = value.get(tag)
        if not isinstance(name, str) or name not in named:
            raise ValueError(f"{path}.{tag}: expected one of {', '.join(named)}, got {name!r}")
        kind = named[name]
    arguments = arguments_of(kind, value, path, tag)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in arguments:
            raise ValueError(f"{path}.{field.name}: expected a value, for it has no default, got none")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:  # its messages begin with the class
        raise type(error)(f"{path}.{str(error).removeprefix(f'{kind.__name__}.')}") from None


@cache
def _fields(whole: type) -> dict[str, tuple[type, ...]]:
    """The fields of a dataclass by name, with the dataclasses that they may hold; () for plain values."""
    hints = get_type_hints(whole)
    return {
        field.name: tuple(kind for kind in get_args(hints[field.name]) if hasattr(kind, "__dataclass_fields__"))
        for field in dataclasses.fields(whole)
    }


def _plain(value: Any, tagged: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return {**({"kind": kind_of(type(value))} if tagged else {}), **as_mapping(value)}
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
