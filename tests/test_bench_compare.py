"""Comparing two results: what is matched, what counts as a regression, and how the command ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from hpo_fused.bench.cases import SHAPES, Case, Shape  # noqa: E402
from hpo_fused.bench.commands import app  # noqa: E402
from hpo_fused.bench.compare import (  # noqa: E402
    MIB,
    Comparison,
    Entry,
    Key,
    Quantiles,
    change_of,
    compare,
    entries,
    moved_floors,
)
from hpo_fused.bench.evidence import Evidence  # noqa: E402
from hpo_fused.bench.linear.cases import HEADS, HeadShape, LinearCase  # noqa: E402
from hpo_fused.bench.linear.results import LinearResult, LinearRow, MemoryRow  # noqa: E402
from hpo_fused.bench.linear.results import summarise as summarise_linear  # noqa: E402
from hpo_fused.bench.results import SCHEMA_VERSION, Errors, Result, Row, Status, summarise  # noqa: E402

CASE = Case(SHAPES["gpt2"], 8, 16)
HEAD = LinearCase(HeadShape("head", 48, 300), 8, 16)
OURS = Key("logits", CASE, "hpo_fused")
MACHINE = {
    "cpu": "Some CPU", "cores": 4, "threads": 2, "device": "cpu", "platform": "Linux x86_64",
    "torch": "2.13.0", "triton": "3.7.1", "python": "3.12.1", "hpo_fused": "0.1.0", "commit": "abc", "created": "now",
}  # fmt: skip
TIMES = {"hpo_fused": 1.0, "eager": 4.0, "copy": 0.5}
Invoke = Callable[..., Any]


def result(
    times: dict[str, float] | None = None, case: Case = CASE, spread: float = 0.01, rows: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None, **settings: Any,
) -> Result:  # fmt: skip
    """A run of five rounds whose 20–80 % bands are ``spread`` to either side; ``rows``: fields by provider."""
    found = []
    for name, seconds in (times or TIMES).items():
        row = Row(case, name, samples_s=[seconds * (1 + step * spread) for step in (-2, -1, 0, 1, 2)])
        row.peak_extra_bytes = None if name == "copy" else 100 * MIB
        for field, value in (rows or {}).get(name, {}).items():
            setattr(row, field, value)
        if row.status != "ok":
            row.samples_s = []
        found.append(row)
    summarise(found, "hpo_fused")
    return Result({**MACHINE, **(environment or {})}, settings, rows=found)


def linear_result(seconds: float = 1.0, peak: int = 200 * MIB) -> LinearResult:
    """A run of the linear path at two shares of inactive rows, with its memory."""
    rows = [
        LinearRow(HEAD.at(inactive), name, samples_s=[factor * (1 - inactive) * (1 + 0.01 * step) for step in range(4)])
        for inactive in (0.0, 0.5)
        for name, factor in (("hpo_fused", seconds), ("gemms", 0.8))
    ]
    summarise_linear(rows, "hpo_fused", {"hpo_fused": True, "gemms": True})
    memory = [
        MemoryRow("tokens", HEAD, "hpo_fused", "cpu", peak_extra_bytes=peak),
        MemoryRow("7b", HEAD, "hpo_fused", "cuda", "predicted"),
    ]
    return LinearResult(dict(MACHINE), {}, rows=rows, memory=memory)


def compared(base: Result | LinearResult, new: Result | LinearResult, threshold: float = 0.1) -> Comparison:
    return compare(entries([base]), entries([new]), threshold)


def regressed(base: Entry, new: Entry, threshold: float = 0.1) -> bool:
    return change_of(OURS, base, new, threshold).regressed


# ---------------------------------------------------------------------------------------------------------------
# judgement


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ((0.99, 1.0, 1.01), "same"),
        ((1.08, 1.09, 1.10), "same"),  # within the threshold
        ((1.10, 1.11, 1.12), "worse"),
        ((1.005, 1.11, 1.2), "noise"),  # beyond it, but some of its rounds took as long as some of the base's
        ((0.89, 0.92, 0.95), "same"),  # 1 / 0.92 < 1.1
        ((0.89, 0.90, 0.91), "better"),
        ((0.89, 0.90, 0.99), "noise"),
    ],
)
def test_time_needs_the_threshold_and_bands_apart(new: tuple[float, float, float], verdict: str) -> None:
    base = Entry("ok", time=Quantiles(0.99, 1.0, 1.01))
    change = change_of(OURS, base, Entry("ok", time=Quantiles(*new)), 0.1)
    assert change.time == verdict
    assert change.time_ratio == new[1]
    assert change.regressed == (verdict == "worse")


def test_threshold_is_the_one_asked_for() -> None:
    base, new = (Entry("ok", time=Quantiles(t - 0.01, t, t + 0.01)) for t in (1.0, 1.3))
    assert regressed(base, new, 0.25)
    assert not regressed(base, new, 0.35)


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        (100 * MIB, 110 * MIB, "same"),
        (100 * MIB, 111 * MIB, "worse"),
        (100 * MIB, 90 * MIB, "better"),
        (1000, MIB + 1000, "same"),  # a thousand times as much, of next to nothing
        (1000, MIB + 1001, "worse"),
        (0, 2 * MIB, "worse"),
        (2 * MIB, 0, "better"),
    ],
)
def test_memory_needs_the_threshold_and_a_mebibyte(base: int, new: int, verdict: str) -> None:
    change = change_of(OURS, Entry("ok", peak=base), Entry("ok", peak=new), 0.1)
    assert change.memory == verdict
    assert change.regressed == (verdict == "worse")
    assert change.memory_ratio == (new / base if base else None)


@pytest.mark.parametrize("status", ["wrong", "failed", "out_of_memory"])
def test_what_was_right_and_is_not_regressed(status: Status) -> None:
    change = change_of(OURS, Entry("ok"), Entry(status, "the reason"), 0.1)
    assert change.regressed
    assert change.faults == (f"{status.replace('_', ' ')}: the reason",)
    back = change_of(OURS, Entry(status, "the reason"), Entry("ok"), 0.1)
    assert not back.regressed
    assert back.fixes == change.faults


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        (Entry("ok"), Entry("ok", broken="log p off"), True),
        (Entry("ok", broken="log p off"), Entry("ok", broken="log p off"), False),
        (Entry("ok", repeats=True), Entry("ok", repeats=False), True),
        (Entry("ok", repeats=None), Entry("ok", repeats=False), False),
        (Entry("ok", repeats=False), Entry("ok", repeats=False), False),
        (Entry("ok"), Entry("skipped", "no GPU"), False),
        (Entry("wrong"), Entry("failed"), False),
    ],
)
def test_limits_of_our_own_and_repetition(base: Entry, new: Entry, expected: bool) -> None:
    assert regressed(base, new) == expected


def test_only_this_package_can_regress() -> None:
    new = result({"hpo_fused": 1.0, "eager": 8.0, "copy": 0.5}, rows={"eager": {"peak_extra_bytes": 900 * MIB}})
    comparison = compared(result(), new)
    assert [change.key.provider for change in comparison.changes if change.regressed] == ["eager"]
    assert comparison.regressions == []
    slower = compared(result(), result({**TIMES, "hpo_fused": 1.5}))
    assert [change.key.provider for change in slower.regressions] == ["hpo_fused"]


# ---------------------------------------------------------------------------------------------------------------
# matching


@pytest.mark.parametrize(
    "change",
    [
        {"shape": Shape("gpt2", 50304)}, {"shape": Shape("gpt2", 50257, 30.0)}, {"responses": 16}, {"length": 8},
        {"dtype": "fp32"}, {"objective": "grpo"}, {"inactive": 0.5}, {"ragged": True}, {"mode": "forward"},
        {"op": "logprobs"},
    ],
)  # fmt: skip
def test_other_cases_are_not_compared(change: dict[str, Any]) -> None:
    comparison = compared(result(), result(case=dataclasses.replace(CASE, **change)))
    assert comparison.changes == []
    assert [key.provider for key in comparison.only_base] == list(TIMES)
    assert [key.provider for key in comparison.only_new] == list(TIMES)


def test_a_shape_in_other_words_is_the_same() -> None:
    other = dataclasses.replace(CASE, shape=dataclasses.replace(CASE.shape, why="said otherwise"))
    assert len(compared(result(), result(case=other)).changes) == len(TIMES)


def test_in_place_is_another_measurement_of_ours_alone() -> None:
    comparison = compared(result(inplace=False), result(inplace=True))
    assert [key.name for key in comparison.only_base] == ["hpo_fused"]
    assert [key.name for key in comparison.only_new] == ["hpo_fused in place"]
    assert [change.key.provider for change in comparison.changes] == ["eager", "copy"]


def test_linear_rows_and_memory() -> None:
    base, new = linear_result(), linear_result(1.3, 300 * MIB)
    comparison = compared(base, new)
    assert comparison.only_base == comparison.only_new == {}
    assert [(change.key.op, change.time, change.memory) for change in comparison.regressions] == [
        ("linear", "worse", None), ("linear", "worse", None), ("memory of linear", None, "worse"),
    ]  # fmt: skip
    assert len(comparison.judged) == 3  # a prediction is no measurement
    ours = comparison.changes[0]
    assert ours.base.over_floor == pytest.approx(1 / 0.8)
    assert ours.new.over_floor == pytest.approx(1.3 / 0.8)


def test_cuda_graphs_and_memory_in_place_are_apart() -> None:
    comparison = compared(result(cuda_graph=False), result(cuda_graph=True))
    assert [key.name for key in comparison.only_new] == [f"{name} CUDA graph" for name in TIMES]
    other = linear_result()
    other.settings["inplace"] = True
    names = [key.name for key in compared(linear_result(), other).only_new if key.is_memory]
    assert names == ["hpo_fused tokens cpu in place", "hpo_fused 7b cuda in place"]


def test_series_and_devices_of_memory_are_apart() -> None:
    one = linear_result()
    one.memory = [dataclasses.replace(one.memory[0], series="budget"), dataclasses.replace(one.memory[0], device="x")]
    comparison = compared(linear_result(), one)
    assert [key.name for key in comparison.only_new] == ["hpo_fused budget cpu", "hpo_fused tokens x"]


def test_rows_measured_twice_are_matched_in_order() -> None:
    """Parts of one file repeat what every part measures, as the head of a 7B model."""
    twice = [linear_result(), linear_result(1.3, 300 * MIB)]
    comparison = compare(entries(twice), entries(twice[::-1]), 0.1)
    assert comparison.only_base == comparison.only_new == {}
    assert [(change.key.name, change.memory) for change in comparison.changes if change.memory] == [
        ("hpo_fused tokens cpu", "worse"), ("hpo_fused tokens cpu #2", "better"),
    ]  # fmt: skip
    assert compare(entries(twice), entries(twice), 0.1).regressions == []
    (only,) = {key.variant for key in compare(entries(twice[:1]), entries(twice), 0.1).only_new if not key.is_memory}
    assert only == "#2"


@pytest.mark.parametrize("value", ["fast", -1.0, 0.0, float("nan"), True])
def test_times_that_are_none_are_refused(value: Any) -> None:
    one = result()
    one.rows[0].median_s = value
    with pytest.raises(ValueError, match=r"logits, gpt2 .*hpo_fused: median_s must be a number"):
        entries([one])


def test_floor_that_moved_is_found() -> None:
    alike = compared(result(), result({name: 1.3 * seconds for name, seconds in TIMES.items()}))
    (floor,) = moved_floors(alike, 0.1)
    assert (floor.key.provider, floor.time_ratio) == ("copy", pytest.approx(1.3))
    (ours,) = alike.regressions
    assert ours.base.over_floor == pytest.approx(ours.new.over_floor)
    assert len(moved_floors(compared(result(), result({**TIMES, "copy": 0.4})), 0.1)) == 1
    assert moved_floors(compared(result(), result({**TIMES, "hpo_fused": 3.0})), 0.1) == []


# ---------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Writes two results as A.json and B.json and compares them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(base: Any, new: Any, *arguments: str) -> Any:
        for name, one in (("A.json", base), ("B.json", new)):
            if one is not None:
                Path(name).write_text(one if isinstance(one, str) else one.to_json(), encoding="utf-8")
        return testing.CliRunner().invoke(app, ["compare", "A.json", "B.json", *arguments])

    return run


def flat(text: str) -> str:
    return " ".join(text.split())


def test_equal_results(invoke: Invoke) -> None:
    done = invoke(result(), result())
    assert done.exit_code == 0, done.output
    assert "No regression in 1 row of hpo_fused." in done.output
    assert "▲" not in done.output.split("▲ worse")[0]


def test_regression(invoke: Invoke) -> None:
    done = invoke(result(), result({**TIMES, "hpo_fused": 1.32}, rows={"hpo_fused": {"peak_extra_bytes": 150 * MIB}}))
    assert done.exit_code == 1, done.output
    told = flat(done.output)
    assert "hpo_fused 1000 1320 1.32 ▲ 2.00 2.64 1.50 ▲" in told
    assert "time 1000 → 1320 ms (20–80 %: 988–1012 → 1304–1336), 2.00 → 2.64 ÷ floor" in told
    assert "peak memory 100 → 150 MiB" in told
    assert "1 of 1 row of hpo_fused regressed." in told
    assert max(map(len, done.output.splitlines()[2:])) <= 80


def test_threshold_of_the_command(invoke: Invoke) -> None:
    slower = result({**TIMES, "hpo_fused": 1.32})
    assert invoke(result(), slower, "--threshold", "0.35").exit_code == 0
    assert invoke(result(), slower, "--threshold", "0.3").exit_code == 1
    for value in ("-0.1", "nan", "inf"):
        assert invoke(result(), slower, "--threshold", value).exit_code == 2


def test_wrong_results_regress_and_others_are_context(invoke: Invoke) -> None:
    wrong = {"status": "wrong", "note": "loss off by 1"}
    done = invoke(result(), result(rows={"hpo_fused": wrong}))
    assert done.exit_code == 1
    assert "hpo_fused: wrong: loss off by 1" in flat(done.output)
    done = invoke(result(), result(rows={"eager": wrong}))
    assert done.exit_code == 0
    assert "eager: wrong: loss off by 1" in flat(done.output)


def test_limits_read_from_the_file(invoke: Invoke) -> None:
    errors = Errors(0.0, 1e-5, None, None, broken="log-probability off by 1e-05")
    done = invoke(result(rows={"hpo_fused": {"repeats": True}}), result(rows={"hpo_fused": {"errors": errors}}))
    assert done.exit_code == 1
    assert "misses its own limits: log-probability off by 1e-05" in flat(done.output)
    done = invoke(result(rows={"hpo_fused": {"repeats": True}}), result(rows={"hpo_fused": {"repeats": False}}))
    assert done.exit_code == 1
    assert "a second call gave another result" in flat(done.output)


def test_slower_machine_is_pointed_out(invoke: Invoke) -> None:
    done = invoke(result(), result({name: 1.3 * seconds for name, seconds in TIMES.items()}))
    assert done.exit_code == 1
    assert "copy took 1.30 times as long" in flat(done.output)
    assert "read ÷ floor instead" in flat(done.output)
    assert "read ÷ floor instead" not in flat(invoke(result(), result({**TIMES, "hpo_fused": 2.0})).output)


def test_nothing_is_dropped(invoke: Invoke) -> None:
    new = result({"hpo_fused": 1.0, "compile": 2.0, "copy": 0.5}, rows={"compile": {"status": "failed"}})
    new.rows.append(Row(dataclasses.replace(CASE, dtype="fp16"), "trl:eager", samples_s=[1.0]))
    done = invoke(result(), new)
    assert done.exit_code == 0
    told = flat(done.output)
    assert "only in A: logits, gpt2 (vocabulary 50257) N=128 8×16 bf16 mhpo_ahpo both: eager" in told
    assert "only in B: logits, gpt2 (vocabulary 50257) N=128 8×16 bf16 mhpo_ahpo both: compile (failed)" in told
    assert "only in B: logits, gpt2 (vocabulary 50257) N=128 8×16 fp16 mhpo_ahpo both: trl:eager" in told


def test_rows_that_became_unavailable_are_told(invoke: Invoke) -> None:
    both = result({**TIMES, "hpo_fused:triton": 0.9})
    gone = {"hpo_fused:triton": {"status": "skipped", "note": "needs a GPU"}}
    done = invoke(both, result({**TIMES, "hpo_fused:triton": 0.9}, rows=gone))
    assert done.exit_code == 0
    assert "hpo_fused:triton: ok in A, skipped in B: needs a GPU" in flat(done.output)


def test_only_what_was_compared_counts(invoke: Invoke) -> None:
    gone = {"hpo_fused": {"status": "skipped", "note": "needs a GPU"}}
    done = invoke(result(), result(rows=gone))
    assert done.exit_code == 2
    assert "0 of 1 row of hpo_fused compared" in flat(done.stderr)
    assert "No regression" not in done.output
    both = {**TIMES, "hpo_fused:triton": 0.9}
    done = invoke(result(both), result(both, rows=gone))
    assert done.exit_code == 0
    assert "No regression in 1 row of hpo_fused; 1 of 2 compared." in done.output
    worse = invoke(result(both), result({**both, "hpo_fused:triton": 2.0}, rows=gone))
    assert worse.exit_code == 1
    assert "1 of 1 row of hpo_fused regressed; 1 of 2 compared." in worse.output


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_run_that_lacks_our_rows_is_not_comparable(invoke: Invoke, kept: bool) -> None:
    """Whether the row is there without a time, or is not there."""
    other = dataclasses.replace(CASE, mode="forward")
    base, new = result(), result()
    base.rows += result(case=other).rows
    rows = result(case=other, rows={"hpo_fused": {"status": "skipped", "note": "interrupted before it was timed"}}).rows
    new.rows += rows if kept else []
    assert invoke(base, new).exit_code == 0  # it was not asked for
    new.interrupted = True
    done = invoke(base, new)
    assert done.exit_code == 2
    told = flat(done.stderr)
    assert "forward: hpo_fused: in A.json, and missing from B.json, which was interrupted" in told
    assert "No regression in 1 row of hpo_fused" in told
    base.interrupted, new.interrupted = True, False
    assert invoke(base, new).exit_code == 0
    new = Evidence.of_parts([new], environment=dict(MACHINE), settings={}, interrupted=True)  # in none of its parts
    assert invoke(base, new).exit_code == 2
    new.parts[0].rows = [row for row in new.parts[0].rows if row.case == CASE]
    new.parts[0].rows[0].samples_s = new.parts[0].rows[1].samples_s
    summarise(new.parts[0].rows, "hpo_fused")
    assert invoke(base, new).exit_code == 1  # a regression is one, whatever else is missing


def test_a_name_that_begins_like_ours_is_not_ours(invoke: Invoke) -> None:
    times = {**TIMES, "hpo_fused_tuned:Mine": 1.0}
    slower = {**times, "hpo_fused_tuned:Mine": 2.0}
    assert invoke(result(times), result(slower)).exit_code == 0
    ours = {"hpo_fused_tuned:Mine": {"ours": True}}
    assert invoke(result(times, rows=ours), result(slower, rows=ours)).exit_code == 1
    assert invoke(result(times), result(slower, rows=ours)).exit_code == 0  # the base's word counts


def test_versions_of_peers_are_compared(invoke: Invoke) -> None:
    done = invoke(result(environment={"trl": "1.15"}), result(environment={"trl": "1.16", "liger-kernel": "0.8"}))
    assert "trl: 1.15 → 1.16" in done.output.splitlines()
    assert "liger-kernel: – → 0.8" in done.output.splitlines()


def test_help_names_all_commands() -> None:
    text = flat(testing.CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output)
    assert "a result of speed, linear, memory, accuracy or all" in text


def test_few_rounds_and_interruptions_are_told(invoke: Invoke) -> None:
    one = result(rows={"hpo_fused": {"samples_s": [1.0]}})
    one.interrupted = True
    one.rows[1].others_cpu = 0.5
    told = flat(invoke(result(), one).output)
    assert "B: speed was interrupted" in told
    assert "Other processes used 50% of the CPUs" in told
    assert "1 times are of fewer than 3 rounds" in told


def test_linear_in_eighty_columns(invoke: Invoke) -> None:
    base, new = linear_result(), linear_result(1.3)
    for one in (base, new):
        for row in [*one.rows]:
            one.rows.append(dataclasses.replace(row, case=dataclasses.replace(row.case, shape=HEADS["qwen2.5-0.5b"])))
    done = invoke(base, new)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert max(map(len, lines[2:])) <= 80
    table = flat(done.output)
    assert "qwen2.5-0.5b hpo_fused 1015 1320 1.30 ▲ 1.25 1.62 –" in table
    assert "memory of linear" in table
    assert "hpo_fused 7b cuda predicted predicted –" in table


@pytest.mark.parametrize(
    ("field", "value"),
    [("cpu", "Another CPU"), ("cores", 8), ("threads", 4), ("device", "cuda:0"), ("platform", "Darwin arm64")],
)
def test_other_machines_are_refused_by_name(invoke: Invoke, field: str, value: Any) -> None:
    other = result(environment={field: value})
    done = invoke(result(), other)
    assert done.exit_code == 2
    assert f"{field}: {MACHINE[field]} in A.json, {value} in B.json" in done.stderr
    done = invoke(result(), other, "--different-machines")
    assert done.exit_code == 0
    assert f"different machines: {field}: {MACHINE[field]} in A.json, {value} in B.json" in done.output


def test_every_difference_of_machines_is_named(invoke: Invoke) -> None:
    done = invoke(result(environment={"gpu": "GPU 1"}), result(environment={"gpu": "GPU 2", "threads": 4}))
    assert done.exit_code == 2
    assert "gpu: GPU 1 in A.json, GPU 2 in B.json" in done.stderr
    assert "threads: 2 in A.json, 4 in B.json" in done.stderr
    assert "cpu:" not in done.stderr
    done = invoke(result(environment={"gpu": "GPU 1"}), result())
    assert "gpu: GPU 1 in A.json, – in B.json" in done.stderr


def test_other_versions_and_settings_are_told_and_compared(invoke: Invoke) -> None:
    new = result(environment={"torch": "2.14.0", "commit": "def", "triton": None, "created": "later"}, seed=1)
    done = invoke(result(seed=0), new)
    assert done.exit_code == 0
    for line in ("torch: 2.13.0 → 2.14.0", "commit: abc → def", "triton: 3.7.1 → –", "speed's seed: 0 → 1"):
        assert line in done.output.splitlines()
    assert "created:" not in done.output


def test_files_of_several_parts(invoke: Invoke) -> None:
    def file(*seconds: float, dtype: str = "fp32") -> Evidence:
        parts = [linear_result(one) for one in seconds]
        for part, mode in zip(parts, ("both", "forward"), strict=True):
            part.settings = {"mode": mode, "dtype": dtype}
        for row in parts[1].rows:
            row.case = dataclasses.replace(row.case, mode="forward")
        return Evidence.of_parts([result(), *parts], environment=dict(MACHINE), settings={})

    done = invoke(file(1.0, 0.5), file(1.0, 0.5))
    assert done.exit_code == 0, done.output
    assert "linear's " not in done.output  # parts differ from one another, and no file from the other
    done = invoke(file(1.0, 0.5), file(1.0, 0.7, dtype="bf16"))
    assert done.exit_code == 1
    assert "linear's dtype: fp32 → bf16" in done.output
    assert "linear's mode" not in done.output
    assert "head forward hpo_fused 508 710 1.40 ▲" in flat(done.output)
    assert "2 of 7 rows of hpo_fused regressed." in done.output
    assert "only in" not in done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read B.json: No such file"),
        ("{}", "B.json is not a result"),
        ("nonsense", "B.json is not a result"),
        (json.dumps({"schema_version": 99}), "B.json has schema version 99; this"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "command": "curves"}), "B.json is not a result"),
    ],
)  # fmt: skip
def test_unreadable_files(invoke: Invoke, content: str | None, message: str) -> None:
    done = invoke(result(), content)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda one: one["environment"].pop("cores"), "B.json: its environment has no field 'cores'"),
        (lambda one: one.update(environment=[]), "B.json: its field 'environment' must be an object"),
        (lambda one: one.update(settings=None), "B.json: its field 'settings' must be an object"),
        (lambda one: one.pop("settings"), "B.json is not a result of hpo-fused-bench speed"),
        (lambda one: one["rows"][0].update(q20_s="1"), "hpo_fused: q20_s must be a number"),
        (lambda one: one["rows"][0].update(peak_extra_bytes=-1), "hpo_fused: peak_extra_bytes must be a number"),
    ],
)
def test_edited_files(invoke: Invoke, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    content = json.loads(result().to_json())
    edit(content)
    done = invoke(result(), json.dumps(content))
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_nothing_in_common(invoke: Invoke) -> None:
    done = invoke(result(), linear_result())
    assert done.exit_code == 2
    assert "A.json and B.json have no row in common" in done.stderr
    # Others alone could never regress: that is not the same as no regression.
    done = invoke(result({"eager": 1.0, "copy": 1.0}), result())
    assert done.exit_code == 2
    assert "no row of hpo_fused in common that is ok in A.json" in done.stderr
