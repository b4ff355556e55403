"""Compiling recorded launches for GPUs that need not be there. Needs Triton, in a process without TRITON_INTERPRET.

Run as a program it prints a :class:`Report` as JSON; ``run_report`` starts it so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hpo_fused.kernels.launch import Machine, override

from .calls import CALLS, FULL_TARGETS, TARGETS, Call, Target
from .listing import LOADS, STORES, main_loops, read_amdgcn, read_cubin, width
from .record import Launch, recording
from .report import Kernel, PublicCall, Report


@dataclasses.dataclass
class _Job:
    """One compilation, and the calls that launch it."""

    target: Target
    launch: Launch
    calls: list[Call]


def _jobs(targets: Sequence[Target], only: str, every: bool) -> tuple[list[_Job], list[PublicCall]]:
    """Distinct compilations, target by target, and each call's launches on the first target."""
    jobs: list[_Job] = []
    public: dict[str, PublicCall] = {}
    for target in targets:
        chosen = [
            call for call in CALLS if only in call.name and (only or every or call.core or target.name in FULL_TARGETS)
        ]
        distinct: dict[str, _Job] = {}
        machine = Machine(target.name, target.processors, target.cache_bytes, target.warp_size)
        for call in chosen:
            with override(machine=machine), recording() as launches:
                call.run()
            for launch in launches:
                distinct.setdefault(launch.key, _Job(target, launch, [])).calls.append(call)
            names, leaves = [launch.name for launch in launches], [launch.leaves for launch in launches]
            public.setdefault(call.name, PublicCall(call.name, call.operation, names, leaves))
        jobs += distinct.values()
    return jobs, list(public.values())


@triton.jit
def _probe_kernel(pointer):  # type: ignore[no-untyped-def]
    tl.store(pointer, 0.0)


def _gpu(target: Target) -> GPUTarget:
    architecture = target.name if target.amd else int(target.name.removeprefix("sm_"))
    return GPUTarget("hip" if target.amd else "cuda", architecture, target.warp_size)


def _message(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if re.search(r"\bfatal\b|\berror\s*:(?! Internal)", line)), "")
    return f"{type(error).__name__}: {told or (lines[-1] if lines else '')}"[:200]


def _unavailable(target: Target) -> str:
    """A line where not even a store can be compiled for the target here: Triton 3.4 brings no linker for AMD, say."""
    try:
        triton.compile(ASTSource(fn=_probe_kernel, signature={"pointer": "*fp32"}, constexprs={}), _gpu(target))
    except Exception as error:
        return f"{target.name}: nothing can be compiled for it here: {_message(error)}"
    return ""


def compile_launch(job: _Job, registers_at_most: int | None = None) -> Kernel:
    """Compile a launch and read the result; ``registers_at_most`` overrides the launch's own limit (NVIDIA only)."""
    launch, call, target = job.launch, job.calls[0], job.target
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes
    )
    options = launch.options | ({"maxnreg": registers_at_most} if registers_at_most is not None else {})
    compiled = triton.compile(source, _gpu(target), options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    code, registers, spills = read_amdgcn(compiled.asm) if target.amd else read_cubin(compiled.asm, tools)
    return Kernel(
        kernel=launch.name, target=job.target.name, calls=[one.name for one in job.calls], sweeps=launch.sweeps,
        softcap=call.softcap, entropy=call.entropy, unaligned=call.unaligned, registers=registers,
        spills=spills, shared_bytes=int(compiled.metadata.shared),
        widest_load=max((width(i, LOADS) for i in code), default=0),
        widest_store=max((width(i, STORES) for i in code), default=0),
        loops=[dataclasses.asdict(loop) for loop in main_loops(code, launch.vector)] if launch.sweeps else [],
    )  # fmt: skip


_waiting: list[_Job] = []  # taken over by the forked processes, since a kernel cannot be sent to one


def _attempt(task: tuple[int, int | None]) -> Kernel | str:
    index, registers_at_most = task
    try:
        return compile_launch(_waiting[index], registers_at_most)
    except Exception as error:
        return _message(error)


def compile_all(targets: Sequence[str], only: str = "", every: bool = False, registers: int | None = None) -> Report:
    """Compile in processes of their own, as many at a time as there are cores; call it where nothing else runs."""
    report = Report()
    trials = {name: _unavailable(TARGETS[name]) for name in targets}
    report.unavailable = [line for line in trials.values() if line]
    jobs, report.public = _jobs([TARGETS[name] for name, line in trials.items() if not line], only, every)
    _waiting[:] = jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tasks = [(index, registers) for index in range(len(jobs))]
    # An executor and not a Pool, which waits for ever where a compiler takes its process down with it.
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork")) as pool:
        for done, (job, outcome) in enumerate(zip(jobs, pool.map(_attempt, tasks), strict=True), start=1):
            name = job.target.name
            if isinstance(outcome, Kernel):
                report.kernels.append(outcome)
            else:
                report.failures.append(f"{name} {job.launch.name}, {job.calls[0].name}: not compiled: {outcome}")
            print(f"\rcompiled {done} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return report


def main() -> None:
    """Compile in this process's children; a ``Report`` as JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--every", action="store_true", help="every call for every target")
    parser.add_argument("--registers", type=int, help="cap on registers (NVIDIA), to see spills")
    chosen = parser.parse_args()
    report = compile_all(chosen.targets, chosen.only, chosen.every, chosen.registers)
    print(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main()
