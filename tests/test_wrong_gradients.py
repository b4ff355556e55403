"""Wrong gradients of the logits, temperatures and columns among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused.interface import (
    LogitTransform,
)
from hpo_fused.torch_backend import operations

from .mutants import BOTH, OF_LINEAR, TORCH, Mutants, kernel_module, of_backends

MUTANTS = Mutants()
wrong, mutant = MUTANTS.wrong, MUTANTS.mutant

kernel_policy = kernel_module("policy_loss")


def spoils_gradient(*suites: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let ``change(out, logits, tokens, transform)`` spoil every gradient that either backend writes."""

    def register(change: Callable[..., None]) -> Callable[..., None]:
        def instead(f: Any, logits: Tensor, targets: Tensor, *rest: Any) -> None:
            before, out = logits.detach().clone(), rest[-1]
            f(logits, targets, *rest)
            (transform,) = (argument for argument in rest if isinstance(argument, LogitTransform))
            if out is not None:
                change(out, before, targets.clamp(min=0).long(), transform)

        wrong(change.__name__, suites, [*of_backends("policy_loss"), *of_backends("token_gradient")], instead)
        return change

    return register


def temperature_of(transform: LogitTransform) -> float | Tensor:
    return transform.temperature if transform.temperatures is None else transform.temperatures.unsqueeze(-1)


@spoils_gradient(*BOTH, *OF_LINEAR)
def temperature_missing_from_the_gradient(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    out.mul_(temperature_of(transform))


@spoils_gradient(*BOTH)
def softcap_derivative_missing(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    if transform.softcap is not None:
        slope = 1 - torch.tanh(logits.nan_to_num() / transform.softcap).square()
        out.div_(slope.clamp(min=1e-6).to(out.dtype))


@spoils_gradient(*BOTH)
def target_column_off_by_one(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    column = tokens.unsqueeze(-1)
    neighbour = (column + 1) % logits.shape[-1]
    ours, other = out.gather(-1, column), out.gather(-1, neighbour)
    out.scatter_(-1, neighbour, ours)
    out.scatter_(-1, column, other)


@spoils_gradient(*BOTH)
def gradient_zero(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    out.zero_()


@spoils_gradient(*BOTH)
def target_column_forgotten(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    out.scatter_(-1, tokens.unsqueeze(-1), 0.0)


@spoils_gradient(*BOTH)
def one_small_row_wrong(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    """Ten percent off in the row with the smallest gradient: an absolute tolerance would let it pass."""
    size = out.abs().amax(-1)
    row = torch.where(size > 0, size, torch.inf).argmin()
    out[row // out.shape[1], row % out.shape[1]] *= 1.1  # by place: the gradient's rows may lie apart


@spoils_gradient(*BOTH)
def log_probability_by_subtraction(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    """1 - p of the sampled token computed from p: no digit left where p is close to 1."""
    if transform.softcap is None:
        column, z = tokens.unsqueeze(-1), logits.nan_to_num() / temperature_of(transform)
        p = z.softmax(-1).gather(-1, column)
        exact = -torch.expm1(z.double().log_softmax(-1).gather(-1, column)).clamp(max=0)
        out.scatter_(-1, column, (out.gather(-1, column) * ((1 - p) / exact.clamp(min=1e-300))).to(out.dtype))


@spoils_gradient("linear")
def gradient_of_the_logits_truncated(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
    """Towards zero instead of to the nearest: half a unit more than a rounding may be off."""
    if out.dtype == torch.bfloat16:
        bits = out.view(torch.int16)
        bits.copy_(torch.where((bits & 1 == 1) & (out != 0), bits - 1, bits))


@mutant(BOTH, *(place for name in ("policy_loss", "token_statistics", "token_gradient") for place in of_backends(name)))
def temperature_of_the_next_row(f: Any, *arguments: Any) -> None:
    f(*(
        argument._replace(temperatures=argument.temperatures.roll(1, -1))
        if isinstance(argument, LogitTransform) and argument.temperatures is not None else argument
        for argument in arguments
    ))  # fmt: skip


@mutant(TORCH, (operations, "write_gradient"))
def temperatures_ignored_by_the_second_sweep(f: Any, sweeps: Any, *rest: Any) -> None:
    given = sweeps.transform
    sweeps.transform = given._replace(temperatures=None)
    f(sweeps, *rest)
    sweeps.transform = given


@mutant(("triton",), (kernel_policy, "row_gradient"), interpreted=True)
def temperatures_ignored_by_the_kernel_s_second_sweep(f: Any, *arguments: Any) -> None:
    """But for the factor of 1 / temperature; numbers in a transform are not of a row."""
    *before, (scale, inverse, rate) = arguments[:9]
    f(*before, (scale if isinstance(scale, float) else scale / inverse, inverse, rate), *arguments[9:])


@pytest.mark.parametrize(("suite", "name"), MUTANTS.parameters())
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    MUTANTS.reject(suite, name, monkeypatch, device)
