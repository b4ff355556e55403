"""Providers: who is measured. Adding one is writing a class and naming it below.

Classes outside this package are named ``module:Class`` and need not be listed; see docs/benchmark.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from hpo_fused.bench.cases import Operation

from .base import Output, Provider, Step, Unavailable
from .cross_entropy import CutCrossEntropy, TorchCrossEntropy
from .fused import Fused
from .liger import LigerChunked, LigerTriton
from .limits import Copy, Gemms
from .plain import Compiled, Eager
from .trl import TrlChunked, TrlEager, TrlTriton

__all__ = ["LIMITS", "PROVIDERS", "Output", "Provider", "Step", "Unavailable", "create", "defaults", "limits"]

PROVIDERS: dict[str, Callable[[], Provider]] = {
    "hpo_fused": Fused,
    "hpo_fused:triton": lambda: Fused("triton"),
    "hpo_fused:torch": lambda: Fused("torch"),
    "eager": Eager,
    "compile": Compiled,
    "trl:eager": TrlEager,
    "trl:triton": TrlTriton,
    "trl:chunked": TrlChunked,
    "liger:triton": LigerTriton,
    "liger:chunked": LigerChunked,
    "cce": CutCrossEntropy,
    "linear_cross_entropy": TorchCrossEntropy,
    "copy": Copy,
    "gemms": Gemms,
    "gemms:fp32": lambda: Gemms("fp32"),
}
# The fastest that can bound the operation counts; they are timed beside whatever is timed.
LIMITS = ("copy", "gemms", "gemms:fp32")
# The others are hpo_fused with a backend that it might not choose itself.
DEFAULT = [name for name in PROVIDERS if not name.startswith("hpo_fused:") and name not in LIMITS]
# Measured on a CPU only where it is named: a pass over the head's whole gradient for every response takes some 30 times
# eager's time there.
SLOW_ON_CPU = "liger:chunked"


def defaults(device: torch.device) -> list[str]:
    """Names of the providers that are measured unasked."""
    return [name for name in DEFAULT if device.type != "cpu" or name != SLOW_ON_CPU]


def limits(operation: Operation) -> list[Provider]:
    """Bounds that every provider of the operation is held against."""
    return [one for one in map(create, LIMITS) if operation in one.operations()]


def create(name: str) -> Provider:
    """The provider of that name.

    Args:
        name: a key of ``PROVIDERS``, or ``module:Class`` for a subclass of :class:`Provider` anywhere, the module as
            ``import`` would find it; the class is called without arguments, and the provider reported under ``name``.

    Raises:
        ValueError: unknown name, no such module or class, or not a subclass, or it cannot be made.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]()
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ValueError(f"provider: expected one of {', '.join(PROVIDERS)}, or module:Class, got {name!r}")
    try:
        kind = getattr(importlib.import_module(module), attribute)
        if not (isinstance(kind, type) and issubclass(kind, Provider)):
            raise TypeError(f"expected a subclass of {Provider.__module__}.Provider, got {kind!r}")
        provider = kind()
    except Exception as error:  # somebody else's module: anything can come
        known = ", ".join(PROVIDERS)
        raise ValueError(
            f"provider: expected one of {known}, or module:Class, got {name!r} ({type(error).__name__}: {error})"
        ) from error
    provider.name = name
    return provider
