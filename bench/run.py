"""One case of logits from its inputs to its rows: draw, check every provider, take its memory, time all in rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs, draw
from .check import Oracle
from .measure import Task
from .providers import Output, Provider
from .results import COPY, COPY_NEW, Row, first_of_ours, summarise
from .trial import (
    Progress,
    Settings,
    Step,
    does_not_fit,
    first_call,
    mark_untimed,
    record_failure,
    record_out_of_memory,
    release,
    time_in_rounds,
)


class _Produce(torch.autograd.Function):
    """Logits as an LM head's output: not a leaf, in a storage that may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, storage: Tensor) -> Tensor:
        return storage.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


_produce: Callable[[Tensor, Tensor], Tensor] = _Produce.apply


class Bench:
    """A provider on a case's inputs: runs what the case's mode asks for, and restores the logits where overwritten.

    The gradient is taken by ``autograd.grad``: ``backward()`` on a leaf may copy it once more into ``.grad``, which
    does not happen in training, where logits are an intermediate result.
    """

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.provider, self.inputs = provider, inputs
        self.storage = provider.room(inputs) if provider.inplace else None
        self.anchor = torch.empty(0, device=inputs.logits.device, requires_grad=True)
        loss_scale = inputs.case.upstream
        if inputs.case.op == "logprobs":
            self.upstream: Tensor | None = inputs.upstream * loss_scale
        else:
            self.upstream = None if loss_scale == 1 else torch.tensor(loss_scale, device=inputs.logits.device)
        self.begun: tuple[Output, Tensor] | None = None

    def before(self) -> None:
        """Restore what the last run overwrote; where the gradient alone is timed, go forward."""
        self.begun = None
        if self.storage is not None:
            self.storage.copy_(self.inputs.logits.detach())
        if self.inputs.case.mode == "gradient":
            self.begun = self._forward()

    def step(self) -> Step:
        """Forward, backward or both, once."""
        if self.inputs.case.mode == "forward":
            with torch.no_grad():
                return Step(self._forward()[0], ())
        (output, logits), self.begun = self.begun or self._forward(), None
        root = output.logprobs if self.inputs.case.op == "logprobs" else output.loss
        if root is None:
            return Step(output, ())  # which the check complains about
        gradients = torch.autograd.grad(root, (logits,), self.upstream)
        logprobs = None if output.logprobs is None else output.logprobs.detach()
        return Step(output._replace(logprobs=logprobs), gradients)

    def _forward(self) -> tuple[Output, Tensor]:
        logits = self.inputs.logits
        if self.storage is not None:
            logits = _produce(self.anchor, self.storage)
        of = self.provider.token_logprobs if self.inputs.case.op == "logprobs" else self.provider.forward
        return of(self.inputs, logits), logits


def check_first(bench: Bench, oracle: Oracle, row: Row, device: torch.device) -> None:
    """The first call into ``row``: compiled, judged, its memory taken; raises what the provider raises."""
    inputs, provider = bench.inputs, bench.provider
    row.note = does_not_fit(provider.memory_factor * inputs.logits.numel() * 4, device)
    if row.note:
        row.status = "out_of_memory"
        return
    row.version = provider.available(device)
    provider.prepare(inputs.case, device)

    def judge(step: Step) -> str:
        row.errors = oracle.judge(inputs, step, ours=provider.ours)
        return row.errors.complaint

    first_call(bench, row, device, judge)


def run_case(
    case: Case, providers: Sequence[Provider], settings: Settings, rows: list[Row], progress: Progress, label: str = ""
) -> None:
    """Measure ``case`` and append its rows, one for each provider and one for each copy, to ``rows``.

    Rows are complete and summarised however this ends: on Ctrl-C they hold the rounds that were finished.

    Args:
        label: what the progress is told of; the shape's name by default.
    """
    device, label = settings.device, label or case.shape.name
    release(device)
    copies = ([COPY, COPY_NEW] if device.type == "cpu" else [COPY]) if settings.timed else []
    mine = {one.name: Row(case, one.name, ours=one.ours, leaves_out=one.leaves_out) for one in providers}
    mine.update({name: Row(case, name) for name in copies})
    rows.extend(mine.values())
    share = 1 / (len(providers) + 2)  # of the progress bar: drawing, each first call, timing
    try:
        progress.stage(f"{label}: drawing inputs")
        copied = len(copies) + sum(provider.inplace for provider in providers)
        note = does_not_fit((1 + copied) * case.logits_bytes, device)
        if note:
            raise MemoryError(note)
        inputs = draw(case, device, settings.seed)
        oracle = Oracle.of(inputs)
        progress.advance(share)

        tasks: dict[str, Task] = {}
        for provider in providers:
            compiling = f" ({provider.slow_start})" if provider.slow_start else ""
            progress.stage(f"{label}: {provider.name}, first call and check{compiling}")
            row = mine[provider.name]
            try:
                bench = Bench(provider, inputs)
                check_first(bench, oracle, row, device)
            except Exception as error:  # a provider's code: anything can come
                record_failure(row, error)
            if row.status == "ok":
                tasks[provider.name] = Task(bench.step, bench.before)
            progress.advance(share)
        if COPY in copies:
            logits = inputs.logits.detach()
            destination = torch.empty_like(logits)
            tasks[COPY] = Task(lambda: destination.copy_(logits))
            if COPY_NEW in copies:
                tasks[COPY_NEW] = Task(logits.clone)
        time_in_rounds(mine, tasks, settings, progress, label, share)
    except Exception as error:
        record_out_of_memory(mine, error)
    finally:
        mark_untimed(mine, timed=settings.timed)
        summarise(list(mine.values()), first_of_ours(mine.values()))
