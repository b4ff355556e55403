"""Launch parameters measured on a machine: the file, what is made of a bad one, and the search with a false clock."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

launch = pytest.importorskip("hpo_fused.kernels.launch", reason="needs Triton")
from hpo_fused.kernels import tuning  # noqa: E402
from hpo_fused.kernels.tuning import Launches, LaunchParameters  # noqa: E402

GPU = "NVIDIA H200"
QWEN = Launches(2, 151936, True, False)
BEST = LaunchParameters(512, 4, 264)
MACHINE = launch.Machine("sm_90", 132, 50 << 20, 32)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, and nothing read before."""
    monkeypatch.setenv(tuning.DIRECTORY_VARIABLE, str(tmp_path))
    launch.forget_parameters()
    yield tmp_path
    launch.forget_parameters()


def write(content: Any) -> Path:
    path = tuning.tuning_file(GPU)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    (one,) = tuning.tuning_content(GPU, {QWEN: BEST})["entries"]
    return {**one, **changes}


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    assert tuning.tuning_file("NVIDIA GeForce RTX 4090") == directory / "tuning-nvidia-geforce-rtx-4090.json"
    monkeypatch.delenv(tuning.DIRECTORY_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.tuning_file(GPU) == Path("/somewhere/hpo_fused/tuning-nvidia-h200.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tuning.tuning_file(GPU) == Path("/home/me/.cache/hpo_fused/tuning-nvidia-h200.json")
    monkeypatch.setenv(tuning.DIRECTORY_VARIABLE, "")
    assert tuning.tuning_file(GPU) == Path("/home/me/.cache/hpo_fused/tuning-nvidia-h200.json")


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run as users that no password file knows: a first launch must not fail for that."""

    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in (tuning.DIRECTORY_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert tuning.tuned_parameters(GPU, *QWEN) is None


def test_more_rows_than_the_gpu_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers are limited by the rows that are to be resident: a thousand on a processor would leave none."""
    write(tuning.tuning_content(GPU, {QWEN: BEST._replace(rows_in_flight=100_000)}))
    monkeypatch.setattr(launch, "machine", lambda index: MACHINE)
    monkeypatch.setattr(launch.torch.cuda, "get_device_name", lambda index: GPU)
    launch.forget_parameters()
    with pytest.warns(UserWarning, match="100000 rows in flight are more than"):
        found = launch.of_device(0, *QWEN)
    assert found == launch.configure(MACHINE, QWEN.itemsize, launch.default_parameters(MACHINE, 2, QWEN.V))


def test_what_was_stored_is_found() -> None:
    write(tuning.tuning_content(GPU, {QWEN: BEST}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tuned_parameters(GPU, *QWEN) == BEST
        assert tuning.tuned_parameters(GPU, 2, 151936, True, True) is None
        assert tuning.tuned_parameters(GPU, 2, 151937, True, False) is None
        assert tuning.tuned_parameters("NVIDIA A100", *QWEN) is None
    assert tuning.tuned_launches(GPU) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting"),
        ("[]", "not a tuning file"),
        ({"entries": 3}, "not a tuning file"),
        ({**tuning.tuning_content(GPU, {}), "triton": "1.0"}, "triton is '1.0'"),
        ({**tuning.tuning_content(GPU, {}), "hpo_fused": "0.0.1"}, "hpo_fused is '0.0.1'"),
        ({**tuning.tuning_content(GPU, {}), "schema_version": 0}, "schema_version is 0"),
        (tuning.tuning_content("NVIDIA A100", {}), "gpu is 'NVIDIA A100', here it is 'NVIDIA H200'"),
        ({**tuning.tuning_content(GPU, {}), "entries": [entry(threads=96)]}, "threads: expected one of"),
        ({**tuning.tuning_content(GPU, {}), "entries": [entry(unroll=3)]}, "unroll: expected one of"),
        ({**tuning.tuning_content(GPU, {}), "entries": [entry(rows_in_flight=0)]}, "rows_in_flight: expected a pos"),
        ({**tuning.tuning_content(GPU, {}), "entries": [entry(rows_in_flight=2.5)]}, "rows_in_flight: expected a pos"),
        ({**tuning.tuning_content(GPU, {}), "entries": [entry(reread=1)]}, "reread: expected true or false"),
        ({**tuning.tuning_content(GPU, {}), "entries": [{}]}, "damaged entry"),
        ({**tuning.tuning_content(GPU, {}), "entries": ["x"]}, "damaged entry"),
    ],
)
def test_a_stale_or_damaged_file_is_ignored_with_one_warning(content: Any, told: str) -> None:
    path = write(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuning.tuned_parameters(GPU, *QWEN) is None
        assert tuning.tuned_parameters(GPU, 4, 8, False, False) is None
    (warning,) = caught
    assert told in str(warning.message)
    assert str(path) in str(warning.message)


def test_unreadable_bytes_are_ignored_too() -> None:
    tuning.tuning_file(GPU).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="ignoring the launch parameters"):
        assert tuning.tuned_parameters(GPU, *QWEN) is None


def test_a_launch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch on that GPU gets; only the device itself is stood in for."""
    monkeypatch.setattr(launch, "machine", lambda index: MACHINE)
    monkeypatch.setattr(launch.torch.cuda, "get_device_name", lambda index: GPU)
    monkeypatch.setattr(launch, "INTERPRETED", SimpleNamespace(value=False))
    logits = SimpleNamespace(element_size=lambda: 2, shape=(1, 1, QWEN.V), device=SimpleNamespace(index=0))
    assert launch.launch_configuration(logits).rows_in_flight == 132
    assert launch.origin(0) == "shipped table for sm_90"
    launch.forget_parameters()
    path = write(tuning.tuning_content(GPU, {QWEN: BEST}))
    found = launch.launch_configuration(logits)
    assert (found.lanes, found.unroll, found.rows_in_flight, found.num_warps) == (512, 4, 264, 16)
    assert str(path) in launch.origin(0)
    with launch.forced_parameters(LaunchParameters(128, 1, 7)):
        assert launch.launch_configuration(logits).grid(100) == (7,)
    assert launch.launch_configuration(logits) == found
    monkeypatch.setattr(launch, "machine", lambda index: launch.Machine("sm_89", 142, 96 << 20, 32))
    monkeypatch.setattr(launch.torch.cuda, "get_device_name", lambda index: "NVIDIA L40S")
    assert "conservative settings: no machine code for sm_89" in launch.origin(0)


# ---------------------------------------------------------------------------------------------------------------
# the search

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")

from hpo_fused.bench import tune, tune_command  # noqa: E402
from hpo_fused.bench.cases import SHAPES  # noqa: E402
from hpo_fused.bench.commands import app  # noqa: E402
from hpo_fused.bench.measure import Clock  # noqa: E402

JOB = tune.Job(QWEN, "qwen3", "bf16", None)


class FalseClock(Clock):
    """A run's time is what the run says."""

    def time(self, run: Callable[[], object]) -> float:
        return float(run())  # type: ignore[arg-type]


def timed(seconds: Callable[[LaunchParameters], float]) -> Callable[[], object]:
    """A run whose time depends on the parameters in force."""

    def run() -> object:
        forced = launch._forced.get()
        assert forced is not None
        return seconds(forced)

    return run


def test_candidates_can_be_resident_and_start_with_the_default() -> None:
    for launches in (QWEN, QWEN._replace(V=262144), QWEN._replace(V=600), QWEN._replace(reread=False)):
        found = tune.candidates(MACHINE, launches)
        assert found[0] == launch.default_parameters(MACHINE, 2, launches.V, reread=launches.reread)
        assert len(set(found)) == len(found) > 1
        for threads, unroll, rows in found:
            assert threads in tuning.THREADS
            assert unroll in tuning.UNROLLS
            assert threads * rows <= 2048 * 132
    assert any(p.rows_in_flight == 85 for p in tune.candidates(MACHINE, QWEN._replace(V=262144)))


def test_the_fastest_is_chosen_if_it_is_worth_it() -> None:
    options = tune.candidates(MACHINE, QWEN)
    better = tune.choose(JOB, options, timed(lambda p: 0.5 if p == BEST else 1.0), FalseClock(), 0.0)
    assert (better.best, better.default) == (BEST, options[0])
    assert better.ratio == 0.5
    assert set(better.seconds) == set(options)
    noise = tune.choose(JOB, options, timed(lambda p: 0.99 if p == BEST else 1.0), FalseClock(), 0.0)
    assert (noise.best, noise.ratio) == (options[0], 1.0)


def test_what_fails_is_left_out_and_told() -> None:
    options = tune.candidates(MACHINE, QWEN)

    def seconds(parameters: LaunchParameters) -> float:
        if parameters.threads == 1024 and parameters != options[0]:
            raise RuntimeError("out of resource: registers")
        return 1.0 / parameters.threads

    found = tune.choose(JOB, options, timed(seconds), FalseClock(), 0.0)
    assert found.best == options[0]
    assert {p.threads for p in found.failed} == {1024}
    assert "out of resource" in next(iter(found.failed.values()))
    with pytest.raises(RuntimeError, match="the shipped parameters"):
        tune.choose(JOB, options, timed(lambda p: 1 / 0), FalseClock(), 0.0)


def test_jobs_cover_what_is_launched() -> None:
    found = list(tune.jobs([SHAPES["gemma"], SHAPES["qwen3"]], ["bf16", "fp16"]))
    assert {(job.shape, job.dtype, *job.launches[2:]) for job in found} == {
        ("gemma", "bf16", True, False), ("gemma", "bf16", True, True), ("gemma", "bf16", False, False),
        ("gemma", "fp16", False, False),
        ("qwen3", "bf16", True, False), ("qwen3", "bf16", False, False), ("qwen3", "fp16", False, False),
    }  # fmt: skip


@pytest.mark.parametrize("reread", [False, True])
def test_what_is_timed_runs(reread: bool, device: torch.device) -> None:
    job = tune.Job(Launches(4, 301, reread, False), "custom", "fp32", None)
    (logprobs,) = tune.runner(job, 2, device)()[-1:]
    assert logprobs.isfinite().all()
    assert logprobs.shape == (1, 2)


def test_storing_keeps_what_still_holds(directory: Path) -> None:
    other = QWEN._replace(V=50257)
    assert tune.store(GPU, {other: BEST}) == tune.store(GPU, {QWEN: BEST}) == tuning.tuning_file(GPU)
    assert tuning.parse(json.loads(tuning.tuning_file(GPU).read_text()), GPU) == {other: BEST, QWEN: BEST}
    write({**tuning.tuning_content(GPU, {other: BEST}), "triton": "1.0"})
    tune.store(GPU, {QWEN: BEST})
    assert tuning.parse(json.loads(tuning.tuning_file(GPU).read_text()), GPU) == {QWEN: BEST}
    assert [path.name for path in directory.iterdir()] == [tuning.tuning_file(GPU).name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [(), ("--device", "cpu")])
def test_without_a_gpu_it_says_why(arguments: tuple[str, ...], directory: Path) -> None:
    done = testing.CliRunner().invoke(app, ["tune", *arguments])
    assert done.exit_code == 2
    assert "launch parameters are measured on a GPU" in done.output
    assert not list(directory.iterdir())


@pytest.mark.parametrize("dry", [False, True])
def test_the_command_on_a_false_machine(dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(tune_command, "_no_gpu", lambda device: "")
    monkeypatch.setattr(tune_command, "device_of", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tune_command, "clock_for", lambda device: FalseClock())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(launch, "machine", lambda index: MACHINE)
    monkeypatch.setattr(tune, "runner", lambda *_: timed(lambda p: 0.5 if p == BEST else 1.0))
    arguments = ["tune", "--shape", "qwen3", "--budget", "0"] + (["--dry-run"] if dry else [])
    done = testing.CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "512×4×264" in done.output
    assert "0.500" in done.output
    assert tuning.tuned_parameters(GPU, *QWEN) == (None if dry else BEST)
    assert ("Wrote" in done.output) is not dry
