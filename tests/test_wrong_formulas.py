"""Wrong formulas: of the objectives in torch, of the loss of log-probabilities in the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import surrogate
from hpo_fused.backend import kernels
from hpo_fused.batch import Layout
from hpo_fused.interface import (
    KL_WEIGHT,
    OLD_LOGPROB,
    POLICY_WEIGHT,
    REF_LOGPROB,
    LossSpec,
    TokenTerms,
)
from hpo_fused.torch_backend import operations

from .mutants import TORCH, Mutants, kernel_module

MUTANTS = Mutants()
wrong, mutant = MUTANTS.wrong, MUTANTS.mutant

kernel_loss, kernel_surrogate = kernel_module("logprob_loss"), kernel_module("surrogate")

CLAMPED, CLIP = [(surrogate, "clamped")], [(surrogate, "_clip")]
HAZARD, GATE = [(surrogate, "log_fidelity_terms")], [(surrogate, "_soft_gate")]
SURROGATE, ESTIMATE, LOSS = [(surrogate, "surrogate")], [(surrogate, "kl_estimate")], [(operations, "token_loss")]
wrong("log_ratio_not_clamped", TORCH, CLAMPED, lambda _, d, bound: (d, torch.ones_like(d, dtype=torch.bool)))
wrong("clamp_with_derivative_one", TORCH, CLAMPED, lambda f, d, b: (f(d, b)[0], torch.ones_like(d, dtype=torch.bool)))
wrong("dual_clip_ignored", TORCH, CLIP, lambda f, *arguments: f(*arguments[:5], torch.inf))
wrong("delta_ignored", TORCH, CLIP, lambda f, *arguments: f(*arguments[:4], torch.inf, arguments[5]))
wrong("gate_temperatures_swapped", TORCH, GATE, lambda f, x, a, pos, neg: f(x, a, neg, pos))
wrong("hazard_of_unbounded_log_ratio", TORCH, HAZARD, lambda f, x, c, *h: (f(x, c, *h)[0], f(x, 1e6, *h)[1]))


@mutant(TORCH, (surrogate, "_log_fidelity"))
def hazard_without_stop_gradient(_: Any, x: Tensor, advantages: Tensor, *parameters: float) -> Any:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        psi, zeta = surrogate.log_fidelity_terms(leaf, *parameters)
        value = (psi - zeta).exp() * advantages
        (derivative,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), derivative


@mutant(TORCH, *CLIP)
def clipped_whatever_the_sign(_: Any, x: Tensor, advantages: Tensor, low: float, high: float, *__: float) -> Any:
    ratio = x.exp()
    inside = (ratio >= low) & (ratio <= high)
    return ratio.clamp(low, high) * advantages, torch.where(inside, ratio * advantages, 0.0)


def _shaped(name: str, kind: str, change: Callable[..., Any]) -> None:
    """A mutant whose surrogate of one kind is ``change(f, spec, x, advantages, logprobs)``."""
    wrong(
        name, TORCH, SURROGATE,
        lambda f, spec, *rest: change(f, spec, *rest) if spec.kind == kind else f(spec, *rest),
    )  # fmt: skip


def _parameters(name: str, kind: str, change: Callable[..., tuple[float, ...]]) -> None:
    """A mutant whose surrogate of one kind gets the parameters ``change(*parameters)``."""
    _shaped(name, kind, lambda f, spec, *rest: f(spec._replace(parameters=change(*spec.parameters)), *rest))


def _differentiated(f: Any, spec: LossSpec, x: Tensor, a: Tensor, logprobs: Tensor) -> Any:
    """As if the weight were no constant: where it moves with the ratio, s does."""
    value, by_ratio, by_logprob = f(spec, x, a, logprobs)
    moved = f(spec, x + 1e-3, a, logprobs)[0] - f(spec, x - 1e-3, a, logprobs)[0]
    return value, by_ratio + moved / 2e-3, by_logprob


for kind in ("truncated_ratio", "gamma_gate"):
    _shaped(f"{kind}_differentiated", kind, _differentiated)
_parameters("truncated_ratio_clips_what_is_outside", "truncated_ratio", lambda *p: (*p[:4], 1.0))
_parameters("truncated_ratio_bounds_swapped_by_sign", "truncated_ratio", lambda *p: (*p[2:4], *p[:2], p[4]))
_parameters("gamma_gate_signs_swapped", "gamma_gate", lambda *p: (*p[2:], *p[:2]))
_shaped("gamma_gate_without_log_probability", "gamma_gate", lambda f, s, x, a, _: f(s, x, a, torch.ones_like(x)))
_shaped("dro_penalty_not_differentiated", "dro", lambda f, *rest: (f(*rest)[0], 0 * rest[1], f(*rest)[2]))
_parameters("dro_penalty_doubled", "dro", lambda beta: (2 * beta,))


def _bounded(name: str, change: Callable[..., Any]) -> None:
    """A mutant of what a token's log-ratio contributes; ``change(f, spec, difference, advantages)``."""
    wrong(
        name, TORCH, [(surrogate, "token_log_ratio")],
        lambda f, spec, *rest: change(f, spec, *rest) if spec.kind == "geometric_mean" else f(spec, *rest),
    )  # fmt: skip


_bounded("geometric_mean_unbounded", lambda f, spec, d, a: (torch.where(a == 0, 0.0, d), f(spec, d, a)[1]))
_bounded("geometric_mean_gradient_beyond_the_bound", lambda f, spec, d, a: (f(spec, d, a)[0], torch.ones_like(d) > 0))
_bounded(
    "geometric_mean_bounded_on_both_sides",
    lambda f, spec, d, a: (d.clamp(*spec.parameters), (d > spec.parameters[0]) & (d < spec.parameters[1])),
)
_bounded("geometric_mean_signs_swapped", lambda f, spec, d, a: f(spec, d, -a))

wrong("kl_direction_reversed", TORCH, ESTIMATE, lambda f, kind, d: (f(kind, -d)[0], -f(kind, -d)[1]))
wrong("kl_gradient_dropped", TORCH, ESTIMATE, lambda f, kind, d: (f(kind, d)[0], torch.zeros_like(d)))


def _estimated(kind: str, change: Callable[..., Any]) -> None:
    """A mutant of the derivative of one KL kind: ``change(right, d)``."""
    wrong(
        f"kl_{kind}_slope_wrong", TORCH, ESTIMATE,
        lambda f, given, d: (f(given, d)[0], change(f(given, d)[1], d) if given == kind else f(given, d)[1]),
    )  # fmt: skip


_estimated("k1", lambda right, d: -right)
_estimated("k2", lambda right, d: -torch.expm1(d))
_estimated("k3", lambda right, d: -d)
_estimated("k3+", lambda right, d: -torch.expm1(d))
wrong("kl_ratio_missing", TORCH, LOSS, lambda f, spec, *rest: f(_other_kl(spec, "k3"), *rest))


def _other_kl(spec: LossSpec, kl: str) -> LossSpec:
    return spec._replace(kl=kl) if spec.kl == "k3_ratio" else spec


@mutant(TORCH, *LOSS)
def kl_ratio_not_differentiated(f: Any, spec: LossSpec, values: Tensor, logprobs: Tensor, *rest: Any) -> Any:
    """r k3 with sg[r]: at the tokens' own ratios only."""
    right = f(spec, values, logprobs, *rest)
    if spec.kl != "k3_ratio" or spec.ratio_level == "sequence":
        return right
    ratio = (logprobs - values[OLD_LOGPROB]).clamp(-20, 20).exp() if spec.off_policy else torch.ones_like(logprobs)
    k3 = surrogate.kl_estimate("k3", (values[REF_LOGPROB] - logprobs).clamp(-20, 20))[0]
    moved = torch.where(values[KL_WEIGHT] != 0, values[KL_WEIGHT] * ratio * k3, 0.0)
    return right._replace(logprob_coefficients=right.logprob_coefficients - moved)


@mutant(TORCH, *LOSS)
def kl_ratio_of_the_token_at_sequence_level(f: Any, spec: LossSpec, values: Tensor, *rest: Any) -> Any:
    right = f(spec, values, *rest)
    if spec.kl != "k3_ratio" or spec.ratio_level != "sequence":
        return right
    silent = values.clone()
    silent[POLICY_WEIGHT] = 0
    theirs, ours = f(spec, silent, *rest), f(spec._replace(ratio_level="token"), silent, *rest[:2])
    return surrogate.TokenLoss(*(
        None if r is None or t is None or o is None else r - t + o for r, t, o in zip(right, theirs, ours, strict=True)
    ))  # fmt: skip


@mutant(TORCH, *LOSS)
def entropy_gradient_dropped(f: Any, *arguments: Any) -> Any:
    right = f(*arguments)
    h = right.entropy_coefficients
    return right._replace(entropy_coefficients=None if h is None else torch.zeros_like(h))


@mutant(TORCH, (Layout, "response_mean"))
def sequence_mean_over_padding(_: Any, layout: Layout, value: Tensor) -> Tensor:
    quotient = layout.of_each_row(layout.response_sum(value) / layout.mask.shape[1])
    return torch.where(layout.mask, quotient, 0.0)


SHARED = [(operations, "response_ratio")]


def _spread(name: str, level: str, change: Callable[..., Any]) -> None:
    """A mutant of how the tokens of a response share a ratio at one level; ``change(right, layout)``."""

    def instead(f: Any, terms: TokenTerms, spec: LossSpec) -> Any:
        right = f(terms, spec)
        return change(right, Layout.of_terms(terms)) if spec.ratio_level == level else right

    wrong(name, TORCH, SHARED, instead)


_spread("sequence_gradient_not_shared", "sequence", lambda right, _: right._replace(spread=None))
_spread("sequence_gradient_summed", "sequence", lambda right, layout: right._replace(spread=layout.response_total))
_spread("sum_gradient_not_shared", "sequence_sum", lambda right, _: right._replace(spread=None))
_spread("sum_gradient_averaged", "sequence_sum", lambda right, layout: right._replace(spread=layout.response_mean))
_spread("sum_taken_for_mean", "sequence_sum", lambda right, layout: right._replace(reduced=layout.response_mean))
_spread("gspo_token_gradient_shared", "sequence_token", lambda right, _: right._replace(spread=right.reduced))
_spread("gspo_token_own_ratio", "sequence_token", lambda right, layout: right._replace(reduced=lambda value: value))

# ---------------------------------------------------------------------------------------------------------------
# in the kernels


@mutant(("logprob_loss",), (kernels, "logprob_loss"))
def mean_over_padding(f: Any, logprobs: Tensor, entropy: Any, terms: TokenTerms, spec: LossSpec) -> Any:
    lengths = torch.full_like(terms.lengths, terms.targets.shape[1])
    return f(logprobs, entropy, terms._replace(response_statistics=torch.stack((lengths, terms.signs))), spec)


@mutant(("logprob_loss",), (kernel_loss, "token_loss"), interpreted=True)
def gradient_a_thousandth_off(f: Any, *arguments: Any) -> Any:
    loss, by_ratio, by_logprob, h = f(*arguments)
    return loss, by_ratio * 1.001, by_logprob, h


@mutant(("logprob_loss",), (kernel_loss, "token_loss"), interpreted=True)
def entropy_gradient_lost(f: Any, *arguments: Any) -> Any:
    *rest, h = f(*arguments)
    return *rest, h * 0


OF_KERNELS = ("logprob_loss",)


def _device(name: str, function: str, change: Callable[..., Any]) -> None:
    """A mutant of a formula of the kernels."""
    wrong(name, OF_KERNELS, [(kernel_surrogate, function)], change, interpreted=True)


_device("estimate_with_slope_zero", "kl_estimate", lambda f, d, kind: (f(d, kind)[0], f(d, kind)[1] * 0))
_device("gate_of_the_other_sign", "gamma_gate", lambda f, x, a, p: f(x, -a, p))
_device("bounds_of_the_other_sign", "truncated_ratio", lambda f, x, a, p: f(x, -a, p))
wrong(
    "bounded_log_ratio_differentiated", OF_KERNELS, [(kernel_loss, "token_log_ratio")],
    lambda f, *rest: (f(*rest)[0], f(*rest)[1] * 0 + 1.0), interpreted=True,
)  # fmt: skip


def _at_level(name: str, level: str, taken_for: str) -> None:
    """A mutant of the launcher that takes a ratio level for another."""
    wrong(
        name, OF_KERNELS, [(kernels, "logprob_loss")],
        lambda f, *rest: f(*rest[:-1], rest[-1]._replace(ratio_level=taken_for))
        if rest[-1].ratio_level == level else f(*rest),
    )  # fmt: skip


_at_level("sum_as_mean", "sequence_sum", "sequence")
_at_level("gspo_token_as_gspo", "sequence_token", "sequence")


@pytest.mark.parametrize(("suite", "name"), MUTANTS.parameters())
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    MUTANTS.reject(suite, name, monkeypatch, device)
