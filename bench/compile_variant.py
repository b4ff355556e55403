"""Compiling one variant of one kernel, without a GPU. Needs Triton, in a process without TRITON_INTERPRET."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hpo_fused.kernels.fused_policy_loss import fused_policy_loss_kernel
from hpo_fused.kernels.launch import Machine, configure
from hpo_fused.kernels.scale_gradient import scale_gradient_kernel
from hpo_fused.kernels.token_gradient import token_gradient_kernel
from hpo_fused.kernels.token_statistics import token_statistics_kernel
from hpo_fused.rows import RowStatistics, TokenTerms

from .machine_code import LOADS, STORES, Loop, is_mufu, main_loops, read_amdgcn, read_cubin, width

VOCABULARY = 151936
_MB = 1024 * 1024
MACHINES = {
    "sm_80": Machine("cuda", 108, 40 * _MB, 32),
    "sm_90": Machine("cuda", 132, 50 * _MB, 32),
    "sm_100": Machine("cuda", 148, 126 * _MB, 32),
    "gfx942": Machine("hip", 304, 256 * _MB, 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
PARAMETERS = {"clip": 4, "log_fidelity": 5, "soft_gate": 2, "truncated_ratio": 2}


@dataclass(frozen=True)
class Variant:
    """One compilation: ``kernel`` is the launcher's name, the rest its constexpr choices."""

    kernel: str
    dtype: str
    softcap: bool = False
    entropy: bool = False
    entropy_term: bool = False
    kind: str = "log_fidelity"
    old: bool = True
    kl: bool = False
    gradient: bool = True
    aligned_out: bool = True

    @property
    def name(self) -> str:
        flags = ("softcap", "entropy", "entropy_term", "kl")
        parts = [self.dtype] + [flag for flag in flags if getattr(self, flag)]
        if self.kernel == "fused_policy_loss":
            parts.append(self.kind)
            parts += [] if self.old else ["on_policy"]
            parts += [] if self.gradient else ["loss_only"]
        return "/".join(parts + ([] if self.aligned_out else ["unaligned_out"]))


@dataclass(frozen=True)
class CompiledKernel:
    """What was compiled and what became of it."""

    kernel: str
    variant: str
    softcap: bool
    aligned_out: bool
    target: str
    num_warps: int
    registers: int
    spills: int
    widest_load: int
    widest_store: int
    instructions: int
    mufu: int
    loops: tuple[Loop, ...]

    @property
    def mufu_per_element(self) -> float:
        """Over the kernel's sweeps: the sum over its main loops."""
        return sum(loop.mufu for loop in self.loops)


def covering_variants() -> list[Variant]:
    """Every kernel, dtype, kind and switch, and the pairs that share registers; not the full product of 1,000."""
    variants = []
    for dtype in ITEMSIZE:
        variants += [
            Variant("fused_policy_loss", dtype),
            Variant("fused_policy_loss", dtype, entropy=True, entropy_term=True, kl=True),
            Variant("token_statistics", dtype, entropy=True),
            Variant("token_gradient", dtype, entropy_term=True),
            Variant("scale_gradient", dtype),
        ]
    variants += [
        Variant("fused_policy_loss", "bf16", entropy=True),
        Variant("fused_policy_loss", "bf16", gradient=False, entropy=True),
        Variant("fused_policy_loss", "bf16", softcap=True, entropy=True, entropy_term=True, kl=True, kind="clip"),
        Variant("fused_policy_loss", "bf16", kind="clip", entropy=True, old=False),
        Variant("fused_policy_loss", "bf16", kind="soft_gate", entropy=True),
        Variant("fused_policy_loss", "bf16", kind="truncated_ratio", entropy=True, aligned_out=False),
        Variant("token_statistics", "bf16"),
        Variant("token_statistics", "bf16", entropy=True, softcap=True),
        Variant("token_gradient", "bf16"),
        Variant("token_gradient", "bf16", softcap=True),
    ]
    return variants


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
    if variant.kernel == "token_statistics":
        types = {"logits": logits, "tokens": "*i64", "compute": "*i1"}
        types["statistics"] = RowStatistics(f32, f32, f32, f32 if variant.entropy else None)
        return (
            token_statistics_kernel,
            {**types, **transform, **lengths},
            {"SOFTCAP": variant.softcap, "ENTROPY": variant.entropy},
        )
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
        return token_gradient_kernel, {**types, **transform, **lengths, **out_strides}, switches
    types = {
        "logits": logits,
        "out": logits if variant.gradient else None,
        "tokens": "*i64",
        "compute": "*i1",
    }
    types["terms"] = TokenTerms(f32, f32, f32, f32 if variant.old else None, f32 if variant.kl else None)
    types |= {"losses": f32, "logprobs": f32, "entropies": f32 if variant.entropy else None}
    coefficients = {"max_log_ratio": "fp32", "kl_coef": "fp32", "entropy_coef": "fp32"}
    parameters = {"parameters": ("fp32",) * PARAMETERS[variant.kind]}
    switches = {
        "KIND": variant.kind,
        "HAS_OLD": variant.old,
        "HAS_KL": variant.kl,
        "ENTROPY": variant.entropy,
        "ENTROPY_TERM": variant.entropy_term,
        "SOFTCAP": variant.softcap,
        "GRADIENT": variant.gradient,
        "ALIGNED_OUT": variant.aligned_out,
    }
    types |= transform | parameters | coefficients | lengths | out_strides
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


def compile_variant(variant: Variant, target: str, registers_at_most: int | None = None) -> CompiledKernel:
    """Compile ``variant`` for ``target`` with its launch's settings and read the result.

    ``registers_at_most`` overrides the launch's own limit (NVIDIA only).
    """
    machine = MACHINES[target]
    reread = variant.kernel == "fused_policy_loss" and variant.gradient
    launch = configure(
        machine,
        ITEMSIZE[variant.dtype],
        VOCABULARY,
        reread=reread,
        narrow=variant.softcap or not variant.aligned_out,
    )
    kernel, types, switches = _arguments(variant)
    switches = {"LANES": launch.lanes, "VEC": launch.vec, "UNROLL": launch.unroll, **switches}
    names = kernel.arg_names
    constants: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in switches.items()}
    attributes = {}
    for name, value in types.items():
        for path, leaf in _leaves(value, (names.index(name),)):
            if leaf is None:
                constants[path] = None
            elif leaf.startswith("*"):  # what a launch finds for tensors that PyTorch allocated
                attributes[path] = [["tt.divisibility", 16]]
    signature = {name: "constexpr" if name in switches else _signature(types[name]) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    architecture = target if machine.backend == "hip" else int(target.removeprefix("sm_"))
    options = {"num_warps": launch.num_warps, **launch.options}
    if registers_at_most is not None:
        options["maxnreg"] = registers_at_most
    compiled = triton.compile(source, GPUTarget(machine.backend, architecture, machine.warp_size), options)
    if machine.backend == "hip":
        code, registers, spills = read_amdgcn(compiled.asm)
    else:
        code, registers, spills = read_cubin(compiled.asm, Path(triton.__file__).parent / "backends/nvidia/bin")
    loads = [size for i in code if (size := width(i, LOADS))]
    stores = [size for i in code if (size := width(i, STORES))]
    return CompiledKernel(
        kernel=variant.kernel, variant=variant.name, softcap=variant.softcap, aligned_out=variant.aligned_out,
        target=target, num_warps=launch.num_warps, registers=registers, spills=spills,
        widest_load=max(loads, default=0), widest_store=max(stores, default=0),
        instructions=len(code), mufu=sum(is_mufu(i) for i in code),
        loops=tuple(main_loops(code, launch.vec)),
    )  # fmt: skip
