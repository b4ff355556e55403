"""The suite has to reject wrong code: each mutation below is a mistake somebody has made, ours to catch.

Every mutant replaces one piece of the torch path, some of them of the kernels' too, and must fail at least one case of
the equivalence table with an assertion (not a crash). A mutant that survives means a hole in the table.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import autograd, batch, eager, loss_batch, surrogate
from hpo_fused.backend import kernels
from hpo_fused.batch import BatchStatistics, Layout
from hpo_fused.loss_batch import LossBatch
from hpo_fused.rows import BatchWeights, LogitTransform, SurrogateSpec, TokenTerms

from .equivalence import Case, check
from .test_equivalence import difficult_rows, presets, sequences, shapings, terms

policy_loss = importlib.import_module("hpo_fused.policy_loss")  # the package's attribute is the function
fused_kernel = None if kernels is None else importlib.import_module("hpo_fused.kernels.fused_policy_loss")
# The same cases that test_equivalence.py holds the right code against; the most discerning first.
SUITE = [
    case for case in difficult_rows() + terms() + sequences() + shapings() + presets() if case.dtype == torch.float32
]
MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}
Patch = pytest.MonkeyPatch


def mutant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTANTS[function.__name__] = function
    return function


def wrap_token_loss(patch: Patch, change: Callable[..., Any]) -> None:
    """Replace the per-token loss wherever it is used by ``change(original, *arguments)``."""
    original = surrogate.token_loss
    for module in (eager, autograd):
        patch.setattr(module, "token_loss", lambda *arguments: change(original, *arguments))


def wrap_gradient(patch: Patch, change: Callable[..., None]) -> None:
    """Let ``change(out, logits, tokens, transform)`` spoil every gradient that either backend writes."""
    for module in (eager, kernels):
        if module is not None:
            _wrap_gradient_of(module, patch, change)


def _wrap_gradient_of(module: ModuleType, patch: Patch, change: Callable[..., None]) -> None:
    fused, two_kernel = module.fused_policy_loss, module.token_gradient

    def spoiled_fused(
        logits: Tensor,
        tokens: Tensor,
        compute: Tensor,
        terms: TokenTerms,
        transform: LogitTransform,
        spec: SurrogateSpec,
        **options: Any,
    ) -> Any:
        result = fused(logits, tokens, compute, terms, transform, spec, **options)
        if options["out"] is not None:
            change(options["out"], logits, tokens, transform)
        return result

    def spoiled_two_kernel(
        logits: Tensor, tokens: Tensor, statistics: Any, c: Any, h: Any, transform: LogitTransform, out: Tensor
    ) -> None:
        two_kernel(logits, tokens, statistics, c, h, transform, out)
        change(out, logits, tokens, transform)

    patch.setattr(module, "fused_policy_loss", spoiled_fused)
    patch.setattr(module, "token_gradient", spoiled_two_kernel)
    if module is eager:  # whose policy_loss is its fused_policy_loss
        return
    whole = module.policy_loss

    def spoiled_policy_loss(logits: Tensor, batch: LossBatch, transform: LogitTransform, *rest: Any, **kw: Any) -> Any:
        result = whole(logits, batch, transform, *rest, **kw)
        assert batch.tokens is not None
        if kw["out"] is not None:
            change(kw["out"], logits, batch.tokens.long().reshape(logits.shape[:-1]), transform)
        return result

    patch.setattr(module, "policy_loss", spoiled_policy_loss)


def wrap_prepare(patch: Patch, change: Callable[..., Any]) -> None:
    """Replace the weights' computation by ``change(original, objective, layout, advantages, **keywords)``."""
    original = batch.prepare
    patch.setattr(loss_batch, "prepare", lambda *args, **kw: change(original, *args, **kw))


def wrap_weights(patch: Patch, change: Callable[[LossBatch, BatchWeights], BatchWeights]) -> None:
    """Replace what the kernels are told about normalisation and weighting."""
    original = LossBatch.weights
    patch.setattr(LossBatch, "weights", lambda batch: change(batch, original(batch)))


def wrap_response_statistics(patch: Patch, change: Callable[[Tensor, Tensor, Any, int], None]) -> None:
    """Let ``change(lengths, signs, inputs, T)`` spoil what the kernels found out about each response."""
    original = fused_kernel.response_statistics

    def spoiled(inputs: Any, weights: BatchWeights, rows: int, T: int, V: int) -> Tensor:
        statistics = original(inputs, weights, rows, T, V)
        B = weights.responses
        change(statistics[2 : 2 + B], statistics[2 + B : 2 + 2 * B], inputs, T)
        return statistics

    patch.setattr(fused_kernel, "response_statistics", spoiled)


@mutant
def hazard_without_stop_gradient(patch: Patch) -> None:
    def shape(x: Tensor, advantages: Tensor, *parameters: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            psi, zeta = surrogate.log_fidelity_terms(leaf, *parameters)
            value = (psi - zeta).exp() * advantages
            (derivative,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), derivative

    patch.setattr(surrogate, "_log_fidelity", shape)


@mutant
def hazard_of_unbounded_log_ratio(patch: Patch) -> None:
    original = surrogate.log_fidelity_terms
    patch.setattr(surrogate, "log_fidelity_terms", lambda x, c, *h: (original(x, c, *h)[0], original(x, 1e6, *h)[1]))


@mutant
def alpha_counted_per_token(patch: Patch) -> None:
    def count(cls: Any, layout: Layout, advantages: Tensor, groups: Any, gradient_average: float = 1.0) -> Any:
        lengths = layout.lengths()
        return cls(
            layout.responses,
            lengths.sum(),
            ((advantages > 0) & layout.mask).sum(),
            ((advantages < 0) & layout.mask).sum(),
            groups,
            None if groups is None else lengths,
        )

    patch.setattr(BatchStatistics, "_of_layout", classmethod(count))


@mutant
def zero_advantage_counted_negative(patch: Patch) -> None:
    original = BatchStatistics._of_layout.__func__

    def count(cls: Any, layout: Layout, advantages: Tensor, *rest: Any) -> Any:
        right = original(cls, layout, advantages, *rest)
        return dataclasses.replace(right, negative=(layout.response_sum(advantages) <= 0).sum())

    patch.setattr(BatchStatistics, "_of_layout", classmethod(count))


@mutant
def local_normaliser(patch: Patch) -> None:
    wrap_prepare(patch, lambda original, *args, **kw: original(*args, **{**kw, "statistics": None}))


@mutant
def gradient_average_forgotten(patch: Patch) -> None:
    def change(original: Any, *args: Any, statistics: Any, **kw: Any) -> Any:
        if statistics is not None:
            statistics = dataclasses.replace(statistics, gradient_average=1.0)
        return original(*args, statistics=statistics, **kw)

    wrap_prepare(patch, change)


@mutant
def hysteretic_weight_on_positives(patch: Patch) -> None:
    def change(original: Any, objective: Any, layout: Layout, advantages: Tensor, **kw: Any) -> Any:
        right, flipped = (original(objective, layout, sign * advantages, **kw) for sign in (1, -1))
        terms = right.terms._replace(policy_weights=flipped.terms.policy_weights)
        return right._replace(terms=terms)

    wrap_prepare(patch, change)


@mutant
def padded_length_as_response_length(patch: Patch) -> None:
    original = Layout.lengths
    patch.setattr(Layout, "lengths", lambda layout: torch.full_like(original(layout), layout.mask.shape[1]))


@mutant
def group_normaliser_without_group_count(patch: Patch) -> None:
    original = BatchStatistics.group_normalizer
    patch.setattr(
        BatchStatistics,
        "group_normalizer",
        lambda self, groups: original(self, groups) / len(set(self.group_ids.tolist())),
    )


@mutant
def caller_weights_on_penalties(patch: Patch) -> None:
    def change(original: Any, objective: Any, layout: Layout, *args: Any, token_weights: Any, **kw: Any) -> Any:
        right = original(objective, layout, *args, token_weights=token_weights, **kw)
        if token_weights is None:
            return right
        weights = layout.per_response_or_token("", token_weights)
        penalty = torch.where(layout.mask, right.terms.penalty_weights * weights, 0.0)
        return right._replace(terms=right.terms._replace(penalty_weights=penalty))

    wrap_prepare(patch, change)


@mutant
def mask_ignored(patch: Patch) -> None:
    original = batch.as_mask
    patch.setattr(batch, "as_mask", lambda mask, shape, device: original(None, shape, device))
    for module in (policy_loss, eager):
        patch.setattr(module, "check_token_ids", lambda *_: None)
    fill = eager.fused_policy_loss

    def survive(logits: Tensor, tokens: Tensor, *args: Any, **kw: Any) -> Any:  # garbage made plausible
        clean = torch.nan_to_num(logits)
        return fill(clean, tokens.clamp(0, logits.shape[-1] - 1), *args, **kw)

    patch.setattr(eager, "fused_policy_loss", survive)


@mutant
def kl_not_normalised(patch: Patch) -> None:
    def change(original: Any, spec: SurrogateSpec, terms: TokenTerms, *rest: Any) -> Any:
        return original(spec, terms._replace(penalty_weights=(terms.penalty_weights != 0).float()), *rest)

    wrap_token_loss(patch, change)


@mutant
def kl_direction_reversed(patch: Patch) -> None:
    patch.setattr(surrogate, "k3", lambda d: torch.expm1(-d) + d)


@mutant
def kl_gradient_dropped(patch: Patch) -> None:
    def change(original: Any, spec: SurrogateSpec, terms: TokenTerms, *rest: Any) -> Any:
        right, without = original(spec, terms, *rest), original(spec._replace(kl_coef=0.0), terms, *rest)
        return right._replace(logprob_coefficients=without.logprob_coefficients)

    wrap_token_loss(patch, change)


@mutant
def entropy_bonus_as_penalty(patch: Patch) -> None:
    def change(original: Any, spec: SurrogateSpec, *rest: Any) -> Any:
        return original(spec._replace(entropy_coef=-spec.entropy_coef), *rest)

    wrap_token_loss(patch, change)


@mutant
def entropy_gradient_dropped(patch: Patch) -> None:
    def change(original: Any, *arguments: Any) -> Any:
        right = original(*arguments)
        h = right.entropy_coefficients
        return right._replace(entropy_coefficients=None if h is None else torch.zeros_like(h))

    wrap_token_loss(patch, change)


@mutant
def log_ratio_not_clamped(patch: Patch) -> None:
    patch.setattr(surrogate, "clamped", lambda d, bound: (d, torch.ones_like(d, dtype=torch.bool)))


@mutant
def clamp_with_derivative_one(patch: Patch) -> None:
    patch.setattr(surrogate, "clamped", lambda d, b: (d.clamp(-b, b), torch.ones_like(d, dtype=torch.bool)))


@mutant
def clipped_whatever_the_sign(patch: Patch) -> None:
    def shape(x: Tensor, advantages: Tensor, low: float, high: float, *_: float) -> tuple[Tensor, Tensor]:
        ratio = x.exp()
        inside = (ratio >= low) & (ratio <= high)
        return ratio.clamp(low, high) * advantages, torch.where(inside, ratio * advantages, 0.0)

    patch.setattr(surrogate, "_clip", shape)


@mutant
def dual_clip_ignored(patch: Patch) -> None:
    original = surrogate._clip
    patch.setattr(surrogate, "_clip", lambda x, a, low, high, delta, dual: original(x, a, low, high, delta, torch.inf))


@mutant
def delta_ignored(patch: Patch) -> None:
    original = surrogate._clip
    patch.setattr(surrogate, "_clip", lambda x, a, low, high, delta, dual: original(x, a, low, high, torch.inf, dual))


@mutant
def gate_temperatures_swapped(patch: Patch) -> None:
    original = surrogate._soft_gate
    patch.setattr(surrogate, "_soft_gate", lambda x, a, pos, neg: original(x, a, neg, pos))


@mutant
def truncated_ratio_differentiated(patch: Patch) -> None:
    original = surrogate._truncated_ratio

    def shape(x: Tensor, a: Tensor, logprobs: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        value, derivative = original(x, a, logprobs, low, high)
        return value, derivative + torch.where((x.exp() > low) & (x.exp() < high), value, 0.0)

    patch.setattr(surrogate, "_truncated_ratio", shape)


@mutant
def sequence_mean_over_padding(patch: Patch) -> None:
    def mean(layout: Layout, value: Tensor) -> Tensor:
        divisor = layout.rows(layout.response_sum(value) / layout.mask.shape[1])
        return torch.where(layout.mask, divisor, 0.0)

    patch.setattr(Layout, "response_mean", mean)


@mutant
def sequence_gradient_not_shared(patch: Patch) -> None:
    def change(original: Any, spec: Any, terms: Any, logprobs: Tensor, entropy: Any, mean: Any = None) -> Any:
        if mean is None:
            return original(spec, terms, logprobs, entropy)
        calls: list[int] = []

        def once(
            value: Tensor,
        ) -> Tensor:  # forward through the mean, backward as if each token had its own ratio
            calls.append(1)
            return mean(value) if len(calls) == 1 else value

        return original(spec, terms, logprobs, entropy, once)

    wrap_token_loss(patch, change)


@mutant
def temperature_missing_from_the_gradient(patch: Patch) -> None:
    wrap_gradient(patch, lambda out, logits, tokens, transform: out.mul_(transform.temperature))


@mutant
def softcap_derivative_missing(patch: Patch) -> None:
    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        if transform.softcap is not None:
            slope = 1 - torch.tanh(logits.nan_to_num() / transform.softcap).square()
            out.div_(slope.clamp(min=1e-6).to(out.dtype))

    wrap_gradient(patch, spoil)


@mutant
def target_column_off_by_one(patch: Patch) -> None:
    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        column = tokens.clamp(min=0).unsqueeze(-1)
        neighbour = (column + 1) % logits.shape[-1]
        ours, other = out.gather(-1, column), out.gather(-1, neighbour)
        out.scatter_(-1, neighbour, ours)
        out.scatter_(-1, column, other)

    wrap_gradient(patch, spoil)


@mutant
def gradient_zero(patch: Patch) -> None:
    wrap_gradient(patch, lambda out, logits, tokens, transform: out.zero_())


@mutant
def target_column_forgotten(patch: Patch) -> None:
    wrap_gradient(
        patch, lambda out, logits, tokens, transform: out.scatter_(-1, tokens.clamp(min=0).unsqueeze(-1), 0.0)
    )


@mutant
def one_small_row_wrong(patch: Patch) -> None:
    """Ten percent off in the row with the smallest gradient: an absolute tolerance would let it pass."""

    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        size = out.abs().amax(-1)
        row = torch.where(size > 0, size, torch.inf).argmin()
        out[row // out.shape[1], row % out.shape[1]] *= 1.1  # by place: the gradient's rows may lie apart

    wrap_gradient(patch, spoil)


@mutant
def log_probability_by_subtraction(patch: Patch) -> None:
    """1 - p of the sampled token computed from p: no digit left where p is close to 1."""

    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: LogitTransform) -> None:
        column = tokens.clamp(min=0).unsqueeze(-1)
        z = logits.nan_to_num() / transform.temperature
        if transform.softcap is not None:
            return
        p = z.softmax(-1).gather(-1, column)
        exact = -torch.expm1(z.double().log_softmax(-1).gather(-1, column)).clamp(max=0)
        out.scatter_(-1, column, (out.gather(-1, column) * ((1 - p) / exact.clamp(min=1e-300))).to(out.dtype))

    wrap_gradient(patch, spoil)


# Mistakes in what a backend writes, whichever it is: the kernels' results have to be held as tightly.
OF_ANY_BACKEND = [
    "temperature_missing_from_the_gradient",
    "softcap_derivative_missing",
    "target_column_off_by_one",
    "gradient_zero",
    "target_column_forgotten",
    "one_small_row_wrong",
    "log_probability_by_subtraction",
]

# Mistakes in the token weights, which the kernels make themselves.
OF_THE_KERNELS: dict[str, Callable[[Patch], None]] = {}


def kernel_mutant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    OF_THE_KERNELS[function.__name__] = function
    return function


@kernel_mutant
def statistics_ignored(patch: Patch) -> None:
    wrap_weights(patch, lambda batch, right: right._replace(own_counts=True))


@kernel_mutant
def responses_of_the_call_alone(patch: Patch) -> None:
    def change(batch: LossBatch, right: BatchWeights) -> BatchWeights:
        numbers = (float(right.responses), *right.numbers[1:])
        return right._replace(numbers=numbers, counts=(None, *right.counts[1:]))

    wrap_weights(patch, change)


@kernel_mutant
def average_of_gradients_forgotten(patch: Patch) -> None:
    wrap_weights(patch, lambda _, right: right._replace(numbers=(*right.numbers[:4], 1.0, *right.numbers[5:])))


@kernel_mutant
def adaptive_weight_fixed_at_its_bound(patch: Patch) -> None:
    def change(batch: LossBatch, right: BatchWeights) -> BatchWeights:
        return right._replace(weighting="fixed") if right.weighting == "adaptive" else right

    wrap_weights(patch, change)


@kernel_mutant
def token_mean_for_response_mean(patch: Patch) -> None:
    def change(batch: LossBatch, right: BatchWeights) -> BatchWeights:
        return right._replace(normalization="mean_length") if right.normalization == "response" else right

    wrap_weights(patch, change)


@kernel_mutant
def caller_weights_dropped(patch: Patch) -> None:
    original = LossBatch.inputs
    patch.setattr(LossBatch, "inputs", lambda batch: original(batch)._replace(token_weights=None))


@kernel_mutant
def caller_weights_transposed(patch: Patch) -> None:
    original = LossBatch.inputs

    def change(batch: LossBatch) -> Any:
        right = original(batch)
        weights = right.token_weights
        return right if weights is None else right._replace(token_weights=weights.roll(1, -1))

    patch.setattr(LossBatch, "inputs", change)


@kernel_mutant
def padded_lengths(patch: Patch) -> None:
    wrap_response_statistics(patch, lambda lengths, signs, inputs, T: lengths.fill_(T))


@kernel_mutant
def zero_counts_as_negative(patch: Patch) -> None:
    wrap_response_statistics(patch, lambda lengths, signs, inputs, T: signs.masked_fill_(signs == 0, -1))


@kernel_mutant
def signs_of_masked_responses_count(patch: Patch) -> None:
    def change(lengths: Tensor, signs: Tensor, inputs: Any, T: int) -> None:
        if not inputs.advantage_per_token:
            signs.copy_(inputs.advantages.sign())

    wrap_response_statistics(patch, change)


@kernel_mutant
def hysteretic_weight_of_the_other_sign(patch: Patch) -> None:
    original = fused_kernel.row_weights

    def change(row: Any, inside: Any, T: Any, B: Any, factor: Any, alpha: Any, *rest: Any) -> Any:
        unmasked, advantage, policy, penalty = original(row, inside, T, B, factor, alpha, *rest)
        tl = fused_kernel.tl
        policy = tl.where(advantage < 0, policy / alpha, tl.where(advantage > 0, policy * alpha, policy))
        return unmasked, advantage, policy, penalty

    patch.setattr(fused_kernel, "row_weights", change)


@kernel_mutant
def penalties_weighted_too(patch: Patch) -> None:
    original = fused_kernel.row_weights

    def change(*arguments: Any) -> Any:
        unmasked, advantage, policy, _ = original(*arguments)
        return unmasked, advantage, policy, policy

    patch.setattr(fused_kernel, "row_weights", change)


def failing_case(backend: str, device: torch.device) -> Case | None:
    for case in SUITE:
        try:
            check(case, backend, device)
        except AssertionError:
            return case
    return None


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 10


@pytest.mark.parametrize("name", MUTANTS)
def test_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    assert failing_case("torch", torch.device("cpu")) is not None, f"no case of the suite notices {name}"


@pytest.mark.skipif(kernels is None, reason="needs Triton")
@pytest.mark.parametrize("name", OF_ANY_BACKEND)
def test_rejected_in_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    MUTANTS[name](monkeypatch)
    assert failing_case("triton", device) is not None, f"no case of the suite notices {name}"


@pytest.mark.skipif(kernels is None, reason="needs Triton")
@pytest.mark.parametrize("name", OF_THE_KERNELS)
def test_wrong_weights_are_rejected_in_the_kernels(name: str, monkeypatch: Patch, device: torch.device) -> None:
    if device.type != "cpu" and name in ("hysteretic_weight_of_the_other_sign", "penalties_weighted_too"):
        pytest.skip("replaces a device function: only in the interpreter")
    OF_THE_KERNELS[name](monkeypatch)
    assert failing_case("triton", device) is not None, f"no case of the suite notices {name}"
