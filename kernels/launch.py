"""Launch configuration by architecture, element type and vocabulary size, and why.

Two quantities decide, both per streaming multiprocessor (SM):

* Bytes in flight. Little's law at HBM's rate: H200, 4.3 TB/s x 0.8 us / 132 SMs = 26 KB per SM. A thread has UNROLL
  16-byte loads outstanding, and while it computes it has none, so about twice the 26 KB is configured:
  16 warps x 32 lanes x 16 B x UNROLL 4 = 32 KB per program, two programs where two rows fit (64 KB), or one program
  of 32 warps (64 KB) where only one row does. A100: 1.6 TB/s x 0.7 us / 108 = 10 KB; B200: 7 TB/s x 0.9 us / 148
  = 43 KB; MI300X: 4.5 TB/s x 1 us / 304 = 15 KB. One table entry serves all of them.
* Rows in flight. The second sweep reads the row again, and should find it in the last-level cache, so
  rows in flight x row bytes should stay below about 0.85 of it (the rest holds lines being written back). Qwen's
  151936 bfloat16 logits are 304 KB: 132 rows = 40 MB of H100's 50 MB, one program per SM. LLaMA-2's 32000 are
  64 KB: two per SM = 17 MB. Where even one row per SM does not fit (float32 at 151936: 80 MB) it stays one per SM:
  fewer programs would idle SMs, and the backward walk keeps the part that does fit.

Programs are persistent (each strides over the rows), so that the grid's size is the number of rows in flight.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_float
from typing import NamedTuple

import torch
from torch import Tensor

from .elementary import INTERPRETED, LOG2E

_MB = 1024 * 1024
VECTOR_BYTES = 16


class Machine(NamedTuple):
    """What a launch depends on: ``cache_bytes`` is the cache that the second sweep's read should hit."""

    backend: str
    processors: int
    cache_bytes: int
    warp_size: int


class LaunchConfiguration(NamedTuple):
    """One program handles a row at a time with ``lanes`` x ``vec`` x ``unroll`` elements per step."""

    num_warps: int
    lanes: int
    vec: int
    unroll: int
    rows_in_flight: int
    options: dict[str, object]

    def grid(self, rows: int) -> tuple[int]:
        return (min(rows, self.rows_in_flight),)


# Last-level caches that the driver does not report (it reports the 4 MB of L2 per XCD): MI300X's memory-side cache.
_MEMORY_SIDE_CACHE = {"gfx942": 256 * _MB, "gfx950": 256 * _MB}


@functools.cache
def machine(device_index: int) -> Machine:
    """Properties of one device; looked up once, since the driver call costs more than a launch."""
    properties = torch.cuda.get_device_properties(device_index)
    backend = "hip" if torch.version.hip else "cuda"
    cache = int(getattr(properties, "L2_cache_size", 0)) or 4 * _MB
    if backend == "hip":
        architecture = properties.gcnArchName.split(":")[0]
        cache = _MEMORY_SIDE_CACHE.get(architecture, cache)
    warp_size = int(getattr(properties, "warp_size", 64 if backend == "hip" else 32))
    return Machine(backend, properties.multi_processor_count, cache, warp_size)


@functools.cache
def configure(
    machine: Machine, itemsize: int, V: int, *, reread: bool = True, narrow: bool = False
) -> LaunchConfiguration:
    """The launch for rows of ``V`` elements of ``itemsize`` bytes.

    ``reread``: a second sweep follows the first. ``narrow``: the variant needs more registers or arithmetic per
    element (softcap: 3 MUFU per element and sweep, bound by arithmetic; stores at another alignment than the loads).
    """
    vec = VECTOR_BYTES // itemsize
    row_bytes = V * itemsize
    fits_two = not reread or 2 * machine.processors * row_bytes <= 0.85 * machine.cache_bytes
    threads = 512 if fits_two else 1024
    # 4 would spill 8 to 24 bytes in the narrow variants, and scalar registers of gfx942 in all (compile_report).
    unroll = 2 if narrow or machine.backend == "hip" else 4
    # A step larger than the row leaves lanes idle: small vocabularies get smaller programs, and more of them.
    while threads > 128 and threads * unroll * VECTOR_BYTES > row_bytes:
        threads //= 2
    if threads * unroll * VECTOR_BYTES > row_bytes:
        unroll = 1
    per_processor = max(1, 1024 // threads)
    options: dict[str, object] = {}
    if machine.backend == "hip":
        options["allow_flush_denorm"] = True  # exp2 as the bare v_exp_f32; NVIDIA's flushes by itself
    else:
        # 65536 registers for the 1024 threads that are to be resident: one more each and a second program waits.
        options["maxnreg"] = 64
    return LaunchConfiguration(
        num_warps=threads // machine.warp_size, lanes=threads, vec=vec, unroll=unroll,
        rows_in_flight=machine.processors * per_processor, options=options,
    )  # fmt: skip


@functools.cache
def _interpreted(itemsize: int, V: int) -> LaunchConfiguration:
    """One Python step per operation: few, large tiles, and few programs."""
    vec = VECTOR_BYTES // itemsize
    lanes = 64
    while lanes < 4096 and lanes * vec < V:
        lanes *= 2
    return LaunchConfiguration(1, lanes, vec, 1, 4, {})


def launch_configuration(tensor: Tensor, *, reread: bool = True, narrow: bool = False) -> LaunchConfiguration:
    """The launch for the rows of ``tensor``, [B, T, V]."""
    itemsize, V = tensor.element_size(), tensor.shape[-1]
    if INTERPRETED.value:
        return _interpreted(itemsize, V)
    return configure(machine(tensor.device.index), itemsize, V, reread=reread, narrow=narrow)


_NO_CHANGE = nullcontext()


def reload_scalars(launch: LaunchConfiguration) -> bool:
    """Whether what all rows share is better read again than kept: where registers are limited. Not on AMD, whose
    scalar registers hold it; there the address would be what spills (gfx942, softcap with KL and entropy term)."""
    return INTERPRETED.value or "maxnreg" in launch.options


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current: Triton launches on the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NO_CHANGE


def assertions() -> dict[str, object]:
    """Launch options of a kernel compiled with its assertions: those it states, not one for every integer sum."""
    return {} if INTERPRETED.value else {"sanitize_overflow": False}


def same_alignment(first: Tensor, second: Tensor) -> bool:
    """Whether equal rows of two [B, T, V] tensors start at the same distance from a 16-byte boundary."""
    itemsize = first.element_size()
    differences = [first.data_ptr() - second.data_ptr()]
    for dimension in range(2):
        if first.shape[dimension] > 1:
            differences.append((first.stride(dimension) - second.stride(dimension)) * itemsize)
    return first.dtype == second.dtype and all(difference % VECTOR_BYTES == 0 for difference in differences)


@functools.lru_cache(maxsize=64)
def transform_constants(temperature: float, softcap: float | None) -> tuple[float, float, float]:
    """scale (v to the base-2 domain), dz'/dz at slope 1, and the factor inside the softcap's exponential.

    Rounded to float32 here as a launch on a GPU would; the interpreter would otherwise mix both precisions.
    """
    log2e = LOG2E.value
    scale, rate = (log2e, 0.0) if softcap is None else (log2e * softcap, 2.0 * log2e / softcap)
    return c_float(scale / temperature).value, c_float(1.0 / temperature).value, c_float(rate).value
