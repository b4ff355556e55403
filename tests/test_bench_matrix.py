"""Every operation, objective, dtype, shape, share of inactive rows and mode is measured as itself, and told apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from hpo_fused.bench import accuracy, files, measure, memory_report, report, show  # noqa: E402
from hpo_fused.bench.cases import Case, Inputs, Shape  # noqa: E402
from hpo_fused.bench.evidence import Evidence  # noqa: E402
from hpo_fused.bench.evidence import Tests as Outcome  # noqa: E402
from hpo_fused.bench.labels import labels  # noqa: E402
from hpo_fused.bench.linear.cases import HeadShape, LinearCase  # noqa: E402
from hpo_fused.bench.linear.results import LinearResult, LinearRow  # noqa: E402
from hpo_fused.bench.matrix import Axes, Contestants  # noqa: E402
from hpo_fused.bench.providers import PROVIDERS, Output  # noqa: E402
from hpo_fused.bench.providers.plain import Eager  # noqa: E402
from hpo_fused.bench.results import COPY, MemoryRow, Result, Row, summarise  # noqa: E402

CPU = torch.device("cpu")
MACHINE = {"cpu": "x", "threads": 1, "torch": "2", "python": "3", "hpo_fused": "0"}
LOGITS, HEAD = "custom:V=97", "custom:H=16,V=97"
TINY = ("--tokens", "24", "--device", "cpu")
OURS_AND_EAGER = ("--provider", "hpo_fused:torch", "--provider", "eager")
Invoke = Callable[..., Any]


def axes(**changes: Any) -> Axes:
    """Everything there is, on two tiny shapes of either kind."""
    values: dict[str, Any] = {
        "operations": ["logits", "linear", "logprobs"],
        "shapes": [LOGITS, "custom:V=33,softcap=3", HEAD],
        "tokens": 24,
        "dtypes": ["bf16", "fp32"],
        "objectives": ["grpo", "mhpo_ahpo"],
        "inactive": [0.0, 0.5],
        "modes": ["forward", "both"],
    }
    return Axes(**{**values, **changes})


# ---------------------------------------------------------------------------------------------------------------
# which cases, and who


def test_the_product_of_all_axes_once_each() -> None:
    cases = axes().cases()
    assert len(cases) == len(set(cases))
    # 2 shapes x 2 dtypes x 2 modes, of a loss x 2 objectives x 2 shares; log-probabilities know neither
    assert sum(case.op == "logits" for case in cases) == 2 * 2 * 2 * 2 * 2
    assert sum(case.op == "logprobs" for case in cases) == 2 * 2 * 2
    heads = axes().heads(CPU)
    assert len(heads) == len(set(heads)) == 2 * 2 * 2  # one head: dtypes, objectives, modes; shares are within
    assert {head.shape.hidden for head in heads} == {16}
    assert axes().shares(heads[0]) == [0.0, 0.5]


def test_shares_that_come_to_the_same_rows_are_one() -> None:
    few = axes(tokens=8, inactive=[0.5, 0.51, 0.0])
    (head,) = {replace(head, dtype="bf16", objective="grpo", mode="both") for head in few.heads(CPU)}
    assert len(few.shares(head)) == 2


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [([], ["logits", "linear"]), ([HEAD], ["linear"]), (["qwen3"], ["logits"]), (["gpt2"], ["logits", "linear"])],
)
def test_an_operation_takes_the_shapes_it_knows(shapes: list[str], expected: list[str]) -> None:
    assert Axes.operations_for(shapes, ["logits", "linear"]) == expected


def test_a_shape_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown shape 'nothing'.*qwen3.*linear path.*qwen3-8b"):
        Axes.operations_for(["gpt2", "nothing"], ["logits", "linear"])


def test_contestants_of_two_operations() -> None:
    who = Contestants.of(["eager", "gemms"], ["logits", "linear"], "cpu")
    assert [provider.name for provider in who.logits] == ["eager"]
    assert [provider.name for provider in who.linear] == ["eager", "gemms"]
    assert who.absent == ["gemms: no provider of logits"]
    assert not Contestants.of([], ["logits", "linear"], "cpu").absent
    with pytest.raises(ValueError, match=r"unknown provider 'nobody'.*linear path"):
        Contestants.of(["eager", "nobody"], ["logits", "linear"], "cpu")
    assert len(Contestants.of([], ["logits"], "cpu", every=True).logits) == len(PROVIDERS)


# ---------------------------------------------------------------------------------------------------------------
# what a file and a table tell


def test_labels_name_what_differs_and_nothing_else() -> None:
    base = Case(Shape("a", 97), 2, 4)
    assert labels([base]) == {base: "a"}
    forward = replace(base, mode="forward")
    single = replace(base, dtype="fp32")
    found = labels([base, forward, single])
    assert found == {base: "a bf16 both", forward: "a bf16 forward", single: "a fp32 both"}
    few = replace(base, inactive=0.25, op="logprobs")
    assert labels([base, few])[few] == "a log p 25%"


def test_the_forward_is_held_against_its_read_alone() -> None:
    """A copy moves twice the bytes that a forward must: as fast as the copy is half its bytes per second."""
    case = Case(Shape("a", 1 << 20), 1, 1, mode="forward")
    rows = [Row(case, COPY, samples_s=[1.0, 1.0]), Row(case, "eager", samples_s=[1.0, 1.0])]
    summarise(rows, None)
    copy, eager = rows
    assert copy.gb_per_s == 2 * case.logits_bytes / 1e9
    assert eager.gb_per_s == case.logits_bytes / 1e9
    assert (copy.share_of_copy, eager.share_of_copy) == (1.0, 0.5)
    gradient = [replace(row, case=replace(case, mode="gradient")) for row in rows]
    summarise(gradient, None)
    assert gradient[1].gb_per_s is None
    assert gradient[1].share_of_copy is None


def evidence() -> Evidence:
    """One of each part."""
    case = Case(Shape("a", 97), 2, 4, mode="forward", op="logprobs")
    head = LinearCase(HeadShape("h", 16, 97), 2, 4, mode="forward")
    logits = Result(MACHINE, {"seed": 1}, rows=[Row(case, "eager")], memory=[MemoryRow("tokens", case, "e", "cpu")])
    linear = LinearResult(MACHINE, {}, rows=[LinearRow(head, "gemms")])
    return Evidence.of_parts([logits, linear], environment=MACHINE, settings={}, tests=Outcome(3, failures=["t"]))


def test_an_evidence_survives_its_file(tmp_path: Path) -> None:
    found = evidence()
    found.write(tmp_path / "e.json")
    assert files.read(tmp_path / "e.json") == found
    assert (tmp_path / "e.json").read_text(encoding="utf-8").count('"cpu": "x"') == 1
    assert files.parts(found) == [found.logits, *found.linear]


def test_one_part_and_nothing_else_is_written_alone() -> None:
    found = evidence()
    assert found.simplest() is found
    found.tests, found.linear = None, []
    assert found.simplest() is found.logits
    found.dropped.append("x: no provider of logits")
    assert found.simplest() is found


def test_an_interruption_marks_the_part_at_work() -> None:
    found = evidence()
    found.interrupt()
    assert (found.interrupted, found.parts[0].interrupted, found.parts[-1].interrupted) == (True, False, True)


# ---------------------------------------------------------------------------------------------------------------
# the commands


def test_speed_of_everything(invoke: Invoke) -> None:
    options = [part for op in ("logits", "linear", "logprobs") for part in ("--op", op)]
    options += [part for mode in ("forward", "gradient", "both") for part in ("--mode", mode)]
    done = invoke(
        "speed", *TINY, *options, "--shape", LOGITS, "--shape", HEAD, "--repeats", "2", *OURS_AND_EAGER,
        "--provider", "gemms", "--output", "r.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = files.read(Path("r.json"))
    assert isinstance(result, Evidence)
    assert result.logits is not None
    seen = {(row.case.op, row.case.mode, row.provider): row for row in result.logits.rows}
    assert len(seen) == 2 * 3 * 4
    assert {row.status for row in seen.values()} == {"ok"}
    for (_, mode, provider), row in seen.items():
        assert len(row.samples_s) == 2
        assert (row.gradient_bytes == 0) == (mode == "forward" or provider.startswith("copy"))
        assert (row.errors is None) == provider.startswith("copy")
        if row.errors is not None:
            assert (row.errors.target is None) == (mode == "forward")
            assert (row.errors.loss is None) == (row.case.op == "logprobs")
    assert [part.rows[0].case.mode for part in result.linear] == ["forward", "gradient", "both"]
    for part in result.linear:
        assert {row.provider: row.status for row in part.rows} == dict.fromkeys(
            ["hpo_fused:torch", "eager", "gemms"], "ok"
        )
        (eager,) = (row for row in part.rows if row.provider == "eager")
        mode = eager.case.mode
        assert eager.errors is not None
        assert (eager.errors.hidden is None) == (mode == "forward")
        assert (eager.tflop_per_s is None) == (mode == "gradient")
    assert "gemms: no provider of logits" in done.stdout
    again = invoke("report", "r.json")
    assert again.exit_code == 0
    assert "log p forward" in again.output


def test_the_forward_does_no_gradient_work(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    class Watched(Eager):
        name = "watched"

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            seen.append((inputs.case.mode, torch.is_grad_enabled()))
            return super().forward(inputs, logits)

    monkeypatch.setitem(PROVIDERS, "watched", Watched)
    run = ("speed", *TINY, "--shape", LOGITS, "--repeats", "2", "--provider", "watched")
    assert invoke(*run, "--mode", "forward", "--mode", "both").exit_code == 0
    assert set(seen) == {("forward", False), ("both", True)}


def test_a_wrong_gradient_is_found_where_it_alone_is_timed(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Eager):
        name = "wrong"

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            return super().forward(inputs, logits * 1.01 - 0.01 * logits.detach())

    monkeypatch.setitem(PROVIDERS, "wrong", Wrong)
    run = ("speed", *TINY, "--shape", LOGITS, "--dtype", "fp32", "--repeats", "2", "--provider", "wrong")
    assert invoke(*run, "--mode", "forward").exit_code == 0
    for mode in ("gradient", "both"):
        done = invoke(*run, "--mode", mode, "--output", f"{mode}.json")
        assert done.exit_code == 1
        assert {row.status for row in Result.read(Path(f"{mode}.json")).rows if row.provider == "wrong"} == {"wrong"}


def test_accuracy_judges_every_dtype_and_times_nothing(invoke: Invoke) -> None:
    done = invoke("accuracy", *TINY, "--shape", LOGITS, "--op", "logits", "--op", "logprobs", "--output", "a.json")
    assert done.exit_code == 0, done.output
    result = files.read(Path("a.json"))
    assert isinstance(result, Result)
    assert {(row.case.op, row.case.dtype) for row in result.rows} == {
        (op, dtype) for op in ("logits", "logprobs") for dtype in ("bf16", "fp32")
    }
    assert {row.provider for row in result.rows} == set(PROVIDERS)
    assert not any(row.samples_s for row in result.rows)
    checked = [row for row in result.rows if row.status == "ok"]
    assert {"hpo_fused", "hpo_fused:torch", "eager"} <= {row.provider for row in checked}
    assert all(row.errors is not None for row in checked)
    assert "median ms" not in done.stdout
    assert done.stdout.count("Against float64") == 1


def test_accuracy_tells_who_is_wrong(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Eager):
        name = "wrong"

        def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
            found = super().token_logprobs(inputs, logits)
            assert found.logprobs is not None
            return found._replace(logprobs=found.logprobs - 0.01)

    monkeypatch.setitem(PROVIDERS, "wrong", Wrong)
    run = ("accuracy", *TINY, "--shape", LOGITS, "--provider", "wrong")
    assert invoke(*run, "--op", "logits").exit_code == 0
    done = invoke(*run, "--op", "logprobs")
    assert done.exit_code == 1
    assert "log-probability off by" in done.stdout


def test_an_interrupted_accuracy_keeps_what_it_has(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(Eager):
        name = "interrupting"

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            raise KeyboardInterrupt

    monkeypatch.setitem(PROVIDERS, "interrupting", Interrupting)
    done = invoke(
        "accuracy", *TINY, "--shape", LOGITS, "--provider", "eager", "--provider", "interrupting", "--output", "a.json"
    )
    assert done.exit_code == 130
    rows = {row.provider: row for row in Result.read(Path("a.json")).rows}
    assert rows["eager"].status == "ok"
    assert rows["interrupting"].note == "interrupted before it was checked"


def test_memory_of_logits_against_tokens(invoke: Invoke) -> None:
    shape = "custom:V=20000"
    done = invoke(
        "memory", "--shape", shape, "--device", "cpu", "--tokens", "8", "--tokens", "32", *OURS_AND_EAGER,
        "--output", "m.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = files.read(Path("m.json"))
    assert isinstance(result, Result)
    rows = {(row.provider, row.case.tokens): row for row in result.memory}
    assert len(rows) == 4
    for (_, tokens), row in rows.items():
        assert row.gradient_bytes == tokens * 20000 * 2
        assert row.peak_extra_bytes is not None
        assert row.peak_extra_bytes >= row.gradient_bytes
    eager = {tokens: rows["eager", tokens].peak_extra_bytes for tokens in (8, 32)}
    assert eager[8] is not None and eager[32] is not None  # noqa: PT018
    assert 3.5 < eager[32] / eager[8] < 4.5  # float32 copies of the logits
    assert f"{(eager[32] or 0) / (1 << 20):.2f}" in done.stdout
    assert "Peak memory" in invoke("report", "m.json").output
    (sheet,) = memory_report.sheets(result)
    assert [cells[0] for cells, _ in sheet.rows] == ["8", "32"]


def test_memory_that_cannot_be_had_is_told(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo_fused.bench.trial.available_bytes", lambda: 50_000)
    run = ("memory", "--shape", LOGITS, "--device", "cpu", "--tokens", "512")
    done = invoke(*run, *OURS_AND_EAGER, "--output", "m.json")
    assert done.exit_code == 0
    assert {row.status for row in Result.read(Path("m.json")).memory} == {"out_of_memory"}
    assert "main memory" in done.stdout


def test_memory_of_a_failing_provider(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Eager):
        name = "broken"

        def forward(self, inputs: Inputs, logits: Tensor) -> Output:
            raise RuntimeError("no such luck")

    monkeypatch.setitem(PROVIDERS, "broken", Broken)
    run = ("memory", "--shape", LOGITS, "--device", "cpu", "--tokens", "8", "--provider", "broken")
    done = invoke(*run, "--provider", "eager", "--output", "m.json")
    assert done.exit_code == 1
    rows = {row.provider: row for row in Result.read(Path("m.json")).memory}
    assert (rows["broken"].status, rows["eager"].status) == ("failed", "ok")
    assert "no such luck" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["speed", "--op", "nothing"], "unknown op 'nothing'; expected one of logits, linear, logprobs"),
        (["speed", "--mode", "sideways"], "unknown mode 'sideways'"),
        (["speed", "--dtype", "bf16", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["speed", "--objective", "ppo"], "unknown objective 'ppo'"),
        (["speed", "--op", "linear", "--shape", "nothing"], "unknown shape 'nothing'"),
        (["speed", "--op", "logits", "--shape", HEAD], "unknown shape"),
        (["speed", "--provider", "nobody"], "unknown provider 'nobody'"),
        (["speed", "--op", "linear", "--ragged"], "--ragged is for logits"),
        (["speed", "--cuda-graph"], "--cuda-graph needs a GPU"),
        (["memory", "--op", "linear", "--shape", HEAD, "--chunk-mib", "0.00001"], "less than one row of logits"),
    ],
)
def test_bad_arguments_are_named(invoke: Invoke, arguments: list[str], text: str) -> None:
    done = invoke(*arguments, "--device", "cpu")
    assert done.exit_code == 2
    assert text in " ".join(done.output.replace("│", " ").split())


# ---------------------------------------------------------------------------------------------------------------
# CUDA graphs, without a GPU


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that capture needs: warm up on a side stream, restore the inputs, capture, and then replay only."""
    events: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            events.append("wait")

    @contextmanager
    def entered(name: str) -> Any:
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    fake = SimpleNamespace(
        Stream=Stream,
        current_stream=Stream,
        stream=lambda _: entered("side stream"),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: events.append("replay")),
        graph=lambda _: entered("capture"),
    )
    monkeypatch.setattr(measure.torch, "cuda", fake)
    task = measure.captured(measure.Task(lambda: events.append("run") or "result", lambda: events.append("before")))
    warm = ["before", "run"] * 3
    captured = ["before", "enter capture", "run", "leave capture"]
    assert events == ["wait", "enter side stream", *warm, "leave side stream", "wait", *captured]
    events.clear()
    task.before()
    assert task.run() == "result"
    assert events == ["before", "replay"]


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


def test_a_result_without_times_is_shown() -> None:
    """A result of each kind is shown without an error, whatever it lacks."""
    from rich.console import Console

    out = Console(width=80, record=True)
    show.show(evidence(), out)
    text = out.export_text()
    assert "No limit was measured" in text
    assert report.notes(Result({}, {})) is not None
    assert accuracy.table(Result({}, {})) is None
