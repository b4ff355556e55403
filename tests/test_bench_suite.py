"""The pytest-benchmark suite: right providers are timed, wrong ones fail, absent ones are skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the bench extra")
pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

CHECKOUT = Path(__file__).resolve().parent.parent
# Providers that nobody ships, registered as another distribution's would be; and a record of Python's path.
PLUGIN = """
    import json, sys
    from dataclasses import replace
    from hpo_fused.bench.providers import PROVIDERS, Unavailable
    from hpo_fused.bench.providers.plain import Eager

    class Wrong(Eager):
        def linear_policy_loss(self, inputs):
            return super().linear_policy_loss(replace(inputs, old_logprobs=inputs.old_logprobs + 0.1))
        policy_loss = lambda self, inputs: 1 / 0

    class Elsewhere(Eager):
        def prepare(self, case, device):
            raise Unavailable("runs on the moon only")

    PROVIDERS.update(wrong=Wrong, elsewhere=Elsewhere)

    def pytest_sessionfinish():
        with open("paths.json", "w") as file:
            json.dump(sys.path, file)
"""


def run_suite(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The suite as a command, run from ``folder`` without this run's own environment."""
    (folder / "moon.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_", "TRITON_", "COV_"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CHECKOUT / "bench" / "suite"),
        "-p",
        "no:cacheprovider",
        "-p",
        "moon",
    ]
    return subprocess.run(
        [*command, "--bench-device", "cpu", *options], cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_suite(tmp_path: Path) -> None:
    names = ("hpo_fused:torch", "eager", "copy", "gemms", "elsewhere", "wrong")
    chosen = [word for name in names for word in ("--bench-provider", name)]
    ops = ("--bench-op", "policy_loss", "--bench-op", "linear_policy_loss", "--bench-rounds", "3")
    done = run_suite(
        tmp_path, *chosen, *ops, "--bench-shape", "custom:V=300,H=48", "--benchmark-json", "out.json", "-rfs"
    )
    assert "2 failed, 6 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    assert "runs on the moon only" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "wrong: loss off by" in done.stdout
    entries = {entry["name"]: entry for entry in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert {
        name.removeprefix("test_provider[").removesuffix("]") for name in entries if entries[name]["stats"]["rounds"]
    } == {
        f"{operation}-custom:V=300,H=48-64-bf16-both-{name}"
        for operation, limit in (("policy_loss", "copy"), ("linear_policy_loss", "gemms"))
        for name in ("hpo_fused:torch", "eager", limit)
    }
    entry = entries["test_provider[policy_loss-custom:V=300,H=48-64-bf16-both-eager]"]
    assert len(entry["stats"]["data"]) == 3
    assert entry["extra_info"]["case"]["shape"]["vocabulary"] == 300
    assert entry["extra_info"]["peak_bytes"] >= entry["extra_info"]["gradient_bytes"] == 64 * 300 * 2
    assert entry["extra_info"]["environment"]["device"] == "cpu"
    # Where the checkout is on the path its kernels/ would shadow Hugging Face's.
    paths = json.loads((tmp_path / "paths.json").read_text())
    assert CHECKOUT not in [Path(entry or ".").resolve() for entry in paths]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    done = run_suite(tmp_path, "--bench-provider", "jax")
    assert "provider: expected one of hpo_fused" in done.stdout
    assert done.returncode != 0
