"""Theoretical occupancy: how many programs of a kernel one processor (SM or CU) can hold at a time, and what limits it.

The rules are those of NVIDIA's occupancy calculator and of LLVM's AMDGPU backend; no GPU is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

_KB = 1024


@dataclass(frozen=True)
class Limits:
    """What one processor has.

    Attributes:
        warp_size: lanes of a warp (NVIDIA) or wavefront (AMD).
        schedulers: warp schedulers or SIMDs; a warp's registers lie in one of them.
        warps: that can be resident on the processor.
        programs: thread blocks or workgroups that can be.
        registers: of one scheduler, each 32 bits in one lane of a warp: what its warps' registers per lane add up to.
        register_unit: a warp gets whole units of these.
        shared_bytes: shared memory or LDS; shared_unit: a program gets whole units of these.
        reserved_bytes: of shared memory, taken by the system from every program.
    """

    warp_size: int
    schedulers: int
    warps: int
    programs: int
    registers: int
    register_unit: int
    shared_bytes: int
    shared_unit: int
    reserved_bytes: int


def _nvidia(warps: int, programs: int, shared: int) -> Limits:
    return Limits(32, 4, warps, programs, 512, 8, shared * _KB, 128, _KB)


def _cdna(shared: int, shared_unit: int) -> Limits:
    return Limits(64, 4, 32, 16, 512, 8, shared * _KB, shared_unit, 0)


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 65536 registers of 32 bits for
# an SM (4 schedulers x 512 x 32 lanes), 64 warps, 32 blocks, 164 and 228 KB of shared memory, 1 KB of it taken by the
# system from each block. Looked up for 8.0 and 9.0 in github.com/NVIDIA/cccl (cudax, arch_traits.cuh) and for 12.0's 48
# warps at docs.rs/oxicuda-launch (SmVersion); 10.0's row, 12.0's 24 blocks and 100 KB are the Guide's from memory, and
# so is that registers come 256 to a warp, 8 to a lane (the occupancy calculator's unit).
# AMD: rocm.docs.amd.com, "AMD GPU specifications" (512 KiB of vector registers to a CU: 4 SIMDs x 512 x 64 lanes x 4 B;
# LDS of 64 KiB on gfx942, 160 KiB on gfx950) and ROCm Compute Profiler, "Pipeline descriptions" (four SIMDs, slots for
# 8 wavefronts each). LLVM's AMDGPUBaseInfo.cpp: 16 workgroups of several wavefronts on a CU, for their barriers; from
# memory: vector registers by eights on gfx90a and later, LDS by 512 B, on gfx950 by 1280 B.
LIMITS = {
    "sm_80": _nvidia(64, 32, 164),
    "sm_90": _nvidia(64, 32, 228),
    "sm_100": _nvidia(64, 32, 228),
    "sm_120": _nvidia(48, 24, 100),
    "gfx942": _cdna(64, 512),
    "gfx950": _cdna(160, 1280),
}


@dataclass(frozen=True)
class Occupancy:
    """What fits.

    Attributes:
        programs: resident on a processor at a time.
        share: of the processor's warp slots that they fill.
        limited_by: "registers", "shared memory", "warps" or "programs".
    """

    programs: int
    share: float
    limited_by: str


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(target: str, num_warps: int, registers: int, shared_bytes: int) -> Occupancy:
    """Of a kernel whose programs have ``num_warps`` warps, ``registers`` a lane and ``shared_bytes`` of shared memory.

    Raises:
        KeyError: no limits are known for ``target``.
    """
    limits = LIMITS[target]
    resident_warps = limits.schedulers * (limits.registers // _up(max(registers, 1), limits.register_unit))
    shared = _up(shared_bytes + limits.reserved_bytes, limits.shared_unit)
    fits = {
        "registers": resident_warps // num_warps,
        "shared memory": limits.shared_bytes // shared if shared else limits.programs,
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
    }
    limited_by = min(fits, key=lambda name: fits[name])
    programs = fits[limited_by]
    return Occupancy(programs, programs * num_warps / limits.warps, limited_by)
