"""Who is measured. A provider is a class of its own; adding one is writing it and naming it below."""

from __future__ import annotations

from collections.abc import Callable

from hpo_fused.bench.providers import linear_peers

from .base import LinearProvider
from .cross_entropy import CrossEntropy
from .fused import Fused
from .gemms import Gemms
from .peers import Peer
from .plain import Compiled, Eager

__all__ = ["DEFAULT", "PROVIDERS", "LinearProvider", "create"]

PROVIDERS: dict[str, Callable[[], LinearProvider]] = {
    "hpo_fused": Fused,
    "hpo_fused:triton": lambda: Fused("triton"),
    "hpo_fused:torch": lambda: Fused("torch"),
    "eager": Eager,
    "compile": Compiled,
    "linear_cross_entropy": CrossEntropy,
    "trl:chunked": lambda: Peer(linear_peers.TRL_CHUNKED, linear_peers.trl_chunked),
    "liger:chunked": lambda: Peer(linear_peers.LIGER_CHUNKED, linear_peers.liger_chunked, leniency=4.0),
    "cce": lambda: Peer(linear_peers.CCE, linear_peers.cce),
    "gemms": Gemms,
}
DEFAULT = ["hpo_fused", "eager", "compile", "linear_cross_entropy", "gemms"]


def create(name: str) -> LinearProvider:
    """The provider of that name.

    Raises:
        ValueError: unknown name; the message lists what there is.
    """
    if name not in PROVIDERS:
        raise ValueError(f"unknown provider {name!r}; expected one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]()
