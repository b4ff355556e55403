"""Compile the kernels for the supported architectures, without a GPU, and read their machine code.

Interpreter and compiler of Triton cannot share a process: ``run_report`` starts one in which TRITON_INTERPRET is not
set, which is this module run as a program. Importing it needs no Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .compile_plan import TARGETS, Job, covering_variants, plan

if TYPE_CHECKING:
    from .compile_variant import CompiledKernel

PROGRESS = "compiled "  # how a line of standard error starts that tells how far --progress has come


@dataclass
class Report:
    """What was compiled.

    Attributes:
        records: a ``CompiledKernel`` as a dict for each job that went well, in the jobs' order.
        failures: a line for each that did not, on a target that other code can be compiled for.
        unavailable: target to reason, where nothing can be compiled or disassembled here.
        tools: the assemblers' versions.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)


def _attempt(task: tuple[Job, int | None]) -> CompiledKernel | str:
    """The record, or what went wrong."""
    from .compile_variant import compile_variant, describe

    (job, registers_at_most) = task
    try:
        return compile_variant(job.variant, job.target, registers_at_most)
    except Exception as error:
        return describe(error)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tools() -> dict[str, str]:
    from triton import knobs

    found = {}
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            found[name] = str(getattr(knobs.nvidia, name).version)
        except (AttributeError, RuntimeError, OSError):
            continue
    return found


def compile_jobs(
    jobs: Sequence[Job],
    *,
    registers_at_most: int | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """Compile in processes of their own; call it where nothing else runs, since they are forked.

    Args:
        jobs: what to compile.
        registers_at_most: overrides the launch's own limit (NVIDIA only): what a check of spills must reject.
        processes: how many compile at a time; default: one for each core.
        progress: called with how many of how many are done.
    """
    # Imported once, before the fork: PyTorch and Triton take seconds.
    from . import compile_variant

    report = Report(tools=_tools())
    tasks = [(job, registers_at_most) for job in jobs]
    progress(0, len(tasks))
    workers = processes or min(len(tasks), _cores())
    # An executor and not a Pool, which waits for ever where a compiler takes its process down with it.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for done, (job, outcome) in enumerate(zip(jobs, pool.map(_attempt, tasks), strict=True), start=1):
            if isinstance(outcome, str):
                if job.target not in report.unavailable and (reason := compile_variant.unavailable(job.target)):
                    report.unavailable[job.target] = reason
                elif job.target not in report.unavailable:
                    report.failures.append(f"{job.target} {job.variant.full_name}: not compiled: {outcome}")
            else:
                report.records.append(dataclasses.asdict(outcome))
            progress(done, len(tasks))
    return report


class ReportFailed(Exception):
    """The report could not be made; the message says why."""


def run_report(
    targets: Sequence[str] = TARGETS,
    only: str = "",
    every: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Report:
    """The report on ``plan(targets, only, every)``, from a process of its own.

    Raises:
        ReportFailed: no Triton, nothing to compile, or the process failed.
    """
    if importlib.util.find_spec("triton") is None:
        raise ReportFailed("compiling kernels needs triton: pip install 'hpo-fused[triton]' (Linux only)")
    if not plan(targets, only, every):
        names = "\n  ".join(variant.full_name for variant in covering_variants())
        raise ReportFailed(f"no variant's name contains {only!r}; there are\n  {names}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONSAFEPATH"] = "1"  # a checkout's kernels/, say, must not shadow an installed package
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # no debug information to write, assemble and read again
    command = [sys.executable, "-m", "hpo_fused.bench.compile_report", "--progress", "--only", only, *targets]
    command += ["--every"] if every else []
    errors: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    if line.startswith(PROGRESS):
                        done, _, total = line.removeprefix(PROGRESS).partition(" of ")
                        progress(int(done), int(total))
                    else:
                        errors.append(line.rstrip())
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            raise ReportFailed("\n".join(errors[-40:]) or f"the compiling process ended with {process.returncode}")
        output.seek(0)
        return Report(**json.load(output))


def main(arguments: Iterable[str] | None = None) -> None:
    """Compile in this process's children; a ``Report`` as JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", default=TARGETS, help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--only", default="", help="variants whose kernel/name contains this")
    parser.add_argument("--every", action="store_true", help="every variant for every target")
    parser.add_argument("--registers", type=int, help="cap on registers (NVIDIA), to see what spills")
    parser.add_argument("--progress", action="store_true", help="tell on standard error how far it has come")
    chosen = parser.parse_args(None if arguments is None else list(arguments))

    def tell(done: int, total: int) -> None:
        if chosen.progress:
            print(f"{PROGRESS}{done} of {total}", file=sys.stderr, flush=True)

    jobs = plan(chosen.targets, chosen.only, chosen.every)
    if not jobs:
        sys.exit(f"no variant's name contains {chosen.only!r}")
    print(json.dumps(dataclasses.asdict(compile_jobs(jobs, registers_at_most=chosen.registers, progress=tell))))


if __name__ == "__main__":
    main()
