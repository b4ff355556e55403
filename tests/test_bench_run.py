"""Interleaved rounds, their ratios, memory, and the fate of providers that are wrong, fail or cannot run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpo_fused.bench import measure
from hpo_fused.bench.cases import Operation, Shape, of_tokens
from hpo_fused.bench.inputs import Inputs
from hpo_fused.bench.measure import Task, peak_extra_bytes, rounds
from hpo_fused.bench.providers import PROVIDERS, Output, Provider, Unavailable, create, limits
from hpo_fused.bench.providers.fused import Fused
from hpo_fused.bench.providers.plain import Eager
from hpo_fused.bench.results import Row, median_ratio, summarise
from hpo_fused.bench.run import Settings, Trial, run_case
from hpo_fused.bench.truth import draw

from .bench_helpers import CPU, Wrong, measured, stepped, tiny

CASE = tiny("policy_loss")

# ---------------------------------------------------------------------------------------------------------------
# rounds


def fake_clock(run: Callable[[], object]) -> float:
    result = run()
    assert isinstance(result, float)
    return result


def test_rounds_rotate_and_drop_who_raises() -> None:
    order: list[str] = []

    def task(name: str, fails_at: int = -1) -> Task:
        def act() -> float:
            order.append(name)
            if order.count(name) == fails_at:
                raise RuntimeError(name)
            return float(len(order))

        return Task(act)

    found = list(rounds({"a": task("a"), "b": task("b", fails_at=2), "c": task("c")}, fake_clock, 3, 100.0))
    assert order == ["a", "b", "c", "b", "c", "a", "a", "c"]
    assert found[0] == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert isinstance(found[1].pop("b"), RuntimeError)
    assert found[1:] == [{"c": 5.0, "a": 6.0}, {"a": 7.0, "c": 8.0}]


@pytest.mark.parametrize(("repeats", "minimum", "expected"), [(10, 3, 3), (2, 3, 2), (10, 5, 5)])
def test_a_used_budget_leaves_the_least_rounds(repeats: int, minimum: int, expected: int) -> None:
    assert len(list(rounds({"a": Task(lambda: 1.0)}, fake_clock, repeats, -1.0, minimum))) == expected


def test_before_is_not_timed() -> None:
    events: list[str] = []

    def clock(run: Callable[[], object]) -> float:
        events.append("clock")
        run()
        return 1.0

    list(rounds({"a": Task(lambda: events.append("run"), lambda: events.append("before"))}, clock, 1, 0.0))
    assert events == ["before", "clock", "run"]


def test_ratios_are_taken_within_rounds() -> None:
    """Where the machine slowed down threefold in one round, the ratio of medians would move and this does not."""
    ours, other, copy, slow_copy = [1.0, 3.0, 1.2], [2.0, 6.0, 2.4], [0.5, 1.5, 0.6], [5.0, 15.0, 6.0]
    names = ("hpo_fused", "other", "copy", "slow", "late")
    rows = {name: Row(CASE, name, ours=name == "hpo_fused", limit=name in ("copy", "slow")) for name in names}
    samples = {"hpo_fused": ours, "other": other, "copy": copy, "slow": slow_copy, "late": []}
    rows["late"].status = "wrong"
    summarise(list(rows.values()), samples)
    assert (rows["other"].over_ours, rows["other"].over_limit) == (2.0, 4.0)
    assert (rows["hpo_fused"].over_ours, rows["hpo_fused"].over_limit) == (1.0, 2.0)
    assert (rows["hpo_fused"].q25_s, rows["hpo_fused"].median_s, rows["hpo_fused"].q75_s) == (1.1, 1.2, 2.1)
    assert (rows["late"].rounds, rows["late"].median_s, rows["other"].rounds) == (0, None, 3)
    assert median_ratio([], [1.0]) is None


def test_cpu_peak_counts_every_allocation() -> None:
    held = torch.zeros(1 << 20)

    def act() -> torch.Tensor:
        temporary = held + held  # 4 MiB, beside the result's 4
        return temporary + held

    peak = peak_extra_bytes(act, CPU)
    assert peak is not None
    assert 8 << 20 <= peak < (8 << 20) + 1024
    assert peak_extra_bytes(lambda: None, CPU) == 0


# ---------------------------------------------------------------------------------------------------------------
# a case


class Elsewhere(Eager):
    name = "elsewhere"

    def prepare(self, case: Any, device: torch.device) -> None:
        raise Unavailable("runs on the moon only")


class Broken(Eager):
    name = "broken"

    def policy_loss(self, inputs: Inputs) -> Output:
        raise RuntimeError("it broke\nin two lines")


class Hungry(Eager):
    name = "hungry"
    copies = 1e15


class Unsteady(Fused):
    """Another loss at every call, within the limits."""

    calls = 0

    def policy_loss(self, inputs: Inputs) -> Output:
        out = super().policy_loss(inputs)
        assert out.loss is not None
        self.calls += 1
        return out._replace(loss=out.loss + 1e-6 * self.calls)


def test_only_right_providers_are_timed() -> None:
    rows = measured(CASE, Fused("torch"), Eager(), Wrong(), Elsewhere(), Broken(), Hungry())
    assert {name for name, row in rows.items() if row.rounds == 3} == {"hpo_fused:torch", "eager", "copy"}
    ours, eager = rows["hpo_fused:torch"], rows["eager"]
    assert (ours.ours, ours.over_ours, eager.ours, ours.repeats, ours.complaint) == (True, 1.0, False, True, "")
    assert eager.over_ours is not None
    assert eager.over_limit is not None
    assert eager.peak_bytes is not None
    assert eager.peak_bytes >= eager.gradient_bytes == CASE.logits_bytes
    notes = {name: (row.status, row.note) for name, row in rows.items() if row.status != "ok"}
    assert notes["wrong"][1].startswith("loss off by")
    assert "wrong: loss off by" in rows["wrong"].complaint
    assert notes["elsewhere"] == ("skipped", "runs on the moon only")
    assert notes["broken"] == ("failed", "RuntimeError: it broke")
    assert notes["hungry"][0] == "out_of_memory"
    assert "GiB of main memory" in notes["hungry"][1]


def test_who_does_not_repeat_itself_is_noticed() -> None:
    row = measured(CASE, Unsteady("torch"), repeats=0)["hpo_fused:torch"]
    assert (row.repeats, row.complaint) == (False, "a second call gave another result")


def test_without_repeats_nothing_is_timed() -> None:
    rows = measured(CASE, Eager(), repeats=0)
    assert list(rows) == ["eager"]
    assert (rows["eager"].rounds, rows["eager"].status, rows["eager"].peak_bytes is None) == (0, "ok", False)


def test_an_interrupted_case_keeps_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        found = rounds(*arguments)
        yield next(found)
        if arguments[2] == 5:  # not the warm-up
            raise KeyboardInterrupt

    monkeypatch.setattr(measure, "rounds", interrupted)
    rows: list[Row] = []
    with pytest.raises(KeyboardInterrupt):
        run_case(CASE, [Eager(), Wrong()], Settings(CPU, 5, 0.0), rows, lambda line: None)
    assert {row.provider: (row.status, row.rounds) for row in rows} == {
        "eager": ("ok", 1), "wrong": ("wrong", 0), "copy": ("ok", 1),
    }  # fmt: skip


def test_a_case_that_does_not_fit_says_so() -> None:
    (row,) = measured(tiny("policy_loss", 1 << 40), Eager(), repeats=0).values()
    assert row.status == "out_of_memory"
    assert "GiB of main memory" in row.note


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("operation", ["policy_loss", "linear_policy_loss", "token_logprobs"])
def test_every_mode_is_measured_beside_its_limits(operation: Any, mode: Any) -> None:
    case = tiny(operation, mode=mode, dtype="bf16")
    rows = measured(case, Fused("torch"), Eager(), repeats=1)
    assert {row.status for row in rows.values()} == {"ok"}
    assert [name for name, row in rows.items() if row.limit] == [one.name for one in limits(operation)]
    assert min(row.over_limit or 0.0 for row in rows.values() if row.limit) == 1.0


def test_gemms_are_those_of_the_active_rows() -> None:
    """In either dtype, and whether or not the vocabulary is taken in parts."""
    case = tiny("linear_policy_loss", 128, dtype="bf16", inactive=0.5)
    inputs, _, _ = stepped(case)
    for name in ("gemms", "gemms:fp32"):
        gemms: Any = create(name)
        gemms.prepare(case, CPU)
        gemms.run(inputs)
        x, weight, logits, of_x, of_weight = gemms.buffers
        assert len(x) == case.active == 64
        torch.testing.assert_close(logits, x @ weight.t())
        torch.testing.assert_close(of_x, logits @ weight, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(of_weight, logits.t() @ x, rtol=2e-2, atol=2e-2)


def test_in_place_logits_are_restored() -> None:
    case = tiny("policy_loss", inplace=True)
    inputs, _ = draw(case, CPU, 0)
    before = inputs.leaves[0].detach().clone()
    trial = Trial(Fused("torch"), inputs)
    gradients = []
    for _ in range(2):
        trial.before()
        gradients.append(trial.step().gradients[0])
        assert trial.storage is not None
        assert gradients[-1].data_ptr() == trial.storage.data_ptr()
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(inputs.leaves[0], before)
    assert measured(case, Fused("torch"), Eager(), repeats=1)["hpo_fused:torch"].status == "ok"


def test_every_provider_says_what_it_is() -> None:
    for name in PROVIDERS:
        provider = create(name)
        assert (provider.name, bool(provider.summary), bool(provider.operations())) == (name, True, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jax", "expected one of hpo_fused, .*or module:Class, got 'jax'"),
        ("no_such_module:Class", "ModuleNotFoundError"),
        ("hpo_fused.bench.providers:Nothing", "AttributeError"),
        ("hpo_fused.bench.providers:Output", "expected a subclass of .*Provider, got"),
    ],
)
def test_unknown_providers_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name)


def test_launch_parameters_apply_to_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("hpo_fused.kernels.launch")
    seen: list[Any] = []

    class Context:
        def __enter__(self) -> None:
            seen.append("entered")

        def __exit__(self, *_: object) -> None:
            seen.append("left")

    def override(*, parameters: Any) -> Context:
        seen.append(tuple(parameters))
        return Context()

    class Watched(Fused):
        def policy_loss(self, inputs: Inputs) -> Output:
            out = super().policy_loss(inputs)
            assert out.loss is not None
            out.loss.register_hook(lambda gradient: seen.append("backward"))
            return out

    monkeypatch.setattr(launch, "override", override)
    provider = Watched("torch", (512, 4, 132))
    assert provider.name == "hpo_fused@512,4,132"
    stepped(CASE, provider)
    assert seen == [(512, 4, 132), "entered", "backward", "left"]


def test_device_time_beside_the_step_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA graphs, which cannot hold eager PyTorch's step here: a dash is all that it gets."""
    told: list[Any] = []
    asked: list[tuple[str, int]] = []
    graphs: weakref.WeakSet[Task] = weakref.WeakSet()

    class Breaks(Eager):
        name = "breaks"
        calls = 0

        def linear_policy_loss(self, inputs: Inputs) -> Output:
            self.calls += 1
            if self.calls == 5:  # checked, and being timed
                raise RuntimeError("once")
            return super().linear_policy_loss(inputs)

    class Watched(Fused):
        def linear_policy_loss(self, inputs: Inputs) -> Output:
            told.append(self._active_count(inputs))
            return super().linear_policy_loss(inputs)

    def captured(task: Task) -> Task:
        provider = task.run.__self__.provider  # type: ignore[attr-defined]
        asked.append((provider.name, len(graphs)))
        if isinstance(provider, Eager):
            raise RuntimeError("cannot be captured")
        graph = replace(task)
        graphs.add(graph)
        return graph

    monkeypatch.setattr(measure, "captured", captured)
    rows: list[Row] = []
    settings = Settings(CPU, 3, 0.0, device_time=True)
    run_case(
        tiny("linear_policy_loss", inactive=0.5), [Watched(), Eager(), Breaks()], settings, rows, lambda line: None
    )
    found = {row.provider: row for row in rows}
    broken = found.pop("breaks")
    assert (broken.status, broken.device_s) == ("failed", None)
    assert "breaks" not in dict(asked), "it had failed"
    assert not any(alive for _, alive in asked), "a graph keeps the memory of its step"
    assert {row.status for row in found.values()} == {"ok"}
    assert (found["eager"].device_s, found["eager"].device_over_limit) == (None, None)
    ours, bounds = found["hpo_fused"], [row.device_s for row in rows if row.limit and row.device_s]
    assert ours.device_s is not None
    assert ours.device_over_limit == ours.device_s / min(bounds)
    assert None in told[:3]
    assert told[-1] == rows[0].case.active
    report = pytest.importorskip("hpo_fused.bench.report", reason="needs the bench extra")
    assert report.speed_table(rows).headings[2:5] == ("device ms", "device ÷ limit", "median ms")
    assert report.speed_table([replace(row, device_s=None) for row in rows]).headings[2] == "median ms"


@pytest.mark.parametrize("operation", ["policy_loss", "linear_policy_loss", "logprob_policy_loss"])
def test_a_scaled_loss_is_checked_whoever_scales_it(operation: Operation) -> None:
    case = tiny(operation, loss_scale=0.25)
    rows = measured(case, Fused(), Eager())
    assert {rows[name].status for name in ("hpo_fused", "eager")} == {"ok"}

    class Forgets(Fused):
        def _loss(self, inputs: Inputs) -> dict[str, Any]:
            return {**super()._loss(inputs), "loss_scale": 1.0}

    assert measured(case, Forgets())["hpo_fused"].status == "wrong"


@pytest.mark.parametrize("ragged", [False, True])
def test_gspo_clips_few_responses(ragged: bool) -> None:
    inputs, truth, _ = stepped(of_tokens("policy_loss", Shape("small", 97), 64 * 32, objective="gspo", ragged=ragged))
    mask = torch.ones_like(truth.logprobs) if inputs.mask is None else inputs.mask.double()
    log_ratios = ((truth.logprobs - inputs.old_logprobs) * mask).sum(1) / mask.sum(1)
    inside = ((log_ratios > -3e-4) & (log_ratios < 4e-4)).double().mean()
    assert 0.8 < inside < 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_are_replayed_and_checked() -> None:
    class Waits(Eager):
        name = "waits"

        def policy_loss(self, inputs: Inputs) -> Output:
            out = super().policy_loss(inputs)
            assert out.loss is not None
            float(out.loss)
            return out

    rows: list[Row] = []
    providers: list[Provider] = [Fused(), Eager(), Waits()]
    device = torch.device("cuda", torch.cuda.current_device())
    run_case(tiny("policy_loss", cuda_graph=True), providers, Settings(device, 3, 0.0), rows, lambda line: None)
    status = {row.provider: (row.status, row.rounds) for row in rows}
    assert status["hpo_fused"] == status["eager"] == status["copy"] == ("ok", 3)
    assert status["waits"] == ("skipped", 0)
