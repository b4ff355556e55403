"""Which launch parameters suit this GPU: candidates, their measurement, and the choice among them."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hpo_fused.kernels.launch import (
    BUSY_PROCESSORS,
    USABLE_CACHE,
    Machine,
    default_parameters,
    forced_parameters,
)
from hpo_fused.kernels.tuning import THREADS, UNROLLS, Launches, LaunchParameters, parse, tuning_content, tuning_file
from hpo_fused.objective import Objective
from hpo_fused.rows import LogitTransform, TokenTerms

from .cases import DTYPES, Shape
from .measure import Clock, Failure, Task, rounds

# A candidate must beat the shipped table by this much: below, it is the machine's noise that is being tuned.
WORTH = 0.02
ROUNDS = 20
# Of a processor: fewer leave it idle while a program waits, more cannot be resident.
RESIDENT_THREADS = (512, 2048)


@dataclass(frozen=True)
class Job:
    """Launches to find parameters for, and what to run to time them: ``softcap`` of the logits, ``dtype``'s name."""

    launches: Launches
    shape: str
    dtype: str
    softcap: float | None

    @property
    def name(self) -> str:
        kernel = "fused" if self.launches.reread else "two kernels"
        return f"{self.shape} {self.dtype} {kernel}" + (" capped" if self.launches.narrow else "")


@dataclass
class Choice:
    """What was measured for a job.

    Attributes:
        job: what for.
        default, best: parameters; the same where nothing was faster by ``WORTH``.
        seconds: median time of each set of parameters that ran.
        ratio: median over rounds of best over default.
        failed: what did not run, and why.
    """

    job: Job
    default: LaunchParameters
    best: LaunchParameters
    seconds: dict[LaunchParameters, float]
    ratio: float = 1.0
    failed: dict[LaunchParameters, str] = field(default_factory=dict)


def jobs(shapes: Iterable[Shape], dtypes: Iterable[str]) -> Iterator[Job]:
    """The fused kernel of each shape (capped too, where its model caps), and the two kernels of one sweep."""
    for shape in shapes:
        for dtype in dtypes:
            itemsize, V = DTYPES[dtype].itemsize, shape.vocabulary
            if dtype != "fp16":  # takes the two-kernel path
                yield Job(Launches(itemsize, V, True, False), shape.name, dtype, None)
                if shape.softcap is not None:
                    yield Job(Launches(itemsize, V, True, True), shape.name, dtype, shape.softcap)
            yield Job(Launches(itemsize, V, False, False), shape.name, dtype, None)


def candidates(machine: Machine, launches: Launches) -> list[LaunchParameters]:
    """Sets of parameters worth timing, the shipped table's first.

    Programs of each size, as many as keep a processor's threads within ``RESIDENT_THREADS``; where a second sweep
    rereads the row, also as many rows as fit the cache.
    """
    itemsize, V, reread, narrow = launches
    default = default_parameters(machine, itemsize, V, reread=reread, narrow=narrow)
    fits = int(USABLE_CACHE * machine.cache_bytes // (V * itemsize))
    found = [default]
    for threads in THREADS:
        for unroll in UNROLLS:
            if threads * unroll * 16 > 2 * V * itemsize:
                continue
            counts = [machine.processors * k for k in (1, 2, 4, 8)]
            counts = [
                n for n in counts if RESIDENT_THREADS[0] <= threads * n / machine.processors <= RESIDENT_THREADS[1]
            ]
            if reread and BUSY_PROCESSORS * machine.processors <= fits < machine.processors:
                counts.append(fits)
            found += [LaunchParameters(threads, unroll, count) for count in counts]
    return list(dict.fromkeys(found))


def choose(job: Job, options: list[LaunchParameters], run: Callable[[], object], clock: Clock, budget: float) -> Choice:
    """Time ``run`` with each of ``options``, whose first is the default, and take the fastest that is worth it.

    All are timed once per round, in rotating order; a ratio is taken within a round.
    """

    def task(parameters: LaunchParameters) -> Task:
        def forced() -> object:
            with forced_parameters(parameters):
                return run()

        return Task(forced)

    failed: dict[LaunchParameters, str] = {}
    tasks: dict[str, Task] = {}
    named = {str(tuple(parameters)): parameters for parameters in options}
    for name, parameters in named.items():
        try:
            task(parameters).run()  # compiles
            tasks[name] = task(parameters)
        except Exception as error:  # too many registers or too little shared memory for this GPU
            failed[parameters] = f"{type(error).__name__}: {error}"
    default = options[0]
    if default in failed:
        raise RuntimeError(f"{job.name}: the shipped parameters {tuple(default)} fail: {failed[default]}")
    times: dict[LaunchParameters, list[float]] = {}
    ratios: dict[LaunchParameters, list[float]] = {}
    for found in rounds(tasks, clock, ROUNDS, budget):
        if isinstance(found, Failure):
            failed[named[found.name]] = f"{type(found.error).__name__}: {found.error}"
            continue
        for name, seconds in found.items():
            times.setdefault(named[name], []).append(seconds)
            if (base := found.get(str(tuple(default)))) is not None:
                ratios.setdefault(named[name], []).append(seconds / base)
    medians = {
        parameters: statistics.median(values) for parameters, values in times.items() if parameters not in failed
    }
    relative = {parameters: statistics.median(ratios[parameters]) for parameters in medians if parameters in ratios}
    best = min(relative, key=lambda parameters: relative[parameters], default=default)
    if relative.get(best, 1.0) > 1 - WORTH:
        best = default
    return Choice(job, default, best, medians, relative.get(best, 1.0), failed)


def runner(job: Job, tokens: int, device: torch.device) -> Callable[[], object]:
    """What is timed: a whole step of the kernels that take ``job.launches``, on random logits."""
    from hpo_fused.kernels import fused_policy_loss, token_gradient, token_statistics

    dtype, V = DTYPES[job.dtype], job.launches.V
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(1, tokens, V, dtype=dtype, device=device).normal_(std=2.5, generator=generator)
    ids = torch.randint(V, (1, tokens), device=device, generator=generator)
    compute = torch.ones(1, tokens, dtype=torch.bool, device=device)
    ones = torch.ones(1, tokens, device=device)
    transform, out = LogitTransform(1.0, job.softcap), torch.empty_like(logits)
    spec = Objective.preset("grpo").lower()
    terms = TokenTerms(ones, ones, ones, None, None)

    def fused() -> tuple[Tensor, ...]:
        losses, logprobs, _ = fused_policy_loss(logits, ids, compute, terms, transform, spec, entropy=True, out=out)
        return losses, logprobs

    def two_kernels() -> tuple[Tensor, ...]:
        statistics_ = token_statistics(logits, ids, compute, transform, entropy=True)
        token_gradient(logits, ids, statistics_, ones, None, transform, out)
        return (statistics_.logprobs,)

    return fused if job.launches.reread else two_kernels


def kept_entries(path: Path, gpu: str) -> dict[Launches, LaunchParameters]:
    """What an earlier run stored that still holds."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), gpu)
    except (OSError, ValueError):
        return {}


def store(gpu: str, entries: Mapping[Launches, LaunchParameters]) -> Path:
    """Add ``entries`` to the GPU's tuning file; other processes see the old file or the new one, never a part."""
    path = tuning_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tuning_content(gpu, {**kept_entries(path, gpu), **entries})
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone; a shared cache directory is everybody's
    os.replace(file.name, path)
    return path
