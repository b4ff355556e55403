"""The benchmark's cases and inputs, and a check that finds mistakes in a provider's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import Objective, reference
from hpo_fused.bench import plain
from hpo_fused.bench.cases import (
    OPERATIONS,
    SHAPES,
    Case,
    Mode,
    Operation,
    Shape,
    cases_of,
    labels,
    of_tokens,
    parse_shape,
)
from hpo_fused.bench.check import fingerprint, judge
from hpo_fused.bench.inputs import Inputs, draw_advantages
from hpo_fused.bench.providers import Output, Step
from hpo_fused.bench.providers.fused import Fused
from hpo_fused.bench.providers.plain import Eager
from hpo_fused.bench.truth import LinearTruth, LogitsTruth, draw

from .bench_helpers import CPU, TINY, judged, stepped, tiny, with_gradient, with_loss

# ---------------------------------------------------------------------------------------------------------------
# cases and inputs


def test_shapes_are_found_by_name_or_spelt() -> None:
    assert [parse_shape(name) for name in SHAPES] == list(SHAPES.values())
    assert parse_shape("custom:V=300,H=64,softcap=30") == Shape("custom:V=300,H=64,softcap=30", 300, 64, 30.0)
    assert parse_shape("custom:V=300").hidden == 0


@pytest.mark.parametrize(
    "text", ["qwen", "custom:", "custom:V=x", "custom:V=1", "custom:V=9,softcap=0", "custom:V=9,W=3"]
)
def test_unknown_shape_lists_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"shape: expected one of .*gpt2 or custom:V=N.*got"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of bf16, fp16, fp32, got 'int8'"),
        ({"objective": "ppo"}, "objective: expected one of grpo, .*, got 'ppo'"),
        ({"mode": "gradient"}, "mode: expected one of forward, backward, both, got 'gradient'"),
        ({"inactive": 1.5}, "inactive: expected a share of 0 to 1, got 1.5"),
        ({"shape": Shape("flat", 97)}, r"shape: expected a hidden size \(H=N\) for linear_policy_loss, got 'flat'"),
        ({"chunk_mib": 1e-6}, r"chunk_mib: expected a row of logits \(388 bytes\) at least"),
        ({"tokens": 0}, "tokens: expected 1 at least, got 0"),
    ],
)
def test_cases_that_there_are_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("linear_policy_loss", **fields)


def test_cases_are_every_combination_once() -> None:
    rows: dict[Operation, list[int]] = {one: [8, 16] for one in OPERATIONS}
    axes = {"dtype": ["bf16", "fp32"], "objective": ["grpo", "dapo"], "inactive": [0.0, 0.5]}
    cases = cases_of(rows, [TINY], axes, inplace=True)
    # Without a loss neither objective nor inactivity makes a difference, and without logits neither does the dtype.
    count = {operation: sum(case.operation == operation for case in cases) for operation in OPERATIONS}
    assert list(count.values()) == [16, 16, 8, 4, 4]
    assert len(set(labels(cases).values())) == len(cases)
    assert {case.inplace for case in cases if case.operation != "policy_loss"} == {False}


@pytest.mark.parametrize("tokens", [1, 7, 48, 101, 1024])
def test_case_has_exactly_the_tokens_asked_for(tokens: int) -> None:
    case = tiny("policy_loss", tokens)
    assert (case.tokens, case.logits_bytes) == (tokens, tokens * 97 * 4)
    assert Case.from_dict({**case.__dict__, "shape": case.shape.__dict__}) == case


def test_work_is_that_which_nobody_can_avoid() -> None:
    size = 40 * 97 * 4 / 1e9
    assert tiny("policy_loss").work() == (pytest.approx(2 * size), "GB/s")
    assert tiny("policy_loss", inactive=0.5).work() == (pytest.approx(1.5 * size), "GB/s")
    assert tiny("token_logprobs", mode="forward").work() == (pytest.approx(size), "GB/s")
    assert tiny("linear_policy_loss", inactive=0.5).work() == (pytest.approx(6 * 20 * 97 * 48 / 1e12), "TFLOP/s")
    assert tiny("policy_loss", mode="backward").work() is None


@pytest.mark.parametrize("operation", ["policy_loss", "linear_policy_loss"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_inputs_are_those_of_a_trained_policy(operation: Operation, softcap: float | None) -> None:
    """Log-probabilities as in training, ratios inside and beyond the clip range, advantages of both signs."""
    case = of_tokens(operation, Shape("s", 4000, 896, softcap), 256)
    inputs, truth = draw(case, CPU, 1)
    z = inputs.leaves[0].detach()
    z = z @ inputs.leaves[1].detach().t() if case.linear else z
    assert z.dtype == torch.bfloat16
    exact = reference.token_logprobs(z.double(), inputs.tokens, softcap=softcap)
    torch.testing.assert_close(truth.logprobs, exact.logprobs, rtol=0, atol=0.01 if case.linear else 1e-9)
    assert -2.5 < exact.logprobs.mean() < -0.3
    ratio = (truth.logprobs - inputs.old_logprobs).exp()
    assert ((ratio > 1.2) | (ratio < 0.8)).double().mean() > 0.03
    assert ((ratio < 1.2) & (ratio > 0.8)).double().mean() > 0.8
    assert {-1.0, 1.0} == set(inputs.advantages.sign().tolist())


def test_equal_seeds_draw_equal_inputs() -> None:
    first, second, other = (draw(tiny("linear_policy_loss"), CPU, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.leaves[0], second.leaves[0])
    assert torch.equal(first.old_logprobs, second.old_logprobs)
    assert not torch.equal(first.leaves[0], other.leaves[0])


@pytest.mark.parametrize(("inactive", "zeros"), [(0.0, 0), (0.5, 8), (0.75, 12), (1.0, 16)])
def test_inactive_share_is_exact(inactive: float, zeros: int) -> None:
    values = draw_advantages(16, inactive, torch.Generator().manual_seed(0))
    assert int((values == 0).sum()) == zeros
    assert abs(float(values.sum())) < 1e-5  # group-normalised


# ---------------------------------------------------------------------------------------------------------------
# the truth


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("operation", ["policy_loss", "linear_policy_loss"])
def test_truth_is_autograd_in_float64(operation: Operation, softcap: float | None) -> None:
    case = tiny(operation, shape=Shape("tiny", 97, 48, softcap))
    inputs, truth = draw(case, CPU, 0)
    leaves = [leaf.detach() for leaf in inputs.leaves]
    logits = leaves[0].flatten(0, 1) @ leaves[1].t() if case.linear else leaves[0].flatten(0, 1)
    z = logits.double().requires_grad_()
    exact = reference.token_logprobs(z.unsqueeze(0), inputs.tokens.view(1, -1), softcap=softcap)
    (slopes,) = torch.autograd.grad(exact.logprobs.sum(), z)
    for got, expected in ((truth.logprobs, exact.logprobs), (truth.entropies, exact.entropy)):
        torch.testing.assert_close(got.flatten(), expected.detach().flatten(), rtol=0, atol=1e-6)
    if isinstance(truth, LogitsTruth):
        torch.testing.assert_close(truth.slopes, slopes[truth.rows])
    else:
        assert isinstance(truth, LinearTruth)
        torch.testing.assert_close(truth.directions, slopes[truth.rows] @ leaves[1].double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(truth.column_slopes, slopes[:, truth.columns], rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", Objective.presets())
@pytest.mark.parametrize("ragged", [False, True])
def test_plain_loss_is_the_reference(objective: str, ragged: bool) -> None:
    """The baseline does the same work: every preset's loss and gradient."""
    case = tiny("logprob_policy_loss", objective=objective, ragged=ragged, inactive=0.25)
    inputs, truth, step = stepped(case)
    exact = truth.logprobs.clone().requires_grad_()
    expected = Eager().loss_of(inputs, exact)
    assert step.output.loss is not None
    torch.testing.assert_close(step.output.loss.double(), expected, rtol=1e-5, atol=1e-7)
    (wanted,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(step.gradients[0].double(), wanted, rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------
# the check


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("fields", [{}, {"ragged": True, "inactive": 0.5}, {"objective": "gspo"}])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_answers_pass(operation: Operation, dtype: str, fields: dict[str, Any]) -> None:
    """Of plain PyTorch, and of this package within its own limits."""
    case = tiny(operation, shape=Shape("tiny", 97, 48, 30.0), dtype=dtype, **fields)
    for provider in (Eager(), Fused("torch")):
        errors = judged(case, provider=provider)
        assert (errors.complaint, errors.broken) == ("", "")
        assert all(0 <= error.median <= error.worst for error in errors.gradients.values())
        assert len(errors.gradients) == (1 if operation == "logprob_policy_loss" else 2)


GRADIENTS: list[tuple[Operation, int]] = [
    ("policy_loss", 0), ("logprob_policy_loss", 0), ("token_logprobs", 0), ("linear_policy_loss", 0),
    ("linear_policy_loss", 1), ("linear_token_logprobs", 0), ("linear_token_logprobs", 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "mistake", [lambda g: 0.98 * g, torch.zeros_like, lambda g: g.roll(1, 0), lambda g: g * torch.nan, lambda g: -g]
)
@pytest.mark.parametrize(("operation", "index"), GRADIENTS)
def test_wrong_gradients_are_rejected(
    operation: Operation, index: int, mistake: Callable[[Tensor], Tensor], dtype: str
) -> None:
    assert "gradient" in judged(tiny(operation, dtype=dtype), with_gradient(index, mistake)).complaint


@pytest.mark.parametrize("error", [0.01, -0.01, float("nan")])
@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.endswith("policy_loss")])
def test_wrong_losses_are_rejected(operation: Operation, error: float) -> None:
    assert judged(tiny(operation), with_loss(lambda loss: loss + error)).complaint.startswith("loss off by")


@pytest.mark.parametrize("field", ["logprobs", "entropy"])
@pytest.mark.parametrize("change", [lambda v: v + 0.01, lambda v: v * torch.nan, torch.zeros_like])
@pytest.mark.parametrize("operation", ["policy_loss", "token_logprobs", "linear_policy_loss", "linear_token_logprobs"])
def test_wrong_values_are_rejected(operation: Operation, change: Callable[[Tensor], Tensor], field: str) -> None:
    def changed(step: Step) -> Step:
        return step._replace(output=step.output._replace(**{field: change(getattr(step.output, field))}))

    kind = {"logprobs": "log-probability", "entropy": "entropy"}[field]
    assert f"{kind} off by" in judged(tiny(operation), changed).complaint


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_who_returns_nothing_is_wrong(operation: Operation, mode: Mode) -> None:
    root = "loss" if operation.endswith("policy_loss") else "log-probabilities"
    complaint = judged(tiny(operation, mode=mode), lambda step: Step(Output(None, None, None), ())).complaint
    assert complaint == f"returned no {root}" + (", returned no gradient" if mode == "both" else "")


@pytest.mark.parametrize("operation", ["policy_loss", "linear_policy_loss"])
def test_log_probabilities_and_entropies_of_a_loss_may_be_missing(operation: Operation) -> None:
    kept = judged(tiny(operation), lambda step: step._replace(output=Output(step.output.loss, None, None)))
    assert (kept.complaint, kept.logprob) == ("", None)


@pytest.mark.parametrize(("operation", "index"), [("policy_loss", 0), ("linear_policy_loss", 0)])
def test_inactive_rows_must_have_no_gradient(operation: Operation, index: int) -> None:
    case = tiny(operation, inactive=0.5)
    idle = draw(case, CPU, 0)[0].advantages == 0
    leak = with_gradient(index, lambda gradient: gradient + 1e-4 * idle[:, None, None])
    assert "gradient" in judged(case, leak).complaint


def test_sampled_and_other_columns_are_judged_apart() -> None:
    """A mistake in one shows there, at its size, and nowhere else."""
    case = tiny("policy_loss")
    column = draw(case, CPU, 0)[0].tokens.unsqueeze(-1)
    sampled = with_gradient(0, lambda g: g.scatter(-1, column, 1.0001 * g.gather(-1, column)))
    for change, both in ((sampled, False), (with_gradient(0, lambda g: 1.0001 * g), True)):
        errors = judged(case, change, Fused("torch"))
        target, others = errors.gradients["sampled token"].beyond, errors.gradients["other tokens"].beyond
        assert target == pytest.approx(1e-4, rel=0.02)
        assert others == pytest.approx(1e-4 if both else 0.0, rel=0.02, abs=1e-6)
        assert errors.complaint == ""
        assert "gradient of the sampled token off by 1.0e-04 (limit 3e-06)" in errors.broken
        assert ("other tokens" in errors.broken) is both


def test_own_log_probability_limit() -> None:
    def shifted(step: Step) -> Step:
        assert step.output.logprobs is not None
        return step._replace(output=step.output._replace(logprobs=step.output.logprobs + 1e-5))

    errors = judged(tiny("policy_loss"), shifted, Fused("torch"))
    assert (errors.complaint, "log-probability off by" in errors.broken) == ("", True)
    assert judged(tiny("policy_loss"), shifted).broken == ""
    assert "median log-probability" in judged(tiny("linear_policy_loss", dtype="bf16"), shifted, Fused("torch")).broken


def test_a_clip_edge_within_the_logprob_limit_is_no_error() -> None:
    """Whether such a token has a gradient is decided by the last bit of its log-probability."""
    inputs, truth = draw(tiny("policy_loss", objective="grpo"), CPU, 0)
    inputs.advantages.fill_(1.0)
    edge = (truth.logprobs - torch.tensor(1.2).double().log()).float()
    for side in (1e-6, -1e-6):
        moved = replace(inputs, old_logprobs=edge + side)
        output = Eager().policy_loss(moved)
        assert output.loss is not None
        step = Step(output, torch.autograd.grad(output.loss, moved.leaves))
        # The truth is made to stand on the other side of the edge, 2e-6 from the provider.
        beyond = replace(truth, logprobs=truth.logprobs + 2 * side)
        assert "gradient" not in judge(moved, beyond, step, Eager()).complaint
        strict = replace(beyond, slack=torch.zeros_like(beyond.slack))
        assert "gradient" in judge(moved, strict, step, Eager()).complaint


def test_every_row_of_both_linear_gradients_is_checked() -> None:
    """Not only those that are compared in full."""
    case = tiny("linear_policy_loss", 256, Shape("tiny", 5000, 48), dtype="bf16")
    inputs, truth, step = stepped(case)
    assert isinstance(truth, LinearTruth)

    def without(index: int, row: int) -> str:
        change = with_gradient(index, lambda g: g.flatten(0, -2).index_fill(0, torch.tensor([row]), 0.0).view(g.shape))
        return judge(inputs, truth, change(step), Eager()).complaint

    for row in sorted({*range(256)} - {*truth.rows.tolist()})[::40]:
        assert without(0, row).startswith("gradient of hidden, all rows, off")
    token = next(one for one in inputs.tokens.flatten().tolist() if one not in truth.columns)
    assert without(1, token).startswith("gradient of weight, all rows, off")


class Moved(Eager):
    """The plain loss of logits that differ from a GEMM's by a unit in the last place, in some rows' tokens."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        logits = torch.nn.functional.linear(*inputs.leaves)
        up = torch.nextafter(logits.detach(), torch.full_like(logits, 1e4))
        one = torch.zeros_like(logits).scatter_(-1, inputs.tokens.unsqueeze(-1), 1.0)
        one.view(-1, logits.shape[-1])[self.rows :] = 0
        logits = logits + one * (up - logits.detach())
        return Output(*plain.policy_loss(inputs.objective, logits, inputs.tokens, *inputs.batch, None))


@pytest.mark.parametrize(("rows", "right"), [(1, True), (40, False)])
def test_a_logit_rounded_the_other_way_is_no_mistake(rows: int, right: bool) -> None:
    """A GEMM of another shape may sum in another order; it does so in few rows."""
    errors = judged(tiny("linear_policy_loss", 128, dtype="bf16"), provider=Moved(rows))
    assert (errors.complaint == "") is right
    assert errors.logprob is not None
    assert errors.logprob < 1e-4


def test_fingerprint_tells_every_bit() -> None:
    values = torch.randn(5, 1000).bfloat16()
    assert torch.equal(fingerprint(values.view(5, 1, 1000)), fingerprint(values))
    other = values.clone()
    other.view(torch.int16)[3, 7] ^= 1
    assert (fingerprint(values) != fingerprint(other)).tolist() == [False, False, False, True, False]
    assert (fingerprint(values) != fingerprint(values.roll(1, -1))).all()
    assert fingerprint(torch.zeros(1)) != fingerprint(-torch.zeros(1))
