"""The same tests run natively on a GPU and, where there is none, under Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Before anything imports TRL: no test asks a hub for anything.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
# Inductor would start a compiler for each core, in each of as many test processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
GPU = torch.cuda.is_available()
if not GPU:  # must happen before the first import of triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from hpo_fused.backend import kernels  # noqa: E402

from .interpreter import patch_once_a_launch  # noqa: E402

BACKENDS = ["torch"] if kernels is None else ["torch", "triton"]
patch_once_a_launch()


def pytest_report_header() -> str:
    """Where the kernels run, and which Triton compiles them."""
    if kernels is None:
        return "kernels: none, Triton cannot be imported"
    import triton

    if not GPU:
        return f"kernels: no GPU, Triton {triton.__version__}'s interpreter"
    properties = torch.cuda.get_device_properties(0)
    hip = torch.version.hip is not None
    architecture = properties.gcnArchName if hip else f"sm_{properties.major}{properties.minor}"
    return f"kernels: {properties.name}, {architecture}, Triton {triton.__version__}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests' tensors live, as they name it themselves."""
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that this machine can run."""
    return str(request.param)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the benchmark's command line from an empty directory, as a user would from theirs."""
    testing = pytest.importorskip("typer.testing", reason="needs the bench extra")
    from hpo_fused.bench.commands import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: testing.CliRunner().invoke(app, list(arguments))
