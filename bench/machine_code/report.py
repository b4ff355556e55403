"""The report on compiled kernels: started in a process of its own, held against limits, and as tables.

Needs no Triton: its interpreter and its compiler cannot share a process, so ``run_report`` starts one in which
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo_fused.bench.tables import NOTHING, Table, number

from .calls import CALLS, TARGETS

ACCESS_BYTES = 16
# Special-function operations per element of a main loop, without softcap (whose tanh takes two more): one exp2, and
# the rescaling of a thread's sums once per step.
SPECIAL_LIMIT = 1.15
# Instructions per element over both sweeps, without softcap: a tenth above what docs/kernels.md counts, and float32's
# with Triton 3.4 and 3.9 (18.1 and 18.5 on sm_80).
INSTRUCTION_LIMIT, INSTRUCTION_LIMIT_ENTROPY, INSTRUCTION_LIMIT_AMD = 14.0, 19.0, 22.0
# Bytes that a thread may spill outside main loops: a sweep stores them once per program and loads them once per row,
# which takes tens of microseconds. Triton 3.9 does so on sm_100 (8 to 24 bytes), 3.4 in two kernels of tokens (8).
SPILLED_BYTES = 32


@dataclass
class Kernel:
    """A compiled launch.

    Attributes:
        calls: names of the public calls that launch it.
        sweeps: it has main loops over rows.
        softcap, entropy, unaligned: as of the first of the calls.
        registers: of a thread; spills: bytes (NVIDIA) or registers (AMD) that did not fit into them.
        shared_bytes: shared memory of a program, for the reductions.
        widest_load, widest_store: bytes of one access to device memory, anywhere in the kernel.
        loops: the main loops (``listing.Loop``) as dicts.
    """

    kernel: str
    target: str
    calls: list[str]
    sweeps: bool
    softcap: bool
    entropy: bool
    unaligned: bool
    registers: int
    spills: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    loops: list[dict[str, Any]]


@dataclass
class PublicCall:
    """Launches of one public call: the kernels' names, and the leaves of each (arguments, tuples flattened)."""

    call: str
    operation: str
    launches: list[str]
    leaves: list[int]


@dataclass
class Report:
    """Outcome of a compilation.

    Attributes:
        kernels: those that went well.
        public: each call's launches.
        failures: a line for each kernel that did not compile.
        unavailable: a line for each target that nothing can be compiled for here.
    """

    kernels: list[Kernel] = field(default_factory=list)
    public: list[PublicCall] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The kernels for JSON."""
        return [dataclasses.asdict(kernel) for kernel in self.kernels]

    @property
    def broken(self) -> list[str]:
        """A line for each limit that does not hold, and for each kernel that did not compile."""
        return [*self.failures, *broken_limits(self.kernels)]


class ReportFailed(Exception):
    """The report could not be made; the message says why."""


def run_report(targets: Sequence[str], only: str = "", every: bool = False, registers: int | None = None) -> Report:
    """The report on these targets, from a process of its own, which tells its progress and its errors on stderr.

    Args:
        targets: names of ``TARGETS``.
        only: calls whose name contains this, on each target.
        every: every call on each target.
        registers: cap on registers (NVIDIA), instead of the launches' own.

    Raises:
        ReportFailed: no such target, no Triton, nothing to compile, or the process failed.
    """
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ReportFailed(f"target: expected one of {', '.join(TARGETS)}, got {unknown[0]!r}")
    if importlib.util.find_spec("triton") is None:
        raise ReportFailed("compiling kernels needs triton: pip install 'hpo-fused[triton]' (Linux only)")
    if not any(only in call.name for call in CALLS):
        raise ReportFailed("\n  ".join([f"no call's name contains {only!r}; there are", *(c.name for c in CALLS)]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONSAFEPATH"] = "1"  # a checkout's kernels/, say, must not shadow an installed package
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # no debug information to write, assemble and read again
    command = [sys.executable, "-m", "hpo_fused.bench.machine_code.build", *targets, "--only", only]
    command += ["--every"] * every + (["--registers", str(registers)] if registers is not None else [])
    with tempfile.TemporaryDirectory() as folder:  # where Python < 3.11, which knows no PYTHONSAFEPATH, finds nothing
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ReportFailed(f"the compiling process ended with {done.returncode}")
    content = json.loads(done.stdout)
    kernels = [Kernel(**kernel) for kernel in content.pop("kernels")]
    return Report(kernels, [PublicCall(**call) for call in content.pop("public")], **content)


def _broken(kernel: Kernel) -> Iterator[str]:
    loops, amd = kernel.loops, kernel.target.startswith("gfx")
    beside = not amd and kernel.spills <= SPILLED_BYTES and not any(loop["spills"] for loop in loops)
    if kernel.spills and not beside:
        yield f"spills {kernel.spills} {'registers' if amd else 'bytes'}"
    if kernel.sweeps and not loops:
        yield "no main loop found"
    for loop in loops:
        accesses = {"loads": loop["load_bytes"]}
        if loop["role"] == "gradient" and not kernel.unaligned:
            accesses["stores"] = loop["store_bytes"]
        for kind, size in accesses.items():
            if size < ACCESS_BYTES:
                yield f"{loop['role']} {kind} {size} bytes at a time, not {ACCESS_BYTES}"
        if not kernel.softcap and loop["special"] > SPECIAL_LIMIT:
            yield f"{loop['special']:.3g} special functions per element of {loop['role']}, limit {SPECIAL_LIMIT}"
    # AMD moves narrow stores' elements between lanes one by one, and its count includes the scalar unit's instructions,
    # which cost no vector slots.
    scattered = kernel.unaligned and amd
    if len(loops) > 1 and not kernel.softcap and not scattered:
        total = sum(loop["instructions"] for loop in loops)
        limit = INSTRUCTION_LIMIT_AMD if amd else INSTRUCTION_LIMIT_ENTROPY if kernel.entropy else INSTRUCTION_LIMIT
        if total > limit:
            yield f"{total:.3g} instructions per element, limit {limit:g}"


def broken_limits(kernels: Iterable[Kernel]) -> list[str]:
    """A line for each limit that a kernel breaks.

    Nothing spills, but for ``SPILLED_BYTES`` outside main loops; main loops access memory 16 bytes at a time, stores
    too where the output is aligned as the input is; no more special-function operations than the formulas need and no
    more instructions than the goal. The kernels of a call have the main loops that it needs.
    """
    kernels = list(kernels)
    lines = [
        f"{kernel.target} {kernel.kernel}, {kernel.calls[0]}: {line}" for kernel in kernels for line in _broken(kernel)
    ]
    roles: dict[tuple[str, str], set[str]] = {}
    for kernel in kernels:
        for call in kernel.calls:
            roles.setdefault((kernel.target, call), set()).update(loop["role"] for loop in kernel.loops)
    needed = {call.name: call.roles for call in CALLS}
    for (target, call), found in roles.items():
        if missing := needed[call] - found:
            lines.append(f"{target} {call}: no main loop found for {' and '.join(sorted(missing))}")
    return lines


def kernel_table(kernels: Sequence[dict[str, Any]]) -> Table | None:
    """Registers, accesses and instructions of each kernel (as a dict); None where there is none."""
    if not kernels:
        return None
    headings = ("kernel", "first call", "target", "regs", "spill", "smem", "ld/st", "statistics", "gradient")
    view = Table("Machine code", headings, left=3)
    for kernel in sorted(kernels, key=lambda one: (one["kernel"], one["calls"][0])):  # stable: targets stay in order
        loops = {loop["role"]: loop for loop in kernel["loops"]}
        cells = []
        for role in ("statistics", "gradient"):
            loop = loops.get(role)
            cells.append(f"{number(loop['instructions'])} ({number(loop['special'])})" if loop is not None else NOTHING)
        view.add(
            kernel["kernel"], kernel["calls"][0], kernel["target"], str(kernel["registers"]), str(kernel["spills"]),
            str(kernel["shared_bytes"]), f"{kernel['widest_load']}/{kernel['widest_store']}", *cells,
        )  # fmt: skip
    gpus = ", ".join(f"{TARGETS[name].gpu} ({name})" for name in dict.fromkeys(one["target"] for one in kernels))
    view.notes = [
        "regs: registers of a thread; spill: bytes (NVIDIA) or registers (AMD) that did not fit into them; smem: bytes "
        "of shared memory of a program; ld/st: bytes of a thread's widest load and store.",
        "statistics, gradient: instructions per element of that main loop, special functions among them in brackets. "
        f"Launch settings of {gpus}.",
    ]
    return view


def call_table(public: Sequence[PublicCall]) -> Table:
    """Kernels that each operation launches, with their leaves, and how many of the calls launch these."""
    view = Table("Launches of a forward and backward call", ("operation", "kernels", "leaves", "calls"), left=2)
    groups: dict[tuple[str, tuple[str, ...]], list[PublicCall]] = {}
    for call in public:
        groups.setdefault((call.operation, tuple(call.launches)), []).append(call)
    for (operation, names), calls in sorted(groups.items()):
        for index, name in enumerate(names):
            leaves = {call.leaves[index] for call in calls}
            shown = f"{min(leaves)}–{max(leaves)}" if len(leaves) > 1 else str(min(leaves))
            view.add(operation, name.removesuffix("_kernel"), shown, "" if index else str(len(calls)))
    view.notes = ["leaves: a launch's arguments, tuples flattened, constants included."]
    return view
