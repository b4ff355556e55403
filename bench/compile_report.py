"""Compile every kernel for every supported architecture, without a GPU, and read the machine code.

``compile_variants(targets)`` compiles a covering set of variants with the launch settings of ``launch.py`` at
V = 151936 and returns one ``CompiledKernel`` each: registers, spills, and for every main loop its instructions, special
function (MUFU) operations and memory access widths per element. Run as a module it prints a table, or JSON with
--json. Must run in a process where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
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
class Loop:
    """An innermost loop that loads logits; counts per element, widths in bytes (narrowest access of each sort)."""

    role: str
    elements: int
    instructions: float
    mufu: float
    load_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class CompiledKernel:
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


def _compile(variant: Variant, target: str, registers_at_most: int | None = None) -> CompiledKernel:
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
    read = _read_amdgcn if machine.backend == "hip" else _read_cubin
    code, registers, spills = read(compiled.asm)
    loads = [width for i in code if (width := _width(i, _LOADS))]
    stores = [width for i in code if (width := _width(i, _STORES))]
    return CompiledKernel(
        kernel=variant.kernel, variant=variant.name, softcap=variant.softcap, aligned_out=variant.aligned_out,
        target=target, num_warps=launch.num_warps, registers=registers, spills=spills,
        widest_load=max(loads, default=0), widest_store=max(stores, default=0),
        instructions=len(code), mufu=sum(_is_mufu(i) for i in code),
        loops=tuple(_main_loops(code, launch.vec)),
    )  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    jump: int | None  # address of a branch's destination


_LOADS = re.compile(r"\bLDG\.E\S*|\bglobal_load_\w+|\bbuffer_load_\w+")
_STORES = re.compile(r"\bSTG\.E\S*|\bglobal_store_\w+|\bbuffer_store_\w+")
_MUFU = re.compile(r"\bMUFU\.|\bv_(exp|log|rcp|rsq|sqrt|sin|cos)_f(32|16)")


def _width(instruction: Instruction, accesses: re.Pattern[str]) -> int:
    """Bytes per thread of a global access; 0 for any other instruction."""
    match = accesses.search(instruction.text)
    if not match:
        return 0
    access = match.group()
    widths = {"128": 16, "x4": 16, "x3": 12, "64": 8, "x2": 8, "16": 2, "short": 2, "8": 1, "byte": 1}
    return next((w for mark, w in widths.items() if re.search(rf"(\.[US]?|_[a-z0-9]*){mark}\b", access)), 4)


def _is_mufu(instruction: Instruction) -> bool:
    return bool(_MUFU.search(instruction.text))


def _read_cubin(asm: Any) -> tuple[list[Instruction], int, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = []
    for address, body in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE):
        jump = re.search(r"\bBRA(?:\.\S+)?\s.*?\b0x([0-9a-f]+)$", body)
        if not body.startswith("NOP"):
            code.append(Instruction(int(address, 16), body, int(jump.group(1), 16) if jump else None))
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return code, usage["REG"], usage["STACK"] + usage["LOCAL"]


def _read_amdgcn(asm: Any) -> tuple[list[Instruction], int, int]:
    text = asm["amdgcn"]
    body = text[: text.index("s_endpgm")] if "s_endpgm" in text else text
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(lines)
        elif re.match(r"(s|v|global|ds|buffer|flat)_", line):
            lines.append(line)
    code = []
    for address, line in enumerate(lines):
        jump = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        code.append(Instruction(address, line, labels.get(jump.group(1)) if jump else None))
    count = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    spills = count["vgpr_spill_count"] + count["sgpr_spill_count"]
    return code, count["vgpr_count"], spills


def _main_loops(code: list[Instruction], vec: int) -> Iterator[Loop]:
    """Innermost loops around 16-byte loads; a block that a forward branch skips and that loads nothing is not counted.

    (That block is the one step that holds the sampled token.) Out-of-line blocks lie outside the loop's addresses.
    """
    backward = [(i.jump, i.address) for i in code if i.jump is not None and i.jump <= i.address]
    for start, end in backward:
        if start == end or any(start <= other < end for _, other in backward):
            continue
        body = [i for i in code if start <= i.address <= end]
        skipped = [
            (i.address, i.jump) for i in body
            if i.jump is not None and i.address < i.jump <= end
            and not any(_is_mufu(j) or _width(j, _LOADS) for j in body if i.address < j.address < i.jump)
        ]  # fmt: skip
        steady = [i for i in body if not any(low < i.address < high for low, high in skipped)]
        loads = [width for i in steady if (width := _width(i, _LOADS))]
        stores = [width for i in steady if (width := _width(i, _STORES))]
        elements = sum(width == 16 for width in loads) * vec
        if not elements:
            continue
        yield Loop(
            role="gradient" if stores else "statistics", elements=elements,
            instructions=round(len(steady) / elements, 2),
            mufu=round(sum(_is_mufu(i) for i in steady) / elements, 3),
            load_bytes=min(loads), store_bytes=min(stores, default=0),
        )  # fmt: skip


def compile_variants(
    targets: Iterable[str] = tuple(MACHINES),
    variants: Iterable[Variant] | None = None,
    *,
    registers_at_most: int | None = None,
    processes: int | None = None,
) -> list[CompiledKernel]:
    """Compile ``variants`` (default: the covering set) for ``targets``, one record each, in that order.

    ``registers_at_most`` overrides the launch's own limit (NVIDIA only): what a check of spills must reject.
    """
    chosen = covering_variants() if variants is None else list(variants)
    jobs = [(variant, target, registers_at_most) for target in targets for variant in chosen]
    with multiprocessing.get_context("spawn").Pool(processes or min(len(jobs), os.cpu_count() or 1)) as pool:
        return pool.starmap(_compile, jobs, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", default=list(MACHINES), help=f"of {', '.join(MACHINES)}")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--only", default="", help="variants whose kernel/name contains this")
    parser.add_argument("--registers", type=int, help="cap on registers (NVIDIA), to see what spills")
    arguments = parser.parse_args()
    variants = [v for v in covering_variants() if arguments.only in f"{v.kernel}/{v.name}"]
    records = compile_variants(arguments.targets, variants, registers_at_most=arguments.registers)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(record) for record in records]))
        return
    for r in records:
        loops = "  ".join(
            f"{x.role}: {x.instructions} instr, {x.mufu} MUFU, {x.load_bytes}/{x.store_bytes} B" for x in r.loops
        )
        print(f"{r.target:7}{r.kernel:18} {r.variant:44} {r.registers:3} registers {r.spills} spills  {loops}")


if __name__ == "__main__":
    main()
