"""Limits, tables and pictures of the linear path, on results made by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf

pytest.importorskip("rich", reason="needs the bench extra")
pytest.importorskip("typer", reason="needs the bench extra")

from rich.console import Console

from hpo_fused.bench import files
from hpo_fused.bench.linear import limits, memory, report
from hpo_fused.bench.linear.cases import HEADS, HeadShape, LinearCase
from hpo_fused.bench.linear.providers.fused import Fused
from hpo_fused.bench.linear.providers.gemms import Gemms
from hpo_fused.bench.linear.results import LinearErrors, LinearResult, LinearRow, RowErrors, summarise
from hpo_fused.bench.results import (
    MemoryRow,
    Prediction,
    Result,
)
from hpo_fused.bench.sheet import Sheet

from .bench_helpers import problem_of

CPU = torch.device("cpu")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command line, with a small 7B model."""
    monkeypatch.setattr(memory, "SEVEN_B_HEAD", HeadShape("small-7b", 64, 800))
    monkeypatch.setattr(memory, "SEVEN_B_TOKENS", 512)
    return invoke


# ---------------------------------------------------------------------------------------------------------------
# limits, tables, pictures, on results made by hand


def case_of(inactive: float = 0.0, tokens: int = 1024, chunk: int | None = None) -> LinearCase:
    return LinearCase.of_tokens(HEADS["qwen2.5-0.5b"], tokens, "bf16", "grpo", inactive, chunk)


def made(seconds: dict[str, float] | None = None, at_quarter: float = 0.25, **environment: Any) -> LinearResult:
    """A result with three rounds of each provider's seconds, ours at 75% inactive, and memory."""
    rows = [
        LinearRow(case_of(), name, samples_s=[value, value * 1.1, value * 1.2], gradient_bytes=1 << 28)
        for name, value in (seconds or {}).items()
    ]
    if seconds and "hpo_fused" in seconds:
        ours = seconds["hpo_fused"] * at_quarter
        rows.append(LinearRow(case_of(0.75), "hpo_fused", samples_s=[ours, ours * 1.1, ours * 1.2]))
    summarise(rows, "hpo_fused", dict.fromkeys([row.provider for row in rows], True))
    found = {"torch": "2.13", "python": "3.11", "hpo_fused": "0.1", "cpu": "a CPU", "threads": 2, **environment}
    return LinearResult(found, {}, rows=rows)


def memory_row(
    series: str, beyond: float, tokens: int = 1024, chunk: int | None = None, **changes: Any
) -> MemoryRow:  # fmt: skip
    """Ours, with so many MiB beyond gradients and accumulator."""
    case = case_of(0.0, tokens, chunk)
    prediction = Prediction(**case.memory("cpu")._asdict())
    row = MemoryRow(series, case, "hpo_fused", "cpu", prediction=prediction, gradient_bytes=prediction.gradients)
    row.peak_extra_bytes = prediction.gradients + prediction.accumulator + int(beyond * (1 << 20))
    return dataclasses.replace(row, **changes)


def verdicts(result: LinearResult) -> dict[str, bool | None]:
    return {limit.what: limit.met for limit in limits.limits(result)}


SECONDS = {"hpo_fused": 1.0, "eager": 2.0, "linear_cross_entropy": 0.9, "gemms": 0.8}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"linear_cross_entropy": 0.8}, ["time ÷ linear_cross_entropy"]),
        ({"eager": 1.7}, ["eager's time ÷ ours (÷ three bare GEMMs: 2.12×)"]),
        ({"gemms": 0.7}, ["time ÷ three bare GEMMs"]),
        ({"gemms": 0.75}, []),
        (
            {"hpo_fused": 2.0},
            [
                "time ÷ three bare GEMMs",
                "time ÷ linear_cross_entropy",
                "eager's time ÷ ours (÷ three bare GEMMs: 2.50×)",
            ],
        ),
    ],
)
def test_limits_of_time_on_a_cpu(changes: dict[str, float], missed: list[str]) -> None:
    result = made({**SECONDS, **changes})
    assert [limit.what for limit in limits.missed(result)] == missed
    assert len(limits.limits(result)) == 4


def test_limit_of_the_inactive_share() -> None:
    what = "time at 75% inactive ÷ at 0%"
    assert verdicts(made(SECONDS, 0.34))[what] is True
    assert verdicts(made(SECONDS, 0.36))[what] is False
    only = made({"hpo_fused": 1.0})
    only.rows = only.rows[1:]
    only.rows[0].ratio_to_full = None
    assert verdicts(only)[what] is None  # nothing to compare with


@pytest.mark.parametrize(("gemms", "met"), [(0.88, True), (0.86, False)])
def test_limits_of_time_on_a_gpu(gemms: float, met: bool) -> None:
    found = verdicts(made({**SECONDS, "gemms": gemms}, gpu="H200"))
    assert found == {"time ÷ three bare GEMMs": met, "time at 75% inactive ÷ at 0%": True}


def test_limits_of_memory() -> None:
    budget = 256 * 151936 * 2  # 74.2 MiB

    def found(*beyond: float) -> list[bool | None]:
        result = made()
        result.memory = [
            memory_row(memory.BUDGET, b, n, budget) for b, n in zip(beyond, (512, 1024, 2048), strict=True)
        ]
        return [limit.met for limit in limits.limits(result)][:2]

    assert found(90, 91, 91) == [True, True]
    assert found(90, 90, 139) == [False, False]
    assert found(90, 90, 91.6) == [True, False]  # grows with the tokens
    result = made()
    result.memory = [memory_row(memory.BUDGET, 1, 512, budget, status="failed", peak_extra_bytes=None)]
    assert [limit.met for limit in limits.limits(result)] == [None, None]


def test_limits_of_a_7b_model() -> None:
    seven = dataclasses.replace(case_of(tokens=16384), shape=HEADS["qwen2.5-7b"])
    result = made()
    bench = memory.MemoryBench(CPU, 0, result.memory, None)  # type: ignore[arg-type]
    bench.predict(memory.SEVEN_B, seven, Fused(), "cuda")
    assert [(limit.limit, limit.measured, limit.met) for limit in limits.limits(result)] == [
        ("≤ 1 GiB", f"{hf.linear_memory(16384, 3584, 152064).extra / 2**30:.3f} GiB", True)
    ]
    cut = "measured ÷ predicted extra, qwen2.5-0.5b, 1024 of 1024 tokens active"
    predicted = case_of().memory("cpu").extra / 2**20
    for beyond, met in ((predicted - 1, True), (predicted + 1, False)):
        result.memory[1:] = [memory_row(memory.SEVEN_B, beyond)]
        assert verdicts(result)[cut] is met
    result.memory[1:] = [memory_row(memory.SEVEN_B, 100, status="out_of_memory", peak_extra_bytes=None)]
    assert verdicts(result)[cut] is None
    for beyond, met in ((1023, True), (1025, False)):  # all of it, as a GPU does
        row = memory_row(memory.SEVEN_B, 0)
        prediction = Prediction(**seven.memory("cuda")._asdict())
        row.case, row.prediction, row.gradient_bytes = seven, prediction, prediction.gradients
        row.peak_extra_bytes = prediction.gradients + prediction.accumulator + (beyond << 20)
        result.memory[1:] = [row]
        assert verdicts(result)["the same measured"] is met


class Products(TorchDispatchMode):
    """The shapes of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(tuple(value.shape) for value in args[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inactive", [0.0, 0.5])
@pytest.mark.parametrize("rows", [None, 20])
def test_the_floor_does_the_three_products_of_the_same_chunks(inactive: float, rows: int | None) -> None:
    problem = problem_of()
    chunk = None if rows is None else rows * 97 * 4
    inputs = problem.inputs(inactive)
    inputs = dataclasses.replace(inputs, case=dataclasses.replace(inputs.case, chunk_bytes=chunk))
    shapes = []
    for provider in (Gemms(), Fused("torch")):
        provider.prepare(inputs.case, CPU)
        with Products() as products:
            provider.step(inputs)
        shapes.append(sorted(products.shapes))
    active = 64 if inactive else 128
    assert shapes[0] == shapes[1]
    assert sum(left[0] for left, right in shapes[0] if right == (48, 97)) == active
    assert len(shapes[0]) == 3 * -(-active // (rows or 128))


@pytest.mark.parametrize("options", [("--provider", "hpo_fused:triton"), ("--tokens", "131", "--provider", "eager")])
def test_check_fails_where_nothing_of_ours_was_measured(invoke: Invoke, options: tuple[str, ...]) -> None:
    done = invoke("linear", "--shape", "custom:H=16,V=97", "--no-memory", "--check", "--quick", *options)
    assert done.exit_code == 1


def test_a_wrong_result_of_ours_is_told_whatever_the_limits() -> None:
    result = made(SECONDS)
    assert not list(limits.wrong(result))
    result.rows[1].status = "wrong"  # eager
    assert not list(limits.wrong(result))
    assert report.verdict(result) == "hpo_fused: 4 of 4 limits met."
    assert report.verdict(made()) == "No limit was measured."
    result.rows[0].repeats = False
    result.rows[-1].status, result.rows[-1].note = "wrong", "loss off by 1"
    assert list(limits.wrong(result)) == [
        "hpo_fused at 0% inactive: a second call gave another result",
        "hpo_fused at 75% inactive is wrong: loss off by 1",
    ]
    assert "WRONG" in report.verdict(result)


def test_statistics() -> None:
    result = made(SECONDS)
    ours, eager, *_, quarter = result.rows
    assert ours.median_s == pytest.approx(1.1)
    assert eager.ratio_to_ours == pytest.approx(2.0)
    assert ours.share_of_gemms == pytest.approx(0.8)
    assert quarter.ratio_to_full == pytest.approx(0.25)
    assert ours.tflop_per_s == pytest.approx(6 * 1024 * 896 * 151936 / 1.1 / 1e12)
    assert quarter.tflop_per_s == pytest.approx(ours.tflop_per_s)  # a quarter of the rows in a quarter of the time
    assert (quarter.share_of_gemms, quarter.ratio_to_ours) == (None, 1.0)


def full_result() -> LinearResult:
    """Everything that a result can hold."""
    result = made({**SECONDS, "compile": 1.9})
    for row in result.rows:
        row.errors = LinearErrors(1e-8, RowErrors(3e-7, 1e-7), 1, RowErrors(3e-3, 2e-3), RowErrors(4e-3, 2e-3))
        row.peak_extra_bytes = 1 << 29
    result.rows[3].errors, result.rows[3].peak_extra_bytes = None, None
    sizes = (256, 512, 1024)
    result.memory = [memory_row(memory.TOKENS, 300, tokens) for tokens in sizes]
    for tokens in sizes:
        peak = tokens * 151936 * 14 + (1 << 28)
        result.memory.append(MemoryRow(memory.TOKENS, case_of(0, tokens), "eager", "cpu", peak_extra_bytes=peak))
    result.memory.append(MemoryRow(memory.TOKENS, case_of(), "compile", "cpu", "skipped", "slow"))
    result.memory.sort(key=lambda row: row.case.tokens)
    result.memory += [memory_row(memory.BUDGET, 100, tokens, 1 << 27) for tokens in (512, 1024)]
    result.memory.append(memory_row(memory.SEVEN_B, 0, 16384, status="predicted", peak_extra_bytes=None))
    return result


def test_file_round_trip(tmp_path: Path) -> None:
    result = full_result()
    result.write(tmp_path / "r.json")
    assert LinearResult.read(tmp_path / "r.json") == result
    assert files.read(tmp_path / "r.json") == result
    assert json.loads((tmp_path / "r.json").read_text())["schema_version"] == 2
    with pytest.raises(ValueError, match="not a result of hpo-fused-bench speed"):
        Result.read(tmp_path / "r.json")


def test_committed_results_can_still_be_read() -> None:
    for path in (Path(__file__).parent.parent / "bench" / "results").glob("*.json"):
        assert files.markdown(files.read(path)).startswith("|")


def test_markdown_tables_are_whole() -> None:
    text = report.markdown(full_result())
    lines = text.splitlines()
    blocks = [list(map(str.strip, block.splitlines())) for block in text.split("\n\n")]
    tables = [block for block in blocks if block[0].startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "| inactive | provider | ms | 20–80 % | ÷ ours | TFLOP/s | % of gemms | peak MiB | of it grad. |" in lines
    assert any(
        line.startswith("| **0%** | **hpo_fused** | 1100 | 1040–1160 | 1.00× | 0.760 | 80.0 |") for line in lines
    )
    assert "| tokens | hpo_fused | predicted | beyond | eager | compile |" in lines
    assert any(line.startswith("| 1024 |") and line.endswith("| skipped |") for line in lines)
    assert "- memory of compile at 1024 tokens: skipped: slow" in lines


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    stream = StringIO()
    console = Console(file=stream, width=width)
    for sheet, _ in report.sections(full_result()):
        console.print(sheet.table())
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "linear_cross_entropy" in text


def test_no_digit_is_cut_at_80_columns_whatever_the_names() -> None:
    """Names of providers are cells of one table and headings of another."""
    long = ["another_project:ItsOwnPolicyLoss", "yetanotherprojectwithoutanybreak", "hpo_fused:torch", "liger:chunked"]
    assert {len(name) for name in long[:2]} == {32}
    result = full_result()
    rows, memory_rows = list(result.rows), list(result.memory)
    for name in long:
        eager = next(row for row in rows if row.provider == "eager")
        samples = [104.76, 104.98, 105.03]
        result.rows.append(
            dataclasses.replace(eager, provider=name, median_s=104.98, q20_s=104.76, q80_s=105.03, samples_s=samples)
        )
        for row in memory_rows:
            if row.provider == "eager":
                one = dataclasses.replace(row, provider=name, peak_extra_bytes=123456 << 20)
                gone = dataclasses.replace(one, status="out_of_memory", peak_extra_bytes=None)
                result.memory.append(one if row.case.tokens < 1024 else gone)
    result.memory.sort(key=lambda row: row.case.tokens)
    stream = StringIO()
    for sheet, _ in report.sections(result):
        Console(file=stream, width=80).print(sheet.table())
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.split().count("104980") == text.split().count("104760–105030") == 4
    assert text.split().count("123456") == 4 * 2
    for sheet in (report.times(result), report.errors(result), report.memory(result)):
        for cells, _ in sheet.rows:
            assert {cell for cell in cells[2:] if cell and not cell.isalpha() and " " not in cell} <= set(text.split())


def test_a_sheet_says_the_same_twice() -> None:
    view = Sheet("Title", ("name", "kind", "num-\nber"), 2)
    view.add("a", "x", "1", ours=True)
    view.add("a", "y", "2")
    view.end_section()
    view.add("b")
    assert view.markdown() == [
        "Title:", "", "| name | kind | number |", "|---|---|---:|", "| **a** | **x** | 1 |", "| a | y | 2 |",
        "| b |  |  |",
    ]  # fmt: skip
    stream = StringIO()
    Console(file=stream, width=40).print(view.table())
    assert stream.getvalue().count("a ") == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(invoke: Invoke, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    full_result().write(Path("r.json"))
    done = invoke("plot", "r.json", "--output", f"deep/p.{suffix}")
    assert done.exit_code == 0, done.output
    picture = Path(f"deep/p.{suffix}").read_bytes()
    if suffix == "png":
        from PIL import Image

        with Image.open(f"deep/p.{suffix}") as image:
            assert image.width > image.height > 500
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
        return
    text = picture.decode()
    assert text.rstrip().endswith("</svg>")
    for word in ("Peak memory beyond the inputs", "hpo_fused", "eager", "gemms", "512 MiB"):
        assert f"<!-- {word}" in text, word
    invoke("plot", "r.json", "--output", "again.svg")
    assert Path("again.svg").read_bytes() == picture


@pytest.mark.parametrize(
    ("content", "output", "missing", "message"),
    [
        (None, "p.png", False, "cannot read"),
        ("{}", "p.png", False, "not a result"),
        ("speed", "p.png", False, "holds neither times nor memory nor errors"),
        ("empty", "p.png", False, "holds neither times nor memory"),
        ("full", "p.xyz", False, "not supported"),
        ("full", "p.png", True, "needs matplotlib: pip install 'hpo-fused[bench]'"),
    ],
)
def test_plot_says_what_is_wrong(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, content: str | None, output: str, missing: bool, message: str
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    elif content in ("speed", "empty", "full"):
        pytest.importorskip("matplotlib")
    made_of = {"speed": Result({}, {}).to_json(), "empty": made().to_json(), "full": full_result().to_json()}
    if content is not None:
        Path("r.json").write_text(made_of.get(content, content))
    done = invoke("plot", "r.json", "--output", output)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
