"""The command ``curves``: pictures of every objective."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .curves_figures import FORMATS, write
from .curves_pages import PAGES


def curves(
    output: Annotated[Path, typer.Option(help="The folder that the pictures go to.")] = Path("curves"),
    family: Annotated[list[str], typer.Option(help=f"Of {', '.join(PAGES)}; repeatable.")] = list(PAGES),  # noqa: B006
    format: Annotated[str, typer.Option(help=f"{' or '.join(FORMATS)}.")] = "svg",
) -> None:
    """Draw every objective: surrogate and gradient multiplier against the importance ratio.

    One picture for each family of objectives and one that compares them. What is drawn are the closed forms that the
    losses use, so that a picture cannot disagree with the code.
    """
    for name in family:
        if name not in PAGES:
            raise typer.BadParameter(f"unknown family {name!r}; expected one of {', '.join(PAGES)}")
    if format not in FORMATS:
        raise typer.BadParameter(f"unknown format {format!r}; expected {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        typer.echo("hpo-fused-bench curves needs matplotlib: pip install 'hpo-fused[bench]'", err=True)
        raise typer.Exit(2) from None
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in dict.fromkeys(family):
            typer.echo(f"Wrote {write(PAGES[name](), output, format)}")
    except OSError as error:
        raise typer.BadParameter(f"cannot write into {output}: {error.strerror}") from None
