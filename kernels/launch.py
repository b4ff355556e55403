"""Launch configuration by architecture, element type and vocabulary size, and why.

Two quantities decide, both per streaming multiprocessor (SM):

* Bytes in flight. Little's law at HBM's rate: H200, 4.3 TB/s x 0.8 us / 132 SMs = 26 KB per SM. A thread has ``loads``
  16-byte loads outstanding, and while it computes it has none, so about twice the 26 KB is configured:
  16 warps x 32 lanes x 16 B x 4 loads = 32 KB per program, two programs where two rows fit (64 KB), or one program
  of 32 warps (64 KB) where only one row does. A100: 1.6 TB/s x 0.7 us / 108 = 10 KB; B200: 7 TB/s x 0.9 us / 148
  = 43 KB; RTX 5090: 1.8 TB/s x 0.8 us / 170 = 8 KB; MI300X: 4.5 TB/s x 1 us / 304 = 15 KB. 4 loads serve H200 and
  B200, 2 (32 KB) the others.
* Rows in flight. The second sweep reads the row again. An H200 finds in the first-level cache (248 KB per SM) what fits
  it, 0.8 of Qwen's row, and next to nothing in the second-level one, counters say: few and long programs are better
  than many. Elsewhere the row should be found in the last-level cache, and nothing else was measured there: rows in
  flight x row bytes stay below about 0.85 of it (the rest holds lines being written back), but never less than a row
  per SM. Under a softcap, which arithmetic bounds, two programs per SM everywhere.

                     cache x 0.85   Qwen 304 KB     Llama-3 257 KB   Gemma 524 KB    GPT-2 101 KB
    A100   108 SMs        36 MB     108 = 33 MB     108 = 28 MB      108 = 57 MB     216 = 22 MB
    H100   132 SMs        45 MB     132 = 40 MB     132 = 34 MB      132 = 69 MB     264 = 27 MB
    B200   148 SMs       112 MB     296 = 90 MB     296 = 76 MB      148 = 78 MB     296 = 30 MB
    5090   170 SMs        86 MB     170 = 52 MB     170 = 44 MB      170 = 89 MB     340 = 34 MB
    MI300X 304 CUs       228 MB     608 = 185 MB    608 = 156 MB     304 = 159 MB    608 = 61 MB

Measured on an H200, loss and gradient, times over a copy's (bf16 where not said; the first column is the table's):

    (threads, loads, rows)    of the table    (1024, 2, 132)   (512, 4, 264)   (512, 8, 132)   (256, 4, 528)
    Qwen                      1.27            1.43             1.35            1.34            1.48
    Qwen, float32             1.37                             1.46            1.37
    Llama-3                   1.30                             1.31
    Gemma                     1.33                             1.44            1.41
    Gemma, softcap 30         1.88            2.02             1.88
    GPT-2, V 50257 / 50304    1.32 / 1.26                                                      1.35 / 1.27

The entries of the other GPUs are not measured.

Programs are persistent (each strides over the rows), so that the grid's size is the number of rows in flight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_float
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .numerics import INTERPRETED, LOG2E

_MB = 1024 * 1024
VECTOR_BYTES = 16
USABLE_CACHE = 0.85
# a * b + c rounded once is part of the kernels' arithmetic; Triton 3.10 leaves it to whoever asks for it.
_FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}
_HIP = torch.version.hip is not None


class Machine(NamedTuple):
    """Properties of a GPU that a launch depends on.

    ``cache_bytes`` is the cache that the second sweep's read should hit.
    """

    architecture: str
    processors: int
    cache_bytes: int
    warp_size: int

    @property
    def known(self) -> bool:
        """Whether the kernels' machine code was looked at for this architecture; others get what is safe."""
        return self.architecture in _LOADS


class LaunchParameters(NamedTuple):
    """The choices of a launch: threads of a program, loads that each has outstanding, rows in flight."""

    threads: int
    loads: int
    rows: int


class LaunchConfiguration(NamedTuple):
    """A launch as Triton takes it; a program handles a row at a time, ``lanes`` x 16 bytes x ``unroll`` a step."""

    lanes: int
    unroll: int
    rows: int
    options: dict[str, object]
    leader: bool = False  # whether one warp computes a row's scalars, see first_sweep.leads

    def programs(self, rows: int) -> int:
        """How many are launched for a call with that many rows."""
        return min(rows, self.rows)


# Loads that a thread has outstanding, by the variant's pressure on registers (see default_parameters): the most that
# spill nothing in a main loop, counted by ``hpo-fused-bench compile``. sm_80: 4 spills 168 bytes with Triton 3.9, where
# 2 spills 32 with softcap, and an A100 needs no more. sm_90: 4 spills 80 bytes with Triton 3.9 where softcap and
# entropy bonus meet. sm_120: 4 spills 40 bytes with an entropy term, and 2 spills 16 with unaligned stores. gfx942: 4
# spills scalar registers in all, and 2 one with softcap, KL and entropy term.
_LOADS = {
    "sm_80": (2, 1, 1), "sm_90": (4, 4, 2), "sm_100": (4, 2, 2), "sm_120": (2, 1, 1), "gfx942": (2, 1, 1),
    "gfx950": (2, 2, 2),
}  # fmt: skip
_LOADS_UNKNOWN = (2, 1, 1)

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


def pressure_of(softcap: float | None, bonus: bool = False, aligned: bool = True) -> int:
    """A variant's pressure, see :func:`default_parameters`: of its softcap, entropy bonus and stores' alignment."""
    return 2 if not aligned else int(softcap is not None) << int(bonus)


def default_parameters(
    machine: Machine, itemsize: int, V: int, *, reread: bool = True, pressure: int = 0
) -> LaunchParameters:
    """The table's entry for rows of ``V`` elements of ``itemsize`` bytes.

    ``reread``: a second sweep follows the first. ``pressure``: of the variant on registers and arithmetic. 0: plain; 1:
    softcap, three special functions per element and sweep, hence bound by arithmetic, which two programs per SM
    overlap; 2: softcap with an entropy bonus, or stores at another alignment than the loads.
    """
    row_bytes = V * itemsize
    fits_two = not reread or 2 * machine.processors * row_bytes <= USABLE_CACHE * machine.cache_bytes
    threads = 512 if fits_two or pressure == 1 else 1024
    loads = _LOADS.get(machine.architecture, _LOADS_UNKNOWN)[pressure]
    # The last tile is partly idle. Small vocabularies get smaller programs, and more of them, so that a row has four.
    while threads > 128 and 4 * threads * VECTOR_BYTES > row_bytes:
        threads //= 2
    if threads * loads * VECTOR_BYTES > row_bytes:
        loads = 1
    return LaunchParameters(threads, loads, machine.processors * max(1, 1024 // threads))


def configure(machine: Machine, parameters: LaunchParameters) -> LaunchConfiguration:
    """The launch with these parameters."""
    threads, loads, rows = parameters
    options: dict[str, object] = {"num_warps": threads // machine.warp_size, **_FUSED_MULTIPLY_ADD}
    if machine.architecture.startswith("gfx"):
        options["allow_flush_denorm"] = True  # exp2 as the bare v_exp_f32; NVIDIA's flushes by itself
    elif machine.known:
        # 65536 registers for the threads that are to be resident, 64 for 1024: one more each and a program waits.
        options["maxnreg"] = min(255, 65536 // (threads * math.ceil(rows / machine.processors)))
    return LaunchConfiguration(threads, loads, rows, options, machine.architecture.startswith("sm_"))


# Of the process and not of a context: autograd runs a GPU's backward on a thread of its own.
_overridden: list[tuple[Machine | None, LaunchParameters | None]] = [(None, None)]


@contextmanager
def override(*, machine: Machine | None = None, parameters: LaunchParameters | None = None) -> Iterator[None]:
    """Launch everything until the block ends as on ``machine``, or with these parameters: to compile and to measure.

    With a machine, CPU tensors reach the kernels' launchers; whoever asks for that intercepts the launches.

    Raises:
        ValueError: parameters that no launch can have.
    """
    if parameters is not None:
        threads, loads, rows = parameters
        if threads not in (32, 64, 128, 256, 512, 1024) or loads not in (1, 2, 4, 8) or rows < 1:
            raise ValueError(
                "parameters: expected threads 32 to 1024 and loads 1 to 8, powers of two, and rows >= 1, got "
                f"{parameters}"
            )
    _overridden.append((machine, parameters))
    try:
        yield
    finally:
        _overridden.pop()


def serves(tensor: Tensor) -> bool:
    """Whether the kernels can take a tensor: CUDA or ROCm, or any in the interpreter or under :func:`override`."""
    return tensor.is_cuda or bool(INTERPRETED.value) or _overridden[-1][0] is not None


def origin(device_index: int) -> str:
    """The origin of a device's launch parameters, in a line."""
    architecture = machine(device_index).architecture
    if machine(device_index).known:
        return f"table entry for {architecture}"
    return f"conservative settings: no machine code for {architecture} was looked at"


@functools.cache
def _interpreted(itemsize: int, V: int) -> LaunchConfiguration:
    """The interpreter's launch: a Python step per operation, so few, large tiles, and few programs."""
    vec = VECTOR_BYTES // itemsize
    lanes = 64
    while lanes < 4096 and lanes * vec < V:
        lanes *= 2
    return LaunchConfiguration(lanes, 1, 4, {"num_warps": 1})


@functools.cache
def _default(machine: Machine, itemsize: int, V: int, reread: bool, pressure: int) -> LaunchConfiguration:
    return configure(machine, default_parameters(machine, itemsize, V, reread=reread, pressure=pressure))


def launch_configuration(tensor: Tensor, *, reread: bool = True, pressure: int = 0) -> LaunchConfiguration:
    """The launch for the rows of ``tensor``, [B, T, V]."""
    itemsize, V = tensor.element_size(), tensor.shape[-1]
    if INTERPRETED.value:
        return _interpreted(itemsize, V)
    chosen, parameters = _overridden[-1]
    chosen = machine(tensor.device.index) if chosen is None else chosen
    return _default(chosen, itemsize, V, reread, pressure) if parameters is None else configure(chosen, parameters)


# What Triton compiled for a launch, by all that it compiles anew for.
_compiled: dict[tuple[object, ...], CompiledKernel] = {}


def _variant(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
) -> tuple[object, ...] | None:
    """All that Triton compiles ``kernel`` anew for, and where; None where it is to find that out itself.

    That is in the interpreter, where launches are intercepted (also to compile for a machine that is not there), where
    a hook asks for the arguments by name, on AMD (Triton asks there for the sizes of storages too), and with integers
    beyond 32 bits. Integers within, of which the kernels let none be specialised, and numbers count by their type.
    """
    if type(kernel) is not JITFunction or kernel.pre_run_hooks or _HIP or _overridden[-1][0] is not None:
        return None
    key: list[object] = [kernel.fn, arguments[0].get_device(), *constants.values(), *options.items()]
    for value in arguments:
        if isinstance(value, Tensor):
            key += value.dtype, value.data_ptr() % VECTOR_BYTES == 0
        elif isinstance(value, tuple):  # of float and None
            key += map(type, value)
        else:
            if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
                return None
            key.append(type(value))
    return tuple(key)


def launch_programs(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    """Run so many programs of a kernel on the device of its first argument, a tensor.

    A kernel that was launched with the like before is called straight: Triton looks for what it compiled in several
    times the time. Its settings for debugging and instrumentation are those of the first such launch.

    Args:
        kernel: what ``triton.jit`` made.
        programs: how many.
        arguments: the values of its parameters, in order, but for
        constants: those of its constexpr parameters, which come last, in order.
        options: of the launch.
    """
    device = arguments[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(device):
            return launch_programs(kernel, programs, arguments, constants, options)
    key = _variant(kernel, arguments, constants, options)
    compiled = None if key is None else _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants.values())
        return
    compiled = kernel[(programs,)](*arguments, **constants, **options)
    if key is not None and isinstance(compiled, CompiledKernel):
        assert kernel.arg_names[len(arguments) :] == list(constants)
        _compiled[key] = compiled


def response_launch() -> dict[str, object]:
    """Launch options of a kernel with one program per response.

    One that states assertions is compiled with those, not with one for every integer sum.
    """
    return (
        {"num_warps": 4} if INTERPRETED.value else {"num_warps": 4, "sanitize_overflow": False, **_FUSED_MULTIPLY_ADD}
    )


def same_alignment(first: Tensor, second: Tensor) -> bool:
    """Whether equal rows of two [B, T, V] tensors start at the same distance from a 16-byte boundary."""
    itemsize = first.element_size()
    if first.dtype != second.dtype or (first.data_ptr() - second.data_ptr()) % VECTOR_BYTES:
        return False
    if first.stride() == second.stride():
        return True
    strides = zip(first.shape[:2], first.stride(), second.stride(), strict=False)
    return all(size <= 1 or (one - other) * itemsize % VECTOR_BYTES == 0 for size, one, other in strides)


@functools.lru_cache(maxsize=64)
def transform_constants(temperature: float, softcap: float | None) -> tuple[float, float, float | None]:
    """scale (v to the base-2 domain), dz'/dz at slope 1, and the factor inside the softcap's exponential.

    Rounded to float32 here as a launch on a GPU would; the interpreter would otherwise mix both precisions.
    """
    log2e = LOG2E.value
    scale = log2e if softcap is None else 2.0 * log2e * softcap
    rate = None if softcap is None else c_float(2.0 * log2e / softcap).value
    return c_float(scale / temperature).value, c_float(1.0 / temperature).value, rate
