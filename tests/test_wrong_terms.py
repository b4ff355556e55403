"""Wrong terms of a token: what a backend is told about the batch, and what it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import ops
from hpo_fused import token_terms as torch_terms
from hpo_fused.batch import BatchStatistics, Layout
from hpo_fused.interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    POLICY_WEIGHT,
    Batch,
    TokenTerms,
)

from .mutants import BOTH, TORCH, Mutants, kernel_module, of_backends

MUTANTS = Mutants()
wrong, mutant = MUTANTS.wrong, MUTANTS.mutant

kernel_terms = kernel_module("token_terms")
TERMS = of_backends("token_terms")
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
    "minus_inf_capped", BOTH, of_backends("policy_loss"), lambda f, logits, *rest: f(logits.clamp(min=-1e9), *rest)
)  # fmt: skip


@mutant(BOTH, *TERMS)
def hysteretic_weight_on_positives(f: Any, batch: Batch, *rest: Any) -> TokenTerms:
    right, flipped = f(batch, *rest), f(batch._replace(advantages=-batch.advantages), *rest)
    values = right.values.clone()
    values[POLICY_WEIGHT] = flipped.values[POLICY_WEIGHT]
    return right._replace(values=values)  # type: ignore[no-any-return]


@mutant(BOTH, *TERMS, (ops, "check_token_ids"), *of_backends("policy_loss"))
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


@pytest.mark.parametrize(("suite", "name"), MUTANTS.parameters())
def test_rejected(suite: str, name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    MUTANTS.reject(suite, name, monkeypatch, device)
