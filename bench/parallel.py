"""``speed --world-size``: our losses over vocabulary shards, beside the same work on a shard alone.

Every rank draws the whole case and keeps its columns, so that the ranks' gradients put together can be held against
float64 as a single process's are.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

import hpo_fused

from . import measure
from .cases import Case
from .check import Errors, judge
from .inputs import Inputs
from .measure import Task
from .providers import Step, Unavailable, limits
from .providers.fused import Fused
from .results import Result, Row, summarise
from .run import Settings, Trial, check_first, does_not_fit, draw_case, new_row


class Sharded(Fused):
    """The losses of a vocabulary's shard, with its group."""

    def __init__(self, shard: hpo_fused.VocabShard) -> None:
        super().__init__()
        self.shard, self.name = shard, f"hpo_fused×{distributed.get_world_size()}"

    def _loss(self, inputs: Inputs) -> dict[str, Any]:
        return {**super()._loss(inputs), "vocab_group": self.shard}


def check(cases: Sequence[Case], ranks: int, device: torch.device) -> None:
    """ValueError unless the cases can be divided over ``ranks`` on the device's kind."""
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        raise ValueError(f"world size: expected at most {torch.cuda.device_count()}, the number of GPUs, got {ranks}")
    for case in cases:
        if not case.gives_loss or case.operation == "logprob_policy_loss" or case.cuda_graph:
            raise ValueError(
                "world size: expected policy_loss or linear_policy_loss, and no CUDA graph, beside it, got "
                f"{case.operation}{', captured' * case.cuda_graph}"
            )
        if case.shape.vocabulary < ranks:
            raise ValueError(f"world size: expected at most V = {case.shape.vocabulary} ranks, got {ranks}")


def run_cases(
    cases: Sequence[Case], ranks: int, settings: Settings, result: Result, tell: Callable[[str], object]
) -> None:
    """Measure the cases on ``ranks`` new processes: gloo on a CPU, NCCL with a GPU for each.

    The rows, as many as are finished however this ends, go into ``result``.

    Raises:
        multiprocessing.ProcessRaisedException: a rank failed; the others are ended.
    """
    fits = []
    for case in cases:
        # A rank holds the whole and its gradient for the check, beside its own columns and theirs.
        if note := does_not_fit((2 * ranks + 2) * case.input_bytes, settings.device):
            result.rows.append(replace(new_row(case, Fused()), status="out_of_memory", note=note))
        else:
            fits.append(case)
    tell(f"{len(fits)} cases on {ranks} ranks")
    with tempfile.TemporaryDirectory() as folder:
        try:
            start: Callable[..., object] = multiprocessing.start_processes  # type: ignore[attr-defined]
            start(_rank, (ranks, folder, fits, settings), nprocs=ranks, start_method=_start_method(settings.device))
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            if (file := Path(folder, "rows.json")).exists():
                result.rows += Result.read(file).rows


def _start_method(device: torch.device) -> str:
    """A server that has imported everything once and forks the ranks; new processes where CUDA might be in use."""
    if device.type == "cuda" or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    return "forkserver"


def _rank(rank: int, ranks: int, folder: str, cases: Sequence[Case], settings: Settings) -> None:
    device = settings.device
    options: dict[str, Any] = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": ranks}
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device, **options)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        distributed.init_process_group("gloo", **options)
    result = Result("speed", {})
    for case in cases:
        result.rows += _measured(case, replace(settings, device=device))
        if rank == 0:
            result.write(Path(folder, "rows.json"))
    distributed.destroy_process_group()


def _measured(case: Case, settings: Settings) -> list[Row]:
    """Rows of a shard alone, of all shards together, and of the limits on a shard: the slowest rank's times.

    Whatever a rank finds, it goes on as the others do: none may wait for a collective that another leaves out.
    """
    device, rank, ranks = settings.device, distributed.get_rank(), distributed.get_world_size()
    inputs, truth = draw_case(case, device, settings.seed)
    vocabulary, dimension = case.shape.vocabulary, 0 if case.linear else -1
    start, stop = (vocabulary * one // ranks for one in (rank, rank + 1))

    def columns(whole: torch.Tensor) -> torch.Tensor:
        return whole.detach().narrow(dimension, start, stop - start)

    shape = replace(case.shape, name=f"{case.shape.name} ÷ {ranks}", vocabulary=stop - start)
    own = columns(inputs.leaves[-1]).clone(memory_format=torch.contiguous_format).requires_grad_()
    part = replace(inputs, case=replace(case, shape=shape), leaves=(*inputs.leaves[:-1], own))
    alone = replace(part, tokens=part.tokens % (stop - start))
    with torch.no_grad():  # other tokens, but the same log-ratios: rows whose ratio is out of bounds cost less
        logprobs = Fused().run(alone).logprobs
    assert logprobs is not None
    alone = replace(alone, old_logprobs=(inputs.old_logprobs - truth.logprobs.float() + logprobs).nan_to_num())
    group = distributed.group.WORLD
    assert group is not None
    trials = [Trial(Fused(), alone), Trial(Sharded(hpo_fused.VocabShard(group, start, vocabulary)), part)]
    trials += [Trial(bound, alone) for bound in limits(case.operation)]

    def judged(step: Step) -> Errors:
        """Of the gradients of all ranks put together."""
        if step.gradients:
            whole = torch.zeros_like(inputs.leaves[-1].detach())
            columns(whole).copy_(step.gradients[-1])
            distributed.all_reduce(whole)
            step = step._replace(gradients=(*step.gradients[:-1], whole))
        return judge(inputs, truth, step, trials[1].provider)

    rows: dict[str, Row] = {}
    tasks: dict[str, Task] = {}
    for trial in trials:
        row = new_row(part.case, trial.provider)
        with contextlib.suppress(Unavailable):  # the same limits on every rank
            check_first(trial, judged if trial.inputs is part else None, row, device)
            rows[row.provider], tasks[row.provider] = row, Task(trial.step, partial(_begin, trial))
    times = _timed(tasks, settings)
    summarise(list(rows.values()), dict(zip(tasks, times.T.tolist(), strict=True)))
    return list(rows.values())


def _begin(trial: Trial) -> None:
    trial.before()
    distributed.barrier()


def _timed(tasks: dict[str, Task], settings: Settings) -> torch.Tensor:
    """Seconds [rounds, tasks] of the slowest rank."""
    clock = measure.clock_for(settings.device)

    def rounds(count: int) -> torch.Tensor:
        found = []
        for outcome in measure.rounds(tasks, clock, count, math.inf):
            for value in outcome.values():
                if isinstance(value, Exception):
                    raise value
            found.append([outcome[name] for name in tasks])
        seconds = torch.tensor(found, dtype=torch.float64, device=settings.device)
        distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
        return seconds

    warm_up = rounds(3 if settings.device.type == "cuda" else 1)  # the same numbers on every rank
    return rounds(min(settings.repeats, max(3, int(settings.budget / warm_up[-1].sum().item()))))
