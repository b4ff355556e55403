"""Entry point of ``hpo-fused-bench``; the commands are in :mod:`hpo_fused.bench.commands`."""

from __future__ import annotations

import os
import sys


def main() -> int | None:
    """Run the command line. Returns 2 where typer or rich is missing: they belong to the extra ``bench``."""
    # PyTorch's memory profiler warns on stderr, between the lines of progress, about every release of older memory.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"rich", "typer"}:
            raise
        print(f"hpo-fused-bench needs {missing}: pip install 'hpo-fused[bench]'", file=sys.stderr)
        return 2
    app(prog_name="hpo-fused-bench")
    return None
