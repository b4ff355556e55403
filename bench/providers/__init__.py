"""Who is measured. A provider is a class of its own; adding one is writing it and naming it below.

Classes outside this package are named ``module:Class`` and need not be listed; see docs/benchmark.md.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import Candidate, Output, Provider, Unavailable
from .custom import custom
from .fused import Fused
from .liger import LigerLogprobs, LigerTriton
from .plain import Compiled, Eager
from .trl import TrlEager, TrlTriton

__all__ = ["DEFAULT", "PROVIDERS", "Candidate", "Output", "Provider", "Unavailable", "create"]

PROVIDERS: dict[str, Callable[[], Provider]] = {
    "hpo_fused": Fused,
    "hpo_fused:triton": lambda: Fused("triton"),
    "hpo_fused:torch": lambda: Fused("torch"),
    "eager": Eager,
    "compile": Compiled,
    "trl:eager": TrlEager,
    "trl:triton": TrlTriton,
    "liger:triton": LigerTriton,
    "liger:logprobs": LigerLogprobs,
}
DEFAULT = ["hpo_fused", "eager", "compile", "trl:eager", "trl:triton", "liger:triton", "liger:logprobs"]


def create(name: str, *, inplace: bool = False) -> Provider:
    """The provider of that name; ``inplace`` asks those that can for the gradient in the logits' storage.

    Args:
        name: a key of ``PROVIDERS``, or ``module:Class`` for a subclass of :class:`Provider` anywhere.
        inplace: see above.

    Raises:
        ValueError: unknown name or no such class; the message lists what there is.
    """
    provider = PROVIDERS[name]() if name in PROVIDERS else custom(name, Provider, PROVIDERS)
    provider.inplace = inplace and provider.can_inplace
    return provider
