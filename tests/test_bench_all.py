"""The whole evidence in one command: what fits a budget, what the report answers, pictures, interruptions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the bench extra")
typer = pytest.importorskip("typer", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")


from hpo_fused.bench import all_command, all_units, limits  # noqa: E402
from hpo_fused.bench.budget import Budget, Spent, Unit  # noqa: E402
from hpo_fused.bench.cases import SHAPES, Case  # noqa: E402
from hpo_fused.bench.commands import app  # noqa: E402
from hpo_fused.bench.evidence import Evidence  # noqa: E402
from hpo_fused.bench.evidence import Tests as Outcome  # noqa: E402
from hpo_fused.bench.linear import limits as linear_limits  # noqa: E402
from hpo_fused.bench.linear.cases import HEADS, LinearCase  # noqa: E402
from hpo_fused.bench.linear.limits import Limit  # noqa: E402
from hpo_fused.bench.linear.results import LinearResult  # noqa: E402
from hpo_fused.bench.providers.plain import Eager  # noqa: E402
from hpo_fused.bench.results import (  # noqa: E402
    COPY,
    MemoryRow,
    Prediction,
)

from .bench_helpers import Silent, timed  # noqa: E402

CPU = torch.device("cpu")
TINY = (
    "--shape", "custom:V=300", "--shape", "custom:H=48,V=300", "--tokens", "64", "--device", "cpu",
    "--provider", "hpo_fused:torch", "--provider", "eager", "--provider", "gemms",
)  # fmt: skip
ALONE = ("--no-tests", "--no-kernels")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command line in a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    return invoke


# ---------------------------------------------------------------------------------------------------------------
# the budget


class Machine:
    """A clock that only its units move, ``slower`` times as much as they should take."""

    def __init__(self, slower: float = 1.0) -> None:
        self.now, self.slower = 100.0, slower
        self.done: list[tuple[str, int]] = []

    def unit(
        self, name: str, priority: int = 1, fixed: float = 0.0, once: float = 0.0, kind: str = "logits",
        slower: float | None = None,
    ) -> Unit:  # fmt: skip
        factor = slower or self.slower

        def run(seconds: float, least: int) -> Spent:
            self.now += fixed * factor
            begun, rounds = self.now, 0
            while once and (rounds < least or self.now < begun + seconds):
                self.now += once * factor
                rounds += 1
            self.done.append((name, rounds))
            return Spent(rounds, self.now - begun)

        return Unit(name, kind, priority, fixed, run, once)

    def spend(self, seconds: float, *units: Unit, reserve: float = 0.0) -> tuple[Budget, float]:
        """The budget afterwards, and the seconds that it took."""
        begun = self.now
        budget = Budget(seconds, reserve, clock=lambda: self.now)
        budget.run(units)
        return budget, self.now - begun

    def names(self) -> list[str]:
        return [name for name, _ in self.done]


def test_what_is_left_goes_to_rounds() -> None:
    machine = Machine()
    budget, took = machine.spend(
        100, machine.unit("a", 0, 10, 2), machine.unit("tests", fixed=20), machine.unit("b", 2, 5, 1), reserve=10
    )
    assert machine.names() == ["a", "tests", "b"]
    assert took == pytest.approx(90, abs=2)
    rounds = dict(machine.done)
    assert abs(rounds["a"] - rounds["b"]) <= 2
    assert rounds["a"] > 10
    assert budget.notes() == []


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_costs_are_learnt_from_what_is_done(slower: float) -> None:
    machine = Machine(slower)
    units = [machine.unit(f"u{index}", index, 4, 0.5) for index in range(6)]
    budget, took = machine.spend(100, *units)
    assert took == pytest.approx(100, rel=0.1)
    assert machine.names() == [f"u{index}" for index in range(6)]
    assert budget.left_out == []


def test_one_kind_tells_nothing_of_another_that_was_seen() -> None:
    machine = Machine()
    heavy = [machine.unit(f"h{index}", 1, 1, 0.1, kind="linear", slower=10) for index in range(2)]
    light = [machine.unit(f"l{index}", 1, 1, 0.1) for index in range(2)]
    _, took = machine.spend(60, light[0], heavy[0], light[1], heavy[1])
    assert took == pytest.approx(60, rel=0.1)
    assert sorted(machine.names()) == ["h0", "h1", "l0", "l1"]


def test_rounds_shrink_before_work_is_left_out() -> None:
    machine = Machine()
    units = [machine.unit(name, index, 5, 5) for index, name in enumerate("abcd")]
    budget, took = machine.spend(42, *units)
    assert machine.done == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]
    assert took == 40
    assert budget.notes() == ["a; b; c; d: 1 round only, to fit the budget"]


def test_the_least_important_is_left_out_wherever_it_stands() -> None:
    machine = Machine()
    units = [machine.unit(name, priority, 10) for name, priority in (("a", 0), ("z", 9), ("y", 8), ("b", 1), ("c", 2))]
    budget, took = machine.spend(35, *units)
    assert machine.names() == ["a", "b", "c"]
    assert took == 30
    assert budget.notes() == [
        "z: left out, as its about 10 s did not fit the budget",
        "y: left out, as its about 10 s did not fit the budget",
    ]


def test_the_most_important_is_done_whatever_the_budget_and_told() -> None:
    machine = Machine()
    budget, took = machine.spend(5, machine.unit("a", 0, 10, 2), machine.unit("b", 1, 1), machine.unit("c", 0, 3, 1))
    assert machine.names() == ["a", "c"]
    assert took == 16
    first, *rest = budget.notes()
    assert first == "budget: 5 s are less than what is measured in any case takes here, about 16 s; so it took longer"
    assert rest[0].startswith("b: left out")


def test_an_interruption_leaves_what_was_not_done() -> None:
    machine = Machine()

    def interrupt(seconds: float, least: int) -> Spent:
        raise KeyboardInterrupt

    budget = Budget(100, clock=lambda: machine.now)
    with pytest.raises(KeyboardInterrupt):
        budget.run([machine.unit("a", 0, 1), Unit("b", "logits", 0, 1, interrupt), machine.unit("c")])
    assert machine.names() == ["a"]
    assert budget.at_work is not None
    assert budget.at_work.name == "b"
    assert [unit.name for unit, _ in budget.left_out] == ["c"]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (["qwen3"], ["logits of qwen3"]),
        (["qwen3-0.6b"], ["linear path of qwen3-0.6b, 64 tokens"]),
        (["gpt2"], ["logits of gpt2", "linear path of gpt2, 64 tokens"]),
    ],
)
def test_the_command_line_narrows(shapes: list[str], expected: list[str]) -> None:
    choice = all_command._choice(CPU, shapes, ["hpo_fused", "eager"], 64, tests=False, kernels=False)
    units = all_units.Work(choice, CPU, 0, Evidence({}, {}), Silent(), 480.0).units()
    assert [unit.name for unit in units if unit.priority in (0, 1, 2, 5)] == expected
    assert all(any(name in unit.name for name in shapes) for unit in units)


def planned(device: str, monkeypatch: pytest.MonkeyPatch, providers: Sequence[str] = ()) -> tuple[list[Unit], Evidence]:
    """The units of the defaults on such a device, as if it were there and everybody ran on it."""
    monkeypatch.setattr(all_units, "_available", lambda providers, device: list(providers))
    where = torch.device(device)
    who = all_units.Contestants.of(providers, ["logits", "linear"], device)
    choice = all_units.Choice.of(where, who, None, None, None, tests=True, kernels=True)
    evidence = Evidence({}, {})
    return all_units.Work(choice, where, 0, evidence, Silent(), 480.0).units(), evidence


# Of the default budget, what everything should take with one round, with room for what the estimates do not know. On a
# CPU, where all of these never run, the last units are for a longer budget.
PLANNED = {"cpu": 2.5, "cuda": 1.0}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_units_of_a_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the defaults promise: every family, both paths, inactive rows, modes, memory, tests, machine code."""
    units, evidence = planned(device, monkeypatch)
    names = [unit.name for unit in units]
    for family in ("qwen3", "llama3", "gemma"):
        assert any(name.startswith(f"logits of {family}") for name in names), family
        assert any(name.startswith(f"linear path of {family}") for name in names), family
    for other in ("qwen3 75%", "qwen3 forward", "qwen3 log p", "qwen3 log p forward"):
        assert f"logits of {other}" in names
    assert "equivalence tests" in names
    assert sum("memory against tokens" in name for name in names) == 2
    assert {name for name in names if name.startswith("machine code")} == {
        "machine code for sm_90, gfx942", "machine code for sm_80, sm_100, sm_120, gfx950",
    }  # fmt: skip
    assert ("linear path of qwen2.5-0.5b, 1024 tokens" in names) is (device == "cpu")
    assert [unit.name for unit in units if unit.priority == 0] == names[:2]
    rounds = [unit.round for unit in units[2:] if unit.round]
    assert rounds == sorted(rounds, reverse=True)
    assert all(unit.fixed > 0 for unit in units)
    # What the default budget is made for, before the machine is known.
    assert sum(unit.fixed + unit.round for unit in units) < PLANNED[device] * all_command.BUDGET
    slow = [line for line in evidence.dropped if line.startswith("compile: left out of memory against tokens, ")]
    assert len(slow) == len(evidence.dropped) == (device == "cpu")
    assert all("accuracy in fp32, qwen3, logits of qwen3 75%" in line for line in slow)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_case_is_run_by_those_who_have_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[tuple[str, str], list[str]] = {}

    def record(case: Case, providers: Sequence[Any], *_: Any) -> None:
        ran[case.op, case.mode] = [one.name for one in providers]

    monkeypatch.setattr(all_units, "run_case", record)
    monkeypatch.setattr(all_units, "nvidia_name", lambda device: "GPU-1")
    monkeypatch.setattr(all_units, "nvidia_clocks", lambda gpu: None)
    units, _ = planned(device, monkeypatch)
    for unit in units:
        if unit.kind == "logits":
            unit.run(0.0, 1)
    assert list(ran) == [("logits", "both"), *list(ran)[1:]]
    assert set(ran) == {("logits", "both"), ("logits", "forward"), ("logprobs", "both"), ("logprobs", "forward")}
    for (op, _), names in ran.items():
        assert ("liger:logprobs" in names) is (op == "logprobs")
        assert ("liger:triton" in names) is (op == "logits")
        assert {"hpo_fused", "eager"} <= set(names)
    # Who was named is not left out, but told to be skipped.
    units, _ = planned(device, monkeypatch, ["eager", "liger:logprobs"])
    next(unit for unit in units if unit.kind == "logits").run(0.0, 1)
    assert ran["logits", "both"] == ["eager", "liger:logprobs"]


# ---------------------------------------------------------------------------------------------------------------
# end to end


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that ``all`` wrote on a tiny shape, and its outcome."""
    folder = tmp_path_factory.mktemp("all") / "deep" / "evidence"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        done = testing.CliRunner().invoke(app, ["all", "--budget", "12", "--output", str(folder), *TINY, *ALONE])
    return folder, done


def test_files_and_exit_status(made: tuple[Path, Any]) -> None:
    folder, done = made
    assert done.exit_code == 0, done.output
    names = {path.name for path in folder.iterdir()}
    assert {"result.json", "report.md"} <= names
    content = json.loads((folder / "result.json").read_text())
    assert content["schema_version"] == 2
    assert content["command"] == "all"
    assert {"created", "torch", "python", "commit", "cpu", "device", "hpo_fused"} <= content["environment"].keys()
    assert content["settings"]["pictures"]
    for name in content["settings"]["pictures"]:
        assert (folder / name).read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert names == {"result.json", "report.md", *content["settings"]["pictures"]}
    assert content["tests"]["note"] == "not asked for"
    assert content["settings"]["kernels"] is False


def test_rounds_fill_the_budget(made: tuple[Path, Any]) -> None:
    """At least most of it. (Above it stands how busy the machine is.)"""
    evidence = Evidence.read(made[0] / "result.json")
    assert evidence.settings["seconds"] > 0.8 * 12
    done = {row.provider for row in evidence.measurements if len(row.samples_s) >= 1}
    assert {"hpo_fused:torch", "eager", COPY, "gemms"} <= done


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_it_takes_its_budget(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    """Start, units and pictures together, on a clock that only these move; what is told is all of it."""
    machine = Machine(slower)
    units = [machine.unit(f"u{index}", index, 10, 0.5) for index in range(5)]
    monkeypatch.setattr(all_command, "clock", lambda: machine.now)
    monkeypatch.setattr(all_units.Work, "units", lambda self: units)

    def draw(evidence: Evidence, folder: Path) -> Iterator[str]:
        machine.now += 12.0
        yield "a.svg"

    monkeypatch.setattr(all_command, "_draw", draw)
    device_of = all_command.device_of

    def slow_start(name: str) -> torch.device:
        machine.now += 60.0
        return device_of(name)

    monkeypatch.setattr(all_command, "device_of", slow_start)
    begun = machine.now
    done = invoke("all", "--budget", "300", "--output", "d", *TINY, *ALONE)
    assert done.exit_code == 0, done.output
    evidence = Evidence.read(Path("d/result.json"))
    assert evidence.settings["seconds"] == machine.now - begun == pytest.approx(300, rel=0.1)
    assert evidence.settings["pictures"] == ["a.svg"]


def test_the_terminal_ends_with_the_short_table(made: tuple[Path, Any]) -> None:
    lines = [line for line in made[1].stdout.rstrip().splitlines() if not line.startswith("Wrote ")]
    assert max(map(len, lines)) <= 80
    head = next(index for index, line in enumerate(lines) if "÷ ours" in line and "off by" in line)
    tail = "\n".join(lines[head:])
    assert "custom:V=300 logits" in tail
    assert "linear N=64" in tail
    assert tail.count("hpo_fused:torch") == 2
    assert tail.count("eager") == 2


def test_the_report_answers_the_questions(made: tuple[Path, Any]) -> None:
    text = (made[0] / "report.md").read_text(encoding="utf-8")
    for question in (
        "How much faster?", "How much smaller?", "How accurate?", "How far from the hardware's limit?",
        "Machine code for GPUs?", "Tests?", "What was left out?", "Where, and how again?",
    ):  # fmt: skip
        assert f"\n## {question}\n" in text, question
    answers = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert "| time ÷ ours | memory ÷ ours | log p off by | gradient off by | % of limit |" in text.split("\n## ")[0]
    assert "![time](time.svg)" in answers["How much faster?"]
    assert "![linear-custom-H-48-V-300-64]" in answers["How much faster?"]
    assert "**hpo_fused:torch**" in answers["How much faster?"]
    assert "![memory](memory.svg)" in answers["How much smaller?"]
    assert "peak MiB" in answers["How much smaller?"]
    assert "![accuracy](accuracy.svg)" in answers["How accurate?"]
    assert "dhidden" in answers["How accurate?"]
    assert "three bare GEMMs of the active rows" in answers["How far from the hardware's limit?"]
    assert "a copy of the logits" in answers["How far from the hardware's limit?"]
    assert "not asked for" in answers["Tests?"]
    again = answers["Where, and how again?"]
    assert "hpo-fused-bench all --budget=12 " in again
    assert " --device=cpu " in again
    assert answers["Machine code for GPUs?"].strip() == "- Not asked for."
    assert "'--shape=custom:H=48,V=300'" in again or "--shape=custom:H=48,V=300" in again
    tables = _tables(text)
    assert len(tables) >= 7
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def _tables(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_report_prints_the_same(made: tuple[Path, Any], invoke: Invoke) -> None:
    done = invoke("report", str(made[0] / "result.json"))
    assert done.exit_code == 0, done.output
    assert done.stdout == (made[0] / "report.md").read_text(encoding="utf-8")


def test_plot_writes_a_picture_for_each_part(made: tuple[Path, Any], invoke: Invoke) -> None:
    done = invoke("plot", str(made[0] / "result.json"), "--output", "deep/p.svg")
    assert done.exit_code == 0, done.output
    names = ["p-linear-custom-H-48-V-300-64.svg", "p-logits.svg"]
    assert sorted(path.name for path in Path("deep").iterdir()) == names
    text = Path("deep/p-logits.svg").read_text(encoding="utf-8")
    for word in ("Time ÷ the time to copy", "Peak memory beyond", "Error against float64", "hpo_fused:torch", "eager"):
        assert f"<!-- {word}" in text, word


def test_plot_of_one_part_is_that_file(made: tuple[Path, Any], invoke: Invoke) -> None:
    evidence = Evidence.read(made[0] / "result.json")
    assert evidence.logits is not None
    evidence.logits.write(Path("one.json"))
    assert invoke("plot", "one.json", "--output", "one.png").exit_code == 0
    assert [path.name for path in Path().glob("*.png")] == ["one.png"]
    dataclasses.replace(evidence.logits, rows=[]).write(Path("none.json"))
    done = invoke("plot", "none.json", "--output", "none.png")
    assert done.exit_code == 2
    assert "neither times nor memory nor errors" in done.output
    assert not Path("none.png").exists()


def test_a_budget_too_small_is_told(invoke: Invoke) -> None:
    done = invoke("all", "--budget", "1", "--output", "d", *TINY)
    assert done.exit_code == 0, done.output
    evidence = Evidence.read(Path("d/result.json"))
    told = "\n".join(evidence.dropped)
    assert "equivalence tests: left out" in told
    assert "machine code for sm_90, gfx942: left out" in told
    assert "gemms: no provider of logits" in told
    text = Path("d/report.md").read_text(encoding="utf-8")
    assert all(line in text for line in evidence.dropped)
    assert evidence.logits is not None
    assert [row.status for row in evidence.logits.rows][:2] == ["ok", "ok"]  # measured all the same
    assert evidence.linear[0].rows[0].samples_s


@pytest.mark.parametrize("from_call", [0, 6])
def test_ctrl_c_keeps_what_is_finished(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, from_call: int) -> None:
    calls = iter(range(1000))
    forward = Eager.forward

    def interrupt(self: Eager, *arguments: Any) -> Any:
        if next(calls) >= from_call:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(Eager, "forward", interrupt)
    done = invoke("all", "--budget", "5", "--output", "d", *TINY, *ALONE)
    assert done.exit_code == 130, done.output
    evidence = Evidence.read(Path("d/result.json"))
    assert evidence.interrupted
    assert evidence.logits is not None
    samples = {row.provider: len(row.samples_s) for row in evidence.logits.rows}
    assert (samples["hpo_fused:torch"] > 0) is (from_call > 0)
    told = "\n".join(evidence.dropped)
    assert "logits of custom:V=300: interrupted" in evidence.dropped
    assert "linear path of custom:H=48,V=300, 64 tokens: not reached before the interruption" in told
    assert evidence.logits.interrupted
    # A head without a row says nothing.
    assert ("off by" in done.stdout) is (from_call > 0)
    text = Path("d/report.md").read_text(encoding="utf-8")
    assert "- Interrupted: parts are missing." in text


@pytest.mark.parametrize(
    ("stop", "name", "parts"),
    [
        ("run_linear", "linear path of custom:H=48,V=300, 64 tokens", [False, True]),
        ("logits_memory", "memory against tokens, logits of custom:V=300", [True, False]),
        ("run_tests", "equivalence tests", [False, False]),
    ],
)
def test_the_part_at_work_was_interrupted(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, stop: str, name: str, parts: list[bool]
) -> None:
    def interrupt(*_: Any, into: Outcome | None = None, **__: Any) -> Any:
        if into is not None:
            into.passed, into.note = 2, "interrupted after 2 of 9 tests"
        raise KeyboardInterrupt

    monkeypatch.setattr(all_units, stop, interrupt)
    # Enough for every unit on a busy machine; the suite, which takes a share of any budget, only where it is stopped.
    budget = ("--budget", "100") if stop == "run_tests" else ("--budget", "600", "--no-tests")
    done = invoke("all", *budget, "--output", "d", *TINY, "--no-kernels")
    assert done.exit_code == 130, done.output
    evidence = Evidence.read(Path("d/result.json"))
    assert evidence.interrupted
    assert f"{name}: interrupted" in evidence.dropped
    assert [line for line in evidence.dropped if line.startswith(f"{name}: not reached")] == []
    assert [part.interrupted for part in evidence.parts] == parts
    assert evidence.tests is not None
    assert stop != "run_tests" or evidence.tests.note == "interrupted after 2 of 9 tests"
    if stop == "run_tests":
        assert "2 passed, 0 failed, 0 skipped in 0 s (interrupted after 2 of 9 tests)" in " ".join(done.stdout.split())


def test_without_being_told_the_last_part_is_at_work() -> None:
    evidence = Evidence.of_parts([timed(), timed()], environment={}, settings={})
    evidence.interrupt()
    assert [part.interrupted for part in evidence.parts] == [True]


def test_a_wrong_result_fails(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Eager.forward

    def wrong(self: Eager, *arguments: Any) -> Any:
        out = forward(self, *arguments)
        return out._replace(loss=out.loss * 1.01)

    monkeypatch.setattr(Eager, "forward", wrong)
    done = invoke("all", "--budget", "2", "--output", "d", *TINY[:2], *TINY[4:-2], *ALONE)
    assert done.exit_code == 1, done.output
    assert "eager wrong" in done.stdout


def test_failed_tests_and_missed_limits_decide_the_exit_status(
    made: tuple[Path, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def status(evidence: Evidence, check: bool) -> int:
        try:
            all_command._finish(evidence, tmp_path, check)
        except typer.Exit as end:
            return int(end.exit_code)
        return 0

    evidence = Evidence.read(made[0] / "result.json")
    (head,) = evidence.linear
    assert status(evidence, check=False) == 0
    assert status(evidence, check=True) == 1  # one size of a fixed chunk budget tells nothing of growth
    assert "--check: not measured: " in capsys.readouterr().out
    whole = head.memory
    head.memory = [row for row in whole if row.series != "budget"]
    assert status(evidence, check=True) == 0
    head.memory = [row for row in whole if row.status == "predicted"]
    assert head.memory
    assert status(evidence, check=True) == 1
    assert "--check: no limit was measured (0 met, 2 predicted)" in " ".join(capsys.readouterr().out.split())
    evidence.linear = []
    assert status(evidence, check=True) == 1
    assert "--check: no limit is stated for what was measured" in " ".join(capsys.readouterr().out.split())
    evidence.tests = Outcome(passed=3, failed=1, failures=["test_x"])
    assert status(evidence, check=False) == 1
    evidence.tests = Outcome(passed=3)
    assert evidence.logits is not None
    for ratio, expected in ((4.5, 0), (3.5, 1)):
        evidence.logits = timed(eager=ratio)
        assert status(evidence, check=True) == expected
        assert status(evidence, check=False) == 0
    evidence.kernels = {"broken": ["sm_90 x: spills"], "records": [], "unavailable": {}, "beyond": []}
    evidence.logits = timed()
    capsys.readouterr()
    assert status(evidence, check=True) == 1
    assert "--check: machine code: 1 limits broken." in capsys.readouterr().out


def test_unknown_names_and_unwritable_folders(invoke: Invoke) -> None:
    for arguments, word in (
        (("--shape", "nope"), "unknown shape"),
        (("--provider", "nope"), "unknown provider"),
        (("--device", "tpu"), "tpu"),
    ):
        done = invoke("all", "--output", "d", *arguments)
        assert done.exit_code == 2
        assert word in " ".join(done.output.replace("│", " ").split())
    Path("file").write_text("")
    assert invoke("all", "--output", "file").exit_code == 2
    assert invoke("all").exit_code == 2


# ---------------------------------------------------------------------------------------------------------------
# limits


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"eager": 3.9}, ["eager's time ÷ ours"]),
        ({"compile_": 1.4}, ["compile's time ÷ ours"]),
        ({"extra": 65 << 20}, ["peak memory beyond the gradient"]),
        ({"gpu": "H100", "copy": 0.9, "peer": 1.5}, []),
        ({"gpu": "H100", "copy": 0.86, "peer": 1.5}, ["time ÷ a copy's"]),
        ({"gpu": "H100", "copy": 0.9, "peer": 1.3}, ["best peer's (liger:triton's) time ÷ ours"]),
        ({"gpu": "H100", "copy": 0.9, "eager": 7.9, "compile_": 1.9}, ["eager's time ÷ ours", "compile's time ÷ ours"]),
    ],
)
def test_limits_of_logits(changes: dict[str, Any], missed: list[str]) -> None:
    found = limits.limits(timed(**changes))
    assert sorted(one.what.partition(",")[0] for one in found if one.met is False) == sorted(missed)
    assert len(found) == (4 if "gpu" in changes else 3)
    open_ = [one.what.partition(",")[0] for one in found if one.met is None]
    assert open_ == (["best peer's time ÷ ours"] if "gpu" in changes and "peer" not in changes else [])
    assert (limits.meets(found) == "") is (not missed and not open_)


def limit(what: str, met: bool | None) -> Limit:
    return Limit(what, "≤ 1", "–" if met is None else "1", met)


PREDICTED, MET, MISSED, OPEN = limit("a, predicted", True), limit("b", True), limit("c", False), limit("d", None)


@pytest.mark.parametrize(
    ("found", "counts", "complaint"),
    [
        ([], "0 met", "no limit is stated for what was measured"),
        ([MET, MET], "2 met", ""),
        ([MET, PREDICTED], "1 met, 1 predicted", ""),
        ([PREDICTED], "0 met, 1 predicted", "no limit was measured (0 met, 1 predicted)"),
        ([MET, OPEN], "1 met, 1 not measured", "not measured: d"),
        ([MET, MISSED, OPEN], "1 met, 1 missed, 1 not measured", "missed: c. not measured: d"),
        ([MET, limit("e, predicted", False)], "1 met, 1 missed", "missed: e, predicted"),
    ],
)
def test_what_meets_the_limits(found: list[Limit], counts: str, complaint: str) -> None:
    assert limits.counts(found) == counts
    assert limits.meets(found) == complaint


def test_predictions_are_recognised() -> None:
    """By the words of the linear path's limits."""
    case = LinearCase(HEADS["qwen2.5-0.5b"], 8, 16)
    prediction = Prediction(1, 1, 1, 1, 4)
    part = LinearResult({}, {}, memory=[MemoryRow("7b", case, "hpo_fused", "cpu", "predicted", prediction=prediction)])
    (one,) = linear_limits.limits(part)
    assert limits.is_predicted(one)
    assert limits.sheet([one]).rows[0][0][-1] == "predicted"


def test_limits_are_of_the_stated_size_only() -> None:
    result = timed(eager=1.0)
    for changes in (
        {"dtype": "fp32"}, {"mode": "forward"}, {"op": "logprobs"}, {"inactive": 0.5}, {"shape": SHAPES["gpt2"]},
        {"length": 1},
    ):  # fmt: skip
        rows = [dataclasses.replace(row, case=dataclasses.replace(row.case, **changes)) for row in result.rows]
        assert limits.limits(dataclasses.replace(result, rows=rows)) == []
    result.rows[0].peak_extra_bytes = None
    assert [one.met for one in limits.limits(result)] == [True, False, None]
