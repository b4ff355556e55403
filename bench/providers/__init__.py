"""Who is measured. A provider is a class of its own; adding one is writing it and naming it below."""

from __future__ import annotations

from collections.abc import Callable

from .base import Output, Provider, Unavailable
from .fused import Fused
from .liger import LigerTriton
from .plain import Compiled, Eager
from .trl import TrlEager, TrlTriton

__all__ = ["DEFAULT", "PROVIDERS", "Output", "Provider", "Unavailable", "create"]

PROVIDERS: dict[str, Callable[[], Provider]] = {
    "hpo_fused": Fused,
    "hpo_fused:triton": lambda: Fused("triton"),
    "hpo_fused:torch": lambda: Fused("torch"),
    "eager": Eager,
    "compile": Compiled,
    "trl:eager": TrlEager,
    "trl:triton": TrlTriton,
    "liger:triton": LigerTriton,
}
DEFAULT = ["hpo_fused", "eager", "compile"]


def create(name: str, *, inplace: bool = False) -> Provider:
    """The provider of that name; ``inplace`` asks those that can for the gradient in the logits' storage.

    Raises:
        ValueError: unknown name; the message lists what there is.
    """
    if name not in PROVIDERS:
        raise ValueError(f"unknown provider {name!r}; expected one of {', '.join(PROVIDERS)}")
    provider = PROVIDERS[name]()
    provider.inplace = inplace and provider.can_inplace
    return provider
