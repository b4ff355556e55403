"""Providers of other people, named ``module:Class`` on the command line: nothing in this package knows of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TypeVar

from .base import Candidate

Kind = TypeVar("Kind", bound=Candidate)


def custom(spec: str, kind: type[Kind], known: Iterable[str]) -> Kind:
    """An instance of the class that ``spec`` names, reported under ``spec``.

    Args:
        spec: ``module:Class``, the module as ``import`` would find it; the class is called without arguments.
        kind: what it must be a subclass of.
        known: names to list where ``spec`` is neither one of them nor a class.

    Raises:
        ValueError: no such module or class, or not a subclass of ``kind``, or it cannot be made.
    """
    module, _, name = spec.partition(":")
    unknown = f"unknown provider {spec!r}; expected one of {', '.join(known)}, or module:Class"
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(unknown)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # somebody else's module: anything can come
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{unknown} (no module {error.name!r} on Python's path)") from None
        raise ValueError(f"provider {spec!r}: importing {module} failed: {type(error).__name__}: {error}") from error
    if found is None:
        raise ValueError(f"{unknown} (module {module!r} has no {name!r})")
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"provider {spec!r}: expected a subclass of {kind.__module__}.{kind.__name__}, got {found!r}")
    try:
        provider = found()
    except Exception as error:
        raise ValueError(f"provider {spec!r}: {name}() failed: {type(error).__name__}: {error}") from error
    assert isinstance(provider, kind)
    provider.name = spec  # unique, and what repeats the command
    return provider
