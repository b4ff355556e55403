"""``hpo-fused-bench counters``: the traffic model's bytes beside those that the hardware counted."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import counters as counting
from .arguments import one_of
from .cases import CUSTOM, DTYPES, parse_shape


def _missing(tool: str) -> str:
    """Why nothing can be counted here; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "it counts for the Triton kernels, and Triton is not installed: pip install 'hpo-fused[triton]' (Linux)"
    if not torch.cuda.is_available():
        return "hardware counters are a GPU's, and PyTorch sees none here"
    if shutil.which(tool) is None:
        return f"{tool} is not on the PATH; it comes with the CUDA toolkit (ncu) or with ROCm (rocprofv3)"
    return ""


def counters(
    shape: Annotated[
        str, typer.Option(help=f"Named shape (see `shapes`) or {CUSTOM}; its softcap is left out.")
    ] = "qwen3",
    dtype: Annotated[str, typer.Option(help="Of the logits: bf16 or fp32.")] = "bf16",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of logits.")] = 2048,
) -> None:
    """Count the device memory's bytes and the L2's hits of one fused step, with ncu or rocprofv3, beside the model's.

    Reading counters may need a permission (NVIDIA: ERR_NVGPUCTRPERM). On MI300 and later what is counted is the traffic
    between L2 and the memory-side cache, which serves the second sweep: expect two reads. Exit status 2: no GPU, or no
    profiler; 1: the profiler failed.
    """
    one_of("dtype", dtype, [name for name in DTYPES if name != "fp16"])
    try:
        chosen = parse_shape(shape)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    vendor = "amd" if torch.version.hip else "nvidia"
    tool = counting.TOOLS[vendor]
    if reason := _missing(tool):
        typer.echo(f"hpo-fused-bench counters: {reason}", err=True)
        raise typer.Exit(2)
    from hpo_fused.kernels import launch

    V, itemsize = chosen.vocabulary, DTYPES[dtype].itemsize
    device = torch.cuda.current_device()
    machine = launch.machine(device)
    rows = launch.of_device(device, itemsize, V).rows_in_flight
    model = counting.predicted(V, itemsize, tokens, min(rows, tokens), machine.cache_bytes)
    try:
        found = counting.count(vendor, shutil.which(tool) or tool, counting.step_command(V, dtype, tokens))
    except counting.CountersFailed as error:
        typer.echo(f"hpo-fused-bench counters: {error}", err=True)
        raise typer.Exit(1) from None
    logits = tokens * V * itemsize
    view = Table("", "read MB", "÷ logits", "written MB", "÷ logits", "L2 hit rate", box=None, pad_edge=False)
    for name, one in (("model", model), ("counted", found)):
        view.add_row(
            name, f"{one.read / 1e6:.1f}", f"{one.read / logits:.3f}", f"{one.written / 1e6:.1f}",
            f"{one.written / logits:.3f}", f"{one.hit:.1%}",
        )  # fmt: skip
    out = Console(highlight=False)
    name = torch.cuda.get_device_name(device)
    out.print(
        f"{name} ({machine.architecture}), {chosen.name}: {tokens} × {V} {dtype}, {rows} rows in flight", style="dim"
    )
    out.print(view)
