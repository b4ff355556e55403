"""CUDA graphs of the benchmark: captured in the right order, replayed, and held against an eager step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

import hpo_fused  # noqa: E402
from hpo_fused.bench import (  # noqa: E402
    measure,
    trial,
)
from hpo_fused.bench.cases import Case, Shape, draw  # noqa: E402
from hpo_fused.bench.linear import providers as of_heads  # noqa: E402
from hpo_fused.bench.linear.cases import HeadShape, LinearCase  # noqa: E402
from hpo_fused.bench.linear.draw import draw as draw_linear  # noqa: E402
from hpo_fused.bench.linear.draw import draw_weight  # noqa: E402
from hpo_fused.bench.linear.providers.fused import Fused as FusedLinear  # noqa: E402
from hpo_fused.bench.linear.results import LinearRow  # noqa: E402
from hpo_fused.bench.linear.run import LinearTrial, run_linear  # noqa: E402
from hpo_fused.bench.providers import Output, Unavailable, create  # noqa: E402
from hpo_fused.bench.results import Result, Row  # noqa: E402
from hpo_fused.bench.run import Bench  # noqa: E402
from hpo_fused.bench.trial import Settings, Step  # noqa: E402

from .bench_helpers import linear_case, tiny_case  # noqa: E402

CPU = torch.device("cpu")
LOGITS, HEAD = "custom:V=97", "custom:H=16,V=97"
Invoke = Callable[..., Any]


class Silent:
    """Progress that nobody looks at."""

    def stage(self, text: str, *, timing: bool = False) -> None:
        pass

    def advance(self, cases: float) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------
# CUDA graphs, without a GPU


class FakeCuda:
    """``torch.cuda`` as far as a capture uses it: what is called, in which order; a replay does ``replayed``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replayed: Callable[[], object] = lambda: None) -> None:
        self.events: list[str] = []
        self.mode = "default"
        events = self.events

        class Stream:
            def wait_stream(self, other: object) -> None:
                events.append("wait")

        def replay() -> None:
            events.append("replay")
            replayed()

        self.Stream = self.current_stream = Stream
        self.CUDAGraph = lambda: SimpleNamespace(replay=replay)
        monkeypatch.setattr(measure.torch, "cuda", self)

    @contextmanager
    def entered(self, name: str) -> Any:
        self.events.append(f"enter {name}")
        yield
        self.events.append(f"leave {name}")

    def stream(self, _: object) -> Any:
        return self.entered("side stream")

    def graph(self, _: object) -> Any:
        return self.entered("capture")

    def get_sync_debug_mode(self) -> str:
        return self.mode

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode
        self.events.append(mode)


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that capture needs: look for synchronisation, warm up on a side stream, restore the inputs, capture."""
    events = (cuda := FakeCuda(monkeypatch)).events
    task = measure.captured(measure.Task(lambda: events.append("run") or "result", lambda: events.append("before")))
    looked = ["before", "error", "run", "default"]
    warm = ["before", "run"] * 3
    captured = ["before", "enter capture", "run", "leave capture"]
    assert events == [*looked, "wait", "enter side stream", *warm, "leave side stream", "wait", *captured]
    assert cuda.mode == "default"
    events.clear()
    task.before()
    assert task.run() == "result"
    assert events == ["before", "replay"]


def graph_of(result: Tensor, run: Callable[[], object] | None = None, **fields: Any) -> tuple[Row, list[str]]:
    """The row of a provider whose step gives ``result``, and who is left to be timed."""
    row = Row(Case(Shape("a", 97), 2, 4), "eager", **fields)
    step = Step(Output(result.sum(), None, None), (result,))
    task = measure.Task(run or (lambda: step))
    return row, [name for name, _ in trial._captured({"eager": row}, {"eager": task})]


def test_a_replay_that_gives_other_bits_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    result = torch.ones(2, 4, 97)

    def flip() -> None:
        result.view(torch.int32)[1, 2, 3] ^= 1

    FakeCuda(monkeypatch, flip)
    row, timed = graph_of(result)
    assert (row.status, timed) == ("wrong", [])
    assert "other bits" in row.note
    FakeCuda(monkeypatch)
    row, timed = graph_of(result)
    assert (row.status, row.note, timed) == ("ok", "", ["eager"])
    row, timed = graph_of(result, lambda: result)  # a copy's
    assert (row.status, timed) == ("ok", ["eager"])


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (
            RuntimeError("called a synchronizing CUDA operation"),
            "skipped",
            "synchronises with the host, so it cannot be captured",
        ),
        (RuntimeError("no"), "skipped", "cannot be captured in a CUDA graph: RuntimeError: no"),
        (Unavailable("not here"), "skipped", "not here"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "CUDA out of memory"),
    ],
)
def test_who_cannot_be_captured_is_skipped(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, note: str
) -> None:
    """It has not failed: nobody promised it. The mode that finds out is left in any case."""
    cuda = FakeCuda(monkeypatch)
    result = torch.ones(2, 4, 97)

    def run() -> Tensor:
        if cuda.mode == "error":
            raise error
        return result

    row, timed = graph_of(result, run)
    assert (row.status, row.note, timed) == (status, note, [])
    assert cuda.mode == "default"


def test_who_does_not_repeat_itself_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    row, timed = graph_of(torch.ones(2, 4, 97), repeats=False)
    assert (row.status, timed, cuda.events) == ("skipped", [], [])
    assert "does not repeat itself" in row.note


def test_ours_is_told_how_many_rows_are_active_where_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask the device otherwise: that wait belongs into a step's time, and into no graph."""
    told: list[object] = []
    loss = hpo_fused.linear_policy_loss

    def watched(*arguments: Any, **options: Any) -> Any:
        told.append(options["active_count"])
        return loss(*arguments, **options)

    monkeypatch.setattr(hpo_fused, "linear_policy_loss", watched)
    for graph in (False, True):
        rows: list[LinearRow] = []
        timing = Settings(CPU, 0, 0.0, cuda_graph=graph)
        case = LinearCase(HeadShape("h", 16, 97), 8, 4, "fp32", "grpo")
        run_linear(case, [0.5], [FusedLinear("torch")], timing, rows, Silent())
        assert [row.status for row in rows] == ["ok"]
    assert told == [None, None, 16, 16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["hpo_fused", "eager"])
@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_replay_gives_what_the_step_gives(kind: str, name: str) -> None:
    """Also of inputs that changed since: nothing was computed once and for all while it was captured."""
    device = torch.device("cuda")
    bench: Bench | LinearTrial
    if kind == "logits":
        inputs = draw(tiny_case(), device, 0)
        bench, leaf = Bench(create(name), inputs), inputs.logits
    else:
        case = linear_case()
        weight = draw_weight(case.shape, case.torch_dtype, device, 0)
        heads = draw_linear(case, [0.0], device, 0, weight).inputs(0.0)
        provider = of_heads.create(name)
        provider.told_active = True
        bench, leaf = LinearTrial(provider, heads), heads.hidden
    graph = measure.captured(measure.Task(bench.step, bench.before))
    for _ in range(2):
        bench.before()
        expected = bench.step()
        graph.before()
        found = graph.run()
        assert isinstance(found, Step)
        assert expected.output.loss is not None
        assert found.output.loss is not None
        torch.testing.assert_close(found.output.loss, expected.output.loss, rtol=0, atol=0)
        for got, value in zip(found.gradients, expected.gradients, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=0)
        with torch.no_grad():
            leaf.mul_(0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_times_less_than_the_launches(invoke: Invoke) -> None:
    run = ("speed", "--shape", "custom:V=1000", "--tokens", "16", "--device", "cuda", "--provider", "hpo_fused")
    medians = {}
    for option in ((), ("--cuda-graph",)):
        done = invoke(*run, *option, "--output", "g.json")
        assert done.exit_code == 0, done.output
        (row,) = (row for row in Result.read(Path("g.json")).rows if row.provider == "hpo_fused")
        medians[option] = row.median_s
    assert medians["--cuda-graph",] < medians[()]
