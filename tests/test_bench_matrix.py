"""Every operation, objective, dtype, shape, share of inactive rows and mode is measured as itself, and told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="needs the bench extra")
pytest.importorskip("typer", reason="needs the bench extra")

from hpo_fused.bench import (
    accuracy,
    files,
    memory,
    memory_report,
    report,
    run,
    show,
    trial,
)
from hpo_fused.bench.cases import Case, Inputs, Shape, draw
from hpo_fused.bench.evidence import Evidence
from hpo_fused.bench.evidence import Tests as Outcome
from hpo_fused.bench.labels import labels
from hpo_fused.bench.linear import memory as linear_memory
from hpo_fused.bench.linear import providers as of_heads
from hpo_fused.bench.linear import run as linear_run
from hpo_fused.bench.linear.cases import HeadShape, LinearCase
from hpo_fused.bench.linear.providers.gemms import Gemms
from hpo_fused.bench.linear.results import LinearResult, LinearRow
from hpo_fused.bench.matrix import Axes, Contestants, measure_peaks, new_evidence
from hpo_fused.bench.matrix import measure as measure_all
from hpo_fused.bench.providers import PROVIDERS, Output
from hpo_fused.bench.providers.plain import Eager
from hpo_fused.bench.results import COPY, MemoryRow, Result, Row, first_of_ours, summarise
from hpo_fused.bench.trial import Settings

from .bench_helpers import tiny_case

CPU = torch.device("cpu")
MACHINE = {"cpu": "x", "threads": 1, "torch": "2", "python": "3", "hpo_fused": "0"}
LOGITS, HEAD = "custom:V=97", "custom:H=16,V=97"
TINY = ("--tokens", "24", "--device", "cpu")
OURS_AND_EAGER = ("--provider", "hpo_fused:torch", "--provider", "eager")
Invoke = Callable[..., Any]


class Silent:
    """Progress that nobody looks at."""

    def stage(self, text: str, *, timing: bool = False) -> None:
        pass

    def advance(self, cases: float) -> None:
        pass


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


@pytest.mark.parametrize(
    ("changes", "read", "written"),
    [
        ({}, 8, 8),
        ({"inactive": 0.5}, 4, 8),
        ({"inactive": 0.3}, 6, 8),  # 2 of 8 responses
        ({"inactive": 1.0}, 0, 8),
        ({"inactive": 0.5, "mode": "forward"}, 4, 0),
        ({"inactive": 0.5, "op": "logprobs"}, 8, 8),  # who asked for them does not say why
    ],
)
def test_the_traffic_that_nobody_can_avoid(changes: dict[str, Any], read: int, written: int) -> None:
    """Rows without advantage are written, zeros, but need not be read."""
    case = tiny_case(**changes)
    assert case.least_bytes == (read + written) * 5 * 97 * 4
    drawn = draw(case, CPU, 0)
    if case.op == "logits":
        assert int((drawn.advantages != 0).sum()) == read
    assert replace(case, ragged=True).least_bytes is None
    rows = [Row(case, COPY, samples_s=[1.0, 1.0]), Row(case, "eager", samples_s=[1.0, 1.0])]
    summarise(rows, None)
    assert rows[1].share_of_copy == (read + written) / 16
    text = " ".join(report.notes(Result(MACHINE, {}, rows=rows)))
    assert ("have an advantage" in text) is (case.inactive > 0 and case.op == "logits")


def timed(case: Case, seconds: dict[str, float]) -> list[Row]:
    """Rows of one case with these times."""
    rows = [Row(case, name, samples_s=[value] * 2) for name, value in seconds.items()]
    summarise(rows, first_of_ours(rows))
    return rows


def test_the_verdict_speaks_of_whole_steps() -> None:
    """Not of one number over a forward, a backward and steps with rows left out."""
    case = tiny_case()
    steps = timed(case, {"hpo_fused": 1.0, "eager": 2.0, COPY: 0.5})
    others = [
        *timed(replace(case, mode="forward"), {"hpo_fused": 1.0, "eager": 9.0, COPY: 0.5}),
        *timed(replace(case, inactive=0.5), {"hpo_fused": 1.0, "eager": 8.0, COPY: 0.5}),
        *timed(replace(case, op="logprobs"), {"hpo_fused": 1.0, "eager": 7.0, COPY: 0.5}),
    ]

    def said(rows: list[Row]) -> str:
        return report.verdict(Result(MACHINE, {}, rows=rows))

    assert said([*others, *steps]) == "hpo_fused: 2.00× the speed of eager, 50% of a bare copy's."
    assert said(others[:3]) == "hpo_fused: 9.00× the speed of eager, 25% of a bare copy's."
    assert said(timed(replace(case, mode="gradient"), {"hpo_fused": 1.0, "eager": 3.0})) == (
        "hpo_fused: 3.00× the speed of eager."
    )
    assert said(timed(replace(case, mode="gradient"), {"hpo_fused": 1.0})) == "hpo_fused: timed alone."
    assert said(others).startswith("No verdict: several kinds")
    assert said(timed(case, {"eager": 1.0})) == "No verdict: hpo_fused was not timed."
    assert said([]) == "No verdict: hpo_fused was not timed."


def test_ours_is_the_first_that_was_timed() -> None:
    case = tiny_case()
    rows = [
        Row(case, "hpo_fused:triton", status="skipped", ours=True),
        Row(case, "hpo_fused:torch", samples_s=[1.0], ours=True),
        Row(case, "eager", samples_s=[3.0]),
    ]
    assert first_of_ours(rows) == "hpo_fused:torch"
    assert first_of_ours(rows[:1]) == "hpo_fused:triton"
    assert first_of_ours(rows[2:]) is None
    assert first_of_ours([replace(rows[1], status="failed"), replace(rows[1], provider="mine")]) == "mine"


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_others_are_compared_with_ours_that_was_timed(invoke: Invoke, op: str) -> None:
    """On a CPU the kernels are skipped: they are nothing to compare with."""
    run = ("speed", "--op", op, "--shape", HEAD if op == "linear" else LOGITS, *TINY, "--repeats", "2")
    who = ("--provider", "hpo_fused:triton", "--provider", "hpo_fused:torch", "--provider", "eager")
    done = invoke(*run, *who, "--output", "r.json")
    assert done.exit_code == 0, done.output
    result = files.read(Path("r.json"))
    rows = {row.provider: row for row in result.measurements}
    assert (rows["hpo_fused:triton"].status, rows["hpo_fused:torch"].ratio_to_ours) == ("skipped", 1.0)
    assert rows["eager"].ratio_to_ours is not None


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        ({"provider": "hpo_fused"}, True),  # of a file from before the field
        ({"provider": "hpo_fused:triton"}, True),
        ({"provider": "hpo_fused_fork:Loss"}, False),
        ({"provider": "mine:Loss", "ours": True}, True),
    ],
)
def test_whose_a_row_is(row: dict[str, Any], ours: bool) -> None:
    assert Row(tiny_case(), **row).is_ours is ours


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_a_row_tells_what_ran_and_what_it_leaves_out(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Said once for each provider, below the tables, if it was timed."""
    changes: dict[str, Any] = {
        "name": "lesser", "ours": True, "leaves_out": "entropy",
        "available": lambda self, device: f"lesser 1.0 on {device}",
    }  # fmt: skip
    makers = {"logits": (PROVIDERS, Eager), "linear": (of_heads.PROVIDERS, of_heads.PROVIDERS["eager"]().__class__)}
    known, base = makers[op]
    monkeypatch.setitem(known, "lesser", type("Lesser", (base,), changes))  # type: ignore[arg-type]
    shape = HEAD if op == "linear" else LOGITS
    run = ("speed", "--op", op, "--shape", shape, *TINY, "--repeats", "1", "--inactive", "0", "--inactive", "0.5")
    done = invoke(*run, "--provider", "lesser", "--provider", "eager", "--output", "r.json")
    rows = [row for row in files.read(Path("r.json")).measurements if row.provider == "lesser"]
    assert {(row.ours, row.version, row.leaves_out) for row in rows} == {(True, "lesser 1.0 on cpu", "entropy")}
    assert done.stdout.count("lesser leaves out: entropy") == 1
    assert "eager leaves out" not in done.stdout
    assert "lesser leaves out: entropy" in invoke("report", "r.json").output


def test_a_gpu_gets_its_memory_back_before_the_next_case(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(trial.gc, "collect", lambda: events.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))
    trial.release(CPU)
    assert events == []
    trial.release(torch.device("cuda"))
    assert events == ["collect", "empty"]
    events.clear()
    for module in (run, linear_run, memory, linear_memory):
        monkeypatch.setattr(module, "release", lambda device: events.append(str(device)))
    options = {"shapes": [LOGITS, HEAD], "dtypes": ["fp32"], "objectives": ["grpo"], "inactive": [0.0]}
    every = axes(**options)
    who = Contestants.of(["eager", "gemms"], every.operations, "cpu")
    into = new_evidence("speed", CPU)
    measure_all(every, who, Settings(CPU, 0, 0.0), into, Silent())
    assert len(events) == 2 * 3  # cases: two modes of each operation
    (gemms,) = (provider for provider in who.linear if isinstance(provider, Gemms))
    assert (gemms.buffers, gemms.active) == ({}, {})
    events.clear()
    measure_peaks(every, who, Settings(CPU, 0, 0.0), [8], new_evidence("memory", CPU), Silent(), quick=True)
    assert len(events) == 2 * 3


def test_progress_tells_cases_of_a_matrix_apart(invoke: Invoke) -> None:
    """A line for each stage of each case, where standard error is no terminal."""
    options = [part for op in ("logits", "linear", "logprobs") for part in ("--op", op)]
    options += [part for mode in ("forward", "both") for part in ("--mode", mode)]
    shapes = ("--shape", LOGITS, "--shape", HEAD, "--dtype", "bf16", "--dtype", "fp32")
    done = invoke("speed", *TINY, *options, *shapes, "--repeats", "1", "--provider", "eager")
    lines = [line for line in done.stderr.splitlines() if line.endswith(": timing")]
    assert len(lines) == len(set(lines)) == 3 * 2 * 2
    assert f"{LOGITS} logprobs bf16 forward: timing" in lines
    assert f"{HEAD} linear fp32 both: timing" in lines
    done = invoke("speed", *TINY, "--shape", LOGITS, "--repeats", "1", "--provider", "eager")
    assert f"{LOGITS}: timing" in done.stderr.splitlines()
    peaks = ("--tokens", "8", "--device", "cpu", "--shape", HEAD, "--op", "linear", "--quick")
    done = invoke("memory", *peaks, "--dtype", "bf16", "--dtype", "fp32", "--provider", "eager")
    assert f"{HEAD} fp32: memory, eager at 8 tokens" in done.stderr.splitlines()


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


def test_a_result_without_times_is_shown() -> None:
    """A result of each kind is shown without an error, whatever it lacks."""
    from rich.console import Console

    out = Console(width=80, record=True)
    show.show(evidence(), out)
    text = out.export_text()
    assert "No limit was measured" in text
    assert list(report.notes(Result({}, {}))) == []
    assert accuracy.table(Result({}, {})) is None


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


def test_accuracy_judges_every_dtype_and_times_nothing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    # Under the interpreter, which truncates bfloat16 instead of rounding, others' kernels would rightly be found wrong.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
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


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_memory_of_a_wrong_provider_is_not_told(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """It is checked at the smallest size, and then measured at none."""
    calls: list[int] = []

    def wrong(self: Any, inputs: Any, *rest: Any) -> Output:
        calls.append(inputs.case.tokens)
        found: Output = base.forward(self, inputs, *rest)
        assert found.loss is not None
        return found._replace(loss=1.01 * found.loss)

    known: dict[str, Any] = of_heads.PROVIDERS if op == "linear" else PROVIDERS  # type: ignore[assignment]
    base = type(known["eager"]())
    monkeypatch.setitem(known, "wrong", type("Wrong", (base,), {"name": "wrong", "forward": wrong}))
    run = ("memory", "--op", op, "--shape", HEAD if op == "linear" else LOGITS, "--device", "cpu")
    who = ("--provider", "wrong", "--provider", "eager")
    done = invoke(*run, "--tokens", "32", "--tokens", "16", *who, "--output", "m.json")
    assert done.exit_code == 1
    assert calls == [16]
    result = files.read(Path("m.json"))
    assert isinstance(result, Result | LinearResult)
    rows = {(row.provider, row.case.tokens): row for row in result.memory}
    for tokens in (16, 32):
        row = rows["wrong", tokens]
        assert (row.status, row.peak_extra_bytes) == ("wrong", None)
        assert "off by" in row.note
        assert rows["eager", tokens].status == "ok"
    assert "off by" in done.stdout


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
