"""Reading a kernel's machine code, as NVIDIA's and AMD's tools print it: accesses, instruction mix, main loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .instruction_classes import AMD_CLASSES, NVIDIA_CLASSES, instruction_class, is_amd


@dataclass(frozen=True)
class Loop:
    """An innermost loop that loads logits.

    Attributes:
        role: "statistics" (the sweep that only loads) or "gradient" (the one that stores).
        elements: what a thread does in an iteration.
        instructions: per element.
        counts: the same by class (``instruction_classes``).
        load_bytes, store_bytes: the narrowest access of each sort.
    """

    role: str
    elements: int
    instructions: float
    counts: dict[str, float]
    load_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    text: str
    jump: int | None  # address of a branch's destination


LOADS = re.compile(r"\bLDG\.E\S*|\bglobal_load_\w+|\bbuffer_load_\w+")
STORES = re.compile(r"\bSTG\.E\S*|\bglobal_store_\w+|\bbuffer_store_\w+")
WIDTHS = {
    "256": 32, "128": 16, "x4": 16, "x3": 12, "64": 8, "x2": 8, "16": 2, "short": 2, "8": 1, "byte": 1,
}  # fmt: skip
VECTOR = 16  # bytes of the accesses that main loops are made of


def width(instruction: Instruction, accesses: re.Pattern[str]) -> int:
    """Bytes per thread of a global access; 0 for any other instruction."""
    match = accesses.search(instruction.text)
    if not match:
        return 0
    access = match.group()
    return next((w for mark, w in WIDTHS.items() if re.search(rf"(\.[US]?|_[a-z0-9]*){mark}\b", access)), 4)


def is_mufu(instruction: Instruction) -> bool:
    """Whether a special-function unit runs it."""
    return instruction_class(instruction.text) == "mufu"


def read_cubin(asm: Any, tools: Path) -> tuple[list[Instruction], int, int]:
    """Instructions, registers of a thread, and bytes it spills, of code for NVIDIA; ``tools`` holds cuobjdump."""
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


def read_amdgcn(asm: Any) -> tuple[list[Instruction], int, int]:
    """Instructions, vector registers of a lane, and registers spilled, of code for AMD."""
    text = asm["amdgcn"]
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.partition(".Lfunc_end")[0].splitlines():
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(lines)
        elif re.match(r"(s|v|global|ds|buffer|flat|scratch)_", line):
            lines.append(line)
    code = []
    for address, line in enumerate(lines):
        jump = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        code.append(Instruction(address, line, labels.get(jump.group(1)) if jump else None))
    count = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    spills = count["vgpr_spill_count"] + count["sgpr_spill_count"]
    return code, count["vgpr_count"], spills


def main_loops(code: list[Instruction], vec: int, partial_sums: bool = False) -> list[Loop]:
    """One innermost loop around 16-byte loads for each role, in the code's order.

    Where the compiler unrolled a loop and left another for the remainder, the one of most elements.

    Args:
        code: of a kernel.
        vec: elements in 16 bytes.
        partial_sums: what a loop stores are sums, not a gradient.
    """
    found = list(_loops(code, vec, partial_sums))
    longest = {loop.role: loop for loop in sorted(found, key=lambda loop: loop.elements)}
    return [loop for loop in found if loop is longest[loop.role]]


def _loops(code: list[Instruction], vec: int, partial_sums: bool) -> Iterator[Loop]:
    """All of them; a block that a forward branch skips and that loads nothing is not counted.

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
            and not any(is_mufu(j) or width(j, LOADS) for j in body if i.address < j.address < i.jump)
        ]  # fmt: skip
        steady = [i for i in body if not any(low < i.address < high for low, high in skipped)]
        loads = [size for i in steady if (size := width(i, LOADS))]
        stores = [size for i in steady if (size := width(i, STORES))]
        elements = sum(size // VECTOR for size in loads) * vec
        if not elements:
            continue
        found = Counter(instruction_class(i.text) for i in steady)
        classes = AMD_CLASSES if is_amd(steady[0].text) else NVIDIA_CLASSES
        yield Loop(
            role="gradient" if stores and not partial_sums else "statistics", elements=elements,
            instructions=round(len(steady) / elements, 3),
            counts={name: round(found[name] / elements, 3) for name in classes},
            load_bytes=min(loads), store_bytes=0 if partial_sums else min(stores, default=0),
        )  # fmt: skip
