"""Options of ``hpo-fused-bench`` that several commands share, and what is made of their values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import torch
import typer

from . import providers as known
from .cases import CUSTOM, DEFAULT_SHAPES, DTYPES, MODES, OPERATIONS, Case, Operation, cases_of, parse_shape
from .providers import Provider

Names = list[str] | None


def repeated(name: str, text: str) -> Any:
    """An option that may be given several times."""
    return typer.Option(f"--{name}", help=f"{text}; repeatable.")


def option(name: str, text: str) -> Any:
    """An option that may be given once."""
    return typer.Option(f"--{name}", help=text)


DeviceName = Annotated[str, option("device", "cpu, cuda or cuda:N; auto is a GPU if there is one.")]
Quick = Annotated[bool, option("quick", "Few rows and rounds: about a minute on two CPU cores.")]
Seed = Annotated[int, option("seed", "Of the random inputs.")]
Output = Annotated[Path | None, option("output", "Write the result to this JSON file.")]


@dataclass
class CaseOptions:
    """Options of every command that measures cases; a command's parameter of this type is replaced by them."""

    op: Annotated[Names, repeated("op", f"Of {', '.join(OPERATIONS)} (the losses of logits or hidden states)")] = None
    shape: Annotated[Names, repeated("shape", f"Named shape (see `shapes`) or {CUSTOM} (two, by device)")] = None
    tokens: Annotated[list[int] | None, repeated("tokens", "Rows (by operation and device)")] = None
    dtype: Annotated[Names, repeated("dtype", f"Of {', '.join(DTYPES)} (bf16; accuracy: and fp32)")] = None
    objective: Annotated[Names, repeated("objective", "A preset of hpo_fused.Objective (mhpo_ahpo)")] = None
    inactive: Annotated[list[float] | None, repeated("inactive", "Share of responses with zero advantage (0)")] = None
    loss_scale: Annotated[list[float] | None, repeated("loss-scale", "What the loss is multiplied by (1)")] = None
    mode: Annotated[Names, repeated("mode", f"Of {', '.join(MODES)} (both); backward: its forward is not timed")] = None
    ragged: Annotated[bool, option("ragged", "Responses of different lengths, padded and masked.")] = False
    inplace: Annotated[bool, option("inplace", "Write the gradient over the logits, where the provider can.")] = False
    chunk_mib: Annotated[float | None, option("chunk-mib", "Linear operations: memory for a chunk's logits.")] = None
    provider: Annotated[Names, repeated("provider", "See `providers`, or module:Class (all that run unasked)")] = None

    def cases(
        self, device: torch.device, tokens: Callable[[Operation], Sequence[int]], *,
        op: Sequence[str] = ("policy_loss",), dtype: Sequence[str] = ("bf16",), cuda_graph: bool = False,
    ) -> list[Case]:  # fmt: skip
        """Every combination; BadParameter for values that there are not. The arguments stand in for missing options."""
        axes: dict[str, Sequence[Any]] = {
            "dtype": self.dtype or dtype, "objective": self.objective or ["mhpo_ahpo"],
            "inactive": self.inactive or [0.0], "mode": self.mode or ["both"], "loss_scale": self.loss_scale or [1.0],
        }  # fmt: skip
        if cuda_graph and (device.type != "cuda" or "backward" in axes["mode"]):
            raise typer.BadParameter("--cuda-graph: expected a GPU, and mode forward or both: the forward is captured")
        fields = {name: getattr(self, name) for name in ("ragged", "inplace", "chunk_mib")}
        with refusing():
            shapes = [parse_shape(name) for name in self.shape or DEFAULT_SHAPES[device.type]]
            rows = {one: self.tokens or tokens(one) for one in cast(Sequence[Operation], self.op or op)}
            return cases_of(rows, shapes, axes, cuda_graph=cuda_graph, **fields)

    def providers(self, device: torch.device) -> list[Provider]:
        """Providers by name; none named: the device's defaults."""
        with refusing():
            return [known.create(name) for name in dict.fromkeys(self.provider or known.defaults(device))]


def takes_cases(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its parameter ``options`` replaced by one for each field of :class:`CaseOptions`."""
    hints = get_type_hints(CaseOptions, include_extras=True)

    @functools.wraps(command)
    def replaced(**values: Any) -> None:
        command(CaseOptions(**{name: values.pop(name) for name in hints}), **values)

    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(CaseOptions, name), annotation=hint)
        for name, hint in hints.items()
    ]
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    parameters = [*fields, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
    replaced.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    replaced.__annotations__ = {one.name: one.annotation for one in parameters}
    return replaced


def device_of(name: str) -> torch.device:
    """The device of that name, made the current one; auto is a GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (index or "0").isdecimal() or int(index or 0) >= count):
        raise typer.BadParameter(f"--device: expected cpu or one of {count} GPUs (cuda, cuda:N), got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(index or 0))
    return torch.device("cuda", int(index or 0))


@contextmanager
def refusing() -> Iterator[None]:
    """Turns errors about values and files into those of the command line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def check_writable(output: Path | None) -> None:
    """Refuse a file that cannot be written now, not after minutes of work."""
    if output is not None:
        with refusing():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.open("a", encoding="utf-8").close()


def default_tokens(operation: Operation, device: torch.device, quick: bool) -> int:
    """Rows where none were asked for: on a CPU few enough that a round of everything takes seconds."""
    if operation == "logprob_policy_loss":
        return 65536
    full = 8192 if device.type == "cuda" else 256 if operation.startswith("linear_") else 1024
    return full // 4 if quick else full


def launch_of(text: str) -> tuple[int, int, int]:
    """THREADS,LOADS,ROWS as numbers."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--launch: expected THREADS,LOADS,ROWS, positive integers, got {text!r}")
    threads, loads, rows = map(int, parts)
    return threads, loads, rows
