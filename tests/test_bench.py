"""The benchmark measures what it says: inputs, checks, rounds, memory, files, and what a user sees."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.objective import Objective

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from rich.console import Console  # noqa: E402

from hpo_fused.bench import accuracy, cli, measure, report  # noqa: E402
from hpo_fused.bench.cases import SHAPES, Case, Inputs, Shape, draw, draw_advantages, parse_shape  # noqa: E402
from hpo_fused.bench.check import Oracle, fingerprint  # noqa: E402
from hpo_fused.bench.commands import app  # noqa: E402
from hpo_fused.bench.display import Display  # noqa: E402
from hpo_fused.bench.labels import number  # noqa: E402
from hpo_fused.bench.measure import Failure, Task, peak_extra_bytes, rounds  # noqa: E402
from hpo_fused.bench.plain import plain_policy_loss  # noqa: E402
from hpo_fused.bench.providers import PROVIDERS, Output, Provider, Unavailable  # noqa: E402
from hpo_fused.bench.providers.plain import Eager  # noqa: E402
from hpo_fused.bench.results import ColumnErrors, Errors, Result, Row, median_ratio, quantiles, summarise  # noqa: E402
from hpo_fused.bench.trial import Step  # noqa: E402

CPU = torch.device("cpu")
TINY = ("--shape", "custom:V=300", "--tokens", "48", "--device", "cpu", "--repeats", "4")
EAGER_ONLY = ("--provider", "hpo_fused:torch", "--provider", "eager")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs the command line from an empty directory, as a user would from theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: testing.CliRunner().invoke(app, list(arguments))


def tiny_case(**changes: Any) -> Case:
    """A case of milliseconds."""
    values = {"shape": Shape("tiny", 97), "responses": 8, "length": 5, "dtype": "fp32"}
    return Case(**{**values, **changes})


def step(inputs: Inputs, function: Callable[..., Any] = plain_policy_loss) -> tuple[Output, Tensor]:
    """Output and gradient of a plain loss on ``inputs``."""
    out = function(
        inputs.objective, inputs.logits, inputs.tokens, inputs.advantages, inputs.old_logprobs, inputs.mask,
        inputs.case.shape.softcap,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss * inputs.case.upstream, inputs.logits)
    return Output(*out), gradient


def as_step(output: Output, gradient: Tensor) -> Step:
    """What a trial returns."""
    return Step(output, (gradient,))


# ---------------------------------------------------------------------------------------------------------------
# inputs


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes(name: str) -> None:
    assert parse_shape(name) is SHAPES[name]


def test_custom_shape() -> None:
    assert parse_shape("custom:V=300,softcap=30") == Shape("custom:V=300,softcap=30", 300, 30.0)


@pytest.mark.parametrize("text", ["qwen", "custom:", "custom:V=x", "custom:V=1", "custom:V=9,softcap=0", "custom:W=3"])
def test_unknown_shape_lists_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown shape .*qwen3, llama3, gemma, gpt2 or custom:V=N"):
        parse_shape(text)


def test_inputs_are_those_of_a_trained_policy() -> None:
    """Log-probabilities as in training, ratios inside and beyond the clip range, advantages of both signs."""
    inputs = draw(Case(Shape("s", 5000), 16, 16), CPU, seed=1)
    assert inputs.logits.dtype == torch.bfloat16
    assert inputs.logits.requires_grad
    exact = reference.token_logprobs(inputs.logits.detach().double(), inputs.tokens).logprobs
    torch.testing.assert_close(inputs.exact_logprobs, exact)
    assert -2.5 < exact.mean() < -0.3
    ratio = (exact - inputs.old_logprobs).exp()
    assert ((ratio > 1.2) | (ratio < 0.8)).double().mean() > 0.03
    assert ((ratio < 1.2) & (ratio > 0.8)).double().mean() > 0.8
    assert (inputs.advantages > 0).any()
    assert (inputs.advantages < 0).any()
    assert (inputs.advantages != 0).all()
    assert inputs.mask is None


def test_equal_seeds_draw_equal_inputs() -> None:
    first, second, other = (draw(tiny_case(), CPU, seed) for seed in (3, 3, 4))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.old_logprobs, second.old_logprobs)
    assert not torch.equal(first.logits, other.logits)


@pytest.mark.parametrize(("inactive", "zeros"), [(0.0, 0), (0.5, 8), (0.75, 12), (1.0, 16)])
def test_inactive_share_is_exact(inactive: float, zeros: int) -> None:
    values = draw_advantages(16, inactive, torch.Generator().manual_seed(0))
    assert int((values == 0).sum()) == zeros
    assert abs(float(values.sum())) < 1e-5  # group-normalised


def test_ragged_inputs_are_masked() -> None:
    mask = draw(tiny_case(ragged=True, length=16), CPU, 0).mask
    assert mask is not None
    assert mask[:, 0].all()
    assert not mask.all()


@pytest.mark.parametrize("tokens", [1, 7, 48, 101, 1024])
def test_case_has_exactly_the_tokens_asked_for(tokens: int) -> None:
    case = Case.of_tokens(Shape("s", 11), tokens, "bf16", "grpo", 0.0, False)
    assert (case.tokens, case.logits_bytes) == (tokens, tokens * 11 * 2)


# ---------------------------------------------------------------------------------------------------------------
# the check


@pytest.mark.parametrize("objective", Objective.presets())
@pytest.mark.parametrize("ragged", [False, True])
def test_plain_loss_is_the_reference(objective: str, ragged: bool) -> None:
    """The baseline does the same work: every preset's loss, log-probabilities, entropy and gradient."""
    case = tiny_case(objective=objective, ragged=ragged, shape=Shape("tiny", 97, 30.0))
    inputs = draw(case, CPU, 0)
    output, gradient = step(inputs)
    z = inputs.logits.detach().double().requires_grad_()
    expected = reference.policy_loss(
        z, inputs.tokens, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask,
        objective=inputs.objective, softcap=30.0,
    )  # fmt: skip
    (exact,) = torch.autograd.grad(expected.loss, z)
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-8)
    keep = slice(None) if inputs.mask is None else inputs.mask
    assert output.entropy is not None
    torch.testing.assert_close(output.logprobs.double()[keep], expected.logprobs[keep], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.entropy.double()[keep], expected.entropy[keep], rtol=0, atol=1e-4)
    assert Oracle.of(inputs).judge(inputs, as_step(output, gradient)).complaint == ""


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_oracle_passes_right_answers_in_every_dtype(dtype: str) -> None:
    inputs = draw(tiny_case(dtype=dtype), CPU, 0)
    assert Oracle.of(inputs).judge(inputs, as_step(*step(inputs))).complaint == ""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda loss, gradient: (loss * 1.01, gradient), "loss"),
        (lambda loss, gradient: (loss * torch.nan, gradient), "loss"),
        (lambda loss, gradient: (loss, gradient * 0.99), "gradient"),
        (lambda loss, gradient: (loss, torch.zeros_like(gradient)), "gradient"),
        (lambda loss, gradient: (loss, gradient.roll(1, -1)), "gradient"),
        (lambda loss, gradient: (loss, gradient * torch.nan), "gradient"),
        (lambda loss, gradient: (loss, gradient.index_fill(0, torch.tensor([7]), 0.0)), "gradient"),
    ],
)
def test_oracle_rejects_wrong_answers(dtype: str, mistake: Callable[..., Any], complaint: str) -> None:
    inputs = draw(tiny_case(dtype=dtype), CPU, 0)
    output, gradient = step(inputs)
    loss, gradient = mistake(output.loss, gradient)
    verdict = Oracle.of(inputs).judge(inputs, as_step(output._replace(loss=loss), gradient)).complaint
    assert verdict.startswith(f"{complaint} off by")


@pytest.mark.parametrize("change", [lambda h: h + 0.01, lambda h: h * torch.nan, torch.zeros_like])
def test_oracle_rejects_wrong_entropies(change: Callable[[Tensor], Tensor]) -> None:
    inputs = draw(tiny_case(), CPU, 0)
    output, gradient = step(inputs)
    assert output.entropy is not None
    output = output._replace(entropy=change(output.entropy))
    assert Oracle.of(inputs).judge(inputs, as_step(output, gradient)).complaint.startswith("entropy off by")


def test_inactive_rows_must_have_no_gradient() -> None:
    inputs = draw(tiny_case(inactive=0.5), CPU, 0)
    output, gradient = step(inputs)
    idle = inputs.advantages == 0
    assert not gradient[idle].any()
    gradient[idle] += 1e-4
    assert "gradient" in Oracle.of(inputs).judge(inputs, as_step(output, gradient)).complaint


def exact_step(inputs: Inputs) -> tuple[Output, Tensor]:
    """What a provider with exact arithmetic returns: the gradient rounded once."""
    case = inputs.case
    z = inputs.logits.detach().double().requires_grad_()
    out = reference.policy_loss(
        z, inputs.tokens, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask,
        objective=inputs.objective, softcap=case.shape.softcap,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss * case.upstream, z)
    return Output(out.loss.detach(), out.logprobs.detach(), None), gradient.to(case.torch_dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("objective", ["mhpo_ahpo", "gspo", "sapo"])
def test_errors_of_exact_arithmetic_are_its_rounding(dtype: str, objective: str) -> None:
    inputs = draw(tiny_case(dtype=dtype, objective=objective, ragged=True), CPU, 0)
    errors = Oracle.of(inputs).judge(inputs, as_step(*exact_step(inputs)), ours=True)
    assert (errors.complaint, errors.broken) == ("", "")
    assert errors.logprob is not None
    assert errors.logprob < 1e-12
    unit = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2**-24}[dtype]
    for columns in (errors.target, errors.others):
        assert columns is not None
        assert unit / 4 < columns.rounding <= unit
        assert columns.median <= columns.worst == pytest.approx(columns.rounding)
        assert columns.beyond < 1e-12


def test_sampled_and_other_columns_are_judged_apart() -> None:
    """A mistake in one shows there, at its size, and nowhere else."""
    inputs = draw(tiny_case(), CPU, 0)
    oracle = Oracle.of(inputs)
    output, gradient = exact_step(inputs)
    column = inputs.tokens.unsqueeze(-1)
    sampled = gradient.scatter(-1, column, 1.0001 * gradient.gather(-1, column))
    both = [oracle.judge(inputs, as_step(output, wrong), ours=True) for wrong in (sampled, 1.0001 * gradient)]
    for errors, target, others in ((both[0], 1e-4, 0), (both[1], 1e-4, 1e-4)):
        assert errors.target is not None
        assert errors.others is not None
        assert errors.target.beyond == pytest.approx(target, rel=0.01)
        assert errors.others.beyond == pytest.approx(others, rel=0.01, abs=1e-12)
        assert errors.complaint == ""
        assert "gradient of the sampled token off by 1.0e-04 (limit 3e-06)" in errors.broken
        assert ("other tokens" in errors.broken) is (others > 0)


def test_logprob_errors() -> None:
    inputs = draw(tiny_case(inactive=0.5), CPU, 0)
    oracle = Oracle.of(inputs)
    output, gradient = exact_step(inputs)
    assert output.logprobs is not None
    active = inputs.advantages.unsqueeze(-1) != 0

    def judge(logprobs: Tensor | None, ours: bool = True) -> Errors:
        return oracle.judge(inputs, as_step(output._replace(logprobs=logprobs), gradient), ours=ours)

    assert judge(None).logprob is None
    assert judge(output.logprobs.masked_fill(~active, torch.nan)).broken == ""
    assert "log-probability off by nan" in judge(output.logprobs.masked_fill(active, torch.nan)).complaint
    shifted = judge(output.logprobs.index_add(1, torch.tensor([2]), torch.full((8, 1), 1e-5).double()))
    assert shifted.logprob == pytest.approx(1e-5, rel=0.1)
    assert (shifted.complaint, "log-probability" in shifted.broken) == ("", True)
    assert judge(output.logprobs + 1e-5, ours=False).broken == ""
    assert "log-probability" in judge(output.logprobs + 0.01).complaint


def test_a_clip_edge_within_the_logprob_limit_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether such a token has a gradient is decided by the last bit of its log-probability."""
    inputs = draw(tiny_case(objective="grpo"), CPU, 0)
    edge = (inputs.exact_logprobs - torch.tensor(1.2).double().log()).float()
    inputs.advantages.fill_(1.0)
    for side in (1e-6, -1e-6):
        moved = dataclasses.replace(inputs, old_logprobs=edge + side)
        output, gradient = exact_step(moved)
        # The oracle is made to stand on the other side of the edge, 2e-6 from the provider.
        beyond = dataclasses.replace(moved, exact_logprobs=inputs.exact_logprobs + 2 * side)
        oracle = Oracle.of(beyond)
        assert "gradient" not in oracle.judge(beyond, as_step(output, gradient)).complaint
        with monkeypatch.context() as patch:
            patch.setattr("hpo_fused.bench.check.OWN_LOGPROB_LIMIT", 0.0)
            assert "gradient" in oracle.judge(beyond, as_step(output, gradient)).complaint


def test_fingerprint_tells_every_bit() -> None:
    values = torch.randn(5, 1000).bfloat16()
    assert torch.equal(fingerprint(values), fingerprint(values.clone()))
    assert torch.equal(fingerprint(values.view(5, 1, 1000)), fingerprint(values))
    other = values.clone()
    other.view(torch.int16)[3, 7] ^= 1
    assert (fingerprint(values) != fingerprint(other)).tolist() == [False, False, False, True, False]
    swapped = values[:, torch.arange(1000).roll(1)]
    assert (fingerprint(values) != fingerprint(swapped)).all()
    assert fingerprint(torch.zeros(1)) != fingerprint(-torch.zeros(1))


# ---------------------------------------------------------------------------------------------------------------
# rounds and statistics


class Stopwatch(measure.Clock):
    """A clock that shows what the task returns."""

    def time(self, run: Callable[[], object]) -> float:
        seconds = run()
        assert isinstance(seconds, float)
        return seconds


def test_rounds_rotate_and_prepare() -> None:
    log: list[str] = []

    def task(name: str, seconds: float) -> Task:
        return Task(lambda: log.append(name) or seconds, lambda: log.append(f"before {name}"))

    tasks = {"a": task("a", 1.0), "b": task("b", 2.0), "c": task("c", 3.0)}
    outcomes = list(rounds(tasks, Stopwatch(), repeats=3, budget=60))
    assert outcomes == [{"a": 1.0, "b": 2.0, "c": 3.0}] * 3
    assert "".join(entry for entry in log if len(entry) == 1) == "abcbcacab"
    assert log[:4] == ["before a", "a", "before b", "b"]


def test_rounds_stop_at_the_budget_but_not_before_three() -> None:
    assert len(list(rounds({"a": Task(lambda: 1.0)}, Stopwatch(), repeats=99, budget=0.0))) == 3
    assert len(list(rounds({"a": Task(lambda: 1.0)}, Stopwatch(), repeats=2, budget=0.0))) == 2


def test_a_task_that_raises_is_dropped_and_its_round_completed() -> None:
    calls: Iterator[float] = iter([1.0])
    tasks = {"bad": Task(lambda: next(calls)), "good": Task(lambda: 2.0)}
    outcomes = list(rounds(tasks, Stopwatch(), repeats=3, budget=60))
    assert outcomes[0] == {"bad": 1.0, "good": 2.0}
    assert isinstance(outcomes[1], Failure)
    assert (outcomes[1].name, type(outcomes[1].error)) == ("bad", StopIteration)
    assert outcomes[1].error.__traceback__ is None  # it would keep the provider's memory for the rest of the round
    assert outcomes[2:] == [{"good": 2.0}] * 2


def test_quantiles() -> None:
    assert quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert quantiles([6.0, 1.0, 5.0, 2.0, 4.0, 3.0]) == (2.0, 3.5, 5.0)


def test_ratio_is_taken_within_rounds() -> None:
    """The machine halves its speed midway: the ratio of medians would say 1.5 or 2.67, the truth is 2."""
    ours, other = [1.0, 1.0, 2.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0, 4.0]
    assert median_ratio(other, ours) == 2.0
    assert median_ratio([1.0], []) is None


def test_summary() -> None:
    case = tiny_case()
    rows = [
        Row(case, "hpo_fused", samples_s=[1.0, 1.0, 2.0]),
        Row(case, "eager", samples_s=[4.0, 4.0, 8.0]),
        Row(case, "compile", status="wrong"),
        Row(case, "copy", samples_s=[0.5, 0.5, 1.0]),
    ]
    summarise(rows, "hpo_fused")
    assert [row.ratio_to_ours for row in rows] == [1.0, 4.0, None, 0.5]
    assert [row.time_over_copy for row in rows] == [2.0, 8.0, None, 1.0]
    assert rows[0].gb_per_s == pytest.approx(2 * 8 * 5 * 97 * 4 / 1e9)
    assert rows[2].median_s is None


# ---------------------------------------------------------------------------------------------------------------
# memory


def test_peak_memory_counts_what_is_held_at_once() -> None:
    """Two temporaries together, one after them: the peak is the two, not the sum and not what is left."""
    mib = 1 << 20

    def run() -> Tensor:
        first = torch.empty(8 * mib, dtype=torch.int8)
        second = torch.empty(16 * mib, dtype=torch.int8)
        del first, second
        return torch.empty(4 * mib, dtype=torch.int8)

    held = torch.empty(32 * mib, dtype=torch.int8)  # before: not the run's
    assert peak_extra_bytes(run, CPU) == pytest.approx(24 * mib, rel=0.01)
    assert peak_extra_bytes(held.clone, CPU) == pytest.approx(32 * mib, rel=0.01)
    assert peak_extra_bytes(lambda: None, CPU) == 0


def test_peak_memory_sees_autograd_and_not_the_inputs() -> None:
    inputs = draw(tiny_case(length=64, shape=Shape("s", 4096)), CPU, 0)
    peak = peak_extra_bytes(lambda: step(inputs), CPU)
    assert peak is not None
    assert 2 * inputs.case.logits_bytes < peak < 4 * inputs.case.logits_bytes


# ---------------------------------------------------------------------------------------------------------------
# the command line


def test_speed_end_to_end(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("speed", *TINY, *EAGER_ONLY, "--output", "deep/r.json")
    assert done.exit_code == 0, done.output
    for word in ("custom:V=300", "hpo_fused:torch", "eager", "copy", "median", "peak MiB", "Wrote deep/r.json"):
        assert word in done.output
    assert done.output.splitlines()[-2].startswith("hpo_fused:torch: ")

    content = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert (content["schema_version"], content["command"], content["interrupted"]) == (2, "speed", False)
    assert {"torch", "triton", "python", "cpu", "threads", "platform", "hpo_fused", "commit"} <= set(
        content["environment"]
    )
    assert content["settings"]["repeats"] == 4
    rows = {row["provider"]: row for row in content["rows"]}
    assert list(rows) == ["hpo_fused:torch", "eager", "copy", "copy_new"]
    for row in rows.values():
        assert row["status"] == "ok", row["note"]
        assert len(row["samples_s"]) == 4
        assert row["q20_s"] <= row["median_s"] <= row["q80_s"]
        assert row["gb_per_s"] > 0
    assert rows["hpo_fused:torch"]["ratio_to_ours"] == 1
    assert rows["copy"]["time_over_copy"] == 1
    assert rows["eager"]["gradient_bytes"] == 48 * 300 * 2
    assert rows["eager"]["peak_extra_bytes"] >= 2 * 48 * 300 * 4
    assert (rows["copy"]["errors"], rows["copy"]["repeats"]) == (None, None)
    assert rows["hpo_fused:torch"]["repeats"] is True
    assert rows["hpo_fused:torch"]["errors"]["logprob"] < 4e-6
    for columns in ("target", "others"):
        assert 1e-3 < rows["eager"]["errors"][columns]["rounding"] < 4e-3
        assert rows["hpo_fused:torch"]["errors"][columns]["beyond"] < 6e-6
    assert "Against float64" in done.output
    assert rows["eager"]["case"]["shape"]["vocabulary"] == 300


def test_without_output_nothing_is_written(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("speed", *TINY, "--provider", "eager").exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--objective", "dr_grpo"),
        ("--objective", "gspo", "--dtype", "fp16", "--ragged"),
        ("--inactive", "0.5", "--dtype", "fp32"),
        ("--inplace",),
        ("--inplace", "--objective", "gspo"),
        ("--shape", "custom:V=128,softcap=30"),
    ],
)
def test_variants_are_right_and_timed(invoke: Invoke, options: tuple[str, ...]) -> None:
    done = invoke("speed", *TINY, *EAGER_ONLY, *options, "--output", "r.json")
    assert done.exit_code == 0, done.output
    rows = Result.read(Path("r.json")).rows
    assert {row.status for row in rows} == {"ok"}
    assert rows[0].repeats
    assert "misses" not in done.output


def test_a_provider_that_does_not_repeat_itself_is_told(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's is only marked; ours misses a limit."""

    class Restless(Eager):
        name = "restless"

        def __init__(self) -> None:
            self.calls = 0

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            self.calls += 1
            out = super().forward(inputs, logits)
            return out._replace(loss=out.loss * (1 + self.calls * 2**-20))

    monkeypatch.setitem(PROVIDERS, "restless", Restless)
    done = invoke("speed", *TINY, "--provider", "restless", "--output", "r.json")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if "restless" in line and "sampled" in line)
    assert line.split()[-1] == "no"
    result = Result.read(Path("r.json"))
    assert result.rows[0].repeats is False
    assert not list(accuracy.broken(result))
    result.rows[0].provider = "hpo_fused"
    (told,) = accuracy.broken(result)
    assert told == "custom:V=300: hpo_fused misses its own limits: a second call gave another result"
    assert told in report.markdown(result)


def test_a_provider_without_logprobs_shows_a_dash(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Eager):
        name = "silent"

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            return super().forward(inputs, logits)._replace(logprobs=None, entropy=None)

    monkeypatch.setitem(PROVIDERS, "silent", Silent)
    done = invoke("speed", *TINY, "--provider", "silent")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if "silent" in line and "sampled" in line)
    assert line.split()[3] == "–"


def test_our_missed_limit_fails_the_run(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo_fused.bench.check.OWN_LOGPROB_LIMIT", 1e-12)
    done = invoke("speed", *TINY, "--provider", "hpo_fused:torch")
    assert done.exit_code == 1
    assert "hpo_fused:torch misses its own limits: log-probability off by" in done.output


def test_inplace_needs_no_memory_for_the_gradient(invoke: Invoke) -> None:
    shape = ("--shape", "custom:V=4000", "--tokens", "512", "--repeats", "1", "--device", "cpu")
    for options in ((), ("--inplace",)):
        invoke("speed", *shape, *EAGER_ONLY, *options, "--output", f"{len(options)}.json")
    plain, inplace = (Result.read(Path(f"{n}.json")).rows for n in (0, 1))
    for row in (plain[0], inplace[0]):
        assert row.status == "ok", row.note
        assert row.peak_extra_bytes is not None
    saved = (plain[0].peak_extra_bytes or 0) - (inplace[0].peak_extra_bytes or 0)
    assert saved == pytest.approx(plain[0].gradient_bytes, rel=0.05)


@pytest.mark.xdist_group("compile")
def test_torch_compile_once(invoke: Invoke) -> None:
    """The one compilation in these tests; where there is no compiler the provider says so and the rest goes on."""
    done = invoke("speed", *TINY, "--provider", "compile", "--provider", "eager", "--output", "r.json")
    assert done.exit_code == 0, done.output
    compiled, eager = Result.read(Path("r.json")).rows[:2]
    assert eager.status == "ok"
    assert compiled.status == "ok" or (compiled.status == "skipped" and "compiler" in compiled.note)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shape", "qwen9"), ["unknown shape 'qwen9'", "gpt2", "custom:V=N"]),
        (("--provider", "magic"), ["unknown provider 'magic'", "hpo_fused:torch", "compile"]),
        (("--objective", "ppo"), ["unknown objective 'ppo'", "mhpo_ahpo", "dr_grpo"]),
        (("--dtype", "int8"), ["unknown dtype 'int8'", "bf16"]),
        (("--device", "tpu9"), ["unknown device 'tpu9'", "cuda:N"]),
        (("--device", "meta"), ["cannot time on 'meta'"]),
        (("--output", "."), ["cannot write"]),
    ],
)
def test_unknown_names_say_what_there_is(invoke: Invoke, arguments: tuple[str, ...], expected: list[str]) -> None:
    done = invoke("speed", *arguments)
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert all(word in text for word in expected), text


class Broken(Eager):
    """A provider whose second call does whatever ``act`` does."""

    name = "broken"
    act: Callable[[], object] = staticmethod(lambda: None)
    from_call = 0

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        self.calls += 1
        if self.calls > self.from_call:
            type(self).act()
        return super().forward(inputs, logits)


def install(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, from_call: int = 0) -> None:
    """Makes a provider "broken" that raises ``error`` from one of its calls on."""

    def act() -> None:
        if error is not None:
            raise error

    broken = type("Fails", (Broken,), {"act": staticmethod(act), "from_call": from_call})
    monkeypatch.setitem(PROVIDERS, "broken", broken)


def test_a_wrong_provider_is_reported_and_not_timed(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Eager):
        name = "wrong"

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            out = super().forward(inputs, logits)
            return out._replace(loss=1.01 * out.loss)

    monkeypatch.setitem(PROVIDERS, "wrong", Wrong)
    done = invoke("speed", *TINY, "--provider", "wrong", "--provider", "eager", "--output", "r.json")
    assert done.exit_code == 1
    assert "wrong: wrong: " in done.output
    assert "off by" in done.output
    row, eager = Result.read(Path("r.json")).rows[:2]
    assert (row.status, row.samples_s, row.median_s, eager.status) == ("wrong", [], None, "ok")


@pytest.mark.parametrize("from_call", [0, 4])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("boom\nand a page of C++"), "failed", 1),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", 0),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", 0),
        (Unavailable("not here"), "skipped", 0),
    ],
)
def test_a_provider_that_raises_stops_nobody_else(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, code: int, from_call: int
) -> None:
    install(monkeypatch, error, from_call)
    done = invoke("speed", *TINY, "--provider", "broken", "--provider", "eager", "--output", "r.json")
    assert done.exit_code == code, done.output
    row, eager = Result.read(Path("r.json")).rows[:2]
    assert (row.status, row.median_s) == (status, None)
    assert "C++" not in row.note
    assert f"broken: {status.replace('_', ' ')}: {row.note}" in done.output
    assert len(eager.samples_s) == 4


def test_interrupt_keeps_finished_rounds(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third timed round: the first call, the memory pass and the warm-up came before."""
    install(monkeypatch, KeyboardInterrupt(), from_call=5)
    shapes = ("--shape", "custom:V=200")
    done = invoke("speed", *TINY, *shapes, "--provider", "eager", "--provider", "broken", "--output", "r.json")
    assert done.exit_code == 130
    assert "Interrupted" in done.output
    result = Result.read(Path("r.json"))
    assert result.interrupted
    assert {row.case.shape.vocabulary for row in result.rows} == {300}
    assert [len(row.samples_s) for row in result.rows] == [2] * 4
    assert all(row.median_s is not None for row in result.rows)


def test_interrupt_before_anything_was_timed(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, KeyboardInterrupt())
    done = invoke("speed", *TINY, "--provider", "eager", "--provider", "broken", "--output", "r.json")
    assert done.exit_code == 130
    assert {row.status for row in Result.read(Path("r.json")).rows} == {"skipped"}
    assert "interrupted before it was timed" in done.output


def test_a_case_that_would_not_fit_is_skipped(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux kills the process that asks for too much, and every result with it."""
    monkeypatch.setattr("hpo_fused.bench.trial.available_bytes", lambda: 50_000)
    done = invoke("speed", *TINY, *EAGER_ONLY, "--output", "r.json")
    assert done.exit_code == 0
    assert {row.status for row in Result.read(Path("r.json")).rows} == {"out_of_memory"}
    assert "No verdict" in done.output


def test_triton_on_a_cpu_is_skipped_with_the_reason(invoke: Invoke) -> None:
    done = invoke("speed", *TINY, "--provider", "hpo_fused:triton", "--provider", "eager")
    assert done.exit_code == 0
    assert "hpo_fused:triton: skipped: needs a GPU" in done.output


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = invoke("speed", *TINY, *EAGER_ONLY)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= width
    (row, errors) = (line for line in lines if " eager " in line)
    assert len(row.split()) == 7  # nothing wrapped, nothing cut
    assert len(errors.split()) == 9
    assert "…" not in done.stdout


def test_report_prints_markdown(invoke: Invoke) -> None:
    invoke("speed", *TINY, *EAGER_ONLY, "--output", "r.json")
    done = invoke("report", "r.json")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "| " + " | ".join(report.HEADINGS) + " |"
    rows = [line for line in lines if line.startswith("| custom:V=300")]
    assert len(rows) == 4 + 2 * 2
    widths = [line.count("|") - 1 for line in lines if line.startswith("|")]
    assert widths == [len(report.HEADINGS)] * 6 + [len(accuracy.HEADINGS)] * 6
    assert "| " + " | ".join(accuracy.HEADINGS) + " |" in lines
    assert "| **hpo_fused:torch** |" in rows[0]
    assert any("torch 2" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{}", "not a result"), ("oops", "not a result"), ('{"schema_version": 99}', "version 99")],
)
def test_report_refuses_other_files(invoke: Invoke, content: str | None, message: str) -> None:
    if content is not None:
        Path("r.json").write_text(content)
    done = invoke("report", "r.json")
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_listings(invoke: Invoke) -> None:
    shapes = invoke("shapes")
    assert shapes.exit_code == 0
    assert all(name in shapes.output for name in [*SHAPES, "151936", "custom:V=N"])
    environment = invoke("env", "--device", "cpu")
    assert environment.exit_code == 0
    assert f"torch: {torch.__version__}" in environment.output


def test_file_round_trip(tmp_path: Path) -> None:
    errors = Errors(1e-9, None, ColumnErrors(3e-3, 2e-3, 2.9e-3, 1e-4), None, "", "something")
    rows = [Row(tiny_case(shape=Shape("s", 9, 30.0)), "eager", samples_s=[1.0, 2.0], errors=errors, repeats=True)]
    rows.append(Row(tiny_case(), "copy"))
    result = Result({"torch": "2"}, {"seed": 0}, rows=rows)
    result.write(tmp_path / "r.json")
    assert Result.read(tmp_path / "r.json") == result


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_extra_is_one_line(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("hpo_fused.bench.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main() == 2
    assert capsys.readouterr().err == f"hpo-fused-bench needs {package}: pip install 'hpo-fused[bench]'\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (1234.5, "1234"), (98.76, "98.8"), (1.234, "1.23"), (0.01234, "0.012")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1.74e-3, "1.7e-3"), (9.96e-11, "1.0e-10"), (0.0, "0"), (-1e-9, "0"), (float("nan"), "nan")],
)
def test_error_numbers(value: float | None, text: str) -> None:
    assert accuracy.error(value) == text


def test_providers_are_documented() -> None:
    for name, create in PROVIDERS.items():
        provider = create()
        assert isinstance(provider, Provider)
        assert (provider.name, bool(provider.summary)) == (name, True)


def test_others_use_of_the_cpus_is_told_apart_from_ours() -> None:
    """Half a second of four CPUs: 1.2 s busy, of which 0.4 s ours and the rest somebody else's."""
    use = measure.CpuUse()
    use._read = staticmethod(lambda: (102.0, 51.2, 10.4))  # type: ignore[method-assign]
    use.start = (100.0, 50.0, 10.0)
    assert use.others() == pytest.approx(0.4)
    use.start = None
    assert use.others() is None


@pytest.mark.parametrize(("others", "warned"), [(None, False), (0.02, False), (0.4, True)])
def test_a_busy_machine_is_a_warning(others: float | None, warned: bool) -> None:
    result = Result({}, {}, rows=[Row(tiny_case(), "eager", others_cpu=others)])
    assert ("do not trust" in report.busy_warning(result)) is warned


def test_page_faults_are_a_hint() -> None:
    case = tiny_case(shape=Shape("s", 10_000_000))
    rows = [Row(case, "copy", median_s=0.1), Row(case, "copy_new", median_s=0.5)]
    linux = {"transparent_huge_pages": "madvise", "thp_mem_alloc_enable": None}
    assert report.page_fault_hint(Result(linux, {}, rows=rows)).startswith("80% of copy_new is page faults")
    assert not report.page_fault_hint(Result({**linux, "thp_mem_alloc_enable": "1"}, {}, rows=rows))
    assert not report.page_fault_hint(Result({**linux, "gpu": "H200"}, {}, rows=rows))


def test_progress_is_drawn_on_a_terminal_and_not_while_timing() -> None:
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with Display(console, 2) as display:
        display.stage("s: drawing inputs")
        assert display.bar is not None
        assert display.bar.live.auto_refresh
        display.advance(0.5)
        display.stage("s: timing, round 1 of at most 2", timing=True)
        assert not display.bar.live.auto_refresh
        assert display.bar.tasks[0].completed == 0.5
    assert display.bar is None
    assert "drawing inputs" in stream.getvalue()
    assert "round 1" in stream.getvalue()


def test_progress_is_a_line_per_stage_elsewhere() -> None:
    stream = StringIO()
    with Display(Console(file=stream, force_terminal=False), 1) as display:
        for text in ("s: warming up", "s: timing, round 1 of at most 9", "s: timing, round 2 of at most 9"):
            display.stage(text, timing=True)
    assert stream.getvalue() == "s: warming up\ns: timing\n"
