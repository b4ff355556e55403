"""The command ``linear`` of ``hpo-fused-bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from hpo_fused.bench.arguments import check_writable, device_of, one_of
from hpo_fused.bench.cases import DTYPES
from hpo_fused.bench.display import Display
from hpo_fused.bench.environment import environment
from hpo_fused.bench.show import finish
from hpo_fused.bench.trial import Settings
from hpo_fused.objective import Objective

from .cases import CUSTOM, DEFAULT_HEAD, LinearCase, parse_head
from .memory import default_tokens, measure_memory
from .providers import PROVIDERS, LinearProvider, create, defaults
from .results import LinearResult
from .run import run_linear

MIB = 1 << 20
DEFAULT_INACTIVE = [0.0, 0.5, 0.75, 0.9]

Shape = Annotated[
    str | None, typer.Option(help=f"Named head (see `shapes`) or {CUSTOM}; {DEFAULT_HEAD['cuda']} on a GPU, "
                                  f"{DEFAULT_HEAD['cpu']} on a CPU.")
]  # fmt: skip
Dtype = Annotated[str, typer.Option(help=f"Of hidden states and head: {', '.join(DTYPES)}.")]
ObjectiveName = Annotated[str, typer.Option(help="A preset of hpo_fused.Objective.")]
Providers = Annotated[list[str], typer.Option(help=f"Of {', '.join(PROVIDERS)}; repeatable. Default: see `providers`.")]
ChunkMib = Annotated[
    float | None, typer.Option(min=0.0, help="Memory for a chunk's logits, MiB (hpo_fused's chunk_bytes).")
]
Tokens = Annotated[
    list[int] | None, typer.Option(min=1, help="Rows at which memory is measured; repeatable.")
]  # fmt: skip
DeviceName = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is a GPU if there is one.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small: about a minute on two CPU cores.")]
Seed = Annotated[int, typer.Option(help="Of the random inputs.")]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 if a limit is missed, too.")]
Output = Annotated[Path | None, typer.Option(help="Write every sample to this JSON file; none is written by default.")]


@dataclass(frozen=True)
class _Run:
    """A checked command line."""

    command: str
    case: LinearCase
    providers: list[LinearProvider]
    device: torch.device
    seed: int
    quick: bool
    check: bool
    output: Path | None

    @classmethod
    def of(
        cls, command: str, shape: str | None, tokens: int, dtype: str, objective: str, chunk_mib: float | None,
        provider: Sequence[str], device: torch.device, seed: int, quick: bool, check: bool, output: Path | None,
    ) -> _Run:  # fmt: skip
        one_of("dtype", dtype, DTYPES)
        one_of("objective", objective, Objective.presets())
        try:
            head = parse_head(shape or DEFAULT_HEAD[device.type])
            providers = [create(name) for name in dict.fromkeys(provider or defaults(device.type))]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        chunk_bytes = None if chunk_mib is None else int(chunk_mib * MIB)
        case = LinearCase.of_tokens(head, tokens, dtype, objective, 0.0, chunk_bytes)
        if chunk_bytes is not None and chunk_bytes < head.vocabulary * case.torch_dtype.itemsize:
            raise typer.BadParameter(f"--chunk-mib {chunk_mib:g} is less than one row of logits")
        check_writable(output)
        return cls(command, case, providers, device, seed, quick, check, output)

    def result(self, **settings: object) -> LinearResult:
        case = self.case
        common = {
            "tokens": case.tokens, "dtype": case.dtype, "objective": case.objective, "chunk_bytes": case.chunk_bytes,
            "seed": self.seed, "quick": self.quick,
        }  # fmt: skip
        return LinearResult(environment(self.device), {**common, **settings}, self.command)


def linear(
    shape: Shape = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Rows (8192 on a GPU, 1024 on a CPU).")] = None,
    dtype: Dtype = "bf16",
    objective: ObjectiveName = "mhpo_ahpo",
    inactive: Annotated[
        list[float], typer.Option(min=0.0, max=1.0, help="Share of responses with zero advantage; repeatable.")
    ] = DEFAULT_INACTIVE,
    provider: Providers = [],  # noqa: B006
    chunk_mib: ChunkMib = None,
    memory_tokens: Tokens = None,
    memory_: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure memory, too.")] = True,
    device: DeviceName = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds at most (50 on a GPU, 10 on a CPU).")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds of timing (120), though three rounds at least.")
    ] = None,
    quick: Quick = False,
    seed: Seed = 0,
    check: Check = False,
    output: Output = None,
) -> None:
    """The linear path: from hidden states and LM head to loss and both gradients, without logits.

    Times it against eager PyTorch, torch.compile, PyTorch's linear_cross_entropy and the three bare GEMMs that nobody
    can do without, at several shares of inactive rows; holds every result against float64 first; then measures peak
    memory (see `memory`). The last table tells which limits are met. The exit status is 1 if a provider was wrong or
    failed, or if hpo_fused misses a limit of its own.
    """
    where = device_of(device)
    on_gpu = where.type == "cuda"
    tokens = tokens or ((2048 if on_gpu else 256) if quick else (8192 if on_gpu else 1024))
    repeats = repeats or (5 if quick else 50 if on_gpu else 10)
    budget = budget if budget is not None else (10.0 if quick else 120.0)
    run = _Run.of(
        "linear", shape, tokens, dtype, objective, chunk_mib, provider, where, seed, quick, check, output
    )  # fmt: skip
    # Whole responses are inactive or not: shares that come to the same are one.
    fractions = sorted({run.case.at(share).inactive_share: share for share in sorted(set(inactive))}.values())
    sizes = sorted(set(memory_tokens or default_tokens(where.type, quick)))
    result = run.result(
        repeats=repeats, budget=budget, inactive=fractions, memory_tokens=sizes if memory_ else []
    )  # fmt: skip
    try:
        with Display(Console(stderr=True), 2 if memory_ else 1) as display:
            run_linear(run.case, fractions, run.providers, Settings(where, repeats, budget, seed), result.rows, display)
            if memory_:
                timing = Settings(where, repeats, budget, seed)
                measure_memory(result, run.case, sizes, run.providers, timing, display, 1.0, quick=quick)
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        if output is not None and (result.rows or result.memory):
            result.write(output)
    finish(result, output, check=check)
