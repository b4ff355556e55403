"""Compiling one variant of one kernel, without a GPU. Needs Triton, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hpo_fused.kernels.computed_rows import computed_rows_kernel
from hpo_fused.kernels.fused_policy_loss import fused_policy_loss_kernel
from hpo_fused.kernels.launch import LaunchConfiguration, Machine, configure, default_parameters, reload_scalars
from hpo_fused.kernels.logprob_policy_loss import LOSS_BLOCK, logprob_policy_loss_kernel
from hpo_fused.kernels.scale_gradient import scale_gradient_kernel
from hpo_fused.kernels.token_gradient import token_gradient_kernel
from hpo_fused.kernels.token_statistics import combine_statistics_kernel, token_statistics_kernel
from hpo_fused.kernels.token_weights import INPUT_STRIDES, STATISTICS_BLOCK, response_statistics_kernel
from hpo_fused.rows import RowStatistics

from .compile_plan import ITEMSIZE, VOCABULARY, Variant
from .gpus import GPUS, REFERENCE, Gpu
from .machine_code import LOADS, STORES, Instruction, Loop, main_loops, read_amdgcn, read_cubin, width
from .occupancy import Occupancy, occupancy

PARAMETERS = {"clip": 4, "log_fidelity": 5, "soft_gate": 2, "truncated_ratio": 2}

# A padded batch of the default objective; one that needs everything but a given normaliser; a chunk of gathered rows.
WEIGHTS: dict[str, dict[str, Any]] = {
    "batch": {"NORMALIZATION": "mean_length", "WEIGHTING": "adaptive", "OWN_COUNTS": True, "PACKED": False},
    "packed": {"NORMALIZATION": "response", "WEIGHTING": "adaptive", "OWN_COUNTS": False, "PACKED": True},
    "prepared": {"NORMALIZATION": "prepared", "WEIGHTING": "none", "OWN_COUNTS": False, "PACKED": False},
}

# Kernels of a program per response, and the tokens it takes in a step.
SMALL = {"response_statistics": STATISTICS_BLOCK, "computed_rows": STATISTICS_BLOCK, "logprob_policy_loss": LOSS_BLOCK}


@dataclass(frozen=True)
class CompiledKernel:
    """What was compiled and what became of it.

    Attributes:
        kernel, variant, dtype, softcap, entropy, aligned_out, target: what.
        num_warps: of a program; programs_per_processor: that the launch means to be resident on a processor.
        registers: of a thread; spills: bytes (NVIDIA) or registers (AMD) that did not fit into them.
        shared_bytes: shared memory of a program, for the reductions.
        widest_load, widest_store: bytes of one access to device memory, anywhere in the kernel.
        instructions: in the whole kernel.
        occupancy: what can be resident.
        loops: the sweeps.
    """

    kernel: str
    variant: str
    dtype: str
    softcap: bool
    entropy: bool
    aligned_out: bool
    target: str
    num_warps: int
    programs_per_processor: int
    registers: int
    spills: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    instructions: int
    occupancy: Occupancy
    loops: tuple[Loop, ...]


def machine_of(gpu: Gpu) -> Machine:
    """What a launch on ``gpu`` depends on."""
    return Machine(gpu.target, gpu.processors, gpu.cache_bytes, 64 if gpu.vendor == "amd" else 32)


def launch_of(variant: Variant, gpu: Gpu, V: int) -> LaunchConfiguration:
    """The launch of ``variant`` on ``gpu`` for rows of ``V`` elements."""
    if variant.kernel in SMALL:
        # Compiled with its assertions, as the launch does.
        options: dict[str, object] = {"debug": variant.kernel == "response_statistics", "sanitize_overflow": False}
        return LaunchConfiguration(4, SMALL[variant.kernel], 1, 1, gpu.processors, options)
    machine, itemsize = machine_of(gpu), ITEMSIZE[variant.dtype]
    parameters = default_parameters(
        machine, itemsize, V,
        reread=variant.kernel == "fused_policy_loss" and variant.gradient,
        narrow=variant.softcap or not variant.aligned_out,
    )  # fmt: skip
    return configure(machine, itemsize, parameters)


def _arguments(variant: Variant) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel, the types of its run-time arguments and the values of its constexpr ones (None included)."""
    logits = f"*{variant.dtype}"
    f32: Any = "*fp32"  # stands where the NamedTuples hold a tensor
    types: dict[str, Any]
    switches: dict[str, Any]
    lengths = {"N": "i32", "T": "i32", "V": "i32", "stride_b": "i32", "stride_t": "i32"}
    out_strides = {"out_stride_b": "i32", "out_stride_t": "i32"}
    transform = {"transform": ("fp32",) * 3}
    if variant.kernel == "scale_gradient":
        return scale_gradient_kernel, {"gradient": logits, "factor": f32, **lengths}, {}
    if variant.kernel in ("token_statistics", "combine_statistics"):
        types = {"logits": logits, "tokens": "*i64", "compute": "*i1"}
        types["statistics"] = RowStatistics(f32, f32, f32, f32 if variant.entropy else None)
        switches = {"SOFTCAP": variant.softcap, "ENTROPY": variant.entropy}
        if variant.kernel == "combine_statistics":
            types |= {"partials": f32, "slots": "i32"}
            return combine_statistics_kernel, {**types, **transform, **lengths}, switches
        types |= {"partials": f32 if variant.shared else None, "parts": "i32", "slots": "i32"}
        return token_statistics_kernel, {**types, **transform, **lengths}, switches
    if variant.kernel == "token_gradient":
        types = {
            "logits": logits,
            "out": logits,
            "tokens": "*i64",
            "statistics": RowStatistics(f32, f32, f32, f32),
        }
        types |= {"logprob_coefficients": f32, "entropy_coefficients": f32 if variant.entropy_term else None}
        switches = {
            "SOFTCAP": variant.softcap,
            "TILT": variant.entropy_term,
            "ALIGNED_OUT": variant.aligned_out,
        }
        return token_gradient_kernel, {**types, **transform, **lengths, **out_strides, "parts": "i32"}, switches
    if variant.kernel == "response_statistics":
        packed = variant.weights == "packed"
        types = {"statistics": "*i32", "tokens": "*i64", "mask": "*i1", "advantages": f32}
        types |= {"cu_seqlens": "*i32" if packed else None, **dict.fromkeys(["N", "T", "B", "V"], "i32")}
        types |= dict.fromkeys(["tokens_stride", "mask_stride", "advantages_stride"], "i32")
        return response_statistics_kernel, types, {"PER_TOKEN": packed}
    prepared, full = variant.weights == "prepared", variant.weights == "packed"
    inputs = {"mask": "*i1", "advantages": f32, "token_weights": f32 if prepared or full else None}
    inputs |= {"old_logprobs": f32 if variant.old else None, "ref_logprobs": f32 if variant.kl else None}
    types = {"statistics": None if prepared else "*i32", "normalizers": f32 if prepared else None}
    types |= {"counts": ("*i64" if full else None,) * 4, "numbers": ("fp32",) * 7, **inputs}
    types |= {"parameters": ("fp32",) * PARAMETERS[variant.kind], "N": "i32", "T": "i32", "B": "i32"}
    types |= {"losses": f32, "active": None if prepared else "*i1"}
    types |= dict.fromkeys(["max_log_ratio", "kl_coef", "entropy_coef"], "fp32") | dict.fromkeys(INPUT_STRIDES, "i32")
    if variant.kernel == "computed_rows":
        types = {name: types[name] for name in computed_rows_kernel.arg_names if name in types}
        types |= {"compute": "*i1", "cu_seqlens": "*i32" if full else None}
        switches = {**WEIGHTS[variant.weights], "ADVANTAGE_PER_TOKEN": full, "WEIGHT_PER_TOKEN": full}
        return computed_rows_kernel, types, {**switches, "SEQUENCE": variant.sequence, "SKIP": True}
    switches = {
        "KIND": variant.kind,
        **WEIGHTS[variant.weights],
        "ADVANTAGE_PER_TOKEN": prepared or full,
        "WEIGHT_PER_TOKEN": prepared or full,
        "HAS_OLD": variant.old,
        "HAS_KL": variant.kl,
        "ENTROPY_TERM": variant.entropy_term,
    }
    if variant.kernel == "logprob_policy_loss":
        entropies = f32 if variant.entropy_term else None
        types |= {"logprobs": f32, "entropies": entropies, "cu_seqlens": "*i32" if full else None}
        types |= {"logprob_coefficients": f32, "entropy_coefficients": entropies, "known_logprobs": f32}
        types |= {"known_entropies": entropies, "logprobs_stride": "i32", "entropies_stride": "i32"}
        del types["tokens_stride"]
        return logprob_policy_loss_kernel, types, {**switches, "SEQUENCE": variant.sequence}
    types |= {"logits": logits, "out": logits if variant.gradient else None, "tokens": "*i64"}
    types |= {"logprobs": f32, "entropies": f32 if variant.entropy else None}
    types |= transform | lengths | out_strides
    switches |= {"SKIP": not prepared, "ENTROPY": variant.entropy, "SOFTCAP": variant.softcap}
    switches |= {"GRADIENT": variant.gradient, "ALIGNED_OUT": variant.aligned_out}
    return fused_policy_loss_kernel, types, switches


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _signature(value: Any) -> Any:
    if isinstance(value, tuple):
        items = [_signature(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return "constexpr" if value is None else value


def _compile(source: ASTSource, target: str, options: dict[str, Any]) -> Any:
    amd = target.startswith("gfx")
    architecture = target if amd else int(target.removeprefix("sm_"))
    return triton.compile(source, GPUTarget("hip" if amd else "cuda", architecture, 64 if amd else 32), options)


def _read(asm: Any, target: str) -> tuple[list[Instruction], int, int]:
    """Instructions, registers and spills."""
    if target.startswith("gfx"):
        return read_amdgcn(asm)
    return read_cubin(asm, Path(triton.__file__).parent / "backends/nvidia/bin")


@triton.jit
def _probe_kernel(pointer):  # type: ignore[no-untyped-def]
    tl.store(pointer, 0.0)


def unavailable(target: str) -> str:
    """Why nothing at all can be compiled or disassembled for ``target`` here; "" where a store can."""
    try:
        source = ASTSource(fn=_probe_kernel, signature={"pointer": "*fp32"}, constexprs={})
        code, _, _ = _read(_compile(source, target, {"num_warps": 1}).asm, target)
        return "" if code else "the disassembler printed no instruction"
    except Exception as error:
        return describe(error)


def describe(error: Exception) -> str:
    """An error in a line of at most 200 characters: the one that names the trouble, where a tool printed many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if re.search(r"\bfatal\b|\berror\s*:(?! Internal)", line)), "")
    return f"{type(error).__name__}: {told or (lines[-1] if lines else '')}"[:200]


def compile_variant(variant: Variant, target: str, registers_at_most: int | None = None) -> CompiledKernel:
    """Compile ``variant`` for ``target`` with its launch's settings and read the result.

    ``registers_at_most`` overrides the launch's own limit (NVIDIA only).
    """
    gpu = GPUS[REFERENCE[target]]
    launch = launch_of(variant, gpu, VOCABULARY)
    kernel, types, switches = _arguments(variant)
    if variant.kernel in SMALL:
        switches = {"BLOCK": launch.lanes, **switches}
    else:
        if variant.kernel == "fused_policy_loss":
            switches["RELOAD"] = reload_scalars(launch)
        switches = {"LANES": launch.lanes, "VEC": launch.vec, "UNROLL": launch.unroll, **switches}
    names = kernel.arg_names
    constants: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in switches.items()}
    attributes = {}
    for name, value in types.items():
        for path, leaf in _leaves(value, (names.index(name),)):
            if leaf is None:
                constants[path] = None
            elif (
                leaf.startswith("*") and not kernel.params[path[0]].do_not_specialize
            ):  # what a launch finds for tensors that PyTorch allocated
                attributes[path] = [["tt.divisibility", 16]]
    signature = {name: "constexpr" if name in switches else _signature(types[name]) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, **launch.options}
    if registers_at_most is not None:
        options["maxnreg"] = registers_at_most
    compiled = _compile(source, target, options)
    code, registers, spills = _read(compiled.asm, target)
    loads = [size for i in code if (size := width(i, LOADS))]
    stores = [size for i in code if (size := width(i, STORES))]
    shared = int(compiled.metadata.shared)
    return CompiledKernel(
        kernel=variant.kernel, variant=variant.name, dtype=variant.dtype, softcap=variant.softcap,
        entropy=variant.entropy, aligned_out=variant.aligned_out, target=target, num_warps=launch.num_warps,
        programs_per_processor=math.ceil(launch.rows_in_flight / gpu.processors), registers=registers, spills=spills,
        shared_bytes=shared, widest_load=max(loads, default=0), widest_store=max(stores, default=0),
        instructions=len(code), occupancy=occupancy(target, launch.num_warps, registers, shared),
        loops=() if variant.kernel in SMALL else tuple(main_loops(code, launch.vec, partial_sums=variant.shared)),
    )  # fmt: skip
