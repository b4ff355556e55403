"""The suites have to reject wrong code: each mutation below is a mistake that somebody has made or could make.

Every mutant replaces one piece of the package and must fail at least one case of its suites with an assertion (not a
crash). A mutant that survives means a hole in a table. The cases are those that the tests hold the right code against.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import ops, surrogate, torch_backend
from hpo_fused import token_terms as torch_terms
from hpo_fused.backend import kernels
from hpo_fused.batch import BatchStatistics, Layout
from hpo_fused.interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    MASKED,
    POLICY_WEIGHT,
    Batch,
    LogitTransform,
    LossSpec,
    TokenTerms,
)
from hpo_fused.linear import autograd as linear_autograd
from hpo_fused.linear import functions as linear_functions
from hpo_fused.linear import head as linear_head
from hpo_fused.linear.head import Head, HeadGradients
from hpo_fused.linear.memory import ChunkPlan
from hpo_fused.linear.rows import Rows
from hpo_fused.torch_backend import operations

from . import test_logprob_loss, test_token_terms
from .equivalence import check
from .linear_equivalence import LinearCase, check_linear, check_linear_logprobs
from .test_equivalence import PRESETS, difficult_rows, presets, sequences, shapings, terms

Patch = pytest.MonkeyPatch
Apply = Callable[[Patch], None]
CPU = torch.device("cpu")
kernel_terms, kernel_loss = (
    None if kernels is None else importlib.import_module(f"hpo_fused.kernels.{name}")
    for name in ("token_terms", "logprob_loss")
)

# ---------------------------------------------------------------------------------------------------------------
# the suites

# The most discerning first, and first of all what finds wrong weights: Triton's interpreter takes its time.
_FIRST = (
    "uncounted-response", "peaked-float32", "response-packed-True", "group_mean_length-padded-False", "weights",
    "kl-entropy-transform", "mean_length-padded-True",
)  # fmt: skip
LOGITS = sorted(
    (c for c in difficult_rows() + terms() + sequences() + shapings() + presets() if c.dtype == torch.float32),
    key=lambda case: _FIRST.index(case.name) if case.name in _FIRST else len(_FIRST),
)
# Few cases, each with much in it: all that test_linear_equivalence.py holds the right code against is far more.
_OBJECTIVE = hf.Objective.preset("mhpo_ahpo", kl_coef=0.04, entropy_coef=0.02)
_TRANSFORM = {"temperature": 0.7, "softcap": 6.0}
LINEAR = [
    LinearCase("token", _OBJECTIVE, torch.bfloat16, bias=True, chunk_rows=3, options=_TRANSFORM),
    LinearCase("token-float32", PRESETS["mhpo_ahpo"], bias=True, chunk_rows=4),
    LinearCase("one-chunk", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, layout="packed"),
    LinearCase("sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3, small_ratios=True),
    LinearCase("half", PRESETS["mhpo_ahpo"], torch.float16, chunk_rows=4, bias=True),
    LinearCase("main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    LinearCase("bound", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=4, slack=12),
    LinearCase("float32-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
]


class Suite(NamedTuple):
    """Cases, and what is asserted of each on a device."""

    cases: Sequence[Any]
    check: Callable[[Any, torch.device], None]

    def fails(self, device: torch.device) -> bool:
        for case in self.cases:
            try:
                self.check(case, device)
            except AssertionError:
                return True
        return False


SUITES = {
    "torch": Suite(LOGITS, lambda case, _: check(case, "torch", CPU)),
    "triton": Suite(LOGITS, lambda case, device: check(case, "triton", device)),
    "token_terms": Suite(test_token_terms.CASES, lambda case, device: test_token_terms.check(case, "triton", device)),
    "logprob_loss": Suite(
        test_logprob_loss.CASES[::-1], lambda case, device: test_logprob_loss.check(*case, "triton", device)
    ),
    "linear": Suite(
        LINEAR, lambda case, _: check_linear(case, "torch", CPU, scale=None if case.dtype == torch.float16 else 0.5)
    ),
    "linear_logprobs": Suite(LINEAR[:1], lambda case, _: check_linear_logprobs(case, "torch", CPU)),
}
# By suite and name; whether the interpreter is needed, because a device function is replaced.
MUTANTS: dict[tuple[str, str], tuple[Apply, bool]] = {}
OF_BOTH_BACKENDS = ("torch", "triton")
OF_LINEAR = ("linear", "linear_logprobs")


def mutant(*suites: str, interpreted: bool = False) -> Callable[[Apply], Apply]:
    """Each of ``suites`` has to reject the mutant."""

    def register(function: Apply) -> Apply:
        for suite in suites:
            MUTANTS[suite, function.__name__] = function, interpreted
        return function

    return register


@pytest.mark.parametrize("suite", ["linear", "linear_logprobs"])
def test_the_suite_passes(suite: str) -> None:
    """Or a mutant's failure would say nothing. (The other suites' cases are tests of their own.)"""
    assert not SUITES[suite].fails(CPU)


# ---------------------------------------------------------------------------------------------------------------
# ways to replace a piece


def _backends() -> list[ModuleType]:
    return [torch_backend] if kernels is None else [torch_backend, kernels]


def wrap_token_loss(patch: Patch, change: Callable[..., Any]) -> None:
    """Replace the torch backend's per-token loss by ``change(original, spec, values, logprobs, entropy[, mean])``."""
    patch.setattr(operations, "token_loss", lambda *arguments: change(surrogate.token_loss, *arguments))


def wrap_gradient(patch: Patch, change: Callable[..., None]) -> None:
    """Let ``change(out, logits, tokens, transform)`` spoil every gradient that either backend writes."""
    for module in _backends():
        _wrap_gradient_of(module, patch, change)


def _wrap_gradient_of(module: ModuleType, patch: Patch, change: Callable[..., None]) -> None:
    one_call, second_sweep = module.policy_loss, module.token_gradient

    def spoiled_call(
        logits: Tensor, targets: Tensor, values: Tensor, spec: LossSpec, transform: LogitTransform, results: Tensor,
        out: Tensor | None,
    ) -> None:  # fmt: skip
        before = logits.detach().clone()
        one_call(logits, targets, values, spec, transform, results, out)
        if out is not None:
            change(out, before, targets.clamp(min=0).long(), transform)

    def spoiled_sweep(
        logits: Tensor, targets: Tensor, statistics: Any, c: Any, h: Any, transform: LogitTransform, out: Tensor
    ) -> None:
        before = logits.detach().clone()
        second_sweep(logits, targets, statistics, c, h, transform, out)
        change(out, before, targets.clamp(min=0).long(), transform)

    patch.setattr(module, "policy_loss", spoiled_call)
    patch.setattr(module, "token_gradient", spoiled_sweep)


def wrap_batch(patch: Patch, change: Callable[[Batch], Batch]) -> None:
    """Replace what both backends are told about the batch."""
    for module in _backends():
        original = module.token_terms
        patch.setattr(module, "token_terms", lambda batch, *rest, original=original: original(change(batch), *rest))


def wrap_terms(patch: Patch, change: Callable[[Callable[[Batch], TokenTerms], Batch], TokenTerms]) -> None:
    """Replace the terms of every token by ``change(token_terms, batch)``."""
    for module in _backends():
        original = module.token_terms
        patch.setattr(
            module, "token_terms",
            lambda batch, *rest, original=original: change(lambda given: original(given, *rest), batch),
        )  # fmt: skip


def with_values(terms: TokenTerms, **changes: Tensor) -> TokenTerms:
    """``terms`` with other values of the terms named in lower case."""
    places = {"policy_weight": POLICY_WEIGHT, "kl_weight": KL_WEIGHT, "entropy_weight": ENTROPY_WEIGHT}
    values = terms.values.clone()
    for name, value in changes.items():
        values[places[name]] = value
    return terms._replace(values=values)


def wrap_response_statistics(patch: Patch, change: Callable[[Tensor, Tensor, int, bool], None]) -> None:
    """Let ``change(statistics, advantages, T, per_token)`` spoil what the kernels counted of each response."""
    assert kernel_terms is not None
    original = kernel_terms.response_statistics_kernel

    class Spoiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(
                statistics: Tensor, mask: Any, advantages: Tensor, cu_seqlens: Any, N: int, T: int, *rest: Any,
                **options: Any,
            ) -> None:  # fmt: skip
                original[grid](statistics, mask, advantages, cu_seqlens, N, T, *rest, **options)
                change(statistics, advantages, T, options["PER_TOKEN"])

            return launch

    patch.setattr(kernel_terms, "response_statistics_kernel", Spoiled())


def wrap_device_function(patch: Patch, module: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a device function by ``change(original, *arguments)``, which the interpreter alone can call."""
    original = getattr(module, name)
    patch.setattr(module, name, lambda *arguments: change(original, *arguments))


# ---------------------------------------------------------------------------------------------------------------
# the objectives' formulas


@mutant("torch")
def hazard_without_stop_gradient(patch: Patch) -> None:
    def shape(x: Tensor, advantages: Tensor, *parameters: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            psi, zeta = surrogate.log_fidelity_terms(leaf, *parameters)
            value = (psi - zeta).exp() * advantages
            (derivative,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), derivative

    patch.setattr(surrogate, "_log_fidelity", shape)


@mutant("torch")
def hazard_of_unbounded_log_ratio(patch: Patch) -> None:
    original = surrogate.log_fidelity_terms
    patch.setattr(surrogate, "log_fidelity_terms", lambda x, c, *h: (original(x, c, *h)[0], original(x, 1e6, *h)[1]))


@mutant("torch")
def kl_direction_reversed(patch: Patch) -> None:
    patch.setattr(surrogate, "k3", lambda d: torch.expm1(-d) + d)


@mutant("torch")
def kl_gradient_dropped(patch: Patch) -> None:
    def change(original: Any, spec: LossSpec, *rest: Any) -> Any:
        right, without = original(spec, *rest), original(spec._replace(kl=False), *rest)
        return right._replace(logprob_coefficients=without.logprob_coefficients)

    wrap_token_loss(patch, change)


@mutant("torch")
def entropy_gradient_dropped(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        right = original(*arguments)
        h = right.entropy_coefficients
        return right._replace(entropy_coefficients=None if h is None else torch.zeros_like(h))

    wrap_token_loss(patch, change)


@mutant("torch")
def log_ratio_not_clamped(patch: Patch) -> None:
    patch.setattr(surrogate, "clamped", lambda d, bound: (d, torch.ones_like(d, dtype=torch.bool)))


@mutant("torch")
def clamp_with_derivative_one(patch: Patch) -> None:
    patch.setattr(surrogate, "clamped", lambda d, b: (d.clamp(-b, b), torch.ones_like(d, dtype=torch.bool)))


@mutant("torch")
def clipped_whatever_the_sign(patch: Patch) -> None:
    def shape(x: Tensor, advantages: Tensor, low: float, high: float, *_: float) -> tuple[Tensor, Tensor]:
        ratio = x.exp()
        inside = (ratio >= low) & (ratio <= high)
        return ratio.clamp(low, high) * advantages, torch.where(inside, ratio * advantages, 0.0)

    patch.setattr(surrogate, "_clip", shape)


@mutant("torch")
def dual_clip_ignored(patch: Patch) -> None:
    original = surrogate._clip
    patch.setattr(surrogate, "_clip", lambda x, a, low, high, delta, dual: original(x, a, low, high, delta, torch.inf))


@mutant("torch")
def delta_ignored(patch: Patch) -> None:
    original = surrogate._clip
    patch.setattr(surrogate, "_clip", lambda x, a, low, high, delta, dual: original(x, a, low, high, torch.inf, dual))


@mutant("torch")
def gate_temperatures_swapped(patch: Patch) -> None:
    original = surrogate._soft_gate
    patch.setattr(surrogate, "_soft_gate", lambda x, a, pos, neg: original(x, a, neg, pos))


@mutant("torch")
def truncated_ratio_differentiated(patch: Patch) -> None:
    original = surrogate._truncated_ratio

    def shape(x: Tensor, a: Tensor, logprobs: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        value, derivative = original(x, a, logprobs, low, high)
        return value, derivative + torch.where((x.exp() > low) & (x.exp() < high), value, 0.0)

    patch.setattr(surrogate, "_truncated_ratio", shape)


@mutant("torch")
def sequence_mean_over_padding(patch: Patch) -> None:
    def mean(layout: Layout, value: Tensor) -> Tensor:
        quotient = layout.of_each_row(layout.response_sum(value) / layout.mask.shape[1])
        return torch.where(layout.mask, quotient, 0.0)

    patch.setattr(Layout, "response_mean", mean)


@mutant("torch")
def sequence_gradient_not_shared(patch: Patch) -> None:
    def change(original: Any, spec: Any, values: Any, logprobs: Tensor, entropy: Any, mean: Any = None) -> Any:
        if mean is None:
            return original(spec, values, logprobs, entropy)
        calls: list[int] = []

        def once(value: Tensor) -> Tensor:  # forward through the mean, backward as if each token had its own ratio
            calls.append(1)
            return mean(value) if len(calls) == 1 else value

        return original(spec, values, logprobs, entropy, once)

    wrap_token_loss(patch, change)


# ---------------------------------------------------------------------------------------------------------------
# the terms of every token


@mutant("torch")
def alpha_counted_per_token(patch: Patch) -> None:
    def totals(batch: Batch, lengths: Tensor, signs: Tensor) -> Any:
        if batch.totals is not None:
            return batch.totals
        return batch.responses, lengths.sum(), lengths[signs > 0].sum(), lengths[signs < 0].sum()

    patch.setattr(torch_terms, "totals_of_batch", totals)


@mutant("torch")
def zero_advantage_counted_negative(patch: Patch) -> None:
    original = torch_terms.totals_of_batch

    def totals(batch: Batch, lengths: Tensor, signs: Tensor) -> Any:
        right = original(batch, lengths, signs)
        return right if batch.totals is not None else (*right[:3], (signs <= 0).sum())

    patch.setattr(torch_terms, "totals_of_batch", totals)


@mutant(*OF_BOTH_BACKENDS)
def statistics_ignored(patch: Patch) -> None:
    wrap_batch(patch, lambda batch: batch._replace(totals=None))


@mutant(*OF_BOTH_BACKENDS)
def responses_of_the_call_alone(patch: Patch) -> None:
    def change(batch: Batch) -> Batch:
        return batch if batch.totals is None else batch._replace(totals=(batch.responses, *batch.totals[1:]))

    wrap_batch(patch, change)


@mutant(*OF_BOTH_BACKENDS)
def gradient_average_forgotten(patch: Patch) -> None:
    wrap_batch(patch, lambda batch: batch._replace(gradient_average=1.0))


@mutant(*OF_BOTH_BACKENDS)
def adaptive_weight_fixed_at_its_bound(patch: Patch) -> None:
    def change(batch: Batch) -> Batch:
        return batch._replace(weighting="fixed") if batch.weighting == "adaptive" else batch

    wrap_batch(patch, change)


@mutant(*OF_BOTH_BACKENDS)
def token_mean_for_response_mean(patch: Patch) -> None:
    def change(batch: Batch) -> Batch:
        return batch._replace(normalization="mean_length") if batch.normalization == "response" else batch

    wrap_batch(patch, change)


@mutant(*OF_BOTH_BACKENDS, "logprob_loss")
def caller_weights_dropped(patch: Patch) -> None:
    wrap_batch(patch, lambda batch: batch._replace(token_weights=None))


@mutant(*OF_BOTH_BACKENDS)
def caller_weights_transposed(patch: Patch) -> None:
    def change(batch: Batch) -> Batch:
        weights = batch.token_weights
        return batch if weights is None else batch._replace(token_weights=weights.roll(1, -1))

    wrap_batch(patch, change)


@mutant(*OF_BOTH_BACKENDS)
def hysteretic_weight_on_positives(patch: Patch) -> None:
    def change(token_terms: Callable[[Batch], TokenTerms], batch: Batch) -> TokenTerms:
        flipped = token_terms(batch._replace(advantages=-batch.advantages))
        return with_values(token_terms(batch), policy_weight=flipped.values[POLICY_WEIGHT])

    wrap_terms(patch, change)


@mutant(*OF_BOTH_BACKENDS)
def caller_weights_on_penalties(patch: Patch) -> None:
    def change(token_terms: Callable[[Batch], TokenTerms], batch: Batch) -> TokenTerms:
        right = token_terms(batch)
        if batch.token_weights is None:
            return right
        layout = Layout.of_terms(right)
        weights = layout.rows(batch.token_weights, batch.weight_per_token)
        kl, entropy = (
            torch.where(layout.mask, right.values[term] * weights, 0.0) for term in (KL_WEIGHT, ENTROPY_WEIGHT)
        )
        return with_values(right, kl_weight=kl, entropy_weight=entropy)

    wrap_terms(patch, change)


@mutant(*OF_BOTH_BACKENDS)
def kl_not_normalised(patch: Patch) -> None:
    def change(token_terms: Callable[[Batch], TokenTerms], batch: Batch) -> TokenTerms:
        right = token_terms(batch)
        return with_values(right, kl_weight=batch.kl_coef * (right.values[KL_WEIGHT] != 0))

    wrap_terms(patch, change)


@mutant(*OF_BOTH_BACKENDS)
def entropy_bonus_as_penalty(patch: Patch) -> None:
    def change(token_terms: Callable[[Batch], TokenTerms], batch: Batch) -> TokenTerms:
        right = token_terms(batch)
        return with_values(right, entropy_weight=-right.values[ENTROPY_WEIGHT])

    wrap_terms(patch, change)


@mutant("torch")
def padded_length_as_response_length(patch: Patch) -> None:
    original = Layout.lengths
    patch.setattr(Layout, "lengths", lambda layout: torch.full_like(original(layout), layout.mask.shape[1]))


@mutant(*OF_BOTH_BACKENDS)
def group_normaliser_without_group_count(patch: Patch) -> None:
    original = BatchStatistics.group_normalizer
    patch.setattr(
        BatchStatistics,
        "group_normalizer",
        lambda self, groups: original(self, groups) / len(set(self.group_ids.tolist())),
    )


@mutant(*OF_BOTH_BACKENDS)
def mask_ignored(patch: Patch) -> None:
    patch.setattr(ops, "check_token_ids", lambda *_: None)

    def change(batch: Batch) -> Batch:
        assert batch.tokens is not None
        return batch._replace(mask=None, tokens=batch.tokens.clamp(min=0))

    wrap_batch(patch, change)
    for module in _backends():  # garbage made plausible
        original = module.policy_loss
        patch.setattr(
            module, "policy_loss",
            lambda logits, *rest, original=original: original(torch.nan_to_num(logits), *rest),
        )  # fmt: skip


@mutant("triton")
def padded_lengths(patch: Patch) -> None:
    wrap_response_statistics(patch, lambda statistics, advantages, T, per_token: statistics[0].fill_(T))


@mutant("triton")
def zero_counts_as_negative(patch: Patch) -> None:
    wrap_response_statistics(patch, lambda statistics, *_: statistics[1].masked_fill_(statistics[1] == 0, -1))


@mutant("triton")
def signs_of_masked_responses_count(patch: Patch) -> None:
    def change(statistics: Tensor, advantages: Tensor, T: int, per_token: bool) -> None:
        if not per_token:
            statistics[1].copy_(advantages.sign())

    wrap_response_statistics(patch, change)


@mutant("triton", interpreted=True)
def hysteretic_weight_of_the_other_sign(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        unmasked, advantage, policy, penalty = original(*arguments)
        alpha, tl = arguments[5], kernel_terms.tl  # type: ignore[union-attr]
        policy = tl.where(advantage < 0, policy / alpha, tl.where(advantage > 0, policy * alpha, policy))
        return unmasked, advantage, policy, penalty

    wrap_device_function(patch, kernel_terms, "_policy_terms", change)


@mutant("triton", interpreted=True)
def penalties_weighted_too(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        unmasked, advantage, policy, _ = original(*arguments)
        return unmasked, advantage, policy, policy

    wrap_device_function(patch, kernel_terms, "_policy_terms", change)


@mutant("token_terms", interpreted=True)
def weights_ignored(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        unmasked, advantage, _, penalty = original(*arguments)
        return unmasked, advantage, penalty, penalty

    wrap_device_function(patch, kernel_terms, "_policy_terms", change)


@mutant("token_terms", interpreted=True)
def mask_ignored_by_the_terms(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        return arguments[2], *original(*arguments)[1:]

    wrap_device_function(patch, kernel_terms, "_policy_terms", change)


@mutant("token_terms", interpreted=True)
def first_block_only(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        first, last = original(*arguments)
        return first, kernel_terms.tl.minimum(last, first + 1024)  # type: ignore[union-attr]

    # What is not written must not look right by chance.
    patch.setattr(torch, "empty", torch.ones)
    wrap_device_function(patch, kernel_terms, "response_range", change)


# ---------------------------------------------------------------------------------------------------------------
# the loss of log-probabilities, in the kernels


@mutant("logprob_loss")
def mean_over_padding(patch: Patch) -> None:
    assert kernels is not None
    original = kernels.logprob_loss

    def change(logprobs: Tensor, entropy: Any, terms: TokenTerms, spec: LossSpec) -> Any:
        lengths = torch.full_like(terms.lengths, terms.targets.shape[1])
        return original(
            logprobs, entropy, terms._replace(statistics=torch.stack((lengths, terms.signs))), spec
        )  # fmt: skip

    patch.setattr(kernels, "logprob_loss", change)


@mutant("logprob_loss", interpreted=True)
def gradient_a_thousandth_off(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        loss, c, h = original(*arguments)
        return loss, c * 1.001, h

    wrap_device_function(patch, kernel_loss, "token_loss", change)


@mutant("logprob_loss", interpreted=True)
def entropy_gradient_lost(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        loss, c, h = original(*arguments)
        return loss, c, h * 0

    wrap_device_function(patch, kernel_loss, "token_loss", change)


# ---------------------------------------------------------------------------------------------------------------
# the gradient of the logits


@mutant(*OF_BOTH_BACKENDS, *OF_LINEAR)
def temperature_missing_from_the_gradient(patch: Patch) -> None:
    wrap_gradient(patch, lambda out, logits, tokens, transform: out.mul_(transform.temperature))


@mutant(*OF_BOTH_BACKENDS)
def softcap_derivative_missing(patch: Patch) -> None:
    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        if transform.softcap is not None:
            slope = 1 - torch.tanh(logits.nan_to_num() / transform.softcap).square()
            out.div_(slope.clamp(min=1e-6).to(out.dtype))

    wrap_gradient(patch, spoil)


@mutant(*OF_BOTH_BACKENDS)
def target_column_off_by_one(patch: Patch) -> None:
    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        column = tokens.unsqueeze(-1)
        neighbour = (column + 1) % logits.shape[-1]
        ours, other = out.gather(-1, column), out.gather(-1, neighbour)
        out.scatter_(-1, neighbour, ours)
        out.scatter_(-1, column, other)

    wrap_gradient(patch, spoil)


@mutant(*OF_BOTH_BACKENDS)
def gradient_zero(patch: Patch) -> None:
    wrap_gradient(patch, lambda out, logits, tokens, transform: out.zero_())


@mutant(*OF_BOTH_BACKENDS)
def target_column_forgotten(patch: Patch) -> None:
    wrap_gradient(patch, lambda out, logits, tokens, transform: out.scatter_(-1, tokens.unsqueeze(-1), 0.0))


@mutant(*OF_BOTH_BACKENDS)
def one_small_row_wrong(patch: Patch) -> None:
    """Ten percent off in the row with the smallest gradient: an absolute tolerance would let it pass."""

    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        size = out.abs().amax(-1)
        row = torch.where(size > 0, size, torch.inf).argmin()
        out[row // out.shape[1], row % out.shape[1]] *= 1.1  # by place: the gradient's rows may lie apart

    wrap_gradient(patch, spoil)


@mutant(*OF_BOTH_BACKENDS)
def log_probability_by_subtraction(patch: Patch) -> None:
    """1 - p of the sampled token computed from p: no digit left where p is close to 1."""

    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        if transform.softcap is not None:
            return
        column, z = tokens.unsqueeze(-1), logits.nan_to_num() / transform.temperature
        p = z.softmax(-1).gather(-1, column)
        exact = -torch.expm1(z.double().log_softmax(-1).gather(-1, column)).clamp(max=0)
        out.scatter_(-1, column, (out.gather(-1, column) * ((1 - p) / exact.clamp(min=1e-300))).to(out.dtype))

    wrap_gradient(patch, spoil)


@mutant("linear")
def gradient_of_the_logits_truncated(patch: Patch) -> None:
    """Towards zero instead of to the nearest: half a unit more than a rounding may be off."""

    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
        if out.dtype == torch.bfloat16:
            bits = out.view(torch.int16)
            bits.copy_(torch.where((bits & 1 == 1) & (out != 0), bits - 1, bits))

    wrap_gradient(patch, spoil)


# ---------------------------------------------------------------------------------------------------------------
# the linear path's chunks and GEMMs


def wrap_accumulate(patch: Patch, change: Callable[..., None]) -> None:
    """Replace what adds a chunk to dweight by ``change(original, total, gradient, x, fresh)``."""
    original = linear_head._accumulate
    patch.setattr(linear_head, "_accumulate", lambda total, g, x, *, fresh: change(original, total, g, x, fresh))


class Seen:
    """The chunks that one HeadGradients was given before."""

    def __init__(self, rows: Rows) -> None:
        self.total, self.chunks = len(rows), list[Rows]()

    @property
    def count(self) -> int:
        return sum(map(len, self.chunks))


def wrap_add(patch: Patch, change: Callable[..., None]) -> None:
    """Replace a chunk's contributions by ``change(add, gradients, seen, rows, x, gradient)``."""
    init, add = HeadGradients.__init__, HeadGradients.add

    def remember(self: HeadGradients, inputs: Any, head: Head, rows: Rows, *rest: Any) -> None:
        init(self, inputs, head, rows, *rest)
        self.seen = Seen(rows)  # type: ignore[attr-defined]

    def changed(self: HeadGradients, rows: Rows, x: Tensor, gradient: Tensor) -> None:
        seen: Seen = self.seen  # type: ignore[attr-defined]
        change(add, self, seen, rows, x, gradient)
        seen.chunks.append(rows)

    patch.setattr(HeadGradients, "__init__", remember)
    patch.setattr(HeadGradients, "add", changed)


def wrap_finish(patch: Patch, change: Callable[[HeadGradients, Any], Any]) -> None:
    """Replace the finished gradients by ``change(gradients, (hidden, weight, bias))``."""
    original = HeadGradients.finish
    patch.setattr(HeadGradients, "finish", lambda self: change(self, original(self)))


def hidden_rows(gradients: HeadGradients) -> Tensor:
    assert gradients.hidden is not None
    return gradients.hidden.view(-1, gradients.hidden.shape[-1])


@mutant("linear")
def weight_gradient_accumulated_in_bfloat16(patch: Patch) -> None:
    def change(original: Any, total: Tensor, gradient: Tensor, x: Tensor, fresh: bool) -> None:
        original(total, gradient, x, fresh=fresh)
        total.copy_(total.to(torch.bfloat16))

    wrap_accumulate(patch, change)


@mutant("linear")
def weight_gradient_rounded_once_more(patch: Patch) -> None:
    """A float32 sum cut to 10 bits after the point, as TF32 has them."""

    def change(original: Any, total: Tensor, gradient: Tensor, x: Tensor, fresh: bool) -> None:
        original(total, gradient, x, fresh=fresh)
        if total.dtype == torch.float32:
            total.copy_((total.view(torch.int32) & -(1 << 13)).view(torch.float32))

    wrap_accumulate(patch, change)


@mutant("linear")
def last_chunk_dropped(patch: Patch) -> None:
    original = ChunkPlan.slices
    patch.setattr(ChunkPlan, "slices", lambda plan, total: original(plan, total)[: max(plan.chunks - 1, 1)])


@mutant(*OF_LINEAR)
def last_chunk_dropped_from_the_gradients(patch: Patch) -> None:
    def change(add: Any, self: HeadGradients, seen: Seen, rows: Rows, *operands: Tensor) -> None:
        if not seen.chunks or seen.count + len(rows) < seen.total:
            add(self, rows, *operands)

    wrap_add(patch, change)


@mutant("linear")
def chunks_overwrite_each_other(patch: Patch) -> None:
    wrap_accumulate(patch, lambda original, total, gradient, x, fresh: original(total, gradient, x, fresh=True))


@mutant("linear")
def first_chunk_added_to_what_was_there(patch: Patch) -> None:
    def change(original: Any, total: Tensor, gradient: Tensor, x: Tensor, fresh: bool) -> None:
        if fresh:
            total.fill_(1e-3)  # memory that was not cleared
        original(total, gradient, x, fresh=False)

    wrap_accumulate(patch, change)


@mutant("linear")
def main_grad_overwritten(patch: Patch) -> None:
    original = HeadGradients.__init__

    def init(self: HeadGradients, *arguments: Any) -> None:
        original(self, *arguments)
        if self.into is not None:
            self.into.zero_()

    patch.setattr(HeadGradients, "__init__", init)


@mutant(*OF_LINEAR)
def rows_scattered_in_order(patch: Patch) -> None:
    def change(add: Any, self: HeadGradients, seen: Seen, rows: Rows, *operands: Tensor) -> None:
        add(self, dataclasses.replace(rows, positions=slice(seen.count, seen.count + len(rows))), *operands)

    wrap_add(patch, change)


@mutant("linear")
def rows_scattered_to_the_first_chunk(patch: Patch) -> None:
    def change(add: Any, self: HeadGradients, seen: Seen, rows: Rows, *operands: Tensor) -> None:
        first = (seen.chunks or [rows])[0].positions
        positions = first if isinstance(first, slice) else first[: len(rows)]
        add(self, dataclasses.replace(rows, positions=positions), *operands)

    wrap_add(patch, change)


@mutant("linear")
def other_rows_not_cleared(patch: Patch) -> None:
    original = HeadGradients.__init__

    def init(self: HeadGradients, inputs: Any, head: Head, rows: Rows, *rest: Any) -> None:
        original(self, inputs, head, rows, *rest)
        if self.hidden is not None:
            self.hidden.fill_(1e-6)

    patch.setattr(HeadGradients, "__init__", init)


@mutant("linear")
def terms_not_gathered(patch: Patch) -> None:
    patch.setattr(
        Rows, "gather",
        lambda rows, entries: entries.view(len(entries), -1)[:, : len(rows)].nan_to_num().contiguous().unsqueeze(1),
    )  # fmt: skip


@mutant(*OF_LINEAR)
def tokens_not_gathered(patch: Patch) -> None:
    original = Rows.at

    def at(positions: Tensor, targets: Tensor, *, exact: bool = True) -> Rows:
        right = original(positions, targets, exact=exact)
        return dataclasses.replace(right, targets=targets.view(-1)[: len(right)].clamp(min=0))

    patch.setattr(Rows, "at", at)


@mutant(*OF_LINEAR)
def results_not_scattered(patch: Patch) -> None:
    def scatter(self: Rows, entries: Tensor, whole: Tensor) -> None:
        whole.view(len(whole), -1)[:, : len(self)] = entries.squeeze(1)

    patch.setattr(Rows, "scatter", scatter)


@mutant("linear")
def view_taken_for_contiguous(patch: Patch) -> None:
    """hidden[:, :-1] read as if its steps lay side by side."""

    def rows(self: Rows, hidden: Tensor) -> Tensor:
        flat = hidden.as_strided((hidden.shape[:2].numel(), hidden.shape[-1]), (hidden.stride(1), 1))
        return flat[self.positions].nan_to_num(0.1, 0.1, 0.1)

    patch.setattr(Rows, "hidden", rows)


@mutant("linear")
def hidden_of_the_chunk_before(patch: Patch) -> None:
    def change(add: Any, self: HeadGradients, seen: Any, rows: Rows, x: Tensor, gradient: Tensor) -> None:
        before = getattr(seen, "before", x)[: x.shape[0]]
        add(self, rows, x if before.shape != x.shape else before, gradient)
        seen.before = x

    wrap_add(patch, change)


@mutant("linear")
def filling_rows_not_cleared(patch: Patch) -> None:
    original = Rows.hidden
    patch.setattr(Rows, "hidden", lambda rows, hidden: original(dataclasses.replace(rows, exact=True), hidden))


@mutant("linear")
def filling_rows_computed(patch: Patch) -> None:
    """As if they had a target: their terms and hidden states are what a mask hides."""
    original = Rows.at

    def at(positions: Tensor, targets: Tensor, *, exact: bool = True) -> Rows:
        right = original(positions, targets, exact=exact)
        return dataclasses.replace(right, targets=right.targets.clamp(min=0))

    patch.setattr(Rows, "at", at)


@mutant(*OF_LINEAR)
def bias_gradient_forgotten(patch: Patch) -> None:
    def change(self: HeadGradients, gradients: Any) -> Any:
        hidden, weight, bias = gradients
        return hidden, weight, None if bias is None else torch.zeros_like(bias)

    wrap_finish(patch, change)


@mutant("linear")
def bias_gradient_summed_in_low_precision(patch: Patch) -> None:
    def change(add: Any, self: HeadGradients, seen: Seen, *operands: Any) -> None:
        add(self, *operands)
        if self.bias is not None:
            self.bias.copy_(self.bias.to(torch.bfloat16))

    wrap_add(patch, change)


@mutant("linear")
def bias_forgotten_in_the_logits(patch: Patch) -> None:
    original = Head.__init__
    patch.setattr(Head, "__init__", lambda self, weight, bias, *rest: original(self, weight, None, *rest))


@mutant("linear")
def bias_added_after_the_rounding(patch: Patch) -> None:
    original = Head.logits

    def logits(self: Head, x: Tensor, out: Tensor) -> None:
        bias, self.bias = self.bias, None
        original(self, x, out)
        self.bias = bias
        if bias is not None:
            out.add_(bias)

    patch.setattr(Head, "logits", logits)


@mutant("linear")
def float32_logits_of_a_rounded_product(patch: Patch) -> None:
    original = Head.logits

    def logits(self: Head, x: Tensor, out: Tensor) -> None:
        original(self, x, out)
        out.copy_(out.to(self.dtypes.operands))

    patch.setattr(Head, "logits", logits)


@mutant("linear")
def hidden_gradient_not_scaled(patch: Patch) -> None:
    original = torch_backend.scale_gradient
    patch.setattr(torch_backend, "scale_gradient", lambda g, factor: None if g.shape[0] > 1 else original(g, factor))


@mutant("linear")
def weight_gradient_not_scaled(patch: Patch) -> None:
    original = torch_backend.scale_gradient
    patch.setattr(
        torch_backend, "scale_gradient",
        lambda g, factor: original(g, factor) if g.shape[0] > 1 or g.shape[1] == 1 else None,
    )  # fmt: skip


@mutant("linear")
def hidden_gradient_rounded_between(patch: Patch) -> None:
    """The vocabulary in two halves whose products are rounded before they are added."""

    def change(add: Any, self: HeadGradients, seen: Seen, rows: Rows, x: Tensor, gradient: Tensor) -> None:
        add(self, rows, x, gradient)
        if self.hidden is None:
            return
        operands, half = self.head.dtypes.operands, gradient.shape[1] // 2
        g, weight = (value.to(operands).float() for value in (gradient, self.head.weight))
        first, second = (g[:, part] @ weight[part] for part in (slice(half), slice(half, None)))
        hidden_rows(self)[rows.positions] = (first.to(operands) + second.to(operands)).to(self.hidden.dtype)

    wrap_add(patch, change)


@mutant("linear")
def idle_rows_computed(patch: Patch) -> None:
    """All unmasked rows enter the GEMMs: nothing is wrong but the cost, and NaN in rows that nobody may read."""
    original = linear_functions.choose_rows
    patch.setattr(
        linear_functions, "choose_rows",
        lambda targets, active, count, *, idle: original(targets, targets != MASKED, None, idle=idle),
    )  # fmt: skip


@mutant("linear")
def idle_rows_given_gradient(patch: Patch) -> None:
    """A floor under the advantage: every unmasked row learns something."""
    original = torch_backend.token_terms

    def token_terms(batch: Batch, spec: LossSpec, vocabulary: int | None, skip_inactive: bool) -> TokenTerms:
        right = original(batch, spec, vocabulary, False)
        values = right.values.clone()
        values[ADVANTAGE] = torch.where(values[ADVANTAGE] == 0, 1e-4, values[ADVANTAGE])
        return right._replace(values=values, active=right.targets != MASKED)

    patch.setattr(torch_backend, "token_terms", token_terms)


@mutant("linear")
def one_row_wrong(patch: Patch) -> None:
    """One percent off in the row with the smallest gradient of the first chunk."""

    def change(add: Any, self: HeadGradients, seen: Seen, rows: Rows, x: Tensor, gradient: Tensor) -> None:
        add(self, rows, x, gradient)
        if self.hidden is not None and not seen.chunks:
            size = gradient.abs().amax(-1).float()
            place = torch.arange(len(hidden_rows(self)))[rows.positions][
                torch.where(size > 0, size, torch.inf).argmin()
            ]
            hidden_rows(self)[place] *= 1.01

    wrap_add(patch, change)


@mutant("linear")
def slightly_off(patch: Patch) -> None:
    """By 5e-5, in float32 only, where nothing is rounded that far."""

    def change(self: HeadGradients, gradients: Any) -> Any:
        if self.hidden is not None and self.hidden.dtype == torch.float32:
            self.hidden.mul_(1 + 5e-5)
        return gradients

    wrap_finish(patch, change)


@mutant("linear")
def loss_scale_after_the_rounding(patch: Patch) -> None:
    """float16: coefficients without the scaler's factor, the factor on the rounded gradient."""
    original = torch_backend.token_gradient

    def gradient(logits: Tensor, targets: Tensor, statistics: Any, c: Tensor, h: Any, *rest: Any) -> None:
        original(logits, targets, statistics, c / 256, None if h is None else h / 256, *rest)
        rest[-1].mul_(256)

    patch.setattr(torch_backend, "token_gradient", gradient)


@mutant(*OF_LINEAR)
def logits_of_backward_differ(patch: Patch) -> None:
    """Made again with another sum, a bit may differ: not what the row's statistics belong to."""
    original = linear_autograd._TokenStatistics.backward

    def backward(ctx: Any, *upstream: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            right = Head.logits

            def logits(self: Head, x: Tensor, out: Tensor) -> None:
                right(self, x, out)
                out[0, 0] *= 1.01

            inner.setattr(Head, "logits", logits)
            return original(ctx, *upstream)

    patch.setattr(linear_autograd._TokenStatistics, "backward", staticmethod(backward))


# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "name"), [pytest.param(*key, id="-".join(key)) for key in MUTANTS])
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    apply, interpreted = MUTANTS[suite, name]
    if suite in ("triton", "token_terms", "logprob_loss") and kernels is None:
        pytest.skip("needs Triton")
    if interpreted and (kernels is None or not kernels.interpreting()):
        pytest.skip("replaces a device function: only in the interpreter")
    apply(monkeypatch)
    assert SUITES[suite].fails(device), f"no case of the suite notices {name}"
