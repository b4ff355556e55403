"""Small cases and providers for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hpo_fused.bench.cases import Case, Operation, Shape, of_tokens
from hpo_fused.bench.check import Errors, judge
from hpo_fused.bench.inputs import Inputs
from hpo_fused.bench.providers import Provider, Step
from hpo_fused.bench.providers.plain import Eager
from hpo_fused.bench.results import Row
from hpo_fused.bench.run import Settings, Trial, run_case
from hpo_fused.bench.truth import Truth, draw

CPU = torch.device("cpu")
TINY = Shape("tiny", 97, 48)  # a width that no block divides
Change = Callable[[Step], Step]


def tiny(operation: Operation, tokens: int = 40, shape: Shape = TINY, **fields: Any) -> Case:
    """A case of milliseconds."""
    return of_tokens(operation, shape, tokens, **{"dtype": "fp32", **fields})


def stepped(case: Case, provider: Provider | None = None, device: torch.device = CPU) -> tuple[Inputs, Truth, Step]:
    """Inputs and truth of a case, and a step of the provider (eager PyTorch), as the benchmark takes it."""
    inputs, truth = draw(case, device, 0)
    provider = provider or Eager()
    provider.prepare(case, device)
    trial = Trial(provider, inputs)
    trial.before()
    return inputs, truth, trial.step()


def judged(case: Case, change: Change = lambda step: step, provider: Provider | None = None) -> Errors:
    """Errors of a step that was changed."""
    provider = provider or Eager()
    inputs, truth, step = stepped(case, provider)
    return judge(inputs, truth, change(step), provider)


def with_loss(change: Callable[[Tensor], Tensor]) -> Change:
    """Changes the loss."""

    def changed(step: Step) -> Step:
        assert step.output.loss is not None
        return step._replace(output=step.output._replace(loss=change(step.output.loss)))

    return changed


def with_gradient(index: int, change: Callable[[Tensor], Tensor]) -> Change:
    """Changes one of the gradients."""
    return lambda step: step._replace(
        gradients=tuple(change(one) if i == index else one for i, one in enumerate(step.gradients))
    )


class Wrong(Eager):
    """Computes another loss."""

    name = "wrong"

    def policy_loss(self, inputs: Inputs) -> Any:
        return super().policy_loss(replace(inputs, old_logprobs=inputs.old_logprobs + 0.1))


def measured(case: Case, *providers: Provider, repeats: int = 3) -> dict[str, Row]:
    """Rows by provider."""
    rows: list[Row] = []
    run_case(case, providers, Settings(CPU, repeats, 0.0), rows, lambda line: None)
    return {row.provider: row for row in rows}
