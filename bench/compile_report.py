"""Compile every kernel for every supported architecture, without a GPU, and hold the machine code against limits.

Run as a module it prints the report, or JSON with --json: for every kernel, variant and target the registers, spills,
and for every main loop its instructions, special-function (MUFU) operations and memory access widths per element. The
variants are a covering set, with the launch settings of ``launch.py`` at V = 151936.

Interpreter and compiler of Triton cannot share a process: ``run_report`` starts one in which TRITON_INTERPRET is not
set. Importing this needs no Triton.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile_variant import CompiledKernel, Variant

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]

# The main loops that a kernel has.
SWEEPS = {
    "fused_policy_loss": ("gradient", "statistics"),
    "token_statistics": ("statistics",),
    "token_gradient": ("gradient",),
    "scale_gradient": ("gradient",),
}
ACCESS_BYTES = 16
# Special-function operations per element, all sweeps together, without softcap (whose tanh takes two more a sweep):
# one exp2 per sweep, and the rescaling of a thread's sums once per step.
MUFU_LIMIT = {"fused_policy_loss": 2.3, "token_statistics": 1.15, "token_gradient": 1.15, "scale_gradient": 0.0}
PROGRESS = "compiled "  # how a line of standard error starts that tells how far --progress has come


def record_name(record: dict[str, Any]) -> str:
    """A record in a few words; without its target it is what --only selects by."""
    return f"{record['target']} {record['kernel']}/{record['variant']}"


def broken_limits(records: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each limit that a record (a ``CompiledKernel`` as a dict) breaks.

    Nothing spills; main loops access memory 16 bytes at a time, stores too where the output is aligned as the input
    is; no more special-function operations than the formulas need. A main loop that was not found breaks all of them.
    """
    broken = []
    for record in records:
        loops = record["loops"]
        expected = ["statistics"] if "loss_only" in record["variant"] else list(SWEEPS[record["kernel"]])
        if (found := sorted(loop["role"] for loop in loops)) != expected:
            broken.append(f"{record_name(record)}: main loops {found}, expected {expected}")
        if record["spills"]:
            unit = "registers" if record["target"].startswith("gfx") else "bytes"
            broken.append(f"{record_name(record)}: spills {record['spills']} {unit}")
        for loop in loops:
            accesses = {"loads": loop["load_bytes"]}
            if loop["role"] == "gradient" and record["aligned_out"]:
                accesses["stores"] = loop["store_bytes"]
            broken += [
                f"{record_name(record)}: {loop['role']} {kind} {size} bytes at a time, not {ACCESS_BYTES}"
                for kind, size in accesses.items()
                if size != ACCESS_BYTES
            ]
        mufu = sum(loop["mufu"] for loop in loops)
        if not record["softcap"] and mufu > MUFU_LIMIT[record["kernel"]]:
            broken.append(f"{record_name(record)}: {mufu:.3g} MUFU per element, limit {MUFU_LIMIT[record['kernel']]}")
    return broken


def _compile(job: tuple[Variant, str, int | None]) -> CompiledKernel:
    from .compile_variant import compile_variant

    return compile_variant(*job)


def compile_variants(
    targets: Iterable[str] = TARGETS,
    variants: Iterable[Variant] | None = None,
    *,
    registers_at_most: int | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[CompiledKernel]:
    """Compile ``variants`` (default: the covering set) for ``targets``, one record each, in that order.

    Args:
        targets: of ``TARGETS``.
        variants: what to compile.
        registers_at_most: overrides the launch's own limit (NVIDIA only): what a check of spills must reject.
        processes: how many compile at a time; default: one for each core.
        progress: called with how many of how many are done.
    """
    from .compile_variant import covering_variants

    chosen = covering_variants() if variants is None else list(variants)
    jobs = [(variant, target, registers_at_most) for target in targets for variant in chosen]
    records = []
    progress(0, len(jobs))
    with multiprocessing.get_context("spawn").Pool(processes or min(len(jobs), os.cpu_count() or 1)) as pool:
        for record in pool.imap(_compile, jobs):
            records.append(record)
            progress(len(records), len(jobs))
    return records


class ReportFailed(Exception):
    """The report could not be made; the message says why."""


def run_report(
    targets: Sequence[str] = TARGETS,
    only: str = "",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """The report's records, from a process of its own. ``only`` selects variants whose kernel/name contains it.

    Raises:
        ReportFailed: no Triton, or the process failed.
    """
    if importlib.util.find_spec("triton") is None:
        raise ReportFailed("compiling kernels needs triton: pip install 'hpo-fused[triton]' (Linux only)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONSAFEPATH"] = "1"  # a checkout's kernels/, say, must not shadow an installed package
    command = [sys.executable, "-m", "hpo_fused.bench.compile_report", "--json", "--progress", "--only", only, *targets]
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
        records: list[dict[str, Any]] = json.load(output)
        return records


def main() -> None:
    """Compile in this process's children and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", default=TARGETS, help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output")
    parser.add_argument("--only", default="", help="variants whose kernel/name contains this")
    parser.add_argument("--registers", type=int, help="cap on registers (NVIDIA), to see what spills")
    parser.add_argument("--progress", action="store_true", help="tell on standard error how far it has come")
    arguments = parser.parse_args()

    from .compile_variant import covering_variants

    variants = [v for v in covering_variants() if arguments.only in f"{v.kernel}/{v.name}"]
    if not variants:
        names = "\n  ".join(f"{v.kernel}/{v.name}" for v in covering_variants())
        sys.exit(f"no variant's name contains {arguments.only!r}; there are\n  {names}")

    def tell(done: int, total: int) -> None:
        if arguments.progress:
            print(f"{PROGRESS}{done} of {total}", file=sys.stderr, flush=True)

    records = compile_variants(arguments.targets, variants, registers_at_most=arguments.registers, progress=tell)
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
