"""Launch configuration by architecture, element type and vocabulary size, and why.

Two quantities decide, both per streaming multiprocessor (SM):

* Bytes in flight. Little's law at HBM's rate: H200, 4.3 TB/s x 0.8 us / 132 SMs = 26 KB per SM. A thread has UNROLL
  16-byte loads outstanding, and while it computes it has none, so about twice the 26 KB is configured:
  16 warps x 32 lanes x 16 B x UNROLL 4 = 32 KB per program, two programs where two rows fit (64 KB), or one program
  of 32 warps (64 KB) where only one row does. A100: 1.6 TB/s x 0.7 us / 108 = 10 KB; B200: 7 TB/s x 0.9 us / 148
  = 43 KB; RTX 5090: 1.8 TB/s x 0.8 us / 170 = 8 KB; MI300X: 4.5 TB/s x 1 us / 304 = 15 KB. UNROLL 4 serves the first
  three, UNROLL 2 (32 KB) the others.
* Rows in flight. The second sweep reads the row again, and should find it in the last-level cache, so
  rows in flight x row bytes should stay below about 0.85 of it (the rest holds lines being written back):

                     cache x 0.85   Qwen 304 KB     Llama-3 257 KB   Gemma 524 KB    GPT-2 101 KB
    A100   108 SMs        36 MB     108 = 33 MB     108 = 28 MB       68 = 36 MB     216 = 22 MB
    H100   132 SMs        45 MB     132 = 40 MB     132 = 34 MB       85 = 45 MB     264 = 27 MB
    B200   148 SMs       112 MB     296 = 90 MB     296 = 76 MB      148 = 78 MB     296 = 30 MB
    5090   170 SMs        86 MB     170 = 52 MB     170 = 44 MB      163 = 85 MB     340 = 34 MB
    MI300X 304 CUs       228 MB     608 = 185 MB    608 = 156 MB     304 = 159 MB    608 = 61 MB

  Where not even one row per SM fits, some SMs are left without one. Gemma on H100 and H200: 132 rows are 69 MB, a
  third of the second read misses, 1.18 times a copy's traffic; 85 rows fit, 1.00. The 85 must then do the arithmetic
  of 132, whose special functions take 0.53 of the copy's time on an H200 (bench/roofline.py): 0.82; and they have
  85 x 64 KB = 5.6 MB in flight, where 4.3 TB/s x 0.8 us = 3.4 MB are needed. Below 0.6 of the SMs (0.53 / 0.6 = 0.88)
  the arithmetic would no longer hide, nor would it with softcap, which is bound by arithmetic as it is. Two ways that
  would keep all SMs at work are not open: 227 KB of each H100 SM's shared memory could hold two fifths of the row
  (132 x 297 KB = 39 MB would be left to the L2), but Triton gives no such memory, and registers are full (64 x 1024);
  a row shared by two programs of one launch would have to wait for a program that may not be running.

Programs are persistent (each strides over the rows), so that the grid's size is the number of rows in flight.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from ctypes import c_float
from typing import NamedTuple

import torch
from torch import Tensor

from .elementary import INTERPRETED, LOG2E
from .tuning import LaunchParameters, forget_files, tuned_launches, tuned_parameters, tuning_file

_MB = 1024 * 1024
VECTOR_BYTES = 16
USABLE_CACHE = 0.85
# Rows that share the cache must not leave fewer than this of the processors with one (see above).
BUSY_PROCESSORS = 0.6


class Machine(NamedTuple):
    """What a launch depends on: ``cache_bytes`` is the cache that the second sweep's read should hit."""

    architecture: str
    processors: int
    cache_bytes: int
    warp_size: int

    @property
    def known(self) -> bool:
        """Whether the kernels' machine code for it was looked at; others get what is safe."""
        return self.architecture in _UNROLL


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

    def steps(self, V: int) -> int:
        """That a row of ``V`` elements takes at most."""
        return -(-(V // self.vec) // (self.lanes * self.unroll))

    def parts(self, rows: int, V: int) -> int:
        """Programs that can share a row of a call with ``rows`` rows, in whole steps, all in flight."""
        return max(1, min(self.rows_in_flight // rows, self.steps(V)))


# Loads that a thread has outstanding, and the same in variants that need more registers or arithmetic per element
# (narrow): the most that spill nothing, counted by ``hpo-fused-bench compile``. sm_120: 4 spills 40 bytes with an
# entropy term, and 2 spills 16 with narrow stores. gfx942: 4 spills scalar registers in all, and 2 one with softcap,
# KL and entropy term.
_UNROLL = {
    "sm_80": (4, 2), "sm_90": (4, 2), "sm_100": (4, 2), "sm_120": (2, 1), "gfx942": (2, 1), "gfx950": (2, 2),
}  # fmt: skip
_UNROLL_UNKNOWN = (2, 1)

# Last-level caches that the driver does not report (it reports the 4 MB of L2 per XCD): MI300X's memory-side cache.
_MEMORY_SIDE_CACHE = {"gfx942": 256 * _MB, "gfx950": 256 * _MB}


@functools.cache
def machine(device_index: int) -> Machine:
    """Properties of one device; looked up once, since the driver call costs more than a launch."""
    properties = torch.cuda.get_device_properties(device_index)
    hip = torch.version.hip is not None
    architecture = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    cache = int(getattr(properties, "L2_cache_size", 0)) or 4 * _MB
    cache = _MEMORY_SIDE_CACHE.get(architecture, cache)
    warp_size = int(getattr(properties, "warp_size", 64 if hip else 32))
    return Machine(architecture, properties.multi_processor_count, cache, warp_size)


def default_parameters(
    machine: Machine, itemsize: int, V: int, *, reread: bool = True, narrow: bool = False
) -> LaunchParameters:
    """The shipped table's entry for rows of ``V`` elements of ``itemsize`` bytes.

    ``reread``: a second sweep follows the first. ``narrow``: the variant needs more registers or arithmetic per
    element (softcap: 3 MUFU per element and sweep, bound by arithmetic; stores at another alignment than the loads).
    """
    row_bytes = V * itemsize
    cache_bytes = USABLE_CACHE * machine.cache_bytes
    fits_two = not reread or 2 * machine.processors * row_bytes <= cache_bytes
    threads = 512 if fits_two else 1024
    unroll = _UNROLL.get(machine.architecture, _UNROLL_UNKNOWN)[narrow]
    # The last tile is partly idle. Small vocabularies get smaller programs, and more of them, so that a row has four.
    while threads > 128 and 4 * threads * VECTOR_BYTES > row_bytes:
        threads //= 2
    if threads * unroll * VECTOR_BYTES > row_bytes:
        unroll = 1
    rows = machine.processors * max(1, 1024 // threads)
    if reread and not narrow and machine.known and rows * row_bytes > cache_bytes:
        fewest = math.ceil(BUSY_PROCESSORS * machine.processors)
        rows = min(machine.processors, max(fewest, int(cache_bytes // row_bytes)))
    return LaunchParameters(threads, unroll, rows)


def configure(machine: Machine, itemsize: int, parameters: LaunchParameters) -> LaunchConfiguration:
    """The launch with these parameters."""
    threads, unroll, rows_in_flight = parameters
    options: dict[str, object] = {}
    if machine.architecture.startswith("gfx"):
        options["allow_flush_denorm"] = True  # exp2 as the bare v_exp_f32; NVIDIA's flushes by itself
    elif machine.known:
        # 65536 registers for the threads that are to be resident, 64 for 1024: one more each and a program waits.
        options["maxnreg"] = min(255, 65536 // (threads * math.ceil(rows_in_flight / machine.processors)))
    return LaunchConfiguration(
        num_warps=threads // machine.warp_size, lanes=threads, vec=VECTOR_BYTES // itemsize, unroll=unroll,
        rows_in_flight=rows_in_flight, options=options,
    )  # fmt: skip


@functools.cache
def of_device(
    device_index: int, itemsize: int, V: int, reread: bool = True, narrow: bool = False
) -> LaunchConfiguration:
    """The launch for such rows on a device: what was tuned there, else the default."""
    found = machine(device_index)
    name = torch.cuda.get_device_name(device_index)
    parameters = tuned_parameters(name, itemsize, V, reread, narrow)
    if parameters is not None and parameters.threads * math.ceil(parameters.rows_in_flight / found.processors) > 2048:
        warnings.warn(
            f"hpo_fused: ignoring the launch parameters for V = {V} in {tuning_file(name)}: "
            f"{parameters.rows_in_flight} rows in flight are more than {found.processors} processors hold. Run "
            "`hpo-fused-bench tune` again",
            stacklevel=2,
        )
        parameters = None
    return configure(
        found, itemsize, parameters or default_parameters(found, itemsize, V, reread=reread, narrow=narrow)
    )


_forced: ContextVar[LaunchParameters | None] = ContextVar("forced", default=None)


@contextmanager
def forced_parameters(parameters: LaunchParameters) -> Iterator[None]:
    """Launch everything in this context with these parameters: for measuring them."""
    token = _forced.set(parameters)
    try:
        yield
    finally:
        _forced.reset(token)


def forget_parameters() -> None:
    """Read tuning files again at the next launch."""
    of_device.cache_clear()
    forget_files()


def origin(device_index: int) -> str:
    """Where a device's launch parameters come from, in a line."""
    found, name = machine(device_index), torch.cuda.get_device_name(device_index)
    if tuned := tuned_launches(name):
        return f"{tuning_file(name)} ({tuned} entries), else the shipped table"
    if found.known:
        return f"shipped table for {found.architecture}"
    return (
        f"conservative settings: no machine code for {found.architecture} was looked at; `hpo-fused-bench tune` "
        "measures what suits this GPU"
    )


@functools.cache
def _interpreted(itemsize: int, V: int) -> LaunchConfiguration:
    """One Python step per operation: few, large tiles, and few programs."""
    vec = VECTOR_BYTES // itemsize
    lanes = 64
    while lanes < 4096 and lanes * vec < V:
        lanes *= 2
    return LaunchConfiguration(1, lanes, vec, 1, 4, {})


def launch_configuration(tensor: Tensor, *, reread: bool = True, narrow: bool = False) -> LaunchConfiguration:
    """The launch for the rows of ``tensor``, [B, T, V]: what ``hpo-fused-bench tune`` found here, else the default."""
    itemsize, V = tensor.element_size(), tensor.shape[-1]
    if INTERPRETED.value:
        return _interpreted(itemsize, V)
    if (forced := _forced.get()) is not None:
        return configure(machine(tensor.device.index), itemsize, forced)
    return of_device(tensor.device.index, itemsize, V, reread, narrow)


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
