"""``hpo-fused-bench providers``: who can be measured on which operation, with what it does and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import providers as of_logits
from .arguments import device_of
from .linear import providers as of_heads
from .providers import Candidate, Provider, Unavailable


def groups(device_type: str) -> Iterator[tuple[str, list[Candidate], list[str]]]:
    """For each operation: its name, every provider that has it, and the names of those measured by default there."""
    logits: list[Provider] = [of_logits.create(name) for name in of_logits.PROVIDERS]
    yield "logits", [one for one in logits if "logits" in one.ops()], of_logits.DEFAULT
    yield "linear", [of_heads.create(name) for name in of_heads.PROVIDERS], of_heads.defaults(device_type)
    yield "logprobs", [one for one in logits if "logprobs" in one.ops()], of_logits.DEFAULT


def usable(provider: Candidate, device: torch.device) -> str:
    """What it would run with on the device, or why it does not run there."""
    try:
        return provider.available(device)
    except Unavailable as reason:
        return f"no: {reason}"


def table(candidates: Iterable[Candidate], default: Iterable[str], device: torch.device) -> Table:
    """Each with what it runs with here, what it does and what it leaves out; an asterisk for the defaults."""
    names = set(default)
    view = Table.grid("", "", padding=(0, 2, 0, 0))
    view.columns[0].no_wrap, view.columns[1].overflow = True, "fold"
    for one in candidates:
        star = " *" if one.name in names else ""
        without = [f"leaves out: {one.leaves_out}"] if one.leaves_out else []
        view.add_row(one.name + star, Text("\n".join([usable(one, device), one.summary, *without])))
    return view


def providers(device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is a GPU if there is one.")] = "auto",
              ) -> None:  # fmt: skip
    """List who can be measured: on logits, on the linear path, on log-probabilities; and whether it runs here.

    `--provider module:Class` takes classes outside this package, too: see docs/benchmark.md.
    """
    where, out = device_of(device), Console(highlight=False)
    for operation, candidates, default in groups(where.type):
        out.print(f"{operation} on {where}", style="bold")
        out.print(table(candidates, default, where))
        out.print()
    for name, reason in of_heads.SLOW_ON_CPU.items() if where.type == "cpu" else ():
        out.print(f"{name}: not by default on a CPU: {reason}.", style="dim")
    out.print("* measured by default; who does not run here is skipped with the reason.", style="dim")
