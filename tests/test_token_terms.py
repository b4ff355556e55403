"""A call's arguments as numbers per token: the kernels and their torch twin against the formulas, in float64.

Which rows are computed is among them: targets say it.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused.backend import implementation
from hpo_fused.interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    KL_WEIGHT,
    MASKED,
    OLD_LOGPROB,
    POLICY_WEIGHT,
    REF_LOGPROB,
    SKIPPED,
    Batch,
    LossSpec,
    TokenTerms,
)
from hpo_fused.token_terms import check_batch

from .equivalence import ROUNDING

RESPONSES, VOCABULARY = 6, 50
LENGTHS = {"padded": 1100, "packed": 300}  # one step of the kernels, and more
BOUNDARIES = [0, 300, 600, 600, 1200, 1500, 1800]  # packed; one response empty
GROUPS = [3, 3, 1, 1, 1, 3]
ABSENT = dict.fromkeys(
    ("cu_seqlens", "groups", "statistics", "token_weights", "entropy_weights", "lengths", "response_mean_log_ratios",
     "advantage_level")
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call's form; ``coefficients`` are KL's and the entropy's."""

    layout: str
    level: Any
    normalization: Any
    weighting: Any = None
    per_token: bool = False  # advantages
    weights: str = "token"  # "none", "response", "column" ([B, 1]), "token"
    totals: str = "own"  # or "numbers", "tensors"
    coefficients: tuple[float, float] = (0.0, 0.0)
    skip: bool = True
    entropy: str = "none"  # weights: "none", "0-d", "response", "column", "token"
    every_advantage: bool = False
    scale: Any = 1.0  # of the loss; "tensor": 0-d

    def __str__(self) -> str:
        weighting = type(self.weighting).__name__ if self.weighting else "unweighted"
        level = "token" if self.per_token else "response"
        return (
            f"{self.layout}-{self.level}-{self.normalization}-{weighting}-{level}-{self.weights}-{self.totals}-"
            f"{self.coefficients}-{'skip' if self.skip else 'all'}-{self.entropy}-{self.every_advantage}-{self.scale}"
        )


def cases() -> list[Case]:
    """Layouts, levels, normalisations, advantages and totals with each other; everything else in turn."""
    weightings = (None, hf.Hysteretic(0.6), hf.AdaptiveHysteretic(0.1), hf.Hysteretic(0.0), hf.AdaptiveHysteretic(0.9))
    weights = ("token", "response", "none", "column")
    entropies = ("none", "0-d", "response", "none", "token", "none", "column")
    coefficients = ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.1, 0.0), (0.0, 0.03), (0.1, 0.03))
    product = itertools.product(
        ("padded", "packed"), ("token", "sequence"), ("response", "mean_length", "group_mean_length", "constant"),
        (False, True), ("own", "numbers", "tensors"),
    )  # fmt: skip
    made = []
    for i, (layout, level, normalization, per_token, totals) in enumerate(product):
        if normalization == "constant" and per_token:
            normalization = "response_sum"
        made.append(
            Case(layout, level, normalization, weightings[i % 5], per_token, weights[i // 2 % 4], totals,
                 coefficients[i % 6], skip=i % 4 != 3, entropy=entropies[i % 7], every_advantage=i % 11 == 5,
                 scale=(1.0, 0.25, "tensor")[i // 5 % 3])
        )  # fmt: skip
    return made


@dataclass
class Call:
    """A checked batch, and the same arguments in float64, one entry per row: [N]."""

    batch: Batch
    spec: LossSpec
    objective: hf.Objective
    statistics: hf.BatchStatistics | None
    responses: Tensor  # of each row
    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    weights: Tensor
    entropy: Tensor | None  # weights
    scale: float
    old: Tensor
    ref: Tensor


def build(case: Case, device: torch.device) -> Call:
    """Responses without advantage, without tokens, with one token of weight, with none; NaN where the mask is off."""
    generator = torch.Generator().manual_seed(3)
    T = LENGTHS[case.layout]
    shape = (RESPONSES, T)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[2], mask[3, 5] = False, True
    advantages = torch.tensor([1.0, 0.0, 1.0, -0.5, 2.0, -1.0])
    weights = torch.ones(RESPONSES)
    weights[4] = 0
    if case.weights == "token":
        weights = (weights[:, None] * (0.5 + torch.rand(shape, generator=generator))).contiguous()
        weights[0, ::3] = 0
        weights[3] = 0
        weights[3, 5] = 1.5
        weights[~mask] = torch.nan
    if case.per_token:
        advantages = advantages[:, None] * (torch.rand(shape, generator=generator) < 0.9)
        advantages[3, 5] = -0.5
        advantages[~mask] = torch.nan
    advantages[5:] = torch.nan  # not 0: a signal
    entropy = torch.tensor([0.5, 0.25, 1.0, 0.0, -1.0, 0.75])
    if case.entropy == "token":
        entropy = (entropy[:, None] + (torch.rand(shape, generator=generator) < 0.1)).contiguous()
        entropy[~mask] = torch.nan
    entropy = entropy[0] if case.entropy == "0-d" else entropy
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    tokens[~mask] = -7
    old, ref = torch.randn(2, *shape, generator=generator)
    responses = torch.arange(RESPONSES)[:, None].expand(shape)
    keywords: dict[str, Any] = {"mask": mask, "old_logprobs": old, "ref_logprobs": ref.bfloat16()}
    given, ids = advantages, tokens
    forms = {"token_weights": (case.weights, weights), "entropy_weights": (case.entropy, entropy)}
    if case.layout == "packed":
        keywords = {k: v.flatten() for k, v in keywords.items()}
        given, ids = given.flatten(), ids.flatten()
        forms = {k: (form, v.flatten() if v.dim() else v) for k, (form, v) in forms.items()}
        keywords["cu_seqlens"] = torch.tensor(BOUNDARIES, dtype=torch.int32)
        lengths = torch.tensor(BOUNDARIES).diff()
        responses = torch.arange(RESPONSES).repeat_interleave(lengths)
    keywords |= {
        name: None if form == "none" else value[:, None] if form == "column" else value
        for name, (form, value) in forms.items()
    }
    kl, bonus = case.coefficients
    shaping = hf.DRO(0.1) if case.every_advantage else hf.Clip()
    objective = hf.Objective(
        case.level, shaping, case.weighting, case.normalization, 300, kl_coef=kl, entropy_coef=bonus
    )
    if case.normalization == "group_mean_length":
        keywords["groups"] = torch.tensor(GROUPS)
    statistics = None
    if case.totals != "own":
        counts = [torch.tensor(n, device=device) if case.totals == "tensors" else n for n in (9, 4321, 2, 5)]
        groups = torch.tensor([*GROUPS, 7], device=device), torch.tensor([10, 20, 30, 0, 40, 50, 60], device=device)
        statistics = hf.BatchStatistics(*counts, *groups, gradient_average=4.0)
    keywords = {k: v if v is None else v.to(device) for k, v in keywords.items()}
    keywords = {**ABSENT, **keywords, "statistics": statistics}
    keywords["loss_scale"] = torch.tensor(0.5, device=device) if case.scale == "tensor" else case.scale
    batch = check_batch(objective, "tokens", ids.shape, device, ids.to(device), given.to(device), **keywords)
    # Per response: by the boundaries if packed, which are not the padded rows'.
    a, u, e = (
        (x if x.dim() == 2 else x[responses] if x.dim() == 1 else x.expand(mask.numel())).double().flatten()
        for x in (advantages, weights, entropy)
    )
    u = torch.ones_like(u) if case.weights == "none" else u
    return Call(
        batch, objective.lower(batch), objective, statistics, responses.flatten(), tokens.flatten(), mask.flatten(), a,
        u, None if case.entropy == "none" else e, 0.5 if case.scale == "tensor" else case.scale, old.flatten(),
        ref.flatten(),
    )  # fmt: skip


def formulas(call: Call, skip: bool) -> dict[str, Tensor]:
    """Every term by its definition, response by response, in float64."""
    objective, mask = call.objective, call.mask
    places = [call.responses == i for i in range(RESPONSES)]
    lengths = [int((mask & place).sum()) for place in places]
    sums = [call.advantages[mask & place].sum().item() for place in places]
    signs = [(s > 0) - (s < 0) for s in sums]
    counted = call.statistics or hf.BatchStatistics(RESPONSES, sum(lengths), signs.count(1), signs.count(-1))
    S, tokens, positive, negative = (
        int(n) for n in (counted.responses, counted.tokens, counted.positive, counted.negative)
    )
    alpha = 1.0
    if isinstance(objective.weighting, hf.Hysteretic):
        alpha = objective.weighting.alpha
    elif isinstance(objective.weighting, hf.AdaptiveHysteretic):
        alpha = min(max(positive / negative, objective.weighting.alpha_min), 1.0) if negative else 1.0
    ids, members = GROUPS, lengths
    if counted.group_ids is not None and counted.group_lengths is not None:
        ids, members = counted.group_ids.tolist(), counted.group_lengths.tolist()
    penalty, policy = torch.zeros(2, mask.numel(), dtype=torch.float64)
    for i, place in enumerate(places):
        of_group = sum(n for n, group in zip(members, ids, strict=True) if group == GROUPS[i])
        n = {
            "response": S * max(lengths[i], 1), "mean_length": max(tokens, 1), "constant": S * 300, "response_sum": S,
            "group_mean_length": len(set(ids)) * max(of_group, 1),
        }[objective.normalization]  # fmt: skip
        penalty[mask & place] = call.scale * counted.gradient_average / n
    policy[mask] = (penalty * torch.where(call.advantages < 0, alpha, 1.0) * call.weights)[mask]
    live = (policy != 0) & ((call.advantages != 0) | isinstance(objective.shaping, hf.DRO))
    if objective.ratio_level == "sequence":
        live = mask & torch.stack([live[place].any() for place in places])[call.responses]
    bonus = objective.entropy_coef * penalty
    if call.entropy is not None:
        bonus[mask] = (call.scale * counted.gradient_average * call.entropy)[mask]
    active = mask if objective.kl_coef else live | (bonus != 0)
    targets = torch.where(active | (not skip), call.tokens, SKIPPED)
    return {
        "policy weight": policy, "KL weight": objective.kl_coef * penalty,
        "entropy weight": bonus, "advantage": call.advantages, "old": call.old,
        "ref": call.ref.bfloat16(), "active": active, "targets": torch.where(mask, targets, MASKED),
        "lengths": torch.tensor(lengths), "signs": torch.tensor(signs),
    }  # fmt: skip


def hold(case: Case, call: Call, terms: TokenTerms) -> None:
    """Hold what the spec asks for: weights to their few roundings, everything else exactly."""
    expected = formulas(call, case.skip)
    values = terms.values.cpu().flatten(1)
    weights = {"policy weight": POLICY_WEIGHT}
    weights |= {"KL weight": KL_WEIGHT} if call.spec.kl != "none" else {}
    weights |= {"entropy weight": ENTROPY_WEIGHT} if call.spec.entropy_bonus else {}
    for name, index in weights.items():
        # Six factors and coefficients in float32, each rounded once, and as many products.
        torch.testing.assert_close(values[index].double(), expected[name], rtol=12 * ROUNDING, atol=0, msg=name)
    exact = {"advantage": ADVANTAGE, "old": OLD_LOGPROB} | ({"ref": REF_LOGPROB} if call.spec.kl != "none" else {})
    for name, index in exact.items():
        assert torch.equal(values[index][call.mask].nan_to_num(7), expected[name][call.mask].float().nan_to_num(7)), (
            name
        )
    for name in ("targets", "active", "lengths", "signs"):
        assert torch.equal(getattr(terms, name).cpu().flatten(), expected[name].to(getattr(terms, name).dtype)), name
    assert bool(terms.active.any())


def check(case: Case, backend: str, device: torch.device) -> None:
    call = build(case, device)
    terms: TokenTerms = implementation(backend).token_terms(call.batch, call.spec, VOCABULARY, case.skip)
    rows = call.batch.rows
    assert terms.values.shape == (6, *rows)
    assert terms.values.dtype == torch.float32
    assert terms.targets.shape == terms.active.shape == rows
    assert (terms.targets.dtype, terms.active.dtype) == (torch.int32, torch.bool)
    hold(case, call, terms)


CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_terms_are_the_formulas(case: Case, backend: str, device: torch.device) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_without_tokens_every_computed_row_has_target_0(layout: str, backend: str, device: torch.device) -> None:
    call = build(Case(layout, "token", "response"), device)
    batch = call.batch._replace(tokens=None)
    for skip in (True, False):
        terms = implementation(backend).token_terms(batch, call.spec, None, skip)
        computed = terms.active if skip else terms.targets != MASKED
        assert torch.equal(terms.targets.flatten().cpu() != MASKED, call.mask)
        assert torch.equal(terms.targets >= 0, computed)
        assert not terms.targets[computed].any()


def small(device: torch.device) -> dict[str, Tensor]:
    """Tensors whose values every dtype holds."""
    generator = torch.Generator().manual_seed(5)
    made = {
        "tokens": torch.randint(100, (3, 7), generator=generator),
        "mask": torch.randint(2, (3, 7), generator=generator),
        "advantages": torch.randint(3, (3, 7), generator=generator),
        "token_weights": torch.randint(1, 4, (3, 7), generator=generator),
        "entropy_weights": torch.randint(1, 4, (3, 7), generator=generator),
        "old_logprobs": -torch.randint(4, (3, 7), generator=generator).float(),
        "ref_logprobs": -torch.randint(4, (3, 7), generator=generator).float(),
    }
    return {name: value.to(device) for name, value in made.items()}


def terms_of(arguments: dict[str, Tensor], backend: str, device: torch.device) -> TokenTerms:
    objective = hf.Objective(weighting=hf.AdaptiveHysteretic(0.1), normalization="response", kl_coef=0.5)
    given = dict(arguments)
    tokens, advantages = given.pop("tokens"), given.pop("advantages")
    batch = check_batch(objective, "tokens", tokens.shape, device, tokens, advantages, **{**ABSENT, **given})
    terms: TokenTerms = implementation(backend).token_terms(batch, objective.lower(batch), 100, True)
    return terms


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("tokens", INTEGERS), ("mask", (torch.bool, *INTEGERS, *FLOATS)), ("advantages", (*INTEGERS, *FLOATS)),
        ("token_weights", (*INTEGERS, *FLOATS)), ("entropy_weights", (*INTEGERS, *FLOATS)), ("old_logprobs", FLOATS),
        ("ref_logprobs", FLOATS),
    ],
)  # fmt: skip
def test_any_dtype(name: str, dtypes: tuple[torch.dtype, ...], backend: str, device: torch.device) -> None:
    arguments = small(device)
    expected = terms_of(arguments, "torch", device)
    for dtype in dtypes:
        terms = terms_of(arguments | {name: arguments[name].to(dtype)}, backend, device)
        agree(terms, expected)


@pytest.mark.parametrize(
    "name",
    ["tokens", "mask", "advantages", "token_weights", "entropy_weights", "old_logprobs", "ref_logprobs"],
)
def test_any_strides(name: str, backend: str, device: torch.device) -> None:
    """Shifted by one as a trainer's slices are, every second entry, transposed, expanded along the batch."""
    arguments = small(device)
    value = arguments[name]
    padded = torch.cat([value[:, :2], value], 1)
    for view in (padded[:, 2:], value.repeat_interleave(2, 1)[:, ::2], value.t().contiguous().t()):
        agree(terms_of(arguments | {name: view}, backend, device), terms_of(arguments, "torch", device))
    one = arguments | {name: value[:1].repeat(3, 1)}
    agree(terms_of(one | {name: value[:1].expand(3, 7)}, backend, device), terms_of(one, "torch", device))


def agree(terms: TokenTerms, expected: TokenTerms) -> None:
    unmasked = expected.targets != MASKED
    for term in (ADVANTAGE, POLICY_WEIGHT, KL_WEIGHT, ENTROPY_WEIGHT, OLD_LOGPROB, REF_LOGPROB):
        torch.testing.assert_close(
            terms.values[term][unmasked], expected.values[term][unmasked], rtol=4 * ROUNDING, atol=0
        )
    for ours, theirs in zip(terms[1:4], expected[1:4], strict=True):
        assert torch.equal(ours, theirs)


def test_empty_batches(backend: str, device: torch.device) -> None:
    for shape in ((0, 7), (3, 0)):
        arguments = {name: value.new_zeros(shape) for name, value in small(device).items()}
        terms = terms_of(arguments, backend, device)
        assert terms.values.shape == (6, *shape)
        assert terms.lengths.tolist() == [0] * shape[0]


def test_values_that_the_host_does_not_read_are_asserted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, as on a GPU (where it would end this process): the interpreter has them under debug only."""
    kernels = pytest.importorskip("hpo_fused.kernels", reason="needs Triton")
    if not kernels.interpreting():
        pytest.skip("a device-side assert ends the process")
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(interpreter_builder, "options", dataclasses.replace(interpreter_builder.options, debug=True))
    call = build(Case("packed", "token", "response"), device)
    kernels.token_terms(call.batch, call.spec, VOCABULARY, True)  # ids under a mask are nobody's business
    for wrong in ([0, 300, 200, 600, 1200, 1500, 1800], [*BOUNDARIES[:-1], 1801], [1, *BOUNDARIES[1:]]):
        batch = call.batch._replace(cu_seqlens=torch.tensor(wrong))
        with pytest.raises((AssertionError, InterpreterError), match="cu_seqlens: expected boundaries that rise"):
            kernels.token_terms(batch, call.spec, VOCABULARY, True)
    for wrong_id in (VOCABULARY, -1):
        tokens = call.tokens.clone()
        tokens[call.mask.nonzero()[3]] = wrong_id
        with pytest.raises((AssertionError, InterpreterError), match="tokens: expected ids"):
            kernels.token_terms(call.batch._replace(tokens=tokens), call.spec, VOCABULARY, True)
