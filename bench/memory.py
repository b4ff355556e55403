"""Peak memory against the number of tokens, logits given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .cases import GROUP, Case, Inputs, draw, draw_advantages, responses_of
from .check import Oracle
from .linear.memory import TOKENS
from .measure import is_out_of_memory
from .providers import Provider
from .results import MemoryRow
from .run import Bench
from .trial import Progress, does_not_fit, peak_of, record_failure, release


def _of_tokens(case: Case, tokens: int) -> Case:
    responses = responses_of(tokens, 2 * GROUP)
    return replace(case, responses=responses, length=tokens // responses)


def _first(inputs: Inputs, case: Case, seed: int) -> Inputs:
    """The first rows of ``inputs``, laid out as ``case``."""
    shape, count = (case.responses, case.length), case.tokens
    advantages = draw_advantages(case.responses, case.inactive, torch.Generator().manual_seed(seed))

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.detach().flatten(0, 1)[:count].reshape(*shape, *values.shape[2:])

    return Inputs(
        case,
        case.resolved_objective(),
        rows(inputs.logits).requires_grad_(),
        rows(inputs.tokens),
        advantages.to(inputs.logits.device),
        rows(inputs.old_logprobs),
        None,
        rows(inputs.exact_logprobs),
        rows(inputs.upstream),
    )


def logits_memory(
    case: Case,
    tokens: Sequence[int],
    providers: Sequence[Provider],
    device: torch.device,
    seed: int,
    rows: list[MemoryRow],
    progress: Progress,
    share: float,
    label: str = "",
) -> None:
    """A row for each number of tokens and provider; ``share`` is what all are worth on the progress bar.

    One batch is drawn, at the largest size; the smaller ones are its first rows. A provider's result is held against
    float64 at the first size that it is measured at, usually the smallest; if it is wrong there, no size is measured.

    Args:
        label: what the progress is told of; the shape's name by default.
    """
    release(device)
    sizes = [_of_tokens(case, count) for count in sorted(tokens)]
    part = share / (len(sizes) * len(providers) + 1)
    mine = {
        (size, provider.name): MemoryRow(TOKENS, size, provider.name, device.type)
        for size in sizes
        for provider in providers
    }
    rows.extend(mine.values())
    label = f"{label or case.shape.name}: memory"
    verdicts: dict[str, str] = {}
    try:
        progress.stage(f"{label}, drawing inputs")
        if note := does_not_fit(2 * sizes[-1].logits_bytes, device):
            raise MemoryError(note)
        inputs = draw(replace(sizes[-1], ragged=False), device, seed)
        progress.advance(part)
        for size in sizes:
            here = _first(inputs, size, seed)
            oracle = None
            for provider in providers:
                progress.stage(f"{label}, {provider.name} at {size.tokens} tokens")
                try:
                    if provider.name not in verdicts and oracle is None:
                        oracle = Oracle.of(here)
                    _measure(mine[size, provider.name], provider, here, device, oracle, verdicts)
                except Exception as error:  # a provider's code: anything can come
                    record_failure(mine[size, provider.name], error)
                progress.advance(part)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        for row in mine.values():
            if row.status == "ok" and row.peak_extra_bytes is None:
                record_failure(row, error)
    finally:
        for row in mine.values():
            if row.status == "ok" and row.peak_extra_bytes is None:
                row.status, row.note = "skipped", "interrupted before it was measured"


def _measure(
    row: MemoryRow,
    provider: Provider,
    inputs: Inputs,
    device: torch.device,
    oracle: Oracle | None,
    verdicts: dict[str, str],
) -> None:
    """``verdicts``: complaints about those whose result was checked; of others by ``oracle``, into it."""
    case = inputs.case
    if provider.largest is not None and case.logits_bytes > provider.largest:
        size = provider.largest >> 20
        row.status, row.note = "skipped", f"{provider.slow_start}: measured up to {size} MiB of logits"
        return
    if note := does_not_fit(provider.memory_factor * inputs.logits.numel() * 4, device):
        row.status, row.note = "out_of_memory", note
        return
    provider.prepare(case, device)
    bench = Bench(provider, inputs)
    if not verdicts.get(provider.name):
        bench.before()
        step = bench.step()  # compiles, which takes memory of its own
        if provider.name not in verdicts:
            assert oracle is not None
            verdicts[provider.name] = oracle.judge(inputs, step, ours=provider.ours).complaint
        del step
    if verdicts[provider.name]:
        row.status, row.note = "wrong", verdicts[provider.name]
        return
    row.peak_extra_bytes, step = peak_of(bench, device)
    row.gradient_bytes = step.gradient_bytes()
