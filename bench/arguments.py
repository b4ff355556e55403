"""Arguments that several commands take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def device_of(name: str) -> torch.device:
    """The device of that name, made the current one; auto is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"unknown device {name!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"cannot time on {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise typer.BadParameter(f"PyTorch sees {count} GPUs, so there is no {name!r}")
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def one_of(kind: str, name: str, known: Iterable[str]) -> str:
    """``name``, if it is known."""
    names = list(known)
    if name not in names:
        raise typer.BadParameter(f"unknown {kind} {name!r}; expected one of {', '.join(names)}")
    return name


def check_writable(output: Path | None) -> None:
    """Refuse a file that cannot be written now, not after minutes of work."""
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a", encoding="utf-8").close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}") from None
