"""What `all` is made of: the equivalence suite, the machine's state, the short table and the pictures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs the bench extra")
pytest.importorskip("typer", reason="needs the bench extra")

from rich.console import Console

from hpo_fused.bench import all_command, all_report, all_units, environment, equivalence
from hpo_fused.bench.compile_document import CompileDocument
from hpo_fused.bench.evidence import Evidence
from hpo_fused.bench.evidence import Tests as Outcome
from hpo_fused.bench.linear.cases import HEADS
from hpo_fused.bench.results import (
    Result,
    Row,
)

from .bench_helpers import Silent, timed

CPU = torch.device("cpu")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command line in a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    return invoke


# ---------------------------------------------------------------------------------------------------------------
# the equivalence suite, the machine


SUITE = """
import time
import pytest

@pytest.mark.parametrize("index", range(4))
def test_right(index):
    pass

def test_wrong():
    assert 1 == 2

def test_absent():
    pytest.skip("no such device")

@pytest.mark.parametrize("index", range({many}))
def test_more(index):
    time.sleep(0.5)
"""


def suite(folder: Path, many: int = 1) -> list[Path]:
    """Tests of known outcome."""
    (folder / "tests").mkdir(exist_ok=True)
    path = folder / "tests" / "test_equivalence.py"
    path.write_text(SUITE.replace("{many}", str(many)))
    return equivalence.test_files(folder)


def test_outcomes_of_the_suite(tmp_path: Path) -> None:
    found = equivalence.run_tests(60, CPU, suite(tmp_path))
    assert (found.passed, found.failed, found.skipped) == (5, 1, 1)
    assert len(found.failures) == 1
    assert found.failures[0].endswith("::test_wrong")
    assert found.note == "kernels in Triton's interpreter, there being no GPU"
    assert found.seconds > 0


HANGS = """
import os
import pathlib
import time
import pytest

@pytest.mark.parametrize("index", range(6))
def test_right(index):
    pass

def test_hangs():
    pathlib.Path({marker!r}).touch()
    {action}
"""


def hanging(folder: Path, action: str = "time.sleep(120)") -> tuple[list[Path], Path]:
    """A suite with a test that does not end by itself, and the file that is there once it runs."""
    marker = folder / "marker"
    (folder / "tests").mkdir()
    text = HANGS.replace("{marker!r}", repr(str(marker))).replace("{action}", action)
    (folder / "tests" / "test_equivalence.py").write_text(text)
    return equivalence.test_files(folder), marker


def test_a_hang_leaves_the_outcomes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "GRACE", 1.0)
    tests, marker = hanging(tmp_path)
    monkeypatch.setattr(equivalence.time, "time", Impatient(marker))
    found = equivalence.run_tests(60, CPU, tests)
    assert marker.exists()
    assert found.passed > 0
    assert (found.failed, found.skipped) == (1, 0)
    assert found.failures == ["tests/test_equivalence.py::test_hangs"]
    assert found.note.startswith("tests/test_equivalence.py::test_hangs was still running 1 s after their time")
    ran = found.passed + 1
    assert (f"; {ran} of 7 tests, a mixed sample" in found.note) is (ran < 7)


class Impatient:
    """The time, an hour later once a file is there."""

    def __init__(self, marker: Path) -> None:
        self.marker, self.real = marker, time.time

    def __call__(self) -> float:
        return self.real() + 3600 * self.marker.exists()


def test_a_crash_fails_the_test_that_was_running(tmp_path: Path) -> None:
    tests, _ = hanging(tmp_path, "os._exit(7)")
    found = equivalence.run_tests(60, CPU, tests)
    assert found.passed > 0
    assert found.failures == ["tests/test_equivalence.py::test_hangs"]
    assert found.note.startswith("pytest ended with status 7 in tests/test_equivalence.py::test_hangs")


def test_an_interruption_of_the_suite_keeps_outcomes(tmp_path: Path) -> None:
    tests, marker = hanging(tmp_path)

    def tick() -> None:
        if marker.exists():
            raise KeyboardInterrupt

    into = Outcome()
    with pytest.raises(KeyboardInterrupt):
        equivalence.run_tests(60, CPU, tests, tick, into)
    assert into.passed > 0
    assert (into.failed, into.failures) == (0, [])
    assert into.note.startswith(f"interrupted after {into.passed} of 7 tests")


def test_on_a_gpu_the_suite_has_its_memory_and_that_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    (tmp_path / "tests").mkdir()
    text = "import os\ndef test_it():\n    assert os.environ['CUDA_VISIBLE_DEVICES'] == 'GPU-abc'\n"
    text += "    assert 'TRITON_INTERPRET' not in os.environ\n"
    (tmp_path / "tests" / "test_equivalence.py").write_text(text)
    found = equivalence.run_tests(60, torch.device("cuda", 1), equivalence.test_files(tmp_path))
    assert (found.passed, found.failed, found.note) == (1, 0, "")
    assert emptied == [True]


def test_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {torch.device("cuda", 0): SimpleNamespace(uuid="u0"), torch.device("cuda", 1): SimpleNamespace()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", known.__getitem__)
    monkeypatch.setattr(torch.version, "hip", None)
    first, second = known
    assert equivalence.visible(first, {}) == {"CUDA_VISIBLE_DEVICES": "GPU-u0"}
    assert equivalence.visible(second, {}) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert equivalence.visible(second, {"CUDA_VISIBLE_DEVICES": "3, MIG-7"}) == {"CUDA_VISIBLE_DEVICES": "MIG-7"}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert equivalence.visible(second, {"HIP_VISIBLE_DEVICES": "2,4"}) == {"HIP_VISIBLE_DEVICES": "4"}
    assert equivalence.visible(first, {}) == {"HIP_VISIBLE_DEVICES": "0"}


def test_the_suite_ends_in_time_and_says_what_it_left(tmp_path: Path) -> None:
    ticks: list[int] = []
    found = equivalence.run_tests(4, CPU, suite(tmp_path, 40), tick=lambda: ticks.append(1))
    ran = found.passed + found.failed + found.skipped
    assert 0 <= ran < 46
    assert found.note.startswith(f"{ran} of 46 tests, a mixed sample")
    assert len(ticks) > 2


def test_no_suite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no checkout" in equivalence.run_tests(1, CPU, []).note
    assert equivalence.test_files(tmp_path) == []
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_equivalence.py").write_text("import nothing_like_this\n")
    broken = equivalence.run_tests(60, CPU, equivalence.test_files(tmp_path))
    assert (broken.failed, broken.failures) == (1, ["tests/test_equivalence.py"])
    monkeypatch.setattr(equivalence.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in equivalence.run_tests(1, CPU, suite(tmp_path)).note


def test_neither_pytest_nor_matplotlib_is_needed() -> None:
    """The extra `bench` has no pytest; pictures and tests are left out where their libraries are missing."""
    code = "import sys; sys.modules.update(pytest=None, matplotlib=None); import hpo_fused.bench.all_command"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_checkouts_own_suite_is_found() -> None:
    names = [path.name for path in equivalence.test_files(Path(__file__).parents[1])]
    assert names == list(equivalence.FILES)


def test_gpu_state_is_read_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "570.86, 700.00, 345, 1980, [N/A], 2619\n"

    def answer(command: list[str], **_: Any) -> Any:
        assert "--id=GPU-1" in command
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(environment.subprocess, "run", answer)
    assert environment.nvidia_state("GPU-1") == {
        "driver": "570.86", "power_limit_w": 700.0, "clock_sm_mhz": 345.0, "clock_sm_max_mhz": 1980.0,
        "clock_memory_mhz": None, "clock_memory_max_mhz": 2619.0,
    }  # fmt: skip

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert set(environment.nvidia_state("0").values()) == {None}


@pytest.mark.parametrize("name", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_clocks_after_a_timing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    said = iter(["1755, 0x0000000000000044\n", "1980, 0x0000000000000000\n", "1900, [N/A]\n"])

    def answer(command: list[str], **_: Any) -> Any:
        if name not in command[1]:
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, next(said), "")

    monkeypatch.setattr(environment.subprocess, "run", answer)
    monkeypatch.setattr(all_units, "nvidia_name", lambda device: "GPU-1")
    evidence = Evidence.of_parts([timed()], environment=timed().environment, settings={})
    choice = all_command._choice(CPU, ["gpt2"], ["eager"], 8, tests=False, kernels=False)
    work = all_units.Work(choice, torch.device("cuda"), 0, evidence, Silent(), 480.0)
    for _ in range(3):
        work._read_clock()
    assert evidence.settings["clocks_after_timing"] == {
        "sm_mhz_min": 1755.0, "sm_mhz_median": 1900.0, "held_down_by": ["power cap", "thermal, hardware"],
    }  # fmt: skip
    assert "| after timing: held_down_by | power cap, thermal, hardware |" in all_report.markdown(evidence)


def test_no_clocks_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert environment.nvidia_clocks("0") is None


def test_versions_of_peers_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"trl": "1.16.0", "cut-cross-entropy": "25.9.3"}

    def version(name: str) -> str:
        if name not in installed:
            raise environment.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(environment, "version", version)
    found = environment.environment(CPU)
    assert {name: found[name] for name in installed} == installed
    assert not {"liger-kernel", "transformers"} & found.keys()


def test_heads_of_the_models() -> None:
    """Sizes as in the models' published configurations."""
    sizes = {"qwen3-0.6b": (1024, 151936), "llama3.2-1b": (2048, 128256), "gemma3-270m": (640, 262144)}
    for name, size in sizes.items():
        assert (HEADS[name].hidden, HEADS[name].vocabulary) == size


@pytest.mark.parametrize("width", [80, 100])
def test_the_short_table_fits(width: int) -> None:
    evidence = Evidence.of_parts([timed(peer=3.0)], environment={}, settings={})
    stream = StringIO()
    Console(file=stream, width=width).print(all_report.summary(evidence).table())
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "8.00×" in stream.getvalue()
    assert "liger:triton" in stream.getvalue()


def test_who_does_less_work_is_marked() -> None:
    part = timed(peer=3.0)
    next(row for row in part.rows if row.provider == "liger:triton").leaves_out = "entropy, log-probabilities"
    evidence = Evidence.of_parts([part], environment=part.environment, settings={})
    text = all_report.short(evidence)
    assert "| liger:triton* | 3.00× |" in text
    assert "- liger:triton* does less work: it leaves out entropy, log-probabilities." in text
    assert "eager*" not in text
    assert text.count("does less work") == 1
    assert "- liger:triton*: from logits it takes 3.00× the time" in all_report.markdown(evidence)


def test_times_hold_no_block_of_those_who_were_skipped() -> None:
    part = timed()
    small = dataclasses.replace(part.rows[0].case, dtype="fp32")
    skipped = Row(small, "liger:triton", "skipped", "needs a GPU")
    checked = Row(small, "eager", errors=part.rows[0].errors)
    evidence = Evidence.of_parts([part], environment=part.environment, settings={})

    def faster() -> str:
        return all_report.markdown(evidence).split("## How much faster?")[1].split("\n## ")[0]

    part.rows += [skipped, checked]
    assert "The same in other ways" not in faster()
    part.rows.append(Row(small, "compile", "failed", "no compiler"))
    assert "| compile | failed |" in faster()
    assert "compile: failed: no compiler" in faster()
    assert "liger:triton" not in faster()


def draws(*steps: Callable[[], str]) -> Callable[[Evidence, Path], Iterator[str]]:
    """Instead of pictures."""

    def draw(evidence: Evidence, folder: Path) -> Iterator[str]:
        for step in steps:
            yield step()

    return draw


def ready() -> Evidence:
    return Evidence.of_parts([timed()], environment=timed().environment, settings={})


def test_results_are_there_before_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 15.0])

    def look() -> str:
        evidence = Evidence.read(tmp_path / "result.json")
        assert (evidence.settings["pictures"], evidence.settings["seconds"]) == ([], 10.0)
        assert "# hpo_fused on" in (tmp_path / "report.md").read_text(encoding="utf-8")
        return "time.svg"

    monkeypatch.setattr(all_command, "_draw", draws(look))
    all_command._write(ready(), tmp_path, lambda: next(seconds))
    evidence = Evidence.read(tmp_path / "result.json")
    assert (evidence.settings["pictures"], evidence.settings["seconds"]) == (["time.svg"], 15.0)
    assert "![time](time.svg)" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_picture_that_fails_is_told_and_the_others_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(result: Result, output: Path, pictures: Sequence[str]) -> None:
        output.write_text("half")
        if pictures == ["memory"]:
            raise ZeroDivisionError("no space")

    monkeypatch.setattr(all_command, "draw_logits", draw)
    evidence = ready()
    all_command._write(evidence, tmp_path, lambda: 1.0)
    assert evidence.dropped == ["picture memory.svg: ZeroDivisionError: no space"]
    assert {path.stem for path in tmp_path.glob("*.svg")} == set(all_command.PICTURES) - {"memory"}
    assert Evidence.read(tmp_path / "result.json").dropped == evidence.dropped


def test_ctrl_c_while_drawing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(result: Result, output: Path, pictures: Sequence[str]) -> None:
        output.write_text("half")
        if pictures != list(all_command.PICTURES)[:1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(all_command, "draw_logits", interrupt)
    all_command._write(ready(), tmp_path, lambda: 1.0)
    evidence = Evidence.read(tmp_path / "result.json")
    assert evidence.interrupted
    assert evidence.logits is not None
    assert not evidence.logits.interrupted  # it was measured to its end
    assert len(evidence.logits.rows) == 4
    assert evidence.dropped == ["pictures: interrupted; `hpo-fused-bench plot result.json` draws them"]
    assert evidence.settings["pictures"] == [path.name for path in tmp_path.glob("*.svg")]
    assert len(evidence.settings["pictures"]) == 1


def test_pictures_of_an_earlier_run_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "used"
    folder.mkdir()
    named = ["old.svg", "gone.svg", "../above.svg", "notes.txt"]
    for name in ("old.svg", "../above.svg", "notes.txt", "mine.svg"):
        (folder / name).write_text("x")
    (folder / "result.json").write_text(json.dumps({"settings": {"pictures": named}}))
    monkeypatch.setattr(all_command, "_draw", draws())
    all_command._write(ready(), folder, lambda: 1.0)
    assert {path.name for path in folder.iterdir()} == {"result.json", "report.md", "notes.txt", "mine.svg"}
    assert (tmp_path / "above.svg").exists()
    (folder / "result.json").write_text("nonsense")
    all_command._write(ready(), folder, lambda: 1.0)


def test_the_command_line_is_repeated_as_given() -> None:
    words = all_command._command_line(
        Path("a/out"), 60.0, "cuda:1", ["custom:V=300"], 64, ["eager"], 3, tests=False, kernels=True, check=True
    )
    assert words == (
        "hpo-fused-bench all --budget=60 --output=out --device=cuda:1 --shape=custom:V=300 --tokens=64 "
        "--provider=eager --seed=3 --no-tests --check"
    )


def test_without_matplotlib_there_are_no_pictures(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evidence = Evidence.of_parts([timed()], environment={}, settings={})
    assert list(all_command._draw(evidence, Path())) == []
    assert "pip install 'hpo-fused[bench]'" in evidence.dropped[0]
    assert list(Path().iterdir()) == []


def test_machine_code_is_told() -> None:
    """From a document as ``compile`` makes it today."""
    evidence = ready()
    evidence.environment |= {"created": "now"}
    made = CompileDocument({}, "Covered: what there was.", [], {"gfx950": "no assembler"}, ["sm_80 x: spills 8 bytes"])
    evidence.kernels = made.as_dict()
    text = all_report.markdown(evidence)
    for said in ("Covered: what there was.", "gfx950: not covered: no assembler", "sm_80 x: spills 8 bytes"):
        assert said in text
    assert "0 kernels compiled, 1 limits broken" in " ".join(all_report.verdict(evidence))
