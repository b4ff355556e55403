"""Reading a kernel's machine code, as NVIDIA's and AMD's tools print it: accesses, special functions, main loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOADS = re.compile(r"\bLDG\.E\S*|\bglobal_load_\w+|\bbuffer_load_\w+")
STORES = re.compile(r"\bSTG\.E\S*|\bglobal_store_\w+|\bbuffer_store_\w+")
WIDTHS = {"256": 32, "128": 16, "x4": 16, "x3": 12, "64": 8, "x2": 8, "16": 2, "short": 2, "8": 1, "byte": 1}
VECTOR = 16  # bytes of the accesses that main loops are made of
SPILL = re.compile(r"\b(?:STL|LDL)\b")  # local memory, which nothing but spills uses here (NVIDIA)
# The special-function unit's: a quarter or an eighth of the rate of an addition.
SPECIAL = re.compile(
    r"^(?:@!?U?P\w+\s+)?MUFU\b|^v_(?:exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)(?:_legacy)?_(?:f16|f32|f64|bf16)"
)


@dataclass(frozen=True)
class Loop:
    """An innermost loop that loads logits.

    Attributes:
        role: "statistics" (the sweep that only loads) or "gradient" (the one that stores).
        elements: of a thread in an iteration.
        instructions, special: per element, special-function operations among them.
        load_bytes, store_bytes: the narrowest access of each sort.
        spills: accesses to spilled registers (NVIDIA).
    """

    role: str
    elements: int
    instructions: float
    special: float
    load_bytes: int
    store_bytes: int
    spills: int


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; ``jump`` is the address of a branch's destination."""

    address: int
    text: str
    jump: int | None


def width(instruction: Instruction, accesses: re.Pattern[str]) -> int:
    """Bytes per thread of a global access; 0 for any other instruction."""
    match = accesses.search(instruction.text)
    if not match:
        return 0
    access = match.group()
    return next((w for mark, w in WIDTHS.items() if re.search(rf"(\.[US]?|_[a-z0-9]*){mark}\b", access)), 4)


def read_cubin(asm: Any, tools: Path) -> tuple[list[Instruction], int, int]:
    """Instructions, registers of a thread, and bytes it spills, of code for NVIDIA; ``tools`` holds cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "-sass", "-res-usage", file.name]
        return parse_sass(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_sass(text: str) -> tuple[list[Instruction], int, int]:
    """Instructions, registers of a thread, and bytes it spills, from cuobjdump's output."""
    code = []
    for address, body in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE):
        jump = re.search(r"\bBRA(?:\.\S+)?\s.*?\b0x([0-9a-f]+)(?:\s|$)", body)
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
    return code, count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]


def main_loops(code: list[Instruction], vec: int) -> list[Loop]:
    """One innermost loop around 16-byte loads for each role, in the code's order; ``vec`` elements are 16 bytes.

    Where the compiler unrolled a loop and left another for the remainder, the one of most elements.
    """
    found = list(_loops(code, vec))
    longest = {loop.role: loop for loop in sorted(found, key=lambda loop: loop.elements)}
    return [loop for loop in found if loop is longest[loop.role]]


def _loops(code: list[Instruction], vec: int) -> Iterator[Loop]:
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
            and not any(SPECIAL.match(j.text) or width(j, LOADS) for j in body if i.address < j.address < i.jump)
        ]  # fmt: skip
        steady = [i for i in body if not any(low < i.address < high for low, high in skipped)]
        loads = [size for i in steady if (size := width(i, LOADS))]
        stores = [size for i in steady if (size := width(i, STORES))]
        if not (elements := sum(size // VECTOR for size in loads) * vec):
            continue
        special = sum(bool(SPECIAL.match(i.text)) for i in steady)
        yield Loop(
            "gradient" if stores else "statistics", elements, round(len(steady) / elements, 3),
            round(special / elements, 3), min(loads), min(stores, default=0),
            sum(bool(SPILL.search(i.text)) for i in steady),
        )  # fmt: skip
