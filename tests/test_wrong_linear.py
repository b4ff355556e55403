"""Wrong chunks, rows and GEMMs of the linear path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hpo_fused import torch_backend
from hpo_fused.interface import (
    ADVANTAGE,
    MASKED,
    Batch,
    LogitTransform,
    LossSpec,
    TokenTerms,
)
from hpo_fused.linear import autograd as linear_autograd
from hpo_fused.linear import functions as linear_functions
from hpo_fused.linear import head as linear_head
from hpo_fused.linear.head import Head, HeadGradients
from hpo_fused.linear.keep import KeptBits, KeptIds
from hpo_fused.linear.memory import ChunkPlan
from hpo_fused.linear.rows import Rows

from .mutants import CPU, OF_LINEAR, SUITES, Mutant, Mutants

MUTANTS = Mutants()
wrong, mutant = MUTANTS.wrong, MUTANTS.mutant


@pytest.mark.parametrize("suite", ["linear", "linear_logprobs"])
def test_the_suite_passes(suite: str) -> None:
    """Or a mutant's failure would say nothing. (The other suites' cases are tests of their own.)"""
    assert not SUITES[suite].fails(CPU)


LINEAR_LOSS = ("linear",)
ACCUMULATE = [(linear_head, "_accumulate")]  # (total, gradient, x, *, fresh)
MADE, ADD, FINISH = ((HeadGradients, name) for name in ("__init__", "add", "finish"))
SCALE = [(torch_backend, "scale_gradient")]
wrong(
    "chunks_overwrite_each_other", LINEAR_LOSS, ACCUMULATE,
    lambda f, total, gradient, x, *, fresh: f(total, gradient, x, fresh=True),
)  # fmt: skip
wrong(
    "last_chunk_dropped", LINEAR_LOSS, [(ChunkPlan, "slices")],
    lambda f, plan, total: f(plan, total)[: max(plan.chunks - 1, 1)],
)  # fmt: skip
wrong(
    "terms_not_gathered", LINEAR_LOSS, [(Rows, "gather")],
    lambda _, rows, x: x.view(len(x), -1)[:, : len(rows)].nan_to_num().contiguous().unsqueeze(1),
)  # fmt: skip
wrong(
    "filling_rows_not_cleared", LINEAR_LOSS, [(Rows, "hidden")],
    lambda f, rows, hidden: f(dataclasses.replace(rows, exact=True), hidden),
)  # fmt: skip
wrong(
    "bias_forgotten_in_the_logits", LINEAR_LOSS, [(Head, "__init__")],
    lambda f, head, weight, bias, *rest: f(head, weight, None, *rest),
)  # fmt: skip
wrong("hidden_gradient_not_scaled", LINEAR_LOSS, SCALE, lambda f, g, factor: None if g.shape[0] > 1 else f(g, factor))
wrong(
    "weight_gradient_not_scaled", LINEAR_LOSS, SCALE,
    lambda f, g, factor: f(g, factor) if g.shape[0] > 1 or g.shape[1] == 1 else None,
)  # fmt: skip


@mutant(LINEAR_LOSS, *ACCUMULATE)
def weight_gradient_accumulated_in_bfloat16(f: Any, total: Tensor, *rest: Any, **options: Any) -> None:
    f(total, *rest, **options)
    total.copy_(total.to(torch.bfloat16))


@mutant(LINEAR_LOSS, *ACCUMULATE)
def weight_gradient_rounded_once_more(f: Any, total: Tensor, *rest: Any, **options: Any) -> None:
    """A float32 sum cut to 10 bits after the point, as TF32 has them."""
    f(total, *rest, **options)
    if total.dtype == torch.float32:
        total.copy_((total.view(torch.int32) & -(1 << 13)).view(torch.float32))


@mutant(LINEAR_LOSS, *ACCUMULATE)
def first_chunk_added_to_what_was_there(f: Any, total: Tensor, gradient: Tensor, x: Tensor, *, fresh: bool) -> None:
    if fresh:
        total.fill_(1e-3)  # memory that was not cleared
    f(total, gradient, x, fresh=False)


@mutant(LINEAR_LOSS, MADE)
def main_grad_overwritten(f: Any, gradients: HeadGradients, *arguments: Any) -> None:
    f(gradients, *arguments)
    if gradients.into is not None:
        gradients.into.zero_()


@mutant(LINEAR_LOSS, MADE)
def other_rows_not_cleared(f: Any, gradients: HeadGradients, *arguments: Any) -> None:
    f(gradients, *arguments)
    if gradients.hidden is not None:
        gradients.hidden.fill_(1e-6)


class Seen(NamedTuple):
    """The rows that a HeadGradients is made for, and the chunks of them that it was given before."""

    rows: Rows
    chunks: list[tuple[Rows, Tensor]]

    @property
    def count(self) -> int:
        return sum(len(rows) for rows, _ in self.chunks)


def adds(*suites: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``change(add, gradients, seen, rows, x, gradient)`` stands in for the addition of a chunk's contributions."""

    def register(change: Callable[..., None]) -> Callable[..., None]:
        def instead(f: Any, gradients: Any, *arguments: Any) -> None:
            if len(arguments) > 3:  # __init__(inputs, head, rows, ...)
                f(gradients, *arguments)
                gradients.seen = Seen(arguments[2], [])
            else:
                change(f, gradients, gradients.seen, *arguments)
                gradients.seen.chunks.append(arguments[:2])

        wrong(change.__name__, suites, [MADE, ADD], instead)
        return change

    return register


def hidden_rows(gradients: HeadGradients) -> Tensor:
    assert gradients.hidden is not None
    return gradients.hidden.view(-1, gradients.hidden.shape[-1])


@adds(*OF_LINEAR)
def last_chunk_dropped_from_the_gradients(f: Any, gradients: Any, seen: Seen, rows: Rows, *rest: Tensor) -> None:
    if not seen.chunks or seen.count + len(rows) < len(seen.rows):
        f(gradients, rows, *rest)


@adds(*OF_LINEAR)
def rows_scattered_in_order(f: Any, gradients: Any, seen: Seen, rows: Rows, *rest: Tensor) -> None:
    f(gradients, dataclasses.replace(rows, positions=slice(seen.count, seen.count + len(rows))), *rest)


@adds("linear")
def rows_scattered_to_the_first_chunk(f: Any, gradients: Any, seen: Seen, rows: Rows, *rest: Tensor) -> None:
    first = (seen.chunks or [(rows, rest[0])])[0][0].positions
    f(gradients, dataclasses.replace(rows, positions=first if isinstance(first, slice) else first[: len(rows)]), *rest)


@adds("linear")
def hidden_of_the_chunk_before(f: Any, gradients: Any, seen: Seen, rows: Rows, x: Tensor, gradient: Tensor) -> None:
    before = seen.chunks[-1][1][: len(x)] if seen.chunks else x
    f(gradients, rows, before if before.shape == x.shape else x, gradient)


@adds("linear")
def bias_gradient_summed_in_low_precision(f: Any, gradients: Any, seen: Seen, *rest: Any) -> None:
    f(gradients, *rest)
    if gradients.bias is not None:
        gradients.bias.copy_(gradients.bias.to(torch.bfloat16))


@adds("linear")
def hidden_gradient_rounded_between(
    f: Any, gradients: Any, seen: Seen, rows: Rows, x: Tensor, gradient: Tensor
) -> None:
    """The vocabulary in two halves whose products are rounded before they are added."""
    f(gradients, rows, x, gradient)
    if gradients.hidden is not None:
        operands, half = gradients.head.dtypes.operands, gradient.shape[1] // 2
        g, weight = (value.to(operands).float() for value in (gradient, gradients.head.weight))
        first, second = (g[:, part] @ weight[part] for part in (slice(half), slice(half, None)))
        product = first.to(operands) + second.to(operands)
        hidden_rows(gradients)[rows.positions] = product.to(gradients.hidden.dtype)


@adds("linear")
def one_row_wrong(f: Any, gradients: Any, seen: Seen, rows: Rows, x: Tensor, gradient: Tensor) -> None:
    """One percent off in the row with the smallest gradient of the first chunk."""
    f(gradients, rows, x, gradient)
    if gradients.hidden is not None and not seen.chunks:
        size, flat = gradient.abs().amax(-1).float(), hidden_rows(gradients)
        flat[torch.arange(len(flat))[rows.positions][torch.where(size > 0, size, torch.inf).argmin()]] *= 1.01


@mutant(OF_LINEAR, FINISH)
def bias_gradient_forgotten(f: Any, gradients: HeadGradients) -> Any:
    hidden, weight, bias = f(gradients)
    return hidden, weight, None if bias is None else torch.zeros_like(bias)


@mutant(LINEAR_LOSS, FINISH)
def slightly_off(f: Any, gradients: HeadGradients) -> Any:
    """By 5e-5, in float32 only, where nothing is rounded that far."""
    if gradients.hidden is not None and gradients.hidden.dtype == torch.float32:
        gradients.hidden.mul_(1 + 5e-5)
    return f(gradients)


@mutant(OF_LINEAR, (Rows, "at"))
def tokens_not_gathered(f: Any, positions: Tensor, targets: Tensor, **options: Any) -> Rows:
    rows = f(positions, targets, **options)
    everywhere, flat = targets.clone(), targets.view(-1)
    everywhere.view(-1)[rows.positions] = flat[: len(rows)].clamp(min=0)
    return dataclasses.replace(rows, everywhere=everywhere)


@mutant(LINEAR_LOSS, (Rows, "at"))
def filling_rows_computed(f: Any, positions: Tensor, targets: Tensor, **options: Any) -> Rows:
    """As if they had a target: their terms and hidden states are what a mask hides."""
    rows = f(positions, targets, **options)
    return dataclasses.replace(rows, everywhere=rows.everywhere.clamp(min=0))


@mutant(OF_LINEAR, (Rows, "scatter"))
def results_not_scattered(_: Any, rows: Rows, entries: Tensor, whole: Tensor) -> None:
    whole.view(len(whole), -1)[:, : len(rows)] = entries.squeeze(1)


@mutant(LINEAR_LOSS, (Rows, "hidden"))
def view_taken_for_contiguous(_: Any, rows: Rows, hidden: Tensor) -> Tensor:
    """hidden[:, :-1] read as if its steps lay side by side."""
    flat = hidden.as_strided((hidden.shape[:2].numel(), hidden.shape[-1]), (hidden.stride(1), 1))
    return flat[rows.positions].nan_to_num(0.1, 0.1, 0.1)


@mutant(LINEAR_LOSS, (Head, "logits"))
def bias_added_after_the_rounding(f: Any, head: Head, x: Tensor, out: Tensor) -> None:
    bias, head.bias = head.bias, None
    f(head, x, out)
    head.bias = bias
    if bias is not None:
        out.add_(bias)


@mutant(LINEAR_LOSS, (Head, "logits"))
def float32_logits_of_a_rounded_product(f: Any, head: Head, x: Tensor, out: Tensor) -> None:
    f(head, x, out)
    out.copy_(out.to(head.dtypes.operands))


@mutant(LINEAR_LOSS, (linear_functions, "choose_rows"))
def idle_rows_computed(f: Any, targets: Tensor, active: Tensor, count: Any, *, idle: bool) -> Any:
    """All unmasked rows enter the GEMMs: nothing is wrong but the cost, and NaN in rows that nobody may read."""
    return f(targets, targets != MASKED, None, idle=idle)


@mutant(LINEAR_LOSS, (torch_backend, "token_terms"))
def idle_rows_given_gradient(f: Any, batch: Batch, spec: LossSpec, vocabulary: int | None, _: bool) -> TokenTerms:
    """A floor under the advantage: every unmasked row learns something."""
    right = f(batch, spec, vocabulary, False)
    values = right.values.clone()
    values[ADVANTAGE] = torch.where(values[ADVANTAGE] == 0, 1e-4, values[ADVANTAGE])
    return right._replace(values=values, active=right.targets != MASKED)  # type: ignore[no-any-return]


@mutant(LINEAR_LOSS, (torch_backend, "token_gradient"))
def loss_scale_after_the_rounding(
    f: Any, logits: Tensor, targets: Tensor, statistics: Any, c: Tensor, h: Any, *rest: Any
) -> None:
    """float16: coefficients without the scaler's factor, the factor on the rounded gradient."""
    f(logits, targets, statistics, c / 256, None if h is None else h / 256, *rest)
    rest[-1].mul_(256)


@mutant(OF_LINEAR, (linear_autograd.Settings, "transform_of"))
def temperatures_of_the_first_rows(_: Any, settings: Any, chunk: Rows) -> LogitTransform:
    given = settings.transform.temperatures
    own = None if given is None else given.view(1, -1)[:, : len(chunk)].contiguous()
    return settings.transform._replace(temperatures=own)  # type: ignore[no-any-return]


@mutant(OF_LINEAR, (linear_autograd._TokenStatistics, "backward"))
def logits_of_backward_differ(f: Any, *arguments: Any) -> Any:
    """Made again with another sum, a bit may differ: not what the row's statistics belong to."""

    def off(logits: Any, head: Head, x: Tensor, out: Tensor) -> None:
        logits(head, x, out)
        out[0, 0] *= 1.01

    with pytest.MonkeyPatch.context() as inner:
        Mutant([(Head, "logits")], off, False).apply(inner)
        return f(*arguments)


RESTRICT = [(form, "restrict") for form in (KeptIds, KeptBits)]  # (logits, rows)
for form, attribute in RESTRICT:
    wrong(f"{form.__name__}_ignored", LINEAR_LOSS, [(form, attribute)], lambda *_: None)
    wrong(
        f"{form.__name__}_of_the_row_before", LINEAR_LOSS, [(form, attribute)],
        lambda f, keep, logits, rows, first: f(
            keep, logits, dataclasses.replace(rows, positions=(rows.positions - 1).clamp(min=0)), first
        ),
    )  # fmt: skip


@mutant(LINEAR_LOSS, (linear_autograd._TokenStatistics, "backward"))
def kept_set_forgotten_in_backward(f: Any, *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as inner:
        Mutant(RESTRICT, lambda *_: None, False).apply(inner)
        return f(*arguments)


@pytest.mark.parametrize(("suite", "name"), MUTANTS.parameters())
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    MUTANTS.reject(suite, name, monkeypatch, device)
