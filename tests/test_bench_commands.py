"""The command line: a smoke for each command, its files, and its exit status."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from hpo_fused.bench import commands, parallel, plan, providers  # noqa: E402
from hpo_fused.bench.cases import OPERATIONS, SHAPES  # noqa: E402
from hpo_fused.bench.machine_code.report import PublicCall, Report  # noqa: E402
from hpo_fused.bench.results import SCHEMA_VERSION, Result, Row  # noqa: E402
from hpo_fused.bench.tables import Table, error, number  # noqa: E402

from .bench_helpers import Wrong, tiny  # noqa: E402
from .test_bench_machine_code import kernel  # noqa: E402

Invoke = Callable[..., Any]
SMALL = ("--shape", "custom:V=97,H=16", "--tokens", "16", "--device", "cpu")
TWO = ("--provider", "hpo_fused", "--provider", "eager")


def option(name: str, *values: str) -> tuple[str, ...]:
    return tuple(word for value in values for word in (f"--{name}", value))


@pytest.fixture(scope="module")
def speed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One run of ``speed`` over everything that is small, and its file."""
    path = tmp_path_factory.mktemp("speed") / "result.json"
    options = (*option("op", *OPERATIONS), *option("dtype", "bf16", "fp32"), *option("mode", "both", "forward"))
    done = testing.CliRunner().invoke(
        commands.app, ["speed", *SMALL, *options, *TWO, "--repeats", "2", "--budget", "0", "--output", str(path)]
    )
    return done, path


def test_speed_times_every_combination(speed: tuple[Any, Path]) -> None:
    done, path = speed
    assert done.exit_code == 0, done.output
    result = Result.read(path)
    cases = {row.case for row in result.rows}
    assert len(cases) == (2 * 4 + 1) * 2  # log-probabilities have one dtype
    for case in cases:
        rows = [row for row in result.rows if row.case == case]
        assert [row.provider for row in rows if not row.limit] == ["hpo_fused", "eager"]
        assert all(row.rounds == 2 and row.over_ours and row.over_limit for row in rows)
    for text in ("÷ limit", "Against float64", "policy_loss custom:V=97,H=16 fp32 both", "Time over hpo_fused's"):
        assert text in done.output


def test_a_result_survives_its_file(speed: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = speed
    result = Result.read(path)
    result.write(tmp_path / "again.json")
    assert Result.read(tmp_path / "again.json") == result
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert path.stat().st_size / len(result.rows) < 1500  # no samples in it
    assert {"torch", "cpu", "threads", "commit"} <= result.environment.keys()


def test_report_writes_tables_and_pictures(speed: tuple[Any, Path], invoke: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, path = speed
    text = invoke("report", str(path)).output
    assert "| case | provider | median ms |" in text
    assert "| linear_policy_loss custom:V=97,H=16 bf16 both | **hpo_fused** |" in text
    assert invoke("report", str(path), "--output", "out").exit_code == 0
    assert (tmp_path / "out" / "report.md").read_text().count("![time](time.png)") == 1
    assert 1000 < (tmp_path / "out" / "time.png").stat().st_size < 100_000


def test_accuracy_tells_errors_and_no_times(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("accuracy", *SMALL, *TWO, "--ragged", "--output", "r.json")
    assert done.exit_code == 0, done.output
    assert "sampled token" in done.output
    rows = Result.read(tmp_path / "r.json").rows
    assert [(row.case.dtype, row.case.ragged, row.rounds) for row in rows] == [("bf16", True, 0)] * 2 + [
        ("fp32", True, 0)
    ] * 2


def test_memory_grows_with_tokens(invoke: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = option("tokens", "64", "128")
    done = invoke("memory", "--shape", "custom:V=2000,H=16", *sizes, "--device", "cpu", *TWO, "--output", "r.json")
    assert done.exit_code == 0, done.output
    assert re.search(r"provider\s+N=64\s+N=128", done.output)
    peaks = [row.peak_bytes or 0 for row in Result.read(tmp_path / "r.json").rows if row.provider == "eager"]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.1)
    assert "memory.png" in invoke("report", "r.json", "--output", "out").output


def test_wrong_providers_decide_the_exit_status(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "wrong", Wrong)
    done = invoke("speed", *SMALL, "--provider", "eager", "--provider", "wrong", "--repeats", "1")
    assert done.exit_code == 1
    assert "wrong: loss off by" in " ".join(done.output.split())


def test_ctrl_c_keeps_what_is_finished(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, calls = commands.run_case, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(commands, "run_case", interrupted)
    done = invoke("speed", *SMALL, *TWO, *option("dtype", "bf16", "fp32"), "--repeats", "1", "--output", "r.json")
    assert done.exit_code == 130
    result = Result.read(tmp_path / "r.json")
    assert (result.interrupted, len(result.rows)) == (True, 3)


@pytest.mark.distributed
def test_ranks_share_the_vocabulary(invoke: Invoke, tmp_path: Path) -> None:
    losses = option("op", "policy_loss", "linear_policy_loss")
    done = invoke("speed", *SMALL, *losses, "--world-size", "2", "--repeats", "2", "--output", "r.json")
    assert done.exit_code == 0, done.output
    result = Result.read(tmp_path / "r.json")
    assert result.settings["world_size"] == 2
    assert {row.case.shape.vocabulary for row in result.rows} == {97 // 2}
    for rows in (result.rows[:3], result.rows[3:6]):
        assert [row.provider for row in rows] == [
            "hpo_fused",
            "hpo_fused×2",
            "gemms" if rows[0].case.linear else "copy",
        ]
        assert all(row.rounds == 2 and row.over_ours and row.over_limit for row in rows)
        assert [row.errors is None for row in rows] == [True, False, True]
        assert rows[1].errors.gradients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed", "--op", "loss"), "operation: expected one of policy_loss"),
        (("speed", "--shape", "gpt3"), "shape: expected one of qwen3-0.6b"),
        (("speed", "--dtype", "int8"), "dtype: expected one of bf16"),
        (("speed", "--provider", "jax"), "provider: expected one of hpo_fused"),
        (("speed", "--device", "tpu"), "expected cpu or one of"),
        (("speed", "--launch", "512,4"), "expected THREADS,LOADS,ROWS"),
        (("speed", "--cuda-graph", "--device", "cpu"), "--cuda-graph: expected a GPU"),
        (("speed", "--op", "linear_policy_loss", "--shape", "custom:V=9"), "shape: expected a hidden size"),
        (("speed", "--output", "/dev/null/r.json"), "File exists"),
        (("speed", "--world-size", "1"), "'--world-size': Input should be greater"),
        (("speed", "--world-size", "2", "--provider", "eager"), "--world-size: expected neither --provider nor"),
        (("speed", "--world-size", "2", "--op", "token_logprobs"), "world size: expected policy_loss or linear"),
        (("speed", "--world-size", "3", "--shape", "custom:V=2"), "world size: expected at most V = 2 ranks, got 3"),
        (("wire", "--shape", "custom:V=9"), "shape: expected a hidden size"),
        (("report", "absent.json"), "No such file"),
        (("compare", "absent.json", "absent.json"), "No such file"),
    ],
)
def test_bad_input_is_refused(invoke: Invoke, arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in re.sub(r"[│\s]+", " ", done.output)


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"world size: expected at most \d+, the number of GPUs, got 99"):
        parallel.check([], 99, torch.device("cuda"))


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 2}', f'{{"schema_version": {SCHEMA_VERSION}}}'])
def test_other_files_are_refused(invoke: Invoke, tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    done = invoke("report", "r.json")
    assert done.exit_code == 2
    assert re.search(r"is not a result|expected schema version", done.output)


def test_launch_parameters_are_measured_beside_the_table_s(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke(
        "speed", *SMALL, "--provider", "eager", "--launch", "512,4,132", "--repeats", "1", "--output", "r.json"
    )
    assert done.exit_code == 0, done.output
    row = next(row for row in Result.read(tmp_path / "r.json").rows if row.provider == "hpo_fused@512,4,132")
    assert (row.status, row.note.startswith("needs a GPU")) == ("skipped", True)  # on this CPU


def test_lists(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    text = invoke("providers", "--device", "cpu").output
    assert all(name in text for name in providers.PROVIDERS)
    assert "hpo_fused *" in text
    text = invoke("shapes").output
    assert all(name in text for name in SHAPES)
    assert f"torch: {torch.__version__}" in invoke("env", "--device", "cpu").output


# ---------------------------------------------------------------------------------------------------------------
# all


def test_all_writes_a_report_and_ends_with_its_budget(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    parts = tuple(plan.Part(one, ("custom:V=97,H=16",), (16, 32), who="quick") for one in OPERATIONS[:2])
    monkeypatch.setitem(plan.PLANS, ("cpu", False), parts)
    monkeypatch.setattr(providers, "DEFAULT", ["hpo_fused", "eager"])
    monkeypatch.setattr(plan, "SECONDS_PER_CASE", {"cpu": 0.0})
    report = Report([kernel()], [PublicCall("default", "policy_loss", ["a_kernel"], 20)], ["sm_90 b: not compiled"])
    monkeypatch.setattr(commands, "run_report", lambda *arguments, **keywords: report)
    done = invoke("all", "--output", "out", "--device", "cpu")
    assert done.exit_code == 0, done.output
    result = Result.read(tmp_path / "out" / "result.json")
    assert {row.case for row in result.rows} == {case for part in parts for case in part.cases()}
    text = (tmp_path / "out" / "report.md").read_text()
    for words in ("![time](time.png)", "![memory](memory.png)", "## Machine code", "sm_90 b: not compiled"):
        assert words in text
    done = invoke("all", "--output", "none", "--device", "cpu", "--budget", "0")
    assert done.exit_code == 0, done.output
    result = Result.read(tmp_path / "none" / "result.json")
    assert result.rows == result.kernels == []
    assert len(result.notes) == 5
    assert all("not begun, as the budget of 0 s was used" in note for note in result.notes)
    assert result.notes[-1].startswith("machine code: ")

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_case", interrupted)
    done = invoke("all", "--output", "cut", "--device", "cpu")
    assert done.exit_code == 130
    result = Result.read(tmp_path / "cut" / "result.json")
    assert (result.interrupted, result.rows, result.kernels, result.notes) == (True, [], [], [])
    assert "Interrupted" in (tmp_path / "cut" / "report.md").read_text()


@pytest.mark.parametrize("part", [part for parts in plan.PLANS.values() for part in parts])
def test_planned_cases_exist(part: plan.Part) -> None:
    assert len(part.cases()) == (1 if part.operation == "logprob_policy_loss" else len(part.shapes)) * len(part.tokens)


@pytest.mark.parametrize("chosen", list(plan.PLANS), ids=str)
def test_no_case_is_planned_twice(chosen: tuple[str, bool]) -> None:
    cases = [case for part in plan.PLANS[chosen] for case in part.cases()]
    assert len(set(cases)) == len(cases)


def test_who_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "DEFAULT", ["hpo_fused", "compile", "liger:triton"])
    monkeypatch.setattr(plan, "defaults", lambda device: providers.DEFAULT)
    part = plan.Part("policy_loss", ("gpt2",), (8,))
    found = [replace(part, who=who).providers(torch.device("cuda")) for who in ("all", "quick", "ours")]
    assert found == [providers.DEFAULT, ["hpo_fused", "liger:triton"], ["hpo_fused"]]


# ---------------------------------------------------------------------------------------------------------------
# compare


def result_of(path: Path, factor: float = 1.0, **changes: Any) -> str:
    """A file with two timed rows."""
    case = tiny("policy_loss")
    rows = [
        Row(case, name, ours=ours, rounds=3, median_s=factor * seconds, over_limit=2.0, peak_bytes=1 << 20)
        for name, ours, seconds in (("hpo_fused", True, 1.0), ("eager", False, 4.0))
    ]
    rows[0] = replace(rows[0], **changes)
    Result("speed", {"cpu": "c", "created": str(factor)}, rows=rows).write(path)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "threshold", "status", "words"),
    [
        ({"factor": 1.04}, "1.05", 0, "1.04"),
        ({"factor": 1.06}, "1.05", 1, "hpo_fused time 1.06×"),
        ({"factor": 2.0}, None, 0, "2.00"),
        ({"peak_bytes": 2 << 20}, "1.05", 1, "hpo_fused peak memory 2.00×"),
        ({"status": "wrong", "note": "loss off", "median_s": None}, "1.05", 1, "hpo_fused is wrong: loss off"),
        ({"case": tiny("token_logprobs")}, "1.05", 2, "No row of hpo_fused is in both"),
    ],
)
def test_compare(
    invoke: Invoke, tmp_path: Path, changes: dict[str, Any], threshold: str | None, status: int, words: str
) -> None:
    files = result_of(tmp_path / "a.json"), result_of(tmp_path / "b.json", **changes)
    done = invoke("compare", *files, *(("--worse-than", threshold) if threshold else ()))
    assert (done.exit_code, words in done.output) == (status, True), done.output


def test_a_row_of_ours_that_is_lost_is_worse(invoke: Invoke, tmp_path: Path) -> None:
    first, second = result_of(tmp_path / "a.json"), result_of(tmp_path / "b.json")
    content = json.loads(Path(second).read_text(encoding="utf-8"))
    lost = next(row for row in content["rows"] if row["ours"])
    other = {**lost, "case": {**lost["case"], "length": lost["case"]["length"] + 1}}
    content["rows"] = [row for row in content["rows"] if row is not lost] + [other]
    Path(second).write_text(json.dumps(content), encoding="utf-8")
    assert invoke("compare", first, second).exit_code == 2  # no row of it is in both
    content["rows"].append(lost)
    Path(first).write_text(json.dumps(content), encoding="utf-8")
    done = invoke("compare", first, second, "--worse-than", "1.05")
    assert done.exit_code == 1
    assert "is not in B" in done.output


def test_others_do_not_decide_a_comparison(invoke: Invoke, tmp_path: Path) -> None:
    files = result_of(tmp_path / "a.json"), result_of(tmp_path / "b.json", 3.0, median_s=1.0)
    assert invoke("compare", *files, "--worse-than", "1.05").exit_code == 0


# ---------------------------------------------------------------------------------------------------------------
# providers of one's own, and tables


def test_the_documented_provider_is_timed(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Named module:Class on the command line, checked and timed on every operation and mode that it has."""
    text = (Path(__file__).parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- provider -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    done = invoke(
        "speed", *option("op", "policy_loss", "token_logprobs", "linear_policy_loss"),
        *option("mode", "forward", "backward", "both"),
        *option("shape", "custom:V=97,H=8", "custom:V=97,H=8,softcap=20"),
        "--tokens", "32", "--repeats", "1", "--device", "cpu", *option("provider", "eager", "mine:Logsumexp"),
        "--output", "r.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    mine = [row for row in Result.read(tmp_path / "r.json").rows if row.provider == "mine:Logsumexp"]
    assert len(mine) == 18
    for row in mine:
        if row.case.operation == "linear_policy_loss":
            assert (row.status, row.note) == ("skipped", "has no linear_policy_loss")
        elif row.case.shape.softcap is not None:
            assert (row.status, row.note) == ("skipped", "has no softcap")
        else:
            assert (row.status, row.rounds) == ("ok", 1)


def test_numbers_are_short() -> None:
    assert [number(v) for v in (None, float("nan"), 0.0, 0.01234, 1.234, 123.4, 12345.6)] == [
        "–", "–", "0", "0.012", "1.23", "123", "12346",
    ]  # fmt: skip
    assert [error(v) for v in (None, float("inf"), -1.0, 1.25e-7, 2e-11)] == ["–", "inf", "0", "1.2e-7", "2.0e-11"]


def test_tables_are_markdown() -> None:
    table = Table("Title", ("case", "provider", "ms"), notes=["note"])
    table.add("a", "ours", "1", bold=True)
    table.add("a", "other")
    assert table.markdown().splitlines() == [
        "## Title", "", "| case | provider | ms |", "|---|---|---:|", "| a | **ours** | 1 |", "| a | other |  |", "",
        "- note",
    ]  # fmt: skip
