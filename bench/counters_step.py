"""What ``hpo-fused-bench counters`` runs under a profiler: the fused kernel, twice, on random logits."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch


def main(arguments: Iterable[str] | None = None) -> None:
    """Launch it on the current GPU, or under the interpreter where it is asked for."""
    from hpo_fused.kernels.tuning import Launches

    from .cases import DTYPES
    from .tune import Job, runner

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--tokens", type=int, required=True)
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launches = Launches(DTYPES[chosen.dtype].itemsize, chosen.vocabulary, True, False)
    run = runner(Job(launches, "counters", chosen.dtype, None), chosen.tokens, device)
    for _ in range(2):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
