"""Options of the suite, and the cases and providers that they choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import typer

from hpo_fused.bench.cases import DTYPES, MODES, OPERATIONS, Case
from hpo_fused.bench.options import CaseOptions, device_of
from hpo_fused.bench.providers import LIMITS, create, defaults

DEVICE = pytest.StashKey[torch.device]()
CPU_TOKENS, GPU_TOKENS = 64, 8192
OPTIONS = ("op", "shape", "tokens", "dtype", "mode", "provider")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Not ``--benchmark-*``, which are pytest-benchmark's own."""
    group = parser.getgroup("hpo_fused benchmark suite")
    kinds: dict[str, tuple[str, Sequence[str] | None, type]] = {
        "op": ("policy_loss, linear_policy_loss and token_logprobs", OPERATIONS, str),
        "shape": ("two, by device", None, str),
        "tokens": (f"{CPU_TOKENS} on a CPU, {GPU_TOKENS} on a GPU", None, int),
        "dtype": ("bf16", [*DTYPES], str),
        "mode": ("both", MODES, str),
        "provider": ("the benchmark's, and the limits", None, str),
    }
    for name, (default, choices, kind) in kinds.items():
        text = f"as of hpo-fused-bench; repeatable ({default})"
        group.addoption(f"--bench-{name}", action="append", type=kind, choices=choices, help=text)
    group.addoption("--bench-device", default="auto", help="cpu, cuda or cuda:N (auto: a GPU if there is one)")
    group.addoption("--bench-rounds", type=int, help="timed calls (5 on a CPU, 50 on a GPU)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse at once what would fail test by test."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the suite needs pytest-benchmark: pip install pytest-benchmark")
    try:
        config.stash[DEVICE] = device_of(config.getoption("--bench-device"))
    except typer.BadParameter as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and provider that has its operation; those of one case follow one another."""
    if not {"case", "provider"} <= {*metafunc.fixturenames}:
        return
    config, device = metafunc.config, metafunc.config.stash[DEVICE]
    asked = {name: config.getoption(f"--bench-{name}") for name in OPTIONS}
    tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    operations = ("policy_loss", "linear_policy_loss", "token_logprobs")
    pairs: list[tuple[Case, str]] = []
    try:
        for case in CaseOptions(**asked).cases(device, lambda op: [tokens], op=operations):
            names = asked["provider"] or (*defaults(device), *LIMITS)
            pairs += [(case, name) for name in names if case.operation in create(name).operations()]
    except (typer.BadParameter, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    ids = [f"{c.operation}-{c.shape.name}-{c.tokens}-{c.dtype}-{c.mode}-{name}" for c, name in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device of the tensors."""
    return request.config.stash[DEVICE]


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest, device: torch.device) -> int:
    """Timed calls."""
    asked: Any = request.config.getoption("--bench-rounds")
    return int(asked or (50 if device.type == "cuda" else 5))
