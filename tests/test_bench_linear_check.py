"""The linear path's inputs, its float64 truth, and a check that finds what is wrong with a provider's result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")


from hpo_fused.bench.cases import Mode  # noqa: E402
from hpo_fused.bench.linear.cases import HEADS, HeadShape, LinearCase, parse_head  # noqa: E402
from hpo_fused.bench.linear.check import LinearOracle  # noqa: E402
from hpo_fused.bench.linear.draw import LinearInputs  # noqa: E402
from hpo_fused.bench.linear.exact import BLOCKS, Exact, block_sums  # noqa: E402
from hpo_fused.bench.linear.providers import LinearProvider, create  # noqa: E402
from hpo_fused.bench.linear.providers.plain import Eager  # noqa: E402
from hpo_fused.bench.linear.results import LinearErrors  # noqa: E402
from hpo_fused.bench.providers import Output  # noqa: E402
from hpo_fused.bench.trial import Step  # noqa: E402

from .bench_helpers import problem_of, zero_row  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------
# inputs


@pytest.mark.parametrize("name", HEADS)
def test_named_heads(name: str) -> None:
    assert parse_head(name) is HEADS[name]


def test_custom_head() -> None:
    assert parse_head("custom:H=64,V=300,softcap=30") == HeadShape("custom:H=64,V=300,softcap=30", 64, 300, 30.0)


@pytest.mark.parametrize("text", ["qwen3", "custom:V=300", "custom:H=1,V=300", "custom:H=8,V=9,W=1", "custom:H=a,V=9"])
def test_unknown_head_lists_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown shape .*qwen2\.5-0\.5b, .*gpt2 or custom:H=N,V=N"):
        parse_head(text)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_are_those_of_a_trained_policy(softcap: float | None) -> None:
    problem = problem_of("bf16", HeadShape("s", 896, 4000, softcap), 256)
    z = (problem.hidden.detach() @ problem.weight.detach().t()).double()
    assert 2.2 < z.std() < 2.8
    exact = reference.token_logprobs(z, problem.tokens, softcap=softcap).logprobs
    assert -2.5 < exact.mean() < -0.3
    assert (exact - problem.logprobs).abs().mean() < 0.1  # as designed
    assert 0.015 < problem.weight.detach().float().std() < 0.025
    inputs = problem.inputs(0.0, exact)
    ratio = (exact - inputs.old_logprobs).exp()
    assert ((ratio > 1.2) | (ratio < 0.8)).double().mean() > 0.03
    assert ((ratio < 1.2) & (ratio > 0.8)).double().mean() > 0.8


def test_shares_of_inactive_rows_share_everything_else() -> None:
    problem = problem_of(fractions=(0.0, 0.75))
    every, few = problem.inputs(0.0), problem.inputs(0.75)
    assert every.hidden is few.hidden
    assert every.weight is few.weight
    assert torch.equal(every.old_logprobs, few.old_logprobs)
    assert int((few.advantages != 0).sum()) * few.case.length == few.case.active == 32
    assert (few.case.inactive_share, every.case.active) == (0.75, 128)
    assert few.active_hidden().shape == (32, 48)
    again = problem_of(fractions=(0.75,))
    assert torch.equal(again.hidden, problem.hidden)
    assert torch.equal(again.advantages[0.75], problem.advantages[0.75])


# ---------------------------------------------------------------------------------------------------------------
# the truth, and the check


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_exact_is_autograd_in_float64(softcap: float | None) -> None:
    problem = problem_of(shape=HeadShape("tiny", 48, 97, softcap))
    exact = Exact.of(problem, 0)
    hidden, weight = (value.detach().double() for value in (problem.hidden, problem.weight))
    z = torch.mm(problem.hidden.detach().flatten(0, 1), problem.weight.detach().t()).double().requires_grad_()
    logprobs = reference.token_logprobs(z.unsqueeze(0), problem.tokens.view(1, -1), softcap=softcap).logprobs
    (slopes,) = torch.autograd.grad(logprobs.sum(), z)
    torch.testing.assert_close(exact.logprobs.flatten(), logprobs.detach().flatten())
    torch.testing.assert_close(exact.directions, slopes[exact.rows] @ weight)
    torch.testing.assert_close(exact.column_slopes, slopes[:, exact.columns])
    torch.testing.assert_close(exact.hidden_probes, slopes @ weight @ exact.probes)
    torch.testing.assert_close(exact.weight_probes, block_sums(slopes * exact.signs))
    assert set(problem.tokens.flatten()[exact.rows].tolist()) <= set(exact.columns.tolist())
    assert exact.weight_probes.shape == (hidden.flatten(0, 1).shape[0], BLOCKS)


def checked(inputs: LinearInputs, exact: Exact, change: Callable[..., Any] = lambda *step: step) -> LinearErrors:
    """The verdict on the plain loss, its (loss, log-probabilities, dhidden, dweight) changed."""
    output, gradients = Eager().step(inputs)
    assert output.logprobs is not None
    loss, logprobs, *changed = change(output.loss.detach(), output.logprobs, *gradients)
    return LinearOracle(inputs, exact).judge(Step(Output(loss, logprobs, None), tuple(changed)), ours=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("objective", ["mhpo_ahpo", "gspo", "dr_grpo"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_right_answers_pass(dtype: str, objective: str, softcap: float | None) -> None:
    problem = problem_of(dtype, HeadShape("tiny", 48, 97, softcap), objective=objective)
    exact = Exact.of(problem, 0)
    for inactive in (0.0, 0.5):
        errors = checked(problem.inputs(inactive, exact.logprobs), exact)
        assert (errors.complaint, errors.broken, errors.moved) == ("", "", 0)
        assert errors.hidden is not None
        assert errors.weight is not None
        assert 0 < errors.hidden.median <= errors.hidden.worst
        assert 0 < errors.weight.median <= errors.weight.worst


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda loss, p, dh, dw: (loss * 1.01, p, dh, dw), "loss off"),
        (lambda loss, p, dh, dw: (loss * torch.nan, p, dh, dw), "loss off"),
        (lambda loss, p, dh, dw: (loss, p, dh * 0.99, dw), "gradient of hidden off"),
        (lambda loss, p, dh, dw: (loss, p, dh, dw * 1.01), "gradient of weight off"),
        (lambda loss, p, dh, dw: (loss, p, dh, dw * torch.nan), "gradient of weight off"),
        (lambda loss, p, dh, dw: (loss, p, dh, dw.roll(1, 0)), "gradient of weight off"),
        (lambda loss, p, dh, dw: (loss, p, dh.roll(1, 0), dw), "gradient of hidden off"),
        (lambda loss, p, dh, dw: (loss, p + 0.01, dh, dw), "log-probability off by more than 1e-04 in 128 rows"),
        (lambda loss, p, dh, dw: (loss, p * torch.nan, dh, dw), "log-probability off"),
    ],
)
def test_wrong_answers_are_rejected(dtype: str, mistake: Callable[..., Any], complaint: str) -> None:
    problem = problem_of(dtype)
    exact = Exact.of(problem, 0)
    assert complaint in checked(problem.inputs(0.0, exact.logprobs), exact, mistake).complaint


@pytest.mark.parametrize("change", [lambda h: h + 0.01, lambda h: h * torch.nan, torch.zeros_like])
def test_wrong_entropies_are_rejected(change: Callable[[Tensor], Tensor]) -> None:
    problem = problem_of("bf16")
    exact = Exact.of(problem, 0)
    oracle = LinearOracle(problem.inputs(0.5, exact.logprobs), exact)
    step = Eager().step(oracle.inputs)
    assert step.output.entropy is not None
    assert oracle.judge(step).complaint == ""
    wrong = step.output._replace(entropy=change(step.output.entropy))
    assert oracle.judge(Step(wrong, step.gradients)).complaint == "entropy off by more than 1e-03 in 64 rows"


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("eager", "loss"),
        pytest.param(
            "linear_cross_entropy", "cross entropy",
            marks=pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="PyTorch < 2.13"),
        ),
    ],
)  # fmt: skip
def test_who_returns_nothing_is_wrong(name: str, root: str, mode: Mode) -> None:
    problem = problem_of()
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.0, exact.logprobs)
    oracle = LinearOracle(dataclasses.replace(inputs, case=dataclasses.replace(inputs.case, mode=mode)), exact)
    errors = create(name).judge(oracle, Step(Output(None, None, None), ()))
    assert errors is not None
    assert errors.complaint.startswith(f"returned no {root}")
    given = create(name).step(inputs)
    errors = create(name).judge(oracle, Step(given.output._replace(logprobs=None, entropy=None), ()))
    assert errors is not None
    assert errors.complaint == ("returned no gradient" if mode == "both" else "")


def test_whoever_takes_a_step_is_judged() -> None:
    """Not only who leaves the gradients to autograd; the bare GEMMs alone are nothing to judge."""

    class Own(LinearProvider):
        name = "own"

        def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
            return 0.0

        def step(self, inputs: LinearInputs, begun: Output | None = None) -> Step:
            return Step(Output(torch.zeros(()), None, None), (inputs.hidden.detach(), inputs.weight.detach()))

    problem = problem_of()
    exact = Exact.of(problem, 0)
    oracle = LinearOracle(problem.inputs(0.0, exact.logprobs), exact)
    errors = Own().judge(oracle, Own().step(oracle.inputs))
    assert errors is not None
    assert "loss off by" in errors.complaint
    assert "gradient of hidden off by" in errors.complaint
    assert create("gemms").judge(oracle, create("gemms").step(oracle.inputs)) is None


def test_every_row_of_both_gradients_is_checked() -> None:
    """Not only those that are compared in full."""
    problem = problem_of("bf16", HeadShape("tiny", 48, 5000), 256)
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.0, exact.logprobs)
    rows = set(range(256)) - set(exact.rows.tolist())
    for index in sorted(rows)[::40]:
        verdict = checked(inputs, exact, lambda loss, p, dh, dw, i=index: (loss, p, zero_row(i)(dh), dw)).complaint
        assert verdict.startswith("gradient of hidden, all rows, off"), index
    token = next(one for one in inputs.tokens.flatten().tolist() if one not in exact.columns)
    wrong = checked(inputs, exact, lambda loss, p, dh, dw: (loss, p, dh, dw.index_fill(0, torch.tensor([token]), 0.0)))
    assert wrong.complaint.startswith("gradient of weight, all rows, off")


def test_who_rounds_more_often_is_given_more_room() -> None:
    problem = problem_of("bf16")
    exact = Exact.of(problem, 0)
    oracle = LinearOracle(problem.inputs(0.0, exact.logprobs), exact)
    step = Eager().step(oracle.inputs)
    hidden, weight = step.gradients
    step = step._replace(gradients=(hidden, weight * 1.01))
    assert "gradient of weight off" in oracle.judge(step).complaint
    assert oracle.judge(step, leniency=4.0).complaint == ""
    assert [create(name).leniency for name in ("hpo_fused", "eager", "liger:chunked")] == [1.0, 1.0, 4.0]


def test_inactive_rows_must_have_no_gradient() -> None:
    problem = problem_of()
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.5, exact.logprobs)
    idle = inputs.advantages == 0

    def leak(loss: Tensor, p: Tensor, dh: Tensor, dw: Tensor) -> tuple[Tensor, ...]:
        return loss, p.masked_fill(idle.unsqueeze(-1), torch.nan), dh + 1e-12 * idle[:, None, None], dw

    assert checked(inputs, exact, leak).complaint == "gradient of hidden not zero in rows without a learning signal"


class Moved(Eager):
    """The plain loss of logits that differ from a GEMM's by a unit in the last place, in some rows' tokens."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def forward(self, inputs: LinearInputs) -> Output:
        from hpo_fused.bench.plain import plain_policy_loss

        logits = torch.nn.functional.linear(inputs.hidden, inputs.weight)
        up = torch.nextafter(logits.detach(), torch.full_like(logits, 1e4))
        one = torch.zeros_like(logits).scatter_(-1, inputs.tokens.unsqueeze(-1), 1.0)
        one.view(-1, logits.shape[-1])[self.rows :] = 0
        logits = logits + one * (up - logits.detach())
        return Output(*plain_policy_loss(
            inputs.objective, logits, inputs.tokens, inputs.advantages, inputs.old_logprobs, None, None
        ))  # fmt: skip


@pytest.mark.parametrize(("rows", "right"), [(1, True), (40, False)])
def test_a_logit_rounded_the_other_way_is_no_mistake(rows: int, right: bool) -> None:
    """A GEMM of another shape may sum in another order; it does so in few rows."""
    problem = problem_of("bf16")
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.0, exact.logprobs)
    errors = LinearOracle(inputs, exact).judge(Moved(rows).step(inputs))
    assert 0 < errors.moved <= rows
    assert (errors.complaint == "") is right
    assert errors.logprob is not None
    assert errors.logprob.median < errors.logprob.worst < 1e-4


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="PyTorch < 2.13")
def test_cross_entropy_is_judged_by_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of()
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.0, exact.logprobs)
    provider, oracle = create("linear_cross_entropy"), LinearOracle(inputs, exact)
    step = provider.step(inputs)
    errors = provider.judge(oracle, step)
    assert errors is not None
    assert (errors.complaint, errors.logprob) == ("", None)
    assert errors.weight is not None
    assert errors.weight.worst < 1e-4
    wrong = step._replace(output=step.output._replace(loss=step.output.loss * 1.01))
    errors = provider.judge(oracle, wrong)
    assert errors is not None
    assert "cross entropy off by 1.0e-02" in errors.complaint
