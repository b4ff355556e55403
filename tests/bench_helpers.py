"""Small cases and their steps, for the tests of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpo_fused.bench.cases import SHAPES, Case, Inputs, Mode, Shape
from hpo_fused.bench.linear.cases import HeadShape, LinearCase
from hpo_fused.bench.linear.draw import Problem, draw, draw_weight
from hpo_fused.bench.plain import plain_policy_loss
from hpo_fused.bench.providers import Output
from hpo_fused.bench.results import COPY, ColumnErrors, Errors, Result, Row, summarise
from hpo_fused.bench.trial import Step

CPU = torch.device("cpu")


def tiny_case(**changes: Any) -> Case:
    """A case of milliseconds."""
    values = {"shape": Shape("tiny", 97), "responses": 8, "length": 5, "dtype": "fp32"}
    return Case(**{**values, **changes})


def step(inputs: Inputs, function: Callable[..., Any] = plain_policy_loss) -> tuple[Output, Tensor]:
    """Output and gradient of a plain loss on ``inputs``."""
    out = function(
        inputs.objective, inputs.logits, inputs.tokens, inputs.advantages, inputs.old_logprobs, inputs.mask,
        inputs.case.shape.softcap,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss * inputs.case.upstream, inputs.logits)
    return Output(*out), gradient


def as_step(output: Output, gradient: Tensor) -> Step:
    """What a trial returns."""
    return Step(output, (gradient,))


def problem_of(
    dtype: str = "fp32", shape: HeadShape | None = None, tokens: int = 128, fractions: tuple[float, ...] = (0.0, 0.5),
    objective: str = "mhpo_ahpo",
) -> Problem:  # fmt: skip
    """A problem of milliseconds."""
    case = LinearCase.of_tokens(shape or HeadShape("tiny", 48, 97), tokens, dtype, objective, 0.0, None)
    return draw(case, fractions, CPU, 0, draw_weight(case.shape, case.torch_dtype, CPU, 0))


def zero_row(index: int) -> Callable[[Tensor], Tensor]:
    """Zeroes one row of hidden's gradient."""
    return lambda gradient: gradient.flatten(0, 1).index_fill(0, torch.tensor([index]), 0.0).view(gradient.shape)


def linear_case(mode: Mode = "both", dtype: str = "fp32", inactive: float = 0.0) -> LinearCase:
    """A small LM head."""
    return LinearCase(HeadShape("tiny", 48, 97), 8, 4, dtype, "grpo", inactive, mode)


def timed(
    eager: float = 8.0, compile_: float = 2.5, copy: float = 0.1, extra: int = 0, peer: float | None = None,
    **fields: Any,
) -> Result:  # fmt: skip
    """A result with the times of others over ours, of a copy over ours, and our bytes beyond the gradient."""
    on_gpu = "gpu" in fields
    case = Case.of_tokens(SHAPES["qwen3"], 8192 if on_gpu else 1024, "bf16", "mhpo_ahpo", 0.0, False)
    seconds = {"hpo_fused": 1.0, "eager": eager, "compile": compile_, COPY: copy}
    if peer is not None:
        seconds["liger:triton"] = peer
    rows = [Row(case, name, samples_s=[value] * 3) for name, value in seconds.items()]
    rows[0].gradient_bytes = case.logits_bytes
    rows[0].peak_extra_bytes = case.logits_bytes + extra
    rows[0].errors = Errors(0.0, 1e-7, ColumnErrors(1e-3, 1e-3, 1e-3, 0.0), ColumnErrors(1e-3, 1e-3, 1e-3, 0.0))
    summarise(rows, "hpo_fused")
    known = {"created": "now", "cpu": "c", "threads": 2, "torch": "t", "python": "p", "hpo_fused": "0"}
    return Result({**known, **fields}, {}, rows=rows)


class Silent:
    """Progress that nobody sees."""

    def stage(self, text: str, *, timing: bool = False) -> None: ...
    def advance(self, cases: float) -> None: ...
