"""Forward, gradient or both, of losses and of log-probabilities: what is run, what is timed, what is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused.bench.cases import MODES, Case, Inputs, Mode, Op, Shape, draw
from hpo_fused.bench.check import Oracle
from hpo_fused.bench.linear import providers as of_heads
from hpo_fused.bench.linear.cases import HeadShape, LinearCase
from hpo_fused.bench.linear.check import LinearOracle
from hpo_fused.bench.linear.draw import LinearInputs, draw_weight
from hpo_fused.bench.linear.draw import draw as draw_linear
from hpo_fused.bench.linear.exact import Exact
from hpo_fused.bench.linear.results import LinearErrors
from hpo_fused.bench.linear.run import LinearTrial
from hpo_fused.bench.providers import Output, Provider, create
from hpo_fused.bench.results import Errors
from hpo_fused.bench.run import Bench
from hpo_fused.bench.trial import Step

CPU = torch.device("cpu")
OPS: tuple[Op, ...] = ("logits", "logprobs")
NAMES = ("hpo_fused:torch", "eager", "compile")
LINEAR = ("hpo_fused:torch", "eager", "compile")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torch.compile by its tracer's fallback alone: a real compilation takes tens of seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def inputs_of(op: Op = "logits", mode: Mode = "both", **changes: Any) -> Inputs:
    """A batch of milliseconds; ragged, of a width that no block divides."""
    values = {"shape": Shape("tiny", 97), "responses": 8, "length": 5, "dtype": "fp32", "ragged": True}
    return draw(Case(**{**values, **changes, "op": op, "mode": mode}), CPU, 0)


def bench_of(provider: Provider, inputs: Inputs) -> Bench:
    """A provider ready for the inputs."""
    provider.prepare(inputs.case, CPU)
    return Bench(provider, inputs)


def run(bench: Bench) -> Step:
    """As a trial does."""
    bench.before()
    return bench.step()


def judged(bench: Bench, step: Step | None = None) -> Errors:
    """Of a step, or of a new one."""
    return Oracle.of(bench.inputs).judge(bench.inputs, step or run(bench), ours=bench.provider.ours)


class Counted:
    """How often a method is called, and under which of autograd's modes."""

    def __init__(self, provider: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.with_grad: list[bool] = []
        method = getattr(provider, name)

        def counted(*arguments: Any) -> Any:
            self.with_grad.append(torch.is_grad_enabled())
            return method(*arguments)

        monkeypatch.setattr(provider, name, counted)


# ---------------------------------------------------------------------------------------------------------------
# logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ragged": False},
        {"dtype": "bf16"},
        {"dtype": "fp16", "shape": Shape("capped", 97, 30.0)},
        {"inactive": 0.5},
    ],
    ids=lambda changes: "-".join(changes) or "fp32",
)
def test_every_mode_is_right(name: str, op: Op, mode: Mode, changes: dict[str, Any]) -> None:
    bench = bench_of(create(name), inputs_of(op, mode, **changes))
    step = run(bench)
    errors = judged(bench, step)
    assert errors.complaint == ""
    assert errors.broken == ""
    assert (errors.loss is None) == (op == "logprobs")
    assert errors.logprob is not None
    assert errors.logprob < 1e-5
    assert (errors.target is None) == (errors.others is None) == (mode == "forward")
    assert len(step.gradients) == (mode != "forward")
    assert step.output.logprobs is not None
    assert not step.output.logprobs.requires_grad


@pytest.mark.parametrize(("mode", "before", "step"), [("forward", 0, 1), ("gradient", 1, 0), ("both", 0, 1)])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_timed(name: str, op: Op, mode: Mode, before: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient's forward goes before; a forward alone records nothing for backward."""
    provider = create(name)
    bench = bench_of(provider, inputs_of(op, mode))
    calls = Counted(provider, "token_logprobs" if op == "logprobs" else "forward", monkeypatch).with_grad
    for _ in range(2):
        calls.clear()
        bench.before()
        assert len(calls) == before
        bench.step()
        assert len(calls) == before + step
        assert calls == [mode != "forward"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES)
def test_parts_make_the_whole(name: str, op: Op) -> None:
    forward, gradient, both = (run(bench_of(create(name), inputs_of(op, mode))) for mode in MODES)
    assert forward.gradients == ()
    assert torch.equal(gradient.gradients[0], both.gradients[0])
    for values in zip(forward.output, gradient.output, both.output, strict=True):
        assert len({value is None for value in values}) == 1
        if values[0] is not None:
            assert torch.equal(values[0], values[1])
            assert torch.equal(values[0], values[2])


def test_modes_are_those_of_the_package() -> None:
    """The parametrisations above are over all of them, in the order that test_parts_make_the_whole unpacks."""
    assert tuple(MODES) == ("forward", "gradient", "both")


Change = Callable[[Tensor], Tensor]
MISTAKES: dict[str, Change] = {
    "scaled": lambda values: 1.01 * values,
    "shifted": lambda values: values + 0.01,
    "nan": lambda values: values * torch.nan,
    "zero": torch.zeros_like,
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("mode", MODES)
def test_wrong_logprobs_and_entropies_are_noticed(mode: Mode, mistake: str) -> None:
    """Of log-probabilities, those of responses without advantage, too: who asked for them does not say why."""
    bench = bench_of(create("eager"), inputs_of("logprobs", mode, inactive=0.5))
    step = run(bench)
    assert step.output.logprobs is not None
    assert step.output.entropy is not None
    wrong = step._replace(output=step.output._replace(logprobs=MISTAKES[mistake](step.output.logprobs)))
    assert judged(bench, wrong).complaint.startswith("log-probability off by")
    wrong = step._replace(output=step.output._replace(entropy=MISTAKES[mistake](step.output.entropy)))
    assert judged(bench, wrong).complaint.startswith("entropy off by")


@pytest.mark.parametrize("mistake", ["scaled", "shifted", "nan", "zero", "masked", "unmasked", "token"])
@pytest.mark.parametrize("mode", ["gradient", "both"])
@pytest.mark.parametrize("op", OPS)
def test_wrong_gradients_are_noticed(op: Op, mode: Mode, mistake: str) -> None:
    bench = bench_of(create("eager"), inputs_of(op, mode))
    step = run(bench)
    (gradient,) = step.gradients
    mask = bench.inputs.mask
    assert mask is not None
    changes: dict[str, Change] = {
        **MISTAKES,
        "masked": lambda values: values * ~mask.unsqueeze(-1),
        "unmasked": lambda values: torch.where(mask.unsqueeze(-1), values, values[0, 0]),
        "token": lambda values: values.scatter(-1, bench.inputs.tokens.unsqueeze(-1), 0.0),
    }
    assert judged(bench, step._replace(gradients=(changes[mistake](gradient),))).complaint.startswith("gradient off by")


@pytest.mark.parametrize("op", OPS)
def test_a_forward_alone_is_judged_by_what_it_returns(op: Op) -> None:
    """No gradient gives a wrong loss away there."""
    bench = bench_of(create("eager"), inputs_of(op, "forward"))
    step = run(bench)
    if op == "logits":
        assert step.output.loss is not None
        wrong = step._replace(output=step.output._replace(loss=step.output.loss + 0.01))
        assert judged(bench, wrong).complaint.startswith("loss off by")
    assert step.output.logprobs is not None
    wrong = step._replace(output=step.output._replace(logprobs=step.output.logprobs.roll(1, 1)))
    assert judged(bench, wrong).complaint.startswith("log-probability off by")


@pytest.mark.parametrize("mode", MODES)
def test_who_ignores_the_mask_is_noticed(mode: Mode) -> None:
    class Maskless(type(create("eager"))):  # type: ignore[misc]
        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            values = {**vars(inputs), "mask": None}
            return super().forward(Inputs(**values), logits)

    inputs = inputs_of("logits", mode)
    assert "off by" in judged(bench_of(Maskless(), inputs)).complaint
    full = inputs_of("logits", mode, ragged=False)
    assert judged(bench_of(Maskless(), full)).complaint == ""


def test_masked_logprobs_are_not_judged() -> None:
    """What a provider says of padding is its own business; its gradient there is not, see above."""
    bench = bench_of(create("eager"), inputs_of("logprobs"))
    step, mask = run(bench), bench.inputs.mask
    assert step.output.logprobs is not None
    assert mask is not None
    padded = step.output.logprobs.masked_fill(~mask, -9.0)
    assert judged(bench, step._replace(output=step.output._replace(logprobs=padded))).complaint == ""


# ---------------------------------------------------------------------------------------------------------------
# hidden states and head


def linear_inputs(mode: Mode, dtype: str = "fp32") -> tuple[LinearInputs, LinearOracle]:
    """A small LM head with half of the responses inactive."""
    case = LinearCase(HeadShape("tiny", 48, 97), 16, 8, dtype, "grpo", 0.5, mode)
    weight = draw_weight(case.shape, case.torch_dtype, CPU, 0)
    problem = draw_linear(case, [0.5], CPU, 0, weight)
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.5, exact.logprobs)
    return inputs, LinearOracle(inputs, exact)


def run_linear(name: str, inputs: LinearInputs) -> tuple[LinearTrial, Step]:
    provider = of_heads.create(name)
    provider.prepare(inputs.case, CPU)
    trial = LinearTrial(provider, inputs)
    trial.before()
    return trial, trial.step()


def judge_linear(trial: LinearTrial, oracle: LinearOracle, step: Step) -> LinearErrors:
    errors = trial.provider.judge(oracle, step)
    assert errors is not None
    return errors


NEEDS_CROSS_ENTROPY = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch.nn.functional.linear_cross_entropy: PyTorch 2.13"
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*LINEAR, pytest.param("linear_cross_entropy", marks=NEEDS_CROSS_ENTROPY)])
def test_every_mode_of_the_linear_path_is_right(name: str, mode: Mode, dtype: str) -> None:
    inputs, oracle = linear_inputs(mode, dtype)
    trial, step = run_linear(name, inputs)
    errors = judge_linear(trial, oracle, step)
    assert errors.complaint == ""
    assert (errors.hidden is None) == (errors.weight is None) == (mode == "forward")
    assert len(step.gradients) == (0 if mode == "forward" else 2)
    assert step.output.loss is not None
    wrong = step._replace(output=step.output._replace(loss=1.1 * step.output.loss + 0.01))
    assert "off by" in judge_linear(trial, oracle, wrong).complaint


@pytest.mark.parametrize("mode", ["gradient", "both"])
@pytest.mark.parametrize("which", [0, 1])
def test_wrong_gradients_of_the_linear_path_are_noticed(mode: Mode, which: int) -> None:
    inputs, oracle = linear_inputs(mode)
    trial, step = run_linear("eager", inputs)
    gradients = list(step.gradients)
    gradients[which] = 1.01 * gradients[which]
    complaint = judge_linear(trial, oracle, step._replace(gradients=tuple(gradients))).complaint
    assert complaint.startswith(f"gradient of {('hidden', 'weight')[which]}")


@pytest.mark.parametrize(("mode", "before", "step"), [("forward", 0, 1), ("gradient", 1, 0), ("both", 0, 1)])
@pytest.mark.parametrize("name", LINEAR)
def test_what_is_timed_of_the_linear_path(
    name: str, mode: Mode, before: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _ = linear_inputs(mode)
    trial, _ = run_linear(name, inputs)
    calls = Counted(trial.provider, "forward", monkeypatch).with_grad
    for _ in range(2):
        calls.clear()
        trial.before()
        assert len(calls) == before
        trial.step()
        assert len(calls) == before + step
        assert calls == [mode != "forward"]


@pytest.mark.parametrize(("mode", "products"), [("forward", 1), ("gradient", 2), ("both", 3)])
def test_the_floor_does_the_gemms_of_the_mode(mode: Mode, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = linear_inputs(mode)
    trial, _ = run_linear("gemms", inputs)
    sizes = []
    multiply = torch.mm

    def counted(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    trial.before()
    trial.step()
    assert sum(sizes) == products * 64 * 48 * 97  # half of the 128 rows are active
    assert inputs.case.flops(64) == (None if mode == "gradient" else 2 * sum(sizes))
