"""Ranks for the tests of what is divided over processes, and the document's table of it.

    python tests/ranks.py --table     run every part, print a line for each way to divide the work

A *part* is a function ``part(rank, world) -> {row of the table: worst gradient difference}`` of a module
``distributed_<topic>.py``, which lists it in ``PARTS: dict[str, Part]`` by its name and with the number of its ranks.
It finds a gloo group initialised, asserts its own limits, and may skip. One with nothing for the table returns {}.

A process imports everything once, then forks the ranks, which wait for parts: importing takes seconds, forking not. A
part that fails, or one of whose ranks ends, takes its ranks down, and those of the next part are new. It is this script
and not a function that multiprocessing spawns: tests are imported by path, and a child process could not find this
module again.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import pytest
from torch import Tensor, distributed

Part: TypeAlias = tuple[int, Callable[[int, int], dict[str, float]]]
# What became of a part: {row: difference}, or {"failed": traceback}, or {"skipped": reason}.
Result: TypeAlias = dict[str, Any]

COLLECTIVE_SECONDS = 30  # a rank that waits longer for the others raises torch.distributed's error
PART_SECONDS = 120  # a rank that takes longer prints where it is, and ends
GRACE_SECONDS = 2  # after a rank's failure the others may still fail with an error that says more

HERE = Path(__file__).parent


def worst(ours: Tensor, expected: Tensor) -> float:
    """The largest difference between two gradients, relative to the expected one's largest entry.

    Args:
        ours, expected: tensors of one shape, any floating dtypes; compared in float64. An expected gradient of zeros
            has no scale: the difference then is absolute.
    """
    assert ours.shape == expected.shape, f"{tuple(ours.shape)} for {tuple(expected.shape)}"
    if not ours.numel():
        return 0.0
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).abs().max() / (expected.abs().max().item() or 1.0))


def parts() -> dict[str, Part]:
    """Every part by its name, in the order of the modules' names."""
    found: dict[str, Part] = {}
    for file in sorted(HERE.glob("distributed_*.py")):
        for name, part in importlib.import_module(f".{file.stem}", __package__).PARTS.items():
            assert name not in found, f"two parts are named {name}"
            found[name] = part
    return found


class Ranks:
    """The tests' side: a process that runs parts when asked to."""

    def __init__(self) -> None:
        # The interpreter even where there is a GPU: the ranks' tensors are on the CPU.
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        own = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", **one_thread}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, name: str) -> dict[str, float]:
        """What a part measured; fails or skips the test if the part does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks ranks has ended: see what it wrote to stderr"
        result = json.loads(answer)
        if "skipped" in result:
            pytest.skip(result["skipped"])
        if "failed" in result:
            pytest.fail(result["failed"], pytrace=False)
        return result

    def close(self) -> None:
        """End the process and its ranks."""
        self._process.communicate()


class _Group:
    """The ranks of one process group, forked when a part needs them."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._store = tempfile.mktemp(prefix="hpo_fused_ranks_")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, name: str) -> Result:
        if not self._processes:
            self._fork()
        for pipe in self._pipes:
            pipe.send(name)
        results: dict[int, Result] = {}
        patience = None
        while len(results) < self._world:
            left = None if patience is None else max(0.0, patience - time.monotonic())
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results], left)
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    results[rank] = {"failed": "ended without a result: see what it wrote to stderr"}
                if patience is None and "failed" in results[rank]:
                    patience = time.monotonic() + GRACE_SECONDS
        failures = {rank: result["failed"] for rank, result in sorted(results.items()) if "failed" in result}
        if failures:
            self.kill()
            missing = "".join(f"rank {rank}: not ended\n" for rank in range(self._world) if rank not in results)
            return {"failed": "".join(f"rank {rank}: {text}\n" for rank, text in failures.items()) + missing}
        if not all(process.is_alive() for process in self._processes):
            self.kill()
        merged: Result = {}
        for result in results.values():
            for row, value in result.items():
                merged[row] = max(merged.get(row, value), value)
        return merged

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        Path(self._store).unlink(missing_ok=True)

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        for rank in range(self._world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._world, self._store, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends when the rank does
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """A rank's life: parts until the pipe ends."""
    patience = timedelta(seconds=COLLECTIVE_SECONDS)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)
    known = parts()
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(PART_SECONDS, exit=True)
        try:
            result: Result = dict(known[name][1](rank, world))
            assert all(math.isfinite(value) for value in result.values()), result
        except pytest.skip.Exception as skipped:
            result = {"skipped": str(skipped)}
        except BaseException:
            result = {"failed": traceback.format_exc()}
        faulthandler.cancel_dump_traceback_later()
        pipe.send(result)


def main(arguments: list[str]) -> NoReturn:
    """Answer the parts named on stdin one by one, or run all of them and print the table."""
    parser = argparse.ArgumentParser(description="Ranks for the tests of what is divided over processes.")
    parser.add_argument("--table", action="store_true", help="run every part and print the document's table")
    table = parser.parse_args(arguments).table
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    answers = os.fdopen(os.dup(1), "w")  # what parts print is no answer
    os.dup2(2, 1)
    known = parts()
    importlib.import_module(".interpreter", __package__).patch_once_a_launch()
    groups = {world: _Group(world) for world in sorted({world for world, _ in known.values()})}
    # Before the fork: what parts import.
    for module in ("torch.distributed.tensor", "torch.distributed.fsdp"):
        importlib.import_module(module)

    def run(name: str) -> Result:
        return groups[known[name][0]].run(name)

    failures = 0
    if table:
        print("| divided | ranks | test | worst gradient difference |\n|---|---|---|---|", file=answers)
        for name in known:
            result = run(name)
            if result.keys() & {"failed", "skipped"}:
                failures += "failed" in result
                print(name, result, file=sys.stderr)
                continue
            for row, value in result.items():
                print(f"| {row} | {known[name][0]} | `{name}` | {value:.1e} |", file=answers)
    else:
        for line in sys.stdin:
            print(json.dumps(run(line.strip())), file=answers, flush=True)
    for group in groups.values():
        group.kill()
    answers.flush()
    os._exit(int(failures > 0))  # at once: taking torch down takes a second


if __name__ == "__main__":
    # As the package that pytest makes of this folder, so that relative imports work in both.
    spec = importlib.util.spec_from_file_location("tests", HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    assert spec is not None
    sys.modules["tests"] = importlib.util.module_from_spec(spec)
    sys.path.remove(str(HERE))
    importlib.import_module("tests.ranks").main(sys.argv[1:])
