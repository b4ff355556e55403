"""Totals of the optimiser batch, layouts and weights: any split into calls gives the gradient of one big call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference

from .samples import Sample
from .test_equivalence import PRESETS

ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.0, -2.0, 0.3])
MASK = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 1])[:, None]
GROUPS = torch.tensor([10, 10, 3, 3, 99, 99])


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 31, generator=generator)
    tokens = torch.randint(31, (6, 5), generator=generator)
    return logits, tokens, -3 + torch.randn(6, 5, generator=generator)


BY_GROUP = hf.Objective.preset("dapo", normalization="group_mean_length")


def numbered(count: object, groups: Tensor | None = GROUPS) -> hf.BatchStatistics:
    return hf.BatchStatistics.from_batch(ADVANTAGES, MASK, groups=groups, group_count=count)  # type: ignore[arg-type]


def test_numbered_groups_all_count(backend: str, device: torch.device) -> None:
    """Of four groups one has no response in this call: it is one of G; the oracle says the same."""
    advantages, mask, groups = (value.to(device) for value in (ADVANTAGES, MASK, GROUPS % 5))  # 0, 3, 4
    whole = hf.BatchStatistics.from_batch(advantages, mask, groups=groups, group_count=5)
    halves = [
        hf.BatchStatistics.from_batch(advantages[part], mask[part], groups=groups[part], group_count=5)
        for part in (slice(0, 2), slice(2, 6))
    ]
    logprobs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    given = {"mask": mask, "groups": groups, "objective": BY_GROUP}
    expected = reference.logprob_policy_loss(logprobs.double(), advantages, statistics=whole, **given)
    for statistics in (whole, halves[0] + halves[1]):
        loss = hf.logprob_policy_loss(logprobs, advantages, statistics=statistics, backend=backend, **given).loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    counted = hf.BatchStatistics.from_batch(advantages, mask, groups=groups)
    fewer = hf.logprob_policy_loss(logprobs, advantages, statistics=counted, backend=backend, **given).loss
    torch.testing.assert_close(fewer * 3 / 5, loss)


def test_counts() -> None:
    statistics = hf.BatchStatistics.from_batch(ADVANTAGES, MASK)
    assert [int(statistics.responses), int(statistics.tokens)] == [6, 15]
    # The fifth response is negative but has no token left: it counts as a response, with neither sign.
    assert [int(statistics.positive), int(statistics.negative)] == [2, 2]
    assert statistics.gradient_average == 1.0


def test_counts_by_masked_sum() -> None:
    per_token = torch.tensor([[1.0, -3.0, 1.0], [1.0, -3.0, 9.0], [0.0, 0.0, 0.0], [-1.0, 1.0, torch.nan]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    statistics = hf.BatchStatistics.from_batch(per_token, mask)
    assert [int(statistics.positive), int(statistics.negative)] == [0, 2]


@pytest.mark.parametrize("advantages", [ADVANTAGES, ADVANTAGES[:, None], ADVANTAGES[:, None].expand(6, 5)])
def test_layouts_count_alike(advantages: Tensor) -> None:
    padded = hf.BatchStatistics.from_batch(advantages, MASK, groups=GROUPS)
    lengths = MASK.sum(1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    packed_advantages = advantages.reshape(-1) if advantages.numel() == 6 else advantages[MASK]
    packed = hf.BatchStatistics.from_batch(packed_advantages, cu_seqlens=cu_seqlens, groups=GROUPS)
    for name in ("responses", "tokens", "positive", "negative"):
        assert int(getattr(padded, name)) == int(getattr(packed, name))
    assert padded.group_lengths.tolist() == packed.group_lengths.tolist() == lengths.tolist()


@pytest.mark.parametrize(
    ("positive", "negative", "alpha"),
    [(0, 5, 0.1), (1, 4, 0.25), (5, 4, 1.0), (3, 0, 1.0), (0, 0, 1.0), (0.2, 0.5, 0.4)],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_hysteretic_weight(positive: float, negative: float, alpha: float, as_tensor: bool) -> None:
    """As the statistics tell it, and as the metrics report it."""
    wrap = torch.tensor if as_tensor else float
    statistics = hf.BatchStatistics(9, 9, wrap(positive), wrap(negative))
    for weighting, expected in ((hf.AdaptiveHysteretic(0.1), alpha), (hf.Hysteretic(0.6), 0.6)):
        out = hf.logprob_policy_loss(
            torch.zeros(6, 5), ADVANTAGES, objective=hf.Objective(weighting=weighting), statistics=statistics
        )
        assert out.metrics()["hysteretic_weight"].item() == pytest.approx(expected, rel=1e-6)
        assert float(statistics.alpha(weighting)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", ["torch", "linear"])
@pytest.mark.parametrize("name", [*PRESETS, "group_mean_length"])
@pytest.mark.parametrize("splits", [[3, 2], [1, 3, 1]])
def test_micro_batches_add_up(name: str, splits: list[int], path: str, device: torch.device) -> None:
    """Accumulated over calls with the totals of the optimiser batch, in one .grad: one big call's gradient."""
    objective = hf.Objective.preset("mhpo_ahpo", normalization=name) if name == "group_mean_length" else PRESETS[name]
    sample = Sample(path, device)
    mask = (torch.arange(4) < torch.tensor([4, 2, 3, 0, 1])[:, None]).to(device)
    groups = torch.tensor([10, 10, 3, 3, 10], device=device) if name == "group_mean_length" else None
    statistics = hf.BatchStatistics.from_batch(sample.advantages, mask, groups=groups)
    results = []
    for parts in ([5], splits):
        inputs, total = sample.leaves(), torch.zeros((), device=device)
        for rows in torch.arange(5, device=device).split(parts):
            out = sample.loss(
                [inputs[0][rows], *inputs[1:]], tokens=sample.tokens[rows], advantages=sample.advantages[rows],
                old_logprobs=sample.old[rows], mask=mask[rows], groups=None if groups is None else groups[rows],
                objective=objective, statistics=statistics if parts == splits else None,
            )  # fmt: skip
            out.loss.backward()
            total += out.loss.detach()
        results.append((total, *(leaf.grad for leaf in inputs)))
    for whole, added in zip(*results, strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-6)


def test_gradient_average_multiplies() -> None:
    logits, tokens, old = batch()
    statistics = hf.BatchStatistics.from_batch(ADVANTAGES, MASK, gradient_average=4)
    losses = [
        hf.policy_loss(logits, tokens, ADVANTAGES, old_logprobs=old, mask=MASK, statistics=s).loss
        for s in (None, statistics)
    ]
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_mean_length_is_daposs_token_mean() -> None:
    logprobs = torch.randn(6, 5) - 2
    loss = hf.logprob_policy_loss(logprobs, ADVANTAGES, mask=MASK, objective="dapo").loss
    expected = -(ADVANTAGES[:, None] * MASK).sum() / MASK.sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("normalization", "options", "expected"),
    [
        ("mean_length", {}, lambda count, tokens: 4 / tokens),
        ("response", {}, lambda count, tokens: 2 / count),
        ("response", {"lengths": torch.tensor([6, 2])}, lambda count, tokens: (3 / 6 + 1 / 2) / count),
        ("response_sum", {}, lambda count, tokens: 4 / count),
        ("constant", {}, lambda count, tokens: 4 / (8 * count)),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_totals_need_not_be_whole(normalization: str, options, expected, as_tensor: bool, backend: str, device) -> None:  # type: ignore[no-untyped-def]
    """A fraction is the factor that a trainer means by it; 0 leaves nothing to divide and counts as 1."""
    objective = hf.Objective.preset("dapo", normalization=normalization, max_length=8)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], device=device)
    options = {name: value.to(device) for name, value in options.items()}
    for count, tokens in ((2.5, 7.3), (0, 0)):
        totals = [
            torch.tensor(c, dtype=torch.float64, device=device) if as_tensor else c for c in (count, tokens, 1, 1)
        ]
        out = hf.logprob_policy_loss(
            torch.full((2, 3), -1.0, device=device), torch.full((2,), -1.0, device=device), mask=mask,
            objective=objective, statistics=hf.BatchStatistics(*totals), backend=backend, **options,
        )  # fmt: skip
        assert out.loss.item() == pytest.approx(expected(count or 1, tokens or 1), rel=1e-6)


def test_response_sum_is_the_mean_of_the_responses_sums(backend: str, device: torch.device) -> None:
    """Also where a response has no token left: it is one of S."""
    logprobs, mask, advantages = torch.randn(6, 5), MASK, ADVANTAGES
    out = hf.logprob_policy_loss(
        logprobs.to(device), advantages.to(device), mask=mask.to(device), objective="reinforce", backend=backend
    )
    expected = -(advantages[:, None] * logprobs * mask).sum(1).mean()
    torch.testing.assert_close(out.loss.cpu(), expected)


SHAPINGS = {
    "clip": hf.Clip(0.2, 0.28, delta=1.8, dual=1.4),
    "log_fidelity": hf.LogFidelity(),
    "soft_gate": hf.SoftGate(),
    "truncated_ratio": hf.TruncatedRatio(1.2, 0.5, "zero", 1.1, 0.4),
    "gamma_gate": hf.GammaGate(),
    "geometric_mean": hf.GeometricMean(0.2, 0.3),
    "dro": hf.DRO(0.5),
}


@pytest.mark.parametrize("weighting", [hf.AdaptiveHysteretic(0.1), hf.Hysteretic(0.6)], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True], ids=["responses", "tokens"])
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_hysteretic_advantages_are_the_losses_weighting(shaping, level, per_token, weighting) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    old, advantages = -2 + 0.3 * torch.randn(6, 5, generator=generator), ADVANTAGES - torch.eye(6)[5]  # alpha: 1 / 3
    if per_token:
        advantages = torch.randn(6, 5, generator=generator) + torch.tensor([2, -2, -2, -2, 0, -3])[:, None]
    objective = hf.Objective(level, SHAPINGS[shaping], weighting)
    unweighted = hf.Objective(level, SHAPINGS[shaping], None)
    folded = hf.hysteretic_advantages(advantages, MASK, weighting)
    assert folded.shape == advantages.shape
    results = []
    for a, o in ((advantages, objective), (folded, unweighted), (advantages, unweighted)):
        logprobs = torch.full((6, 5), -2.0, requires_grad=True)
        hf.logprob_policy_loss(logprobs, a, old_logprobs=old, mask=MASK, objective=o).loss.backward()
        results.append(logprobs.grad)
    assert not torch.allclose(results[0], results[2], rtol=0.05, atol=0)
    if shaping == "dro":  # its weighting scales the quadratic term too
        assert not torch.allclose(results[0], results[1], rtol=0.01, atol=0)
    else:  # the two round differently: alpha by the weight or by the advantage
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)


def test_hysteretic_advantages_in_every_form(device: torch.device) -> None:
    """One alpha, 2 / 3 here: from the whole batch's statistics, from any layout, kept in the advantages' dtype."""
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.0, -2.0, 0.3], device=device)
    expected = torch.where(advantages < 0, advantages * 2 / 3, advantages)
    cu_seqlens = torch.tensor([0, 2, 4, 5, 6, 8, 9], device=device)
    statistics = hf.BatchStatistics.from_batch(advantages, cu_seqlens=cu_seqlens)
    per_token = advantages.repeat_interleave(cu_seqlens.diff())
    for result, form in (
        (hf.hysteretic_advantages(advantages), expected),
        (hf.hysteretic_advantages(advantages[:, None]), expected[:, None]),
        (hf.hysteretic_advantages(advantages[:, None].expand(6, 5)), expected[:, None].expand(6, 5)),
        (hf.hysteretic_advantages(advantages, cu_seqlens=cu_seqlens), expected),
        (hf.hysteretic_advantages(per_token, cu_seqlens=cu_seqlens), expected.repeat_interleave(cu_seqlens.diff())),
        (hf.hysteretic_advantages(advantages[1:2], statistics=statistics), expected[1:2]),
        (hf.hysteretic_advantages(advantages, weighting=None), advantages),
    ):
        torch.testing.assert_close(result, form)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert hf.hysteretic_advantages(advantages.to(dtype)).dtype == dtype
    assert hf.hysteretic_advantages(torch.tensor([2, -1, -1], device=device)).tolist() == [2.0, -0.5, -0.5]
    # Half precision is rounded once: 1.25 times bfloat16(1 / 3) would be 0.41797.
    quarters = torch.tensor([1.0, -1.25, -1.25, -1.25], device=device).bfloat16()
    assert hf.hysteretic_advantages(quarters).tolist() == [1.0, *[-0.416015625] * 3]


@pytest.mark.parametrize("name", ["grpo", "gspo_token", "mhpo_ahpo"])
@pytest.mark.parametrize("level", ["response", "token"])
def test_as_many_responses_as_tokens(level: str, name: str, backend: str, device: torch.device) -> None:
    """Packed, one advantage per response and one per token look alike: the caller says which, by name or by shape."""
    objective = hf.Objective.preset(name)
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, device=device)
    cu_seqlens = torch.tensor([0, 0, 2, 3], device=device)
    options = {"cu_seqlens": cu_seqlens, "old_logprobs": logprobs + torch.tensor([0.1, -0.05, 0.2], device=device)}
    values = {
        "advantages": torch.tensor([5.0, 1.0, -1.0], device=device),
        "token_weights": torch.tensor([3.0, 0.5, 2.0], device=device),
        "entropy_weights": torch.tensor([7.0, 0.2, 0.3], device=device),
    }
    entropy = torch.tensor([0.7, 1.1, 0.9], device=device)
    shaped = {key: value[:, None] if level == "response" else value[None] for key, value in values.items()}
    gradients, losses = [], []
    for advantages, said in (
        (values["advantages"], level),
        (shaped["advantages"], None),
        (shaped["advantages"], level),
    ):
        leaf = logprobs.float().requires_grad_()
        given = {**shaped, **options, "entropy": entropy, "advantages": advantages, "advantage_level": said}
        loss = hf.logprob_policy_loss(leaf, objective=objective, backend=backend, **given).loss
        loss.backward()
        losses.append(loss), gradients.append(leaf.grad)
    exact = logprobs.requires_grad_()
    # As the oracle sees it, beyond doubt: the empty response's entries belong to no token.
    plain = {k: v[None, [1, 1, 2]] if level == "response" else v[None] for k, v in values.items()}
    expected = reference.logprob_policy_loss(
        exact, objective=objective, **plain, **options, entropy=entropy.double(), advantage_level="token"
    )
    if level == "response" and objective.weighting is not None:
        statistics = hf.BatchStatistics.from_batch(values["advantages"], cu_seqlens=cu_seqlens, advantage_level=level)
        assert [int(statistics.positive), int(statistics.negative)] == [1, 1]
    (gradient,) = torch.autograd.grad(expected, exact)
    for ours, its in zip(losses, gradients, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(its.double(), gradient, rtol=1e-6, atol=1e-7)


def test_padded_levels_are_told_by_their_shape() -> None:
    logprobs, advantages = torch.randn(3, 3), torch.tensor([5.0, 1.0, -1.0])
    losses = [
        hf.logprob_policy_loss(logprobs, a, objective="grpo", advantage_level=level).loss
        for a, level in (
            (advantages, None), (advantages, "response"), (advantages[:, None], None),
            (advantages[:, None].repeat(1, 3), None), (advantages[:, None].repeat(1, 3), "token"),
        )
    ]  # fmt: skip
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hf.BatchStatistics.from_batch(ADVANTAGES), ValueError, "mask: expected .*lengths"),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES[:, None]),
            ValueError,
            r"mask: expected .*lengths.*\[6, 1\]",
        ),
        (lambda: hf.BatchStatistics.from_batch([1.0]), TypeError, "advantages.*list"),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES, cu_seqlens=torch.tensor([0, 0, 1, 2, 3, 4, 6])),
            ValueError,
            r"advantages: expected advantage_level='response' or 'token'.*\[6\]",
        ),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES, MASK, advantage_level="prompt"),
            ValueError,
            "advantage_level: expected one of .*'prompt'",
        ),
        (lambda: hf.BatchStatistics.from_batch(ADVANTAGES, [1]), TypeError, "mask.*list"),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES[:2], MASK),
            ValueError,
            r"advantages: .*\[6\].*\[2\]",
        ),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES, MASK, groups=GROUPS[:3]),
            ValueError,
            r"groups: .*\[6\].*\[3\]",
        ),
        (
            lambda: hf.BatchStatistics.from_batch(ADVANTAGES, MASK, gradient_average=0),
            ValueError,
            "gradient_average",
        ),
        (lambda: hf.BatchStatistics(1, 2, 3, "4"), TypeError, "negative.*str"),
        (lambda: hf.BatchStatistics(-1, 2, 3, 4), ValueError, "responses.*-1"),
        (lambda: hf.BatchStatistics(torch.ones(2), 2, 3, 4), ValueError, "responses.*0-d"),
        (lambda: hf.BatchStatistics(1.5, float("nan"), 3, 4), ValueError, "tokens: expected a finite number.*nan"),
        (lambda: hf.BatchStatistics(1, 2.5, True, 4), TypeError, "positive: expected a number.*True"),
        (lambda: hf.BatchStatistics(1, 1, 1, 1, group_ids=GROUPS), ValueError, "group_lengths"),
        (lambda: numbered(4, None), ValueError, r"groups: expected .*group_count=4, got None"),
        (lambda: numbered(0), ValueError, r"group_count: expected a positive int.*0"),
        (lambda: numbered(4.0), TypeError, r"group_count: expected a positive int.*4\.0"),
        (lambda: numbered(99), ValueError, r"groups: expected groups in \[0, 99\), got int64 \[6\].* with 99"),
        (lambda: numbered(96, GROUPS - 4), ValueError, r"groups: expected groups in \[0, 96\), got .* with -1"),
        (
            lambda: hf.logprob_policy_loss(
                torch.zeros(6, 5),
                ADVANTAGES,
                mask=MASK,
                groups=GROUPS + 1,
                objective=BY_GROUP,
                statistics=numbered(100),
            ),
            ValueError,
            r"groups: expected groups in \[0, 100\), got .* with 100",
        ),
        (
            lambda: hf.BatchStatistics(6, 15, 2, 2, group_lengths=torch.tensor([15])).check(numbered(100)),
            ValueError,
            r"statistics: expected the groups \[0, 1, 2.*got \[0\]",
        ),
        (lambda: numbered(100) + numbered(None), ValueError, "groups: .*group_count=100, got one counted by group"),
        (lambda: numbered(100) + numbered(101), ValueError, "groups: .*group_count=100, got .*group_count=101"),
        (lambda: numbered(100) + hf.BatchStatistics(1, 1, 1, 0), ValueError, "groups: .*got one counted without"),
        (
            lambda: hf.BatchStatistics(1, 1, 1, 0) + hf.BatchStatistics(1, 1, 1, 0, gradient_average=2),
            ValueError,
            r"gradient_average: expected 1\.0 in both statistics, got 2",
        ),
        (lambda: hf.BatchStatistics(1, 1, 1, 0) + 1, TypeError, "unsupported operand"),
        (lambda: hf.BatchStatistics(1, 1, 1, 0).check(), TypeError, "parts: expected .*at least one"),
        (lambda: numbered(100).check([numbered(100)]), TypeError, r"parts: expected BatchStatistics, got list \[Batch"),
        (
            lambda: hf.BatchStatistics(6, 15, 2, 3).check(hf.BatchStatistics.from_batch(ADVANTAGES, MASK)),
            ValueError,
            "statistics: expected negative = 2, as in the accumulated micro-batches, got 3",
        ),
        (lambda: hf.hysteretic_advantages([1.0]), TypeError, "advantages: expected a tensor.*list"),
        (lambda: hf.hysteretic_advantages(ADVANTAGES > 0), TypeError, "advantages: .*bool"),
        (lambda: hf.hysteretic_advantages(ADVANTAGES, MASK[:2]), ValueError, r"advantages: .*\[2\].*\[6\]"),
        (lambda: hf.hysteretic_advantages(ADVANTAGES, weighting=0.6), TypeError, "weighting: .*AdaptiveHyst.*0.6"),
        (lambda: hf.hysteretic_advantages(ADVANTAGES, statistics=(1, 2)), TypeError, "statistics: .*tuple"),
        (
            lambda: hf.hysteretic_advantages(ADVANTAGES[:3], cu_seqlens=torch.tensor([0, 0, 2, 3])),
            ValueError,
            "advantages: expected advantage_level=",
        ),
    ],
)
def test_bad_statistics(build, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        build()
