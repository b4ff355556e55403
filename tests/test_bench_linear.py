"""The commands on the linear path, from the command line to the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo_fused as hf

pytest.importorskip("rich", reason="needs the bench extra")
pytest.importorskip("typer", reason="needs the bench extra")


from hpo_fused.bench import files
from hpo_fused.bench.linear import limits, memory
from hpo_fused.bench.linear.cases import HEADS, HeadShape
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.linear.providers import PROVIDERS, create
from hpo_fused.bench.linear.providers.fused import Fused
from hpo_fused.bench.linear.providers.plain import Eager
from hpo_fused.bench.linear.results import LinearResult
from hpo_fused.bench.providers import Output
from hpo_fused.bench.results import (
    Prediction,
)
from hpo_fused.bench.trial import Step

from .bench_helpers import zero_row

SHAPE = "custom:H=48,V=300"
TINY = ("--shape", SHAPE, "--device", "cpu")
TIMED = (*TINY, "--tokens", "64", "--repeats", "3", "--no-memory")
PLAIN = ("--provider", "hpo_fused:torch", "--provider", "eager", "--provider", "gemms")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command line, with a small 7B model."""
    monkeypatch.setattr(memory, "SEVEN_B_HEAD", HeadShape("small-7b", 64, 800))
    monkeypatch.setattr(memory, "SEVEN_B_TOKENS", 512)
    return invoke


# ---------------------------------------------------------------------------------------------------------------
# the command line


def test_linear_end_to_end(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke(
        "linear", *TINY, "--tokens", "64", "--repeats", "3", "--budget", "0", *PLAIN, "--memory-tokens", "32",
        "--memory-tokens", "64", "--inactive", "0", "--inactive", "0.75", "--output", "deep/r.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("Against float64", "Peak memory", "in parts", "Limits", "predicted", "small-7b", "Wrote deep/r.json"):
        assert word in done.output
    assert "limits met" in done.output
    result = files.read(tmp_path / "deep" / "r.json")
    assert isinstance(result, LinearResult)
    assert (result.command, result.interrupted, result.settings["inactive"]) == ("linear", False, [0.0, 0.75])
    assert [(row.provider, row.case.inactive) for row in result.rows] == [
        ("hpo_fused:torch", 0.0), ("eager", 0.0), ("gemms", 0.0), ("hpo_fused:torch", 0.75), ("gemms", 0.75),
    ]  # fmt: skip
    for row in result.rows:
        assert row.status == "ok", row.note
        assert len(row.samples_s) == 3
        assert row.tflop_per_s
        assert row.ratio_to_ours
        assert (row.errors is None) is row.is_floor
    ours, eager, gemms, quarter, _ = result.rows
    assert ours.repeats is True
    assert (ours.ratio_to_ours, gemms.share_of_gemms) == (1, 1)
    assert ours.gradient_bytes == eager.gradient_bytes == (64 * 48 + 48 * 300) * 2
    assert quarter.ratio_to_full is not None
    assert eager.peak_extra_bytes is not None
    assert eager.peak_extra_bytes > 2 * 64 * 300 * 4
    for memory_row in result.memory:
        assert memory_row.status == ("ok" if memory_row.peak_extra_bytes else "predicted"), memory_row.note
        if memory_row.prediction is not None and memory_row.peak_extra_bytes is not None:
            assert memory_row.peak_extra_bytes <= memory_row.prediction.peak
    assert {row.series for row in result.memory} == {"tokens", "budget", "7b"}
    printed = invoke("report", "deep/r.json")
    assert printed.exit_code == 0, printed.output
    assert "| **0%** | **hpo_fused:torch** |" in printed.output


def test_memory_alone(invoke: Invoke) -> None:
    done = invoke(
        "memory", *TINY, *PLAIN, "--tokens", "32", "--tokens", "64", "--chunk-mib", "0.01", "--output", "m.json"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("m.json"))
    assert (result.command, result.rows) == ("memory", [])
    first = next(result.of_series("tokens"))
    assert first.case.chunk_bytes == int(0.01 * (1 << 20))
    expected = hf.linear_memory(32, 48, 300, chunk_bytes=first.case.chunk_bytes, device="cpu")
    assert first.prediction == Prediction(**expected._asdict())
    assert {row.provider for row in result.memory} == {"hpo_fused:torch", "eager"}
    assert "÷ ours" not in done.output


def test_memory_of_a_forward_alone(invoke: Invoke) -> None:
    """With a fixed chunk budget and of the 7B model it is a step's, as the limits are."""
    run = ("memory", "--op", "linear", *TINY, "--provider", "hpo_fused:torch", "--provider", "eager", "--tokens", "64")
    for mode in ("forward", "both"):
        done = invoke(*run, "--mode", mode, "--output", "m.json")
        assert done.exit_code == 0, done.output
        result = LinearResult.read(Path("m.json"))
        for row in result.of_series("tokens"):
            assert (row.case.mode, row.gradient_bytes > 0) == (mode, mode == "both")
        assert {row.case.mode for series in ("budget", "7b") for row in result.of_series(series)} == {"both"}


def test_predictions_of_the_7b_model_are_for_both_devices(invoke: Invoke) -> None:
    done = invoke("memory", *TINY, "--provider", "hpo_fused:torch", "--tokens", "16", "--quick", "--output", "m.json")
    assert done.exit_code == 0, done.output
    rows = list(LinearResult.read(Path("m.json")).of_series("7b"))
    assert [(row.device, row.status, row.case.tokens) for row in rows] == [
        ("cuda", "predicted", 512), ("cpu", "predicted", 512),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [("--objective", "gspo", "--dtype", "fp16"), ("--dtype", "fp32"), ("--chunk-mib", "0.02")]
)
def test_variants_are_right_and_timed(invoke: Invoke, options: tuple[str, ...]) -> None:
    done = invoke("linear", *TIMED, *PLAIN, *options, "--shape", "custom:H=48,V=300,softcap=20", "--output", "r.json")
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("r.json"))
    assert {row.status for row in result.rows} == {"ok"}
    assert [row.case.inactive for row in result.rows if row.is_ours] == [0.0, 0.5, 0.75, 0.9]
    assert result.memory == []


def test_cross_entropy_runs_or_says_why_not(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("linear", *TIMED, "--provider", "linear_cross_entropy", "--inactive", "0", "--output", "r.json")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    (row,) = LinearResult.read(Path("r.json")).rows
    assert row.status == ("ok" if hasattr(torch.nn.functional, "linear_cross_entropy") else "skipped")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "linear_cross_entropy: skipped: needs PyTorch >= 2.13" in " ".join(done.output.split())


def test_torch_compile(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case is compiled anew; here by the tracer alone, since tests/test_bench.py has a real compilation."""
    compiled, compile_ = [], torch.compile

    def traced(function: Any, *, dynamic: bool) -> Any:
        compiled.append(function.__code__.co_name)
        return compile_(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    done = invoke("linear", *TIMED, "--provider", "compile", "--inactive", "0", "--output", "r.json")
    assert done.exit_code == 0, done.output
    (row,) = LinearResult.read(Path("r.json")).rows
    assert row.status == "ok", row.note
    (name,) = compiled
    assert name.startswith("plain_linear_loss_")


def broken(base: type, change: Callable[..., Any]) -> type:
    """A provider whose gradients are changed."""

    def step(self: Any, inputs: LinearInputs, begun: Output | None = None) -> Step:
        found: Step = base.step(self, inputs, begun)
        return found._replace(gradients=tuple(change(*found.gradients)))

    return type("Wrong", (base,), {"step": step})


@pytest.mark.parametrize(
    "change",
    [
        lambda dh, dw: (dh, 1.01 * dw),
        lambda dh, dw: (zero_row(37)(dh), dw),
    ],
)
@pytest.mark.parametrize(
    ("name", "base", "ours"), [("hpo_fused:torch", lambda: Fused("torch"), True), ("eager", Eager, False)]
)
def test_a_wrong_provider_is_reported_and_not_timed(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any], name: str, base: Callable[[], Any],
    ours: bool,
) -> None:  # fmt: skip
    """Whoever it is fails the run, as on logits; that this package is wrong is said of ours alone."""
    kind = broken(type(base()), change)
    monkeypatch.setitem(PROVIDERS, name, lambda: kind(*(["torch"] if ours else [])))
    done = invoke("linear", *TIMED, *PLAIN, "--inactive", "0", "--output", "r.json")
    assert done.exit_code == 1, done.output
    rows = {row.provider: row for row in LinearResult.read(Path("r.json")).rows}
    assert (rows[name].status, rows[name].samples_s, rows[name].median_s) == ("wrong", [], None)
    assert f"{name} at 0%: wrong: gradient of" in " ".join(done.output.split())
    assert ("WRONG" in done.output) is ours
    assert {row.status for other, row in rows.items() if other != name} == {"ok"}


def test_check_fails_on_a_missed_limit(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EAGER_OVER", 1e9)
    assert invoke("linear", *TIMED, *PLAIN, "--inactive", "0").exit_code == 0
    assert invoke("linear", *TIMED, *PLAIN, "--inactive", "0", "--check").exit_code == 1


class Failing(Eager):
    """A provider that raises from one of its calls on."""

    name = "failing"
    error: BaseException = RuntimeError("boom\nand a page of C++")
    from_call = 0

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, inputs: LinearInputs) -> Output:
        self.calls += 1
        if self.calls > self.from_call:
            raise self.error
        return super().forward(inputs)


def install(monkeypatch: pytest.MonkeyPatch, error: BaseException, from_call: int = 0) -> None:
    kind = type("Fails", (Failing,), {"error": error, "from_call": from_call})
    monkeypatch.setitem(PROVIDERS, "failing", kind)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("boom\nand a page of C++"), "failed", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", 0),
    ],
)
def test_a_provider_that_raises_stops_nobody_else(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, code: int
) -> None:
    install(monkeypatch, error)
    done = invoke(
        "linear", *TINY, "--tokens", "64", "--repeats", "3", "--memory-tokens", "32", "--inactive", "0", "--quick",
        "--provider", "failing", "--provider", "eager", "--output", "r.json",
    )  # fmt: skip
    assert done.exit_code == code, done.output
    result = LinearResult.read(Path("r.json"))
    assert [row.status for row in result.rows] == [status, "ok"]
    assert [row.status for row in result.memory] == [status, "ok"]
    assert "C++" not in done.output


def test_interrupt_keeps_finished_rounds(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third timed round: the first call, the memory pass and the warm-up came before."""
    install(monkeypatch, KeyboardInterrupt(), from_call=5)
    done = invoke(
        "linear", *TINY, "--tokens", "64", "--repeats", "4", "--inactive", "0", "--provider", "eager", "--provider",
        "failing", "--output", "r.json",
    )  # fmt: skip
    assert done.exit_code == 130
    assert "Interrupted" in done.output
    result = LinearResult.read(Path("r.json"))
    assert result.interrupted
    assert [len(row.samples_s) for row in result.rows] == [2, 2]
    assert all(row.median_s is not None for row in result.rows)
    assert result.memory == []


def test_interrupt_keeps_measured_memory(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, KeyboardInterrupt(), from_call=2)
    done = invoke("memory", *TINY, "--tokens", "16", "--tokens", "32", "--provider", "failing", "--output", "r.json")
    assert done.exit_code == 130
    result = LinearResult.read(Path("r.json"))
    assert [row.status for row in result.memory] == ["ok", "skipped"]
    assert "interrupted before it was measured" in done.output


@pytest.mark.parametrize("command", [("linear", "--tokens", "64", "--inactive", "0"), ("memory", "--tokens", "64")])
def test_what_would_not_fit_is_skipped(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Linux kills the process that asks for too much, and every result with it."""
    monkeypatch.setattr("hpo_fused.bench.trial.available_bytes", lambda: 50_000)
    done = invoke(*command, *TINY, *PLAIN, "--quick", "--output", "r.json")
    assert done.exit_code == 0, done.output
    result = LinearResult.read(Path("r.json"))
    assert {row.status for row in result.rows} <= {"out_of_memory"}
    assert {row.status for row in result.memory} == {"out_of_memory", "predicted"}
    assert "GiB are free" in done.output


def test_compile_memory_is_measured_up_to_a_size(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Small", (Eager,), {"name": "small", "largest": 20_000, "slow_start": "slow"})
    monkeypatch.setitem(PROVIDERS, "small", kind)
    invoke("memory", *TINY, "--tokens", "32", "--tokens", "64", "--provider", "small", "--output", "r.json")
    rows = LinearResult.read(Path("r.json")).memory
    assert [row.status for row in rows] == ["ok", "skipped"]
    assert rows[1].note.startswith("slow: measured up to")


@pytest.mark.parametrize("command", ["linear", "memory"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shape", "qwen9"), ["unknown shape 'qwen9'", "qwen2.5-0.5b", "custom:H=N"]),
        (("--provider", "magic"), ["unknown provider 'magic'", "hpo_fused:torch", "linear_cross_entropy", "gemms"]),
        (("--objective", "ppo"), ["unknown objective 'ppo'", "mhpo_ahpo"]),
        (("--dtype", "int8"), ["unknown dtype 'int8'", "bf16"]),
        (("--chunk-mib", "0.001"), ["less than one row"]),
        (("--device", "tpu9"), ["unknown device 'tpu9'", "cuda:N"]),
        (("--output", "."), ["cannot write"]),
    ],
)
def test_unknown_names_say_what_there_is(
    invoke: Invoke, command: str, arguments: tuple[str, ...], expected: list[str]
) -> None:
    done = invoke(command, *arguments)
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert all(word in text for word in expected), text


def test_listing(invoke: Invoke) -> None:
    listed = invoke("shapes")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in [*HEADS, "3584", "custom:H=N"])


def test_providers_are_documented() -> None:
    for name in PROVIDERS:
        provider = create(name)
        assert (provider.name, bool(provider.summary)) == (name, True)
