"""GPUs that the roofline model knows: what their vendors, or a measurement, say of them, and where.

Clocks are the highest that the vendor names: under a load that is bound by memory they are often lower, and what the
model says of arithmetic is then too good. Bandwidths are a vendor's peak unless ``bandwidth_is`` says otherwise; a
copy reaches about 0.9 of it (H200: 4.3 of 4.8 TB/s). Both sides of "time ÷ copy" use the same bandwidth.

Rates per clock and processor are in results, one lane of one instruction being one result:

* ``issue``: NVIDIA, four schedulers of one warp instruction each, 4 x 32 (A100's and H100's architecture papers, from
  memory). AMD, four 16-lane SIMDs, 64 results of vector instructions (ROCm Compute Profiler, "Pipeline
  descriptions"); scalar, memory and branch instructions issue beside them from other wavefronts.
* ``special``: NVIDIA, 16 (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", whose rows were
  read in quotations for 8.0 and 9.0; for B200 swarmsignal.net/flashattention-4-asymmetric-scaling, which has 16 per
  clock and SM, as on Hopper; for 12.0 assumed to be the same). AMD, a quarter of 64 (LLVM, SISchedule.td: "F16 or F32
  transcendental instructions (these are quarter rate)"; of CDNA 4 nothing else was found).
* ``latency`` of a load from device memory under load, in seconds: what ``kernels/launch.py`` plans with, an assumption.
* ``fp32``: the same table, 64 for 8.0 and 128 for 8.6 and later.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        name: how it is selected and reported.
        target: the architecture that its code is compiled for.
        processors: SMs or CUs.
        clock_hz: the highest that the vendor names.
        cache_bytes: the last-level cache, which the second sweep's read should hit.
        bandwidth: of device memory, bytes per second; ``bandwidth_is``: whose figure.
        latency: of a load from device memory, seconds.
        issue, special, fp32: results per clock and processor (see above).
        special_takes_issue: whether a special function keeps the vector unit from issuing meanwhile (AMD: yes).
        source: of the figures before.
    """

    name: str
    target: str
    processors: int
    clock_hz: float
    cache_bytes: int
    bandwidth: float
    bandwidth_is: str
    source: str
    latency: float = 0.8e-6
    issue: int = 128
    special: int = 16
    fp32: int = 128
    special_takes_issue: bool = False

    @property
    def vendor(self) -> str:
        return "amd" if self.target.startswith("gfx") else "nvidia"


PEAK = "vendor's peak"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "A100", "sm_80", 108, 1.41e9, 40 * MIB, 2.039e12, PEAK,
            "A100 80 GB SXM: 108 SMs, 1.41 GHz (hmc-tech.com/gpus/nvidia-a100-sxm-vs-nvidia-b200; 19.5 TFLOP/s = "
            "108 x 64 x 2 x 1.41 GHz); 40 MB (besthub.dev, B200 compared); 2.039 TB/s (acecloud.ai, NVIDIA's sheet)",
            latency=0.7e-6, fp32=64,
        ),
        Gpu(
            "H100", "sm_90", 132, 1.98e9, 50 * MIB, 3.35e12, PEAK,
            "H100 SXM: 132 SMs, 50 MB, 3.35 TB/s (archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html, NVIDIA's "
            "sheet); 1.98 GHz (glennklockwood.com/garden/processors/h100; 67 TFLOP/s = 132 x 128 x 2 x 1.98 GHz)",
        ),
        Gpu(
            "H200", "sm_90", 132, 1.98e9, 50 * MIB, 4.3e12, "copy, measured",
            "H200 SXM: an H100 with other memory (glennklockwood.com/garden/processors/h100); a device copy of "
            "about 4.3 TB/s of a device copy was measured before these kernels were, of 4.8 TB/s (acecloud.ai)",
        ),
        Gpu(
            "B200", "sm_100", 148, 1.98e9, 126 * MIB, 8.0e12, PEAK,
            "B200 SXM: 148 SMs (chipsandcheese.com/p/nvidias-b200-keeping-the-cuda-juggernaut); 1.98 GHz "
            "(hmc-tech.com/gpus/nvidia-b200-vs-nvidia-b100); 126 MB (besthub.dev and app.daily.dev on Blackwell; "
            "hmc-tech.com has 65.5 MB); DGX B200: 64 TB/s for 8 (acecloud.ai; hmc-tech.com has 7.7 TB/s)",
            latency=0.9e-6,
        ),
        Gpu(
            "RTX 5090", "sm_120", 170, 2.407e9, 96 * MIB, 1.792e12, PEAK,
            "170 SMs, 2407 MHz, 96 MB, 1792 GB/s (pocketmags.com, Linux Format, May 2025; elprocus.com)",
        ),
        Gpu(
            "MI300X", "gfx942", 304, 2.1e9, 256 * MIB, 5.3e12, PEAK,
            "304 CUs, 256 MB memory-side cache (rocm.docs.amd.com, AMD GPU specifications); 5.3 TB/s "
            "(chipsandcheese.com/p/testing-amds-giant-mi300x); 2.1 GHz from memory (163.4 TFLOP/s = 304 x 256 x that)",
            latency=1e-6, issue=64, special=16, fp32=64, special_takes_issue=True,
        ),
        Gpu(
            "MI355X", "gfx950", 256, 2.4e9, 256 * MIB, 8.0e12, PEAK,
            "256 CUs, 256 MB memory-side cache (rocm.docs.amd.com, AMD GPU specifications); 2.4 GHz (wccftech.com on "
            "AMD's Hot Chips 2025 talk); 8 TB/s (gangliao.me/blog/2026/amd-gpu-architecture-deep-dive; boston.co.uk)",
            latency=1e-6, issue=64, special=16, fp32=64, special_takes_issue=True,
        ),
    )
}  # fmt: skip

# Whose processor count and cache the launch settings of a target's compilation are for.
REFERENCE = {
    "sm_80": "A100", "sm_90": "H200", "sm_100": "B200", "sm_120": "RTX 5090", "gfx942": "MI300X", "gfx950": "MI355X",
}  # fmt: skip
