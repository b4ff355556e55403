"""The pytest-benchmark suite: who runs on what, what is timed, skipped and refused, and what its file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="needs the bench extra")
pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

from hpo_fused.bench.matrix import OPERATIONS, Operation
from hpo_fused.bench.providers import DEFAULT
from hpo_fused.bench.suite import conftest as suite
from hpo_fused.bench.suite.problems import Drawn, Latest, Problem, problems_of

CHECKOUT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LOGITS, HEAD = "custom:V=300", "custom:H=48,V=300"
ROUNDS = 3

# Providers that nobody ships, registered as another distribution's would be; and a record of what the run found.
PLUGIN = """
    import json
    import sys

    from hpo_fused.bench.linear.providers import PROVIDERS as LINEAR
    from hpo_fused.bench.linear.providers.plain import Eager as LinearEager
    from hpo_fused.bench.providers import PROVIDERS, Unavailable
    from hpo_fused.bench.providers.fused import Fused
    from hpo_fused.bench.providers.plain import Eager

    class Wrong(Eager):
        def forward(self, inputs, logits):
            out = super().forward(inputs, logits)
            return out._replace(loss=1.01 * out.loss)

    class LinearWrong(LinearEager):
        def forward(self, inputs):
            out = super().forward(inputs)
            return out._replace(loss=1.01 * out.loss)

    class Elsewhere(Eager):
        def prepare(self, case, device):
            raise Unavailable("runs on the moon only")

    class Broken(Eager):
        def forward(self, inputs, logits):
            raise RuntimeError("this provider broke")

    class Inexact(Fused):
        def forward(self, inputs, logits):
            out = super().forward(inputs, logits)
            return out._replace(logprobs=out.logprobs - 1e-5)

    PROVIDERS.update(
        wrong=Wrong, elsewhere=Elsewhere, broken=Broken, **{"hpo_fused:inexact": lambda: Inexact("torch")}
    )
    LINEAR.update(wrong=LinearWrong)

    def pytest_sessionfinish():
        with open("paths.json", "w") as file:
            json.dump(sys.path, file)
"""


def run_pytest(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Pytest as a command, run from ``cwd`` without this run's own environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "TRITON_", "COV_"))}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


class Outcome:
    """A run of the suite: what it printed, its file, and the path that modules were searched on."""

    def __init__(self, folder: Path) -> None:
        (folder / "moon.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
        providers = ("hpo_fused:torch", "eager", "copy", "gemms", "elsewhere", "wrong", "broken", "hpo_fused:inexact")
        self.done = run_pytest(
            str(CHECKOUT / "bench" / "suite"), "-p", "moon", "--benchmark-json", "out.json",
            "--bench-device", "cpu", "--bench-op", "logits", "--bench-op", "linear", "--bench-rounds", str(ROUNDS),
            "--bench-shape", LOGITS, "--bench-shape", HEAD, "--bench-dtype", "fp32",
            "--bench-mode", "both", "--bench-mode", "forward",
            *(word for provider in providers for word in ("--bench-provider", provider)),
            cwd=folder,
        )  # fmt: skip
        assert (folder / "out.json").exists(), self.done.stdout + self.done.stderr
        self.content = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        self.paths = json.loads((folder / "paths.json").read_text(encoding="utf-8"))

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return {entry["name"]: entry for entry in self.content["benchmarks"]}

    def lines(self, kind: str) -> list[str]:
        """Of the summary, those of failed or skipped tests."""
        return [line for line in self.done.stdout.splitlines() if line.startswith(kind)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run with everything in it."""
    return Outcome(tmp_path_factory.mktemp("suite"))


def named(op: str, shape: str, tokens: int, mode: str, provider: str) -> str:
    return f"test_provider[{op}-{shape}-{tokens}-fp32-{mode}-{provider}]"


def test_right_ones_are_timed_and_only_they(outcome: Outcome) -> None:
    expected = {
        named(op, shape, tokens, mode, provider)
        for op, shape, tokens, providers in (
            ("logits", LOGITS, 64, ("hpo_fused:torch", "eager", "copy")),
            ("linear", HEAD, 32, ("hpo_fused:torch", "eager", "gemms")),
        )
        for mode in ("both", "forward")
        for provider in providers
    }
    assert {name for name, entry in outcome.entries.items() if entry["stats"]["rounds"]} == expected


def test_entries_tell_the_case_the_speed_and_the_machine(outcome: Outcome) -> None:
    entry = outcome.entries[named("logits", LOGITS, 64, "both", "hpo_fused:torch")]
    assert len(entry["stats"]["data"]) == ROUNDS
    assert entry["group"] == f"logits-{LOGITS}-64-fp32-both"
    info = entry["extra_info"]
    assert (info["op"], info["provider"], info["case"]["shape"]["vocabulary"]) == ("logits", "hpo_fused:torch", 300)
    traffic = 2 * 64 * 300 * 4
    assert info["gb_per_s"] == pytest.approx(traffic / entry["stats"]["median"] / 1e9)
    assert info["gradient_bytes"] == traffic / 2
    assert info["peak_extra_bytes"] >= info["gradient_bytes"]
    assert info["environment"]["torch"] == torch.__version__
    assert info["environment"]["device"] == "cpu"
    forward = outcome.entries[named("logits", LOGITS, 64, "forward", "eager")]
    assert forward["extra_info"]["gb_per_s"] == pytest.approx(traffic / 2 / forward["stats"]["median"] / 1e9)
    linear = outcome.entries[named("linear", HEAD, 32, "both", "gemms")]
    assert linear["extra_info"]["tflop_per_s"] == pytest.approx(6 * 32 * 48 * 300 / linear["stats"]["median"] / 1e12)


def test_unavailable_ones_are_skipped_with_the_reason(outcome: Outcome) -> None:
    (line,) = outcome.lines("SKIPPED")
    assert line.startswith("SKIPPED [2]")
    assert "runs on the moon only" in line


@pytest.mark.parametrize(
    ("op", "shape", "tokens", "provider", "reason"),
    [
        ("logits", LOGITS, 64, "wrong", "Failed: wrong: loss off by"),
        ("linear", HEAD, 32, "wrong", "Failed: wrong: loss off by"),
        ("logits", LOGITS, 64, "hpo_fused:inexact", "Failed: wrong: log-probability off by"),
        ("logits", LOGITS, 64, "broken", "RuntimeError: this provider broke"),
    ],
)
@pytest.mark.parametrize("mode", ["both", "forward"])
def test_wrong_ones_fail(
    outcome: Outcome, op: str, shape: str, tokens: int, provider: str, reason: str, mode: str
) -> None:
    name = named(op, shape, tokens, mode, provider)
    (line,) = (line for line in outcome.lines("FAILED") if name in line)
    assert reason in line


def test_nothing_else_happened(outcome: Outcome) -> None:
    assert outcome.done.returncode == 1
    assert "8 failed, 12 passed, 2 skipped" in outcome.done.stdout


def test_checkout_is_not_on_the_path(outcome: Outcome) -> None:
    """There its ``kernels/`` would shadow Hugging Face's."""
    assert CHECKOUT not in [Path(entry or ".").resolve() for entry in outcome.paths]


# ---------------------------------------------------------------------------------------------------------------
# the choice


class Config:
    """As much of pytest's as the suite asks."""

    def __init__(self, **options: Any) -> None:
        self.options = {f"--bench-{name}": value for name, value in options.items()}
        self.stash = {suite.DEVICE: CPU}

    def getoption(self, name: str) -> Any:
        return self.options.get(name)


def problem_of(op: Operation, shape: str, tokens: int) -> Problem:
    (problem,) = problems_of(op, [shape], tokens, ["fp32"], ["both"], CPU)
    return problem


def pairs(**options: Any) -> list[tuple[Problem, str]]:
    config: Any = Config(**options)
    return suite.chosen(config)


def test_default_is_every_operation_and_small() -> None:
    found = pairs()
    assert list(dict.fromkeys(problem.op for problem, _ in found)) == list(OPERATIONS)
    assert max(problem.case.tokens for problem, _ in found) <= 64
    assert {name for problem, name in found if problem.op == "linear"} >= {"hpo_fused", "eager", "gemms"}
    assert {name for problem, name in found if problem.op == "logits"} == {*DEFAULT, "copy"}


def test_tests_of_one_case_follow_one_another() -> None:
    """However many there are, the inputs of one are in memory."""
    found = pairs(tokens=[8, 16], dtype=["bf16", "fp32"], mode=["both", "forward", "gradient"])
    runs = [problem for problem, _ in groupby(found, key=lambda pair: pair[0])]
    assert len(runs) == len(set(runs)) == 12 * 5


def test_names_belong_to_the_operations_that_have_them() -> None:
    found = pairs(shape=["gpt2", "qwen2.5-7b"], provider=["eager", "gemms", "trl:eager"])
    assert [(problem.op, problem.case.shape.name, name) for problem, name in found] == [
        ("logits", "gpt2", "eager"), ("logits", "gpt2", "trl:eager"),
        ("linear", "gpt2", "eager"), ("linear", "gpt2", "gemms"),
        ("linear", "qwen2.5-7b", "eager"), ("linear", "qwen2.5-7b", "gemms"),
        ("logprobs", "gpt2", "eager"), ("logprobs", "gpt2", "trl:eager"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ["gpt3"]}, r"--bench-shape: unknown shape 'gpt3'; expected qwen3, .*linear path: unknown shape"),
        ({"shape": ["gpt2", "gpt3"]}, "--bench-shape: unknown shape 'gpt3'"),
        ({"op": ["linear"], "shape": ["qwen3"]}, "--bench-shape: unknown shape 'qwen3'; expected qwen2.5-0.5b"),
        ({"provider": ["eager", "jax"]}, "--bench-provider: logits: unknown provider 'jax'; expected one of hpo_fused"),
        ({"op": ["logits"], "provider": ["gemms"]}, "--bench-provider: logits: unknown provider 'gemms'"),
        ({"shape": ["qwen3"], "provider": ["gemms"]}, "--bench-provider: logits: unknown provider 'gemms'"),
        ({"op": ["linear"], "provider": ["copy"]}, "--bench-provider: linear: unknown provider 'copy'"),
    ],
)
def test_unknown_names_are_refused(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        pairs(**options)


def test_inputs_are_drawn_once_for_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (problem_of("logits", LOGITS, tokens) for tokens in (8, 16))
    real: Callable[[Problem, torch.device], Drawn] = Problem.draw
    drawn: list[Problem] = []

    def draw(problem: Problem, device: torch.device) -> Drawn:
        drawn.append(problem)
        return real(problem, device)

    monkeypatch.setattr(Problem, "draw", draw)
    latest = Latest(CPU)
    found = latest.of(first)
    assert latest.of(problem_of("logits", LOGITS, 8)) is found
    assert latest.of(second) is not found
    latest.of(first)
    assert drawn == [first, second, first]


def test_a_case_that_does_not_fit_says_so() -> None:
    with pytest.raises(MemoryError, match="GiB of main memory"):
        problem_of("logits", "qwen3", 1 << 30).draw(CPU)
    with pytest.raises(MemoryError, match="GiB of main memory"):
        problem_of("linear", "qwen2.5-7b", 1 << 40).draw(CPU)
