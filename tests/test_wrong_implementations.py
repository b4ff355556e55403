"""The suites have to reject wrong code: each mutation below is a mistake that somebody has made or could make.

Every mutant replaces one piece of the package and must fail at least one case of its suites with an assertion (not a
crash). A mutant that survives means a hole in a table. The cases are those that the tests hold the right code against.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import ops, surrogate, torch_backend
from hpo_fused import token_terms as torch_terms
from hpo_fused.backend import kernels
from hpo_fused.batch import BatchStatistics
from hpo_fused.interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    MASKED,
    OLD_LOGPROB,
    POLICY_WEIGHT,
    REF_LOGPROB,
    Batch,
    LogitTransform,
    LossSpec,
    TokenTerms,
)
from hpo_fused.layout import Layout
from hpo_fused.linear import autograd as linear_autograd
from hpo_fused.linear import functions as linear_functions
from hpo_fused.linear import head as linear_head
from hpo_fused.linear.head import Head, HeadGradients
from hpo_fused.linear.keep import KeptBits, KeptIds
from hpo_fused.linear.memory import ChunkPlan
from hpo_fused.linear.rows import Rows
from hpo_fused.torch_backend import operations

from . import test_logprob_loss, test_token_terms
from .equivalence import check
from .linear_equivalence import LinearCase, check_linear, check_linear_logprobs
from .test_equivalence import PRESETS, difficult_rows, presets, sequences, shapings, terms

Patch = pytest.MonkeyPatch
Place = tuple[Any, str]  # an object and its attribute
CPU = torch.device("cpu")
kernel_terms, kernel_loss, kernel_policy, kernel_surrogate = (
    None if kernels is None else importlib.import_module(f"hpo_fused.kernels.{name}")
    for name in ("token_terms", "logprob_loss", "policy_loss", "surrogate")
)

# ---------------------------------------------------------------------------------------------------------------
# the suites

# The most discerning first, and first of all what finds wrong weights: Triton's interpreter takes its time.
_FIRST = (
    "uncounted-response", "peaked-float32", "response-packed-True", "group_mean_length-padded-False", "weights",
    "kl-entropy-transform", "mean_length-padded-True", "entropy-weights", "temperatures-of-tokens",
)  # fmt: skip
LOGITS = sorted(
    (c for c in difficult_rows() + terms() + sequences() + shapings() + presets() if c.dtype == torch.float32),
    key=lambda case: _FIRST.index(case.name) if case.name in _FIRST else len(_FIRST),
)
# Few cases, each with much in it: all that test_linear_equivalence.py holds the right code against is far more.
_OBJECTIVE = hf.Objective.preset("mhpo_ahpo", kl_coef=0.04, entropy_coef=0.02)
LINEAR = [
    LinearCase(
        "token", _OBJECTIVE, torch.bfloat16, bias=True, chunk_rows=3, temperature="token", options={"softcap": 6.0}
    ),
    LinearCase("token-float32", PRESETS["mhpo_ahpo"], bias=True, chunk_rows=4),
    LinearCase("one-chunk", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, layout="packed"),
    LinearCase("sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3, small_ratios=True),
    LinearCase("half", PRESETS["mhpo_ahpo"], torch.float16, chunk_rows=4, bias=True),
    LinearCase("main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    LinearCase("bound", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=4, slack=12),
    LinearCase("float32-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
    LinearCase("kept-ids", PRESETS["gspo"], chunk_rows=3, small_ratios=True, slack=1, keep="ids"),
    LinearCase("kept-bits", PRESETS["mhpo_ahpo"], chunk_rows=3, keep="bits"),
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
BOTH, OF_LINEAR = ("torch", "triton"), ("linear", "linear_logprobs")


class Instead:
    """A function, method or kernel by which ``change(original, *arguments)`` stands in for the original."""

    def __init__(self, original: Any, change: Callable[..., Any]) -> None:
        self.original, self.change = original, change

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.change(self.original, *arguments, **options)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __getitem__(self, grid: Any) -> Instead:
        return Instead(self.original[grid], self.change)


class Mutant(NamedTuple):
    """What stands in for the original at each of ``places``; ``interpreted``: a device function, so not on a GPU."""

    places: Sequence[Place]
    change: Callable[..., Any]
    interpreted: bool

    def apply(self, patch: Patch) -> None:
        for owner, attribute in self.places:
            patch.setattr(owner, attribute, Instead(getattr(owner, attribute), self.change))


MUTANTS: dict[tuple[str, str], Mutant] = {}  # by suite and name


def wrong(
    name: str, suites: Sequence[str], places: Sequence[Place], change: Callable[..., Any], interpreted: bool = False
) -> None:
    """Each of ``suites`` has to reject the mutant."""
    for suite in suites:
        MUTANTS[suite, name] = Mutant(places, change, interpreted)


def mutant(
    suites: Sequence[str], *places: Place, interpreted: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same as a decorator of ``change``."""

    def register(change: Callable[..., Any]) -> Callable[..., Any]:
        wrong(change.__name__, suites, places, change, interpreted)
        return change

    return register


@pytest.mark.parametrize("suite", ["linear", "linear_logprobs"])
def test_the_suite_passes(suite: str) -> None:
    """Or a mutant's failure would say nothing. (The other suites' cases are tests of their own.)"""
    assert not SUITES[suite].fails(CPU)


def _of_backends(attribute: str) -> list[Place]:
    return [(module, attribute) for module in (torch_backend, kernels) if module is not None]


# ---------------------------------------------------------------------------------------------------------------
# the objectives' formulas

TORCH = ("torch",)
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
# the terms of every token: what a backend is told about the batch, what it makes of that

TERMS = _of_backends("token_terms")
TOTALS = [(torch_terms, "totals_of_batch")]


def _told(name: str, suites: Sequence[str], change: Callable[[Batch], dict[str, Any]]) -> None:
    """A mutant whose backends get a batch with other fields."""
    wrong(name, suites, TERMS, lambda f, batch, *rest: f(batch._replace(**change(batch)), *rest))


def _made(name: str, term: int, change: Callable[[TokenTerms, Batch], Tensor], suites: Sequence[str] = BOTH) -> None:
    """A mutant with other values of a term."""

    def instead(f: Any, batch: Batch, *rest: Any) -> TokenTerms:
        terms: TokenTerms = f(batch, *rest)
        values = terms.values.clone()
        values[term] = change(terms, batch)
        return terms._replace(values=values)

    wrong(name, suites, TERMS, instead)


_told("statistics_ignored", BOTH, lambda batch: {"totals": None})
_told(
    "responses_of_the_call_alone", BOTH,
    lambda batch: {"totals": batch.totals and (batch.responses, *batch.totals[1:])},
)  # fmt: skip
_told("gradient_average_forgotten", BOTH, lambda batch: {"scale": 1.0})
_told(
    "adaptive_weight_fixed_at_its_bound", BOTH,
    lambda batch: {"weighting": "fixed" if batch.weighting == "adaptive" else batch.weighting},
)  # fmt: skip
_told(
    "token_mean_for_response_mean", BOTH,
    lambda batch: {"normalization": "mean_length" if batch.normalization == "response" else batch.normalization},
)  # fmt: skip
_told("caller_weights_dropped", (*BOTH, "logprob_loss"), lambda batch: {"token_weights": None})
_told(
    "caller_weights_transposed", BOTH,
    lambda batch: {"token_weights": None if batch.token_weights is None else batch.token_weights.roll(1, -1)},
)  # fmt: skip
_told("entropy_weights_dropped", BOTH, lambda batch: {"entropy_weights": None})
_told(
    "sum_over_a_response_divided_by_its_length", TORCH,
    lambda batch: {"normalization": "response" if (batch.normalization, batch.max_length) == ("constant", 1) else
                   batch.normalization},
)  # fmt: skip
_made(
    "entropy_weights_normalised",
    ENTROPY_WEIGHT,
    lambda terms, batch: terms.values[ENTROPY_WEIGHT] * (0.1 if batch.entropy_weights is not None else 1.0),
)
_made(
    "dro_without_tokens_of_no_advantage", POLICY_WEIGHT,
    lambda terms, batch: terms.values[POLICY_WEIGHT] * (terms.values[ADVANTAGE] != 0), TORCH,
)  # fmt: skip
_made("kl_not_normalised", KL_WEIGHT, lambda terms, batch: batch.kl_coef * (terms.values[KL_WEIGHT] != 0))
_made("entropy_bonus_as_penalty", ENTROPY_WEIGHT, lambda terms, batch: -terms.values[ENTROPY_WEIGHT])


def _weighted(terms: TokenTerms, batch: Batch, term: int) -> Tensor:
    if batch.token_weights is None:
        return terms.values[term]
    layout = Layout.of_terms(terms)
    weights = layout.rows(batch.token_weights)
    return torch.where(layout.mask, terms.values[term] * weights, 0.0)


_made("caller_weights_on_the_kl_term", KL_WEIGHT, lambda terms, batch: _weighted(terms, batch, KL_WEIGHT))
_made("caller_weights_on_the_entropy", ENTROPY_WEIGHT, lambda terms, batch: _weighted(terms, batch, ENTROPY_WEIGHT))


wrong(
    "minus_inf_capped", BOTH, _of_backends("policy_loss"), lambda f, logits, *rest: f(logits.clamp(min=-1e9), *rest)
)  # fmt: skip


@mutant(BOTH, *TERMS)
def hysteretic_weight_on_positives(f: Any, batch: Batch, *rest: Any) -> TokenTerms:
    right, flipped = f(batch, *rest), f(batch._replace(advantages=-batch.advantages), *rest)
    values = right.values.clone()
    values[POLICY_WEIGHT] = flipped.values[POLICY_WEIGHT]
    return right._replace(values=values)  # type: ignore[no-any-return]


@mutant(BOTH, *TERMS, (ops, "check_token_ids"), *_of_backends("policy_loss"))
def mask_ignored(f: Any, first: Any, *rest: Any) -> Any:
    if isinstance(first, Batch):
        assert first.tokens is not None
        return f(first._replace(mask=None, tokens=first.tokens.clamp(min=0)), *rest)
    return None if len(rest) == 2 else f(torch.nan_to_num(first), *rest)  # no check of ids; garbage made plausible


@mutant(TORCH, *TOTALS)
def alpha_counted_per_token(f: Any, batch: Batch, lengths: Tensor, signs: Tensor) -> Any:
    positive, negative = lengths[signs > 0].sum(), lengths[signs < 0].sum()
    return batch.totals or (batch.responses, lengths.sum(), positive, negative)


@mutant(TORCH, *TOTALS)
def zero_advantage_counted_negative(f: Any, batch: Batch, lengths: Tensor, signs: Tensor) -> Any:
    return batch.totals or (*f(batch, lengths, signs)[:3], (signs <= 0).sum())


@mutant(TORCH, (Layout, "lengths"))
def padded_length_as_response_length(f: Any, layout: Layout) -> Tensor:
    return torch.full_like(f(layout), layout.mask.shape[1])


@mutant(BOTH, (BatchStatistics, "group_normalizer"))
def group_normaliser_without_group_count(f: Any, statistics: BatchStatistics, groups: Tensor) -> Tensor:
    assert statistics.group_ids is not None
    return f(statistics, groups) / len(set(statistics.group_ids.tolist()))  # type: ignore[no-any-return]


@mutant(("triton",), (kernel_terms, "response_statistics_kernel"))
def padded_lengths(launch: Any, statistics: Tensor, *rest: Any, **options: Any) -> None:
    launch(statistics, *rest, **options)
    statistics[0].fill_(rest[4])  # T


@mutant(("triton",), (kernel_terms, "response_statistics_kernel"))
def zero_counts_as_negative(launch: Any, statistics: Tensor, *rest: Any, **options: Any) -> None:
    launch(statistics, *rest, **options)
    statistics[1].masked_fill_(statistics[1] == 0, -1)


@mutant(("triton",), (kernel_terms, "response_statistics_kernel"))
def signs_of_masked_responses_count(
    launch: Any, statistics: Tensor, mask: Any, advantages: Tensor, *rest: Any, **options: Any
) -> None:
    launch(statistics, mask, advantages, *rest, **options)
    if rest[-1] == 0:  # the advantages' step: one for each response
        statistics[1].copy_(advantages.sign())


WEIGHTS = (kernel_terms, "_policy_terms")  # (unmasked, advantage, policy weight, penalty weight, live)


@mutant(("triton",), WEIGHTS, interpreted=True)
def hysteretic_weight_of_the_other_sign(f: Any, *arguments: Any) -> Any:
    unmasked, advantage, policy, penalty, live = f(*arguments)
    alpha, tl = arguments[4], kernel_terms.tl  # type: ignore[union-attr]
    policy = tl.where(advantage < 0, policy / alpha, tl.where(advantage > 0, policy * alpha, policy))
    return unmasked, advantage, policy, penalty, live


@mutant(("triton",), WEIGHTS, interpreted=True)
def penalties_weighted_too(f: Any, *arguments: Any) -> Any:
    unmasked, advantage, policy, _, live = f(*arguments)
    return unmasked, advantage, policy, policy, live


@mutant(("token_terms",), WEIGHTS, interpreted=True)
def weights_ignored(f: Any, *arguments: Any) -> Any:
    unmasked, advantage, _, penalty, live = f(*arguments)
    return unmasked, advantage, penalty, penalty, live


@mutant(("token_terms",), WEIGHTS, interpreted=True)
def mask_ignored_by_the_terms(f: Any, *arguments: Any) -> Any:
    return arguments[2], *f(*arguments)[1:]


@mutant(("token_terms",), (kernel_terms, "response_range"), (torch, "empty"), interpreted=True)
def first_block_only(f: Any, *arguments: Any, **options: Any) -> Any:
    if options:  # torch.empty: what is not written must not look right by chance
        return torch.ones(*arguments, **options)
    first, last = f(*arguments)
    return first, kernel_terms.tl.minimum(last, first + 1024)  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------
# the loss of log-probabilities, in the kernels


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


# ---------------------------------------------------------------------------------------------------------------
# the gradient of the logits


def spoils_gradient(*suites: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let ``change(out, logits, tokens, transform)`` spoil every gradient that either backend writes."""

    def register(change: Callable[..., None]) -> Callable[..., None]:
        def instead(f: Any, logits: Tensor, targets: Tensor, *rest: Any) -> None:
            before, out = logits.detach().clone(), rest[-1]
            f(logits, targets, *rest)
            (transform,) = (argument for argument in rest if isinstance(argument, LogitTransform))
            if out is not None:
                change(out, before, targets.clamp(min=0).long(), transform)

        wrong(change.__name__, suites, [*_of_backends("policy_loss"), *_of_backends("token_gradient")], instead)
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


@mutant(
    BOTH, *(place for name in ("policy_loss", "token_statistics", "token_gradient") for place in _of_backends(name))
)
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


# ---------------------------------------------------------------------------------------------------------------
# the linear path's chunks and GEMMs

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
    return dataclasses.replace(rows, targets=targets.view(-1)[: len(rows)].clamp(min=0))


@mutant(LINEAR_LOSS, (Rows, "at"))
def filling_rows_computed(f: Any, positions: Tensor, targets: Tensor, **options: Any) -> Rows:
    """As if they had a target: their terms and hidden states are what a mask hides."""
    rows = f(positions, targets, **options)
    return dataclasses.replace(rows, targets=rows.targets.clamp(min=0))


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
        lambda f, keep, logits, rows: f(
            keep, logits, dataclasses.replace(rows, positions=(rows.positions - 1).clamp(min=0))
        ),
    )  # fmt: skip


@mutant(LINEAR_LOSS, (linear_autograd._TokenStatistics, "backward"))
def kept_set_forgotten_in_backward(f: Any, *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as inner:
        Mutant(RESTRICT, lambda *_: None, False).apply(inner)
        return f(*arguments)


# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "name"), [pytest.param(*key, id="-".join(key)) for key in MUTANTS])
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if suite in ("triton", "token_terms", "logprob_loss") and kernels is None:
        pytest.skip("needs Triton")
    mutated = MUTANTS[suite, name]
    if mutated.interpreted and (kernels is None or not kernels.interpreting()):
        pytest.skip("replaces a device function: only in the interpreter")
    mutated.apply(monkeypatch)
    assert SUITES[suite].fails(device), f"no case of the suite notices {name}"
