"""The benchmark measures what it says: rounds, memory, files, and what a user sees."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich", reason="needs the bench extra")
pytest.importorskip("typer", reason="needs the bench extra")

from rich.console import Console

from hpo_fused.bench import accuracy, cli, measure, report
from hpo_fused.bench.cases import SHAPES, Case, Inputs, Shape, draw
from hpo_fused.bench.display import Display
from hpo_fused.bench.labels import number
from hpo_fused.bench.measure import Failure, Task, peak_extra_bytes, rounds
from hpo_fused.bench.providers import PROVIDERS, Output, Provider, Unavailable
from hpo_fused.bench.providers.plain import Eager
from hpo_fused.bench.results import ColumnErrors, Errors, Result, Row, median_ratio, quantiles, summarise
from hpo_fused.bench.sheet import NAME_WIDTH, folded

from .bench_helpers import step, tiny_case

CPU = torch.device("cpu")
TINY = ("--shape", "custom:V=300", "--tokens", "48", "--device", "cpu", "--repeats", "4")
EAGER_ONLY = ("--provider", "hpo_fused:torch", "--provider", "eager")
Invoke = Callable[..., Any]


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


@pytest.mark.parametrize("name", ["hpo_fused:torch", "eager"])
def test_peak_memory_of_the_gradient_holds_its_forward(invoke: Invoke, name: str) -> None:
    """Or who makes the gradient in its forward would need none, and who saves a copy for it less than it holds."""
    shape = ("--shape", "custom:V=4000", "--tokens", "512", "--repeats", "1", "--device", "cpu", "--provider", name)
    done = invoke("speed", *shape, "--mode", "gradient", "--mode", "both", "--output", "r.json")
    rows = {row.case.mode: row for row in Result.read(Path("r.json")).rows if row.provider == name}
    peaks = [rows[mode].peak_extra_bytes for mode in ("gradient", "both")]
    assert rows["gradient"].gradient_bytes == 512 * 4000 * 2
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)
    assert (peaks[0] or 0) > rows["gradient"].gradient_bytes
    assert "peak MiB of the gradient: with its forward" in done.stdout


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


LONG = "another_project:ItsOwnPolicyLoss"


def test_no_digit_is_cut_at_80_columns_whatever_the_names() -> None:
    """A long name is folded; of a number with its digits cut off nobody would know."""
    assert len(LONG) == 32
    case = Case(Shape("custom:V=151936,softcap=30", 151936, 30.0), 8, 128)
    columns = ColumnErrors(1.1e-3, 2.2e-3, 3.3e-3, 4.4e-3)
    errors = Errors(1.2e-10, 3.4e-11, columns, ColumnErrors(5.5e-3, 6.6e-3, 7.7e-3, 8.8e-3))
    rows = [
        Row(case, LONG, samples_s=[104.76, 104.98, 105.03], errors=errors, peak_extra_bytes=123456 << 20),
        Row(case, LONG.upper(), status="out_of_memory"),
        Row(case, "hpo_fused", samples_s=[0.1] * 3, errors=errors, repeats=True),
        Row(case, "copy", samples_s=[0.05] * 3),
    ]
    summarise(rows, "hpo_fused")
    result = Result({}, {}, rows=rows)
    stream = StringIO()
    errors_table = accuracy.table(result)
    assert errors_table is not None
    for view in (report.table(result), errors_table):
        Console(file=stream, width=80).print(view)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    words = text.split()
    cells = report._cells(rows[0])
    for cell in cells:
        assert cell in words
    assert cells[:3] == ["104980", "104848–105010", "1050×"]
    for line in accuracy._lines(rows[0]):
        assert {cell for cell in line if cell} <= set(words)
    for line in folded(LONG, NAME_WIDTH).split("\n"):
        assert line in words
        assert line.upper() in words


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("hpo_fused", ["hpo_fused"]),
        ("hpo_fused:torch", ["hpo_", "fused:", "torch"]),
        ("out of memory", ["out of", "memory"]),
        ("linear_cross_entropy", ["linear_", "cross_", "entropy"]),
        ("abcdefghijklmnopqrst", ["abcdefghijkl", "mnopqrst"]),
        ("", [""]),
    ],
)
def test_names_are_folded_where_they_are_composed(text: str, lines: list[str]) -> None:
    assert folded(text, 9, 12).split("\n") == lines
    assert folded(text, 40) == text


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
