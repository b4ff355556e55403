"""The benchmark of the linear path: inputs, the float64 truth, wrong results rejected, limits, pictures, commands."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf
from hpo_fused import reference

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from rich.console import Console  # noqa: E402

from hpo_fused.bench import files  # noqa: E402
from hpo_fused.bench.commands import app  # noqa: E402
from hpo_fused.bench.linear import limits, memory, report  # noqa: E402
from hpo_fused.bench.linear.cases import HEADS, HeadShape, LinearCase, parse_head  # noqa: E402
from hpo_fused.bench.linear.check import LinearOracle  # noqa: E402
from hpo_fused.bench.linear.draw import LinearInputs, Problem, draw, draw_weight  # noqa: E402
from hpo_fused.bench.linear.exact import BLOCKS, Exact, block_sums  # noqa: E402
from hpo_fused.bench.linear.providers import PROVIDERS, create  # noqa: E402
from hpo_fused.bench.linear.providers.fused import Fused  # noqa: E402
from hpo_fused.bench.linear.providers.gemms import Gemms  # noqa: E402
from hpo_fused.bench.linear.providers.plain import Eager  # noqa: E402
from hpo_fused.bench.linear.results import LinearErrors, LinearResult, LinearRow, RowErrors, summarise  # noqa: E402
from hpo_fused.bench.providers import Output  # noqa: E402
from hpo_fused.bench.results import (  # noqa: E402
    MemoryRow,
    Prediction,
    Result,
)
from hpo_fused.bench.sheet import Sheet  # noqa: E402
from hpo_fused.bench.trial import Step  # noqa: E402

CPU = torch.device("cpu")
SHAPE = "custom:H=48,V=300"
TINY = ("--shape", SHAPE, "--device", "cpu")
TIMED = (*TINY, "--tokens", "64", "--repeats", "3", "--no-memory")
PLAIN = ("--provider", "hpo_fused:torch", "--provider", "eager", "--provider", "gemms")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs the command line from an empty directory, as a user would from theirs, with a small 7B model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(memory, "SEVEN_B_HEAD", HeadShape("small-7b", 64, 800))
    monkeypatch.setattr(memory, "SEVEN_B_TOKENS", 512)
    return lambda *arguments: testing.CliRunner().invoke(app, list(arguments))


def problem_of(
    dtype: str = "fp32", shape: HeadShape | None = None, tokens: int = 128, fractions: tuple[float, ...] = (0.0, 0.5),
    objective: str = "mhpo_ahpo",
) -> Problem:  # fmt: skip
    """A problem of milliseconds."""
    case = LinearCase.of_tokens(shape or HeadShape("tiny", 48, 97), tokens, dtype, objective, 0.0, None)
    return draw(case, fractions, CPU, 0, draw_weight(case.shape, case.torch_dtype, CPU, 0))


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


def _row(index: int) -> Callable[[Tensor], Tensor]:
    """Zeroes one row of hidden's gradient."""
    return lambda gradient: gradient.flatten(0, 1).index_fill(0, torch.tensor([index]), 0.0).view(gradient.shape)


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


def test_every_row_of_both_gradients_is_checked() -> None:
    """Not only those that are compared in full."""
    problem = problem_of("bf16", HeadShape("tiny", 48, 5000), 256)
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.0, exact.logprobs)
    rows = set(range(256)) - set(exact.rows.tolist())
    for index in sorted(rows)[::40]:
        verdict = checked(inputs, exact, lambda loss, p, dh, dw, i=index: (loss, p, _row(i)(dh), dw)).complaint
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


# ---------------------------------------------------------------------------------------------------------------
# limits, tables, pictures, on results made by hand


def case_of(inactive: float = 0.0, tokens: int = 1024, chunk: int | None = None) -> LinearCase:
    return LinearCase.of_tokens(HEADS["qwen2.5-0.5b"], tokens, "bf16", "grpo", inactive, chunk)


def made(seconds: dict[str, float] | None = None, at_quarter: float = 0.25, **environment: Any) -> LinearResult:
    """A result with three rounds of each provider's seconds, ours at 75% inactive, and memory."""
    rows = [
        LinearRow(case_of(), name, samples_s=[value, value * 1.1, value * 1.2], gradient_bytes=1 << 28)
        for name, value in (seconds or {}).items()
    ]
    if seconds and "hpo_fused" in seconds:
        ours = seconds["hpo_fused"] * at_quarter
        rows.append(LinearRow(case_of(0.75), "hpo_fused", samples_s=[ours, ours * 1.1, ours * 1.2]))
    summarise(rows, "hpo_fused", dict.fromkeys([row.provider for row in rows], True))
    found = {"torch": "2.13", "python": "3.11", "hpo_fused": "0.1", "cpu": "a CPU", "threads": 2, **environment}
    return LinearResult(found, {}, rows=rows)


def memory_row(
    series: str, beyond: float, tokens: int = 1024, chunk: int | None = None, **changes: Any
) -> MemoryRow:  # fmt: skip
    """Ours, with so many MiB beyond gradients and accumulator."""
    case = case_of(0.0, tokens, chunk)
    prediction = Prediction(**case.memory("cpu")._asdict())
    row = MemoryRow(series, case, "hpo_fused", "cpu", prediction=prediction, gradient_bytes=prediction.gradients)
    row.peak_extra_bytes = prediction.gradients + prediction.accumulator + int(beyond * (1 << 20))
    return dataclasses.replace(row, **changes)


def verdicts(result: LinearResult) -> dict[str, bool | None]:
    return {limit.what: limit.met for limit in limits.limits(result)}


SECONDS = {"hpo_fused": 1.0, "eager": 2.0, "linear_cross_entropy": 0.9, "gemms": 0.8}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"linear_cross_entropy": 0.8}, ["time ÷ linear_cross_entropy"]),
        ({"eager": 1.7}, ["eager's time ÷ ours (÷ three bare GEMMs: 2.12×)"]),
        ({"gemms": 0.7}, ["time ÷ three bare GEMMs"]),
        ({"gemms": 0.75}, []),
        (
            {"hpo_fused": 2.0},
            [
                "time ÷ three bare GEMMs",
                "time ÷ linear_cross_entropy",
                "eager's time ÷ ours (÷ three bare GEMMs: 2.50×)",
            ],
        ),
    ],
)
def test_limits_of_time_on_a_cpu(changes: dict[str, float], missed: list[str]) -> None:
    result = made({**SECONDS, **changes})
    assert [limit.what for limit in limits.missed(result)] == missed
    assert len(limits.limits(result)) == 4


def test_limit_of_the_inactive_share() -> None:
    what = "time at 75% inactive ÷ at 0%"
    assert verdicts(made(SECONDS, 0.34))[what] is True
    assert verdicts(made(SECONDS, 0.36))[what] is False
    only = made({"hpo_fused": 1.0})
    only.rows = only.rows[1:]
    only.rows[0].ratio_to_full = None
    assert verdicts(only)[what] is None  # nothing to compare with


@pytest.mark.parametrize(("gemms", "met"), [(0.88, True), (0.86, False)])
def test_limits_of_time_on_a_gpu(gemms: float, met: bool) -> None:
    found = verdicts(made({**SECONDS, "gemms": gemms}, gpu="H200"))
    assert found == {"time ÷ three bare GEMMs": met, "time at 75% inactive ÷ at 0%": True}


def test_limits_of_memory() -> None:
    budget = 256 * 151936 * 2  # 74.2 MiB

    def found(*beyond: float) -> list[bool | None]:
        result = made()
        result.memory = [
            memory_row(memory.BUDGET, b, n, budget) for b, n in zip(beyond, (512, 1024, 2048), strict=True)
        ]
        return [limit.met for limit in limits.limits(result)][:2]

    assert found(90, 91, 91) == [True, True]
    assert found(90, 90, 139) == [False, False]
    assert found(90, 90, 91.6) == [True, False]  # grows with the tokens
    result = made()
    result.memory = [memory_row(memory.BUDGET, 1, 512, budget, status="failed", peak_extra_bytes=None)]
    assert [limit.met for limit in limits.limits(result)] == [None, None]


def test_limits_of_a_7b_model() -> None:
    seven = dataclasses.replace(case_of(tokens=16384), shape=HEADS["qwen2.5-7b"])
    result = made()
    bench = memory.MemoryBench(CPU, 0, result.memory, None)  # type: ignore[arg-type]
    bench.predict(memory.SEVEN_B, seven, Fused(), "cuda")
    assert [(limit.limit, limit.measured, limit.met) for limit in limits.limits(result)] == [
        ("≤ 1 GiB", f"{hf.linear_memory(16384, 3584, 152064).extra / 2**30:.3f} GiB", True)
    ]
    cut = "measured ÷ predicted extra, qwen2.5-0.5b, 1024 of 1024 tokens active"
    predicted = case_of().memory("cpu").extra / 2**20
    for beyond, met in ((predicted - 1, True), (predicted + 1, False)):
        result.memory[1:] = [memory_row(memory.SEVEN_B, beyond)]
        assert verdicts(result)[cut] is met
    result.memory[1:] = [memory_row(memory.SEVEN_B, 100, status="out_of_memory", peak_extra_bytes=None)]
    assert verdicts(result)[cut] is None
    for beyond, met in ((1023, True), (1025, False)):  # all of it, as a GPU does
        row = memory_row(memory.SEVEN_B, 0)
        prediction = Prediction(**seven.memory("cuda")._asdict())
        row.case, row.prediction, row.gradient_bytes = seven, prediction, prediction.gradients
        row.peak_extra_bytes = prediction.gradients + prediction.accumulator + (beyond << 20)
        result.memory[1:] = [row]
        assert verdicts(result)["the same measured"] is met


class Products(TorchDispatchMode):
    """The shapes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(tuple(value.shape) for value in args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inactive", [0.0, 0.5])
@pytest.mark.parametrize("rows", [None, 20])
def test_the_floor_does_the_three_products_of_the_same_chunks(inactive: float, rows: int | None) -> None:
    problem = problem_of()
    chunk = None if rows is None else rows * 97 * 4
    inputs = problem.inputs(inactive)
    inputs = dataclasses.replace(inputs, case=dataclasses.replace(inputs.case, chunk_bytes=chunk))
    shapes = []
    for provider in (Gemms(), Fused("torch")):
        provider.prepare(inputs.case, CPU)
        with Products() as products:
            provider.step(inputs)
        shapes.append(sorted(products.shapes))
    active = 64 if inactive else 128
    assert shapes[0] == shapes[1]
    assert sum(left[0] for left, right in shapes[0] if right == (48, 97)) == active
    assert len(shapes[0]) == 3 * -(-active // (rows or 128))


@pytest.mark.parametrize("options", [("--provider", "hpo_fused:triton"), ("--tokens", "131", "--provider", "eager")])
def test_check_fails_where_nothing_of_ours_was_measured(invoke: Invoke, options: tuple[str, ...]) -> None:
    done = invoke("linear", "--shape", "custom:H=16,V=97", "--no-memory", "--check", "--quick", *options)
    assert done.exit_code == 1


def test_a_wrong_result_of_ours_is_told_whatever_the_limits() -> None:
    result = made(SECONDS)
    assert not list(limits.wrong(result))
    result.rows[1].status = "wrong"  # eager
    assert not list(limits.wrong(result))
    assert report.verdict(result) == "hpo_fused: 4 of 4 limits met."
    assert report.verdict(made()) == "No limit was measured."
    result.rows[0].repeats = False
    result.rows[-1].status, result.rows[-1].note = "wrong", "loss off by 1"
    assert list(limits.wrong(result)) == [
        "hpo_fused at 0% inactive: a second call gave another result",
        "hpo_fused at 75% inactive is wrong: loss off by 1",
    ]
    assert "WRONG" in report.verdict(result)


def test_statistics() -> None:
    result = made(SECONDS)
    ours, eager, *_, quarter = result.rows
    assert ours.median_s == pytest.approx(1.1)
    assert eager.ratio_to_ours == pytest.approx(2.0)
    assert ours.share_of_gemms == pytest.approx(0.8)
    assert quarter.ratio_to_full == pytest.approx(0.25)
    assert ours.tflop_per_s == pytest.approx(6 * 1024 * 896 * 151936 / 1.1 / 1e12)
    assert quarter.tflop_per_s == pytest.approx(ours.tflop_per_s)  # a quarter of the rows in a quarter of the time
    assert (quarter.share_of_gemms, quarter.ratio_to_ours) == (None, 1.0)


def full_result() -> LinearResult:
    """Everything that a result can hold."""
    result = made({**SECONDS, "compile": 1.9})
    for row in result.rows:
        row.errors = LinearErrors(1e-8, RowErrors(3e-7, 1e-7), 1, RowErrors(3e-3, 2e-3), RowErrors(4e-3, 2e-3))
        row.peak_extra_bytes = 1 << 29
    result.rows[3].errors, result.rows[3].peak_extra_bytes = None, None
    sizes = (256, 512, 1024)
    result.memory = [memory_row(memory.TOKENS, 300, tokens) for tokens in sizes]
    for tokens in sizes:
        peak = tokens * 151936 * 14 + (1 << 28)
        result.memory.append(MemoryRow(memory.TOKENS, case_of(0, tokens), "eager", "cpu", peak_extra_bytes=peak))
    result.memory.append(MemoryRow(memory.TOKENS, case_of(), "compile", "cpu", "skipped", "slow"))
    result.memory.sort(key=lambda row: row.case.tokens)
    result.memory += [memory_row(memory.BUDGET, 100, tokens, 1 << 27) for tokens in (512, 1024)]
    result.memory.append(memory_row(memory.SEVEN_B, 0, 16384, status="predicted", peak_extra_bytes=None))
    return result


def test_file_round_trip(tmp_path: Path) -> None:
    result = full_result()
    result.write(tmp_path / "r.json")
    assert LinearResult.read(tmp_path / "r.json") == result
    assert files.read(tmp_path / "r.json") == result
    assert json.loads((tmp_path / "r.json").read_text())["schema_version"] == 2
    with pytest.raises(ValueError, match="not a result of hpo-fused-bench speed"):
        Result.read(tmp_path / "r.json")


def test_committed_results_can_still_be_read() -> None:
    for path in (Path(__file__).parent.parent / "bench" / "results").glob("*.json"):
        assert files.markdown(files.read(path)).startswith("|")


def test_markdown_tables_are_whole() -> None:
    text = report.markdown(full_result())
    lines = text.splitlines()
    blocks = [list(map(str.strip, block.splitlines())) for block in text.split("\n\n")]
    tables = [block for block in blocks if block[0].startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "| inactive | provider | ms | 20–80 % | ÷ ours | TFLOP/s | % of gemms | peak MiB | of it grad. |" in lines
    assert any(
        line.startswith("| **0%** | **hpo_fused** | 1100 | 1040–1160 | 1.00× | 0.760 | 80.0 |") for line in lines
    )
    assert "| tokens | hpo_fused | predicted | beyond | eager | compile |" in lines
    assert any(line.startswith("| 1024 |") and line.endswith("| skipped |") for line in lines)
    assert "- memory of compile at 1024 tokens: skipped: slow" in lines


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    stream = StringIO()
    console = Console(file=stream, width=width)
    for sheet, _ in report.sections(full_result()):
        console.print(sheet.table())
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "linear_cross_entropy" in text


def test_a_sheet_says_the_same_twice() -> None:
    view = Sheet("Title", ("name", "kind", "num-\nber"), 2)
    view.add("a", "x", "1", ours=True)
    view.add("a", "y", "2")
    view.end_section()
    view.add("b")
    assert view.markdown() == [
        "Title:", "", "| name | kind | number |", "|---|---|---:|", "| **a** | **x** | 1 |", "| a | y | 2 |",
        "| b |  |  |",
    ]  # fmt: skip
    stream = StringIO()
    Console(file=stream, width=40).print(view.table())
    assert stream.getvalue().count("a ") == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(invoke: Invoke, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    full_result().write(Path("r.json"))
    done = invoke("plot", "r.json", "--output", f"deep/p.{suffix}")
    assert done.exit_code == 0, done.output
    picture = Path(f"deep/p.{suffix}").read_bytes()
    if suffix == "png":
        from PIL import Image

        with Image.open(f"deep/p.{suffix}") as image:
            assert image.width > image.height > 500
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
        return
    text = picture.decode()
    assert text.rstrip().endswith("</svg>")
    for word in ("Peak memory beyond the inputs", "hpo_fused", "eager", "gemms", "512 MiB"):
        assert f"<!-- {word}" in text, word
    invoke("plot", "r.json", "--output", "again.svg")
    assert Path("again.svg").read_bytes() == picture


@pytest.mark.parametrize(
    ("content", "output", "missing", "message"),
    [
        (None, "p.png", False, "cannot read"),
        ("{}", "p.png", False, "not a result"),
        ("speed", "p.png", False, "holds neither times nor memory nor errors"),
        ("empty", "p.png", False, "holds neither times nor memory"),
        ("full", "p.xyz", False, "not supported"),
        ("full", "p.png", True, "needs matplotlib: pip install 'hpo-fused[bench]'"),
    ],
)
def test_plot_says_what_is_wrong(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, content: str | None, output: str, missing: bool, message: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    elif content in ("speed", "empty", "full"):
        pytest.importorskip("matplotlib")
    made_of = {"speed": Result({}, {}).to_json(), "empty": made().to_json(), "full": full_result().to_json()}
    if content is not None:
        Path("r.json").write_text(made_of.get(content, content))
    done = invoke("plot", "r.json", "--output", output)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


# ---------------------------------------------------------------------------------------------------------------
# the command line


def test_linear_end_to_end(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke(
        "linear", *TINY, "--tokens", "64", "--repeats", "3", "--budget", "0", *PLAIN, "--memory-tokens", "32",
        "--memory-tokens", "64", "--inactive", "0", "--inactive", "0.75", "--output", "deep/r.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("Against float64", "Peak memory", "in parts", "Limits", "predicted", "small-7b", "Wrote deep/r.json"):
        assert word in done.output
    assert "limits met" in done.output
    result = files.read(tmp_path / "deep" / "r.json")
    assert isinstance(result, LinearResult)
    assert (result.command, result.interrupted, result.settings["inactive"]) == ("linear", False, [0.0, 0.75])
    assert [(row.provider, row.case.inactive) for row in result.rows] == [
        ("hpo_fused:torch", 0.0), ("eager", 0.0), ("gemms", 0.0), ("hpo_fused:torch", 0.75), ("gemms", 0.75),
    ]  # fmt: skip
    for row in result.rows:
        assert row.status == "ok", row.note
        assert len(row.samples_s) == 3
        assert row.tflop_per_s
        assert row.ratio_to_ours
        assert (row.errors is None) is row.is_floor
    ours, eager, gemms, quarter, _ = result.rows
    assert ours.repeats is True
    assert (ours.ratio_to_ours, gemms.share_of_gemms) == (1, 1)
    assert ours.gradient_bytes == eager.gradient_bytes == (64 * 48 + 48 * 300) * 2
    assert quarter.ratio_to_full is not None
    assert eager.peak_extra_bytes is not None
    assert eager.peak_extra_bytes > 2 * 64 * 300 * 4
    for memory_row in result.memory:
        assert memory_row.status == ("ok" if memory_row.peak_extra_bytes else "predicted"), memory_row.note
        if memory_row.prediction is not None and memory_row.peak_extra_bytes is not None:
            assert memory_row.peak_extra_bytes <= memory_row.prediction.peak
    assert {row.series for row in result.memory} == {"tokens", "budget", "7b"}
    printed = invoke("report", "deep/r.json")
    assert printed.exit_code == 0, printed.output
    assert "| **0%** | **hpo_fused:torch** |" in printed.output


def test_memory_alone(invoke: Invoke) -> None:
    done = invoke(
        "memory", *TINY, *PLAIN, "--tokens", "32", "--tokens", "64", "--chunk-mib", "0.01", "--output", "m.json"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("m.json"))
    assert (result.command, result.rows) == ("memory", [])
    first = next(result.of_series("tokens"))
    assert first.case.chunk_bytes == int(0.01 * (1 << 20))
    expected = hf.linear_memory(32, 48, 300, chunk_bytes=first.case.chunk_bytes, device="cpu")
    assert first.prediction == Prediction(**expected._asdict())
    assert {row.provider for row in result.memory} == {"hpo_fused:torch", "eager"}
    assert "÷ ours" not in done.output


def test_predictions_of_the_7b_model_are_for_both_devices(invoke: Invoke) -> None:
    done = invoke("memory", *TINY, "--provider", "hpo_fused:torch", "--tokens", "16", "--quick", "--output", "m.json")
    assert done.exit_code == 0, done.output
    rows = list(LinearResult.read(Path("m.json")).of_series("7b"))
    assert [(row.device, row.status, row.case.tokens) for row in rows] == [
        ("cuda", "predicted", 512), ("cpu", "predicted", 512),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [("--objective", "gspo", "--dtype", "fp16"), ("--dtype", "fp32"), ("--chunk-mib", "0.02")]
)
def test_variants_are_right_and_timed(invoke: Invoke, options: tuple[str, ...]) -> None:
    done = invoke("linear", *TIMED, *PLAIN, *options, "--shape", "custom:H=48,V=300,softcap=20", "--output", "r.json")
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("r.json"))
    assert {row.status for row in result.rows} == {"ok"}
    assert [row.case.inactive for row in result.rows if row.is_ours] == [0.0, 0.5, 0.75, 0.9]
    assert result.memory == []


def test_cross_entropy_runs_or_says_why_not(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("linear", *TIMED, "--provider", "linear_cross_entropy", "--inactive", "0", "--output", "r.json")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    (row,) = LinearResult.read(Path("r.json")).rows
    assert row.status == ("ok" if hasattr(torch.nn.functional, "linear_cross_entropy") else "skipped")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "linear_cross_entropy: skipped: needs PyTorch >= 2.13" in " ".join(done.output.split())


def test_torch_compile(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case is compiled anew; here by the tracer alone, since tests/test_bench.py has a real compilation."""
    compiled, compile_ = [], torch.compile

    def traced(function: Any, *, dynamic: bool) -> Any:
        compiled.append(function.__code__.co_name)
        return compile_(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    done = invoke("linear", *TIMED, "--provider", "compile", "--inactive", "0", "--output", "r.json")
    assert done.exit_code == 0, done.output
    (row,) = LinearResult.read(Path("r.json")).rows
    assert row.status == "ok", row.note
    (name,) = compiled
    assert name.startswith("plain_linear_loss_")


def broken(base: type, change: Callable[..., Any]) -> type:
    """A provider whose gradients are changed."""

    def step(self: Any, inputs: LinearInputs, begun: Output | None = None) -> Step:
        found: Step = base.step(self, inputs, begun)
        return found._replace(gradients=tuple(change(*found.gradients)))

    return type("Wrong", (base,), {"step": step})


@pytest.mark.parametrize(
    "change",
    [
        lambda dh, dw: (dh, 1.01 * dw),
        lambda dh, dw: (_row(37)(dh), dw),
    ],
)
@pytest.mark.parametrize(
    ("name", "base", "code"), [("hpo_fused:torch", lambda: Fused("torch"), 1), ("eager", Eager, 0)]
)
def test_a_wrong_provider_is_reported_and_not_timed(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any], name: str, base: Callable[[], Any],
    code: int,
) -> None:  # fmt: skip
    """Ours fails the run; somebody else's is only told."""
    kind = broken(type(base()), change)
    monkeypatch.setitem(PROVIDERS, name, lambda: kind(*(["torch"] if code else [])))
    done = invoke("linear", *TIMED, *PLAIN, "--inactive", "0", "--output", "r.json")
    assert done.exit_code == code, done.output
    rows = {row.provider: row for row in LinearResult.read(Path("r.json")).rows}
    assert (rows[name].status, rows[name].samples_s, rows[name].median_s) == ("wrong", [], None)
    assert f"{name} at 0%: wrong: gradient of" in " ".join(done.output.split())
    assert ("WRONG" in done.output) is bool(code)
    assert {row.status for other, row in rows.items() if other != name} == {"ok"}


def test_check_fails_on_a_missed_limit(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EAGER_OVER", 1e9)
    assert invoke("linear", *TIMED, *PLAIN, "--inactive", "0").exit_code == 0
    assert invoke("linear", *TIMED, *PLAIN, "--inactive", "0", "--check").exit_code == 1


class Failing(Eager):
    """A provider that raises from one of its calls on."""

    name = "failing"
    error: BaseException = RuntimeError("boom\nand a page of C++")
    from_call = 0

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, inputs: LinearInputs) -> Output:
        self.calls += 1
        if self.calls > self.from_call:
            raise self.error
        return super().forward(inputs)


def install(monkeypatch: pytest.MonkeyPatch, error: BaseException, from_call: int = 0) -> None:
    kind = type("Fails", (Failing,), {"error": error, "from_call": from_call})
    monkeypatch.setitem(PROVIDERS, "failing", kind)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("boom\nand a page of C++"), "failed"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
    ],
)
def test_a_provider_that_raises_stops_nobody_else(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    install(monkeypatch, error)
    done = invoke(
        "linear", *TINY, "--tokens", "64", "--repeats", "3", "--memory-tokens", "32", "--inactive", "0", "--quick",
        "--provider", "failing", "--provider", "eager", "--output", "r.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("r.json"))
    assert [row.status for row in result.rows] == [status, "ok"]
    assert [row.status for row in result.memory] == [status, "ok"]
    assert "C++" not in done.output


def test_interrupt_keeps_finished_rounds(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third timed round: the first call, the memory pass and the warm-up came before."""
    install(monkeypatch, KeyboardInterrupt(), from_call=5)
    done = invoke(
        "linear", *TINY, "--tokens", "64", "--repeats", "4", "--inactive", "0", "--provider", "eager", "--provider",
        "failing", "--output", "r.json",
    )  # fmt: skip
    assert done.exit_code == 130
    assert "Interrupted" in done.output
    result = LinearResult.read(Path("r.json"))
    assert result.interrupted
    assert [len(row.samples_s) for row in result.rows] == [2, 2]
    assert all(row.median_s is not None for row in result.rows)
    assert result.memory == []


def test_interrupt_keeps_measured_memory(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, KeyboardInterrupt(), from_call=1)
    done = invoke("memory", *TINY, "--tokens", "16", "--tokens", "32", "--provider", "failing", "--output", "r.json")
    assert done.exit_code == 130
    result = LinearResult.read(Path("r.json"))
    assert [row.status for row in result.memory] == ["ok", "skipped"]
    assert "interrupted before it was measured" in done.output


@pytest.mark.parametrize("command", [("linear", "--tokens", "64", "--inactive", "0"), ("memory", "--tokens", "64")])
def test_what_would_not_fit_is_skipped(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Linux kills the process that asks for too much, and every result with it."""
    monkeypatch.setattr("hpo_fused.bench.trial.available_bytes", lambda: 50_000)
    done = invoke(*command, *TINY, *PLAIN, "--quick", "--output", "r.json")
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("r.json"))
    assert {row.status for row in result.rows} <= {"out_of_memory"}
    assert {row.status for row in result.memory} == {"out_of_memory", "predicted"}
    assert "GiB are free" in done.output


def test_compile_memory_is_measured_up_to_a_size(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Small", (Eager,), {"name": "small", "largest": 20_000, "slow_start": "slow"})
    monkeypatch.setitem(PROVIDERS, "small", kind)
    invoke("memory", *TINY, "--tokens", "32", "--tokens", "64", "--provider", "small", "--output", "r.json")
    rows = LinearResult.read(Path("r.json")).memory
    assert [row.status for row in rows] == ["ok", "skipped"]
    assert rows[1].note.startswith("slow: measured up to")


@pytest.mark.parametrize("command", ["linear", "memory"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shape", "qwen9"), ["unknown shape 'qwen9'", "qwen2.5-0.5b", "custom:H=N"]),
        (("--provider", "magic"), ["unknown provider 'magic'", "hpo_fused:torch", "linear_cross_entropy", "gemms"]),
        (("--objective", "ppo"), ["unknown objective 'ppo'", "mhpo_ahpo"]),
        (("--dtype", "int8"), ["unknown dtype 'int8'", "bf16"]),
        (("--chunk-mib", "0.001"), ["less than one row"]),
        (("--device", "tpu9"), ["unknown device 'tpu9'", "cuda:N"]),
        (("--output", "."), ["cannot write"]),
    ],
)
def test_unknown_names_say_what_there_is(
    invoke: Invoke, command: str, arguments: tuple[str, ...], expected: list[str]
) -> None:
    done = invoke(command, *arguments)
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert all(word in text for word in expected), text


def test_listing(invoke: Invoke) -> None:
    listed = invoke("shapes")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in [*HEADS, "3584", "custom:H=N"])


def test_providers_are_documented() -> None:
    for name in PROVIDERS:
        provider = create(name)
        assert (provider.name, bool(provider.summary)) == (name, True)
