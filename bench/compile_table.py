"""The compile report for people: a table that fits 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

NAME_WIDTH = 24
SWEEPS = {"statistics": "stats", "gradient": "grad"}


def _broken_at_slashes(name: str) -> str:
    """``name`` on lines of at most ``NAME_WIDTH`` characters, as far as its parts allow."""
    lines = [""]
    for part in name.replace("/", "/\n").split("\n"):
        if len(lines[-1] + part) > NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _cells(record: dict[str, Any]) -> list[str]:
    """A record's cells, from the target on."""
    cells = [record["target"], str(record["registers"]), str(record["spills"])]
    for role in SWEEPS:
        found = [loop for loop in record["loops"] if loop["role"] == role]
        if not found:
            cells += ["–", "–", "–"]
            continue
        loop = found[0]
        accesses = str(loop["load_bytes"]) + (f"/{loop['store_bytes']}" if loop["store_bytes"] else "")
        cells += [f"{loop['instructions']:.1f}", f"{loop['mufu']:.2f}", accesses]
    return cells


def table(records: Iterable[dict[str, Any]]) -> Table:
    """A section for each kernel and variant, in it a line for each target."""
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    view.add_column("kernel/variant", no_wrap=True, vertical="top")
    view.add_column("target", no_wrap=True)
    sweeps = [f"{sweep}\n{what}" for sweep in SWEEPS.values() for what in ("instr", "MUFU", "bytes")]
    for heading in ("regs", "spills", *sweeps):
        view.add_column(heading, justify="right", no_wrap=True)
    ordered = sorted(records, key=lambda record: (record["kernel"], record["variant"]))  # stable: targets stay
    for (kernel, variant), group in groupby(ordered, key=lambda record: (record["kernel"], record["variant"])):
        columns = zip(*(_cells(record) for record in group), strict=True)
        view.add_row(
            _broken_at_slashes(f"{kernel}/{variant}"), *("\n".join(column) for column in columns), end_section=True
        )
    return view


def notes() -> Iterable[str]:
    """What the columns mean."""
    yield "regs: registers of a thread; spills: bytes (NVIDIA) or registers (AMD) that did not fit into them."
    yield (
        "stats, grad: main loops of the two sweeps over a row; instructions and special-function operations (MUFU) "
        "per element, bytes of a thread's narrowest load/store."
    )
