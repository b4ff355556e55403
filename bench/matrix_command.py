"""``hpo-fused-bench speed``, ``accuracy`` and ``memory``: operations by objectives, dtypes, shapes and so on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from hpo_fused.objective import Objective

from .arguments import check_writable, device_of, one_of
from .cases import CUSTOM, DEFAULT_SHAPES, DTYPES, MODES, Mode
from .display import Display
from .evidence import Evidence
from .linear.cases import CUSTOM as CUSTOM_HEAD
from .linear.cases import DEFAULT_HEAD
from .linear.memory import default_tokens
from .matrix import OPERATIONS, Axes, Contestants, Operation, measure, measure_peaks, new_evidence
from .show import finish
from .trial import Settings

Ops = Annotated[
    list[str],
    typer.Option("--op", help=f"Of {', '.join(OPERATIONS)}; repeatable. logprobs: token log-probabilities alone."),
]
Shapes = Annotated[
    list[str],
    typer.Option(
        help=f"Named shape (see `shapes`), {CUSTOM} or, of the linear path, {CUSTOM_HEAD}; repeatable. Default: "
        f"{', '.join(DEFAULT_SHAPES)}; linear: {DEFAULT_HEAD['cuda']} on a GPU, {DEFAULT_HEAD['cpu']} on a CPU."
    ),
]
Dtypes = Annotated[list[str], typer.Option(help=f"Of {', '.join(DTYPES)}; repeatable.")]
Objectives = Annotated[list[str], typer.Option(help="A preset of hpo_fused.Objective; repeatable.")]
Inactive = Annotated[
    list[float], typer.Option(min=0.0, max=1.0, help="Share of responses with zero advantage; repeatable.")
]
Modes = Annotated[
    list[str], typer.Option(help=f"Of {', '.join(MODES)}; repeatable. gradient: backward alone, forward not timed.")
]
Providers = Annotated[list[str], typer.Option(help="See `providers`, or module:Class; repeatable.")]
DeviceName = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto is a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of the random inputs.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small: about a minute on two CPU cores.")]
Output = Annotated[Path | None, typer.Option(help="Write every sample to this JSON file; none is written by default.")]
Ragged = Annotated[bool, typer.Option("--ragged", help="Responses of different lengths, padded; logits only.")]
BOTH = ["both"]


@dataclass(frozen=True)
class _Run:
    """A checked command line."""

    axes: Axes
    who: Contestants
    settings: Settings
    output: Path | None
    check: bool = False

    @classmethod
    def of(
        cls, axes: Axes, providers: Sequence[str], settings: Settings, output: Path | None, *, inplace: bool = False,
        every: bool = False, check: bool = False,
    ) -> _Run:  # fmt: skip
        for dtype in axes.dtypes:
            one_of("dtype", dtype, DTYPES)
        for objective in axes.objectives:
            one_of("objective", objective, Objective.presets())
        for mode in axes.modes:
            one_of("mode", mode, MODES)
        for operation in axes.operations:
            one_of("op", operation, OPERATIONS)
        try:
            axes = replace(axes, operations=Axes.operations_for(axes.shapes, axes.operations))
            names, kind = tuple(dict.fromkeys(providers)), settings.device.type
            who = Contestants.of(names, axes.operations, kind, inplace=inplace, every=every)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if axes.ragged and "linear" in axes.operations:
            raise typer.BadParameter("--ragged is for logits and log-probabilities, not for --op linear")
        if settings.cuda_graph and settings.device.type != "cuda":
            raise typer.BadParameter(f"--cuda-graph needs a GPU, this is {settings.device}")
        if settings.cuda_graph and "gradient" in axes.modes:
            raise typer.BadParameter("--cuda-graph captures a forward with its backward: not for --mode gradient")
        check_writable(output)
        return cls(axes, who, settings, output, check)

    @property
    def count(self) -> int:
        """How many cases the progress bar is for."""
        return len(self.axes.cases()) + len(self.axes.heads(self.settings.device))

    def finish(self, evidence: Evidence) -> None:
        """Write, show and end."""
        result = evidence.simplest()
        if self.output is not None and evidence.parts:
            result.write(self.output)
        finish(result, self.output if evidence.parts else None, check=self.check)


def _axes(
    op: Sequence[str], shape: Sequence[str], tokens: int, dtype: Sequence[str], objective: Sequence[str],
    inactive: Sequence[float], mode: Sequence[str], ragged: bool,
) -> Axes:  # fmt: skip
    def unique(values: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(values))

    operations, modes = cast(list[Operation], unique(op)), cast(list[Mode], unique(mode))
    shares = list(dict.fromkeys(inactive))
    return Axes(operations, unique(shape), tokens, unique(dtype), unique(objective), shares, modes, ragged)


def speed(
    op: Ops = ["logits"],  # noqa: B006
    shape: Shapes = [],  # noqa: B006
    tokens: Annotated[int | None, typer.Option(min=1, help="Rows (8192 on a GPU, 1024 on a CPU).")] = None,
    dtype: Dtypes = ["bf16"],  # noqa: B006
    objective: Objectives = ["mhpo_ahpo"],  # noqa: B006
    inactive: Inactive = [0.0],  # noqa: B006
    mode: Modes = BOTH,
    ragged: Ragged = False,
    inplace: Annotated[
        bool, typer.Option("--inplace", help="Who can writes the gradient over the logits; the others do not.")
    ] = False,
    provider: Providers = [],  # noqa: B006
    device: DeviceName = "auto",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds at most (100 on a GPU, 20 on a CPU).")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds of timing per case (30), though three rounds at least.")
    ] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Time the replay of a CUDA graph: no host work in it.")
    ] = False,
    quick: Quick = False,
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Time against eager PyTorch, torch.compile, other projects, and a bare copy of the logits or bare GEMMs.

    Every combination of the options is a case. Every provider is first held against a float64 oracle; one that differs
    is reported and not timed. Then all run once per round, in rotating order. A second table tells how exact each is,
    and whether it repeats itself. The exit status is 1 if a provider was wrong or failed, or if hpo_fused misses a
    limit of its own.
    """
    where = device_of(device)
    on_gpu = where.type == "cuda"
    tokens = tokens or ((2048 if on_gpu else 256) if quick else (8192 if on_gpu else 1024))
    repeats = repeats or (10 if quick else 100 if on_gpu else 20)
    budget = budget if budget is not None else (10.0 if quick else 30.0)
    axes = _axes(op, shape, tokens, dtype, objective, inactive, mode, ragged)
    timing = Settings(where, repeats, budget, seed, cuda_graph=cuda_graph)
    run = _Run.of(axes, provider, timing, output, inplace=inplace)
    result = new_evidence(
        "speed", where, tokens=tokens, repeats=repeats, budget=budget, seed=seed, inplace=inplace, quick=quick,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    _measure(run, result)


def accuracy(
    op: Ops = ["logits"],  # noqa: B006
    shape: Shapes = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="Rows.")] = 256,
    dtype: Dtypes = ["bf16", "fp32"],  # noqa: B006
    objective: Objectives = ["mhpo_ahpo"],  # noqa: B006
    inactive: Inactive = [0.0],  # noqa: B006
    mode: Modes = BOTH,
    ragged: Ragged = False,
    provider: Annotated[list[str], typer.Option(help="As for `speed`; repeatable. Default: all.")] = [],  # noqa: B006
    device: DeviceName = "auto",
    seed: Seed = 0,
    output: Output = None,
) -> None:
    """Hold every provider against float64: loss, log-probabilities, the sampled token's gradient and all others'.

    Nothing is timed. The exit status is 1 if a provider was wrong or failed, or if hpo_fused misses a limit of its own.
    """
    where = device_of(device)
    axes = _axes(op, shape, tokens, dtype, objective, inactive, mode, ragged)
    run = _Run.of(axes, provider, Settings(where, 0, 0.0, seed), output, every=True)
    _measure(run, new_evidence("accuracy", where, tokens=tokens, seed=seed))


def _measure(run: _Run, result: Evidence) -> None:
    """All of it, however far it comes."""
    try:
        with Display(Console(stderr=True), run.count) as display:
            measure(run.axes, run.who, run.settings, result, display)
    except KeyboardInterrupt:
        result.interrupt()
    run.finish(result)


def memory(
    op: Ops = ["logits", "linear"],  # noqa: B006
    shape: Shapes = [],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(min=1, help="Rows at which memory is measured; repeatable.")] = [],  # noqa: B006
    dtype: Dtypes = ["bf16"],  # noqa: B006
    objective: Objectives = ["mhpo_ahpo"],  # noqa: B006
    inactive: Inactive = [0.0],  # noqa: B006
    mode: Modes = BOTH,
    inplace: Annotated[
        bool, typer.Option("--inplace", help="Who can writes the gradient over the logits; the others do not.")
    ] = False,
    provider: Providers = [],  # noqa: B006
    chunk_mib: Annotated[
        float | None, typer.Option(min=0.0, help="Linear path: memory for a chunk's logits, MiB (chunk_bytes).")
    ] = None,
    device: DeviceName = "auto",
    quick: Quick = False,
    seed: Seed = 0,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a limit is missed, too.")] = False,
    output: Output = None,
) -> None:
    """Peak memory against the number of tokens.

    Every provider is held against a float64 oracle at the smallest of them; one that differs is not measured, and the
    exit status is 1.

    Of the linear path also beside what `hpo_fused.linear_memory` predicts, with a fixed chunk budget, and for the head
    of a 7B model with 16384 tokens: predicted, and measured as far as this machine can.
    """
    where = device_of(device)
    sizes = sorted(set(tokens or default_tokens(where.type, quick)))
    axes = _axes(op, shape, max(sizes), dtype, objective, inactive, mode, ragged=False)
    run = _Run.of(axes, provider, Settings(where, 0, 0.0, seed), output, inplace=inplace, check=check)
    chunk_bytes = None if chunk_mib is None else int(chunk_mib * (1 << 20))
    for head in run.axes.heads(where):
        if chunk_bytes is not None and chunk_bytes < head.shape.vocabulary * head.torch_dtype.itemsize:
            raise typer.BadParameter(f"--chunk-mib {chunk_mib:g} is less than one row of logits")
    result = new_evidence("memory", where, memory_tokens=sizes, seed=seed, quick=quick, inplace=inplace)
    try:
        with Display(Console(stderr=True), run.count) as display:
            measure_peaks(run.axes, run.who, run.settings, sizes, result, display, chunk_bytes=chunk_bytes, quick=quick)
    except KeyboardInterrupt:
        result.interrupt()
    run.finish(result)
