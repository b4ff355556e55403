"""Peak memory against the number of tokens, logits given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .cases import GROUP, Case, Inputs, draw, draw_advantages, responses_of
from .linear.memory import TOKENS
from .measure import is_out_of_memory, peak_extra_bytes
from .providers import Provider
from .results import MemoryRow
from .run import Bench
from .trial import Progress, Step, does_not_fit, record_failure, synchronize


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
) -> None:
    """A row for each number of tokens and provider; ``share`` is what all are worth on the progress bar.

    One batch is drawn, at the largest size; the smaller ones are its first rows.
    """
    sizes = [_of_tokens(case, count) for count in sorted(tokens)]
    part = share / (len(sizes) * len(providers) + 1)
    mine = {
        (size, provider.name): MemoryRow(TOKENS, size, provider.name, device.type)
        for size in sizes
        for provider in providers
    }
    rows.extend(mine.values())
    label = f"{case.shape.name}: memory"
    try:
        progress.stage(f"{label}, drawing inputs")
        if note := does_not_fit(2 * sizes[-1].logits_bytes, device):
            raise MemoryError(note)
        inputs = draw(replace(sizes[-1], ragged=False), device, seed)
        progress.advance(part)
        for size in sizes:
            here = _first(inputs, size, seed)
            for provider in providers:
                progress.stage(f"{label}, {provider.name} at {size.tokens} tokens")
                try:
                    _measure(mine[size, provider.name], provider, here, device)
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


def _measure(row: MemoryRow, provider: Provider, inputs: Inputs, device: torch.device) -> None:
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
    bench.before()
    bench.step()  # compiles, which takes memory of its own
    synchronize(device)
    bench.before()
    kept: list[Step] = []
    row.peak_extra_bytes = peak_extra_bytes(lambda: kept.append(bench.step()), device)
    row.gradient_bytes = kept.pop().gradient_bytes()
