"""Architectures that the kernels are compiled for. Needs no Triton: the process that shows a report knows them too."""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20


class Target(NamedTuple):
    """An architecture, and the processors and last-level cache of the GPU whose launch settings are compiled."""

    name: str
    gpu: str
    processors: int
    cache_bytes: int

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def warp_size(self) -> int:
        return 64 if self.amd else 32


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", 108, 40 * MIB),
        Target("sm_90", "H200", 132, 50 * MIB),
        Target("sm_100", "B200", 148, 126 * MIB),
        Target("sm_120", "RTX 5090", 170, 96 * MIB),
        Target("gfx942", "MI300X", 304, 256 * MIB),
        Target("gfx950", "MI355X", 256, 256 * MIB),
    )
}
# One target of each vendor gets every call, the others the core set: a code path that compiles well for one
# architecture of a vendor rarely fails on the next, and where it does it is register pressure, which the core set has
# most of.
FULL_TARGETS = ("sm_90", "gfx942")
