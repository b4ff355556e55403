"""Options of the suite, and the cases and providers that they choose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import typer

from hpo_fused.bench.arguments import device_of
from hpo_fused.bench.cases import DTYPES, MODES
from hpo_fused.bench.environment import environment
from hpo_fused.bench.matrix import OPERATIONS, Axes
from hpo_fused.bench.suite.problems import (
    Latest,
    Problem,
    default_providers,
    default_tokens,
    problems_of,
    why_not,
)

DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Not ``--benchmark-*``, which are pytest-benchmark's own."""
    group = parser.getgroup("hpo_fused benchmark suite")

    def repeatable(name: str, text: str, **keywords: Any) -> None:
        group.addoption(f"--bench-{name}", action="append", help=f"{text}; repeatable", **keywords)

    repeatable("op", f"of {', '.join(OPERATIONS)} (all)", choices=OPERATIONS)
    repeatable("shape", "a shape of logits or a head, by name or custom:... (see `hpo-fused-bench shapes`)")
    repeatable("tokens", "rows (64 of logits and 32 of hidden states on a CPU, 8192 on a GPU)", type=int)
    repeatable("dtype", f"of {', '.join(DTYPES)} (bf16)", choices=[*DTYPES])
    repeatable("mode", f"of {', '.join(MODES)} (both)", choices=MODES)
    repeatable("provider", "as of hpo-fused-bench, or copy (its defaults, and copy)")
    group.addoption("--bench-device", default="auto", help="cpu, cuda or cuda:N (auto: a GPU if there is one)")
    group.addoption("--bench-rounds", type=int, help="timed calls (5 on a CPU, 50 on a GPU)")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse at once what would fail test by test."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the suite needs pytest-benchmark: pip install pytest-benchmark")
    try:
        config.stash[DEVICE] = device_of(config.getoption("--bench-device"))
    except typer.BadParameter as error:
        raise pytest.UsageError(f"--bench-device: {error}") from None
    for option in ("--bench-tokens", "--bench-rounds"):
        values = config.getoption(option)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise pytest.UsageError(f"{option} must be at least 1, got {value}")


def _asked(config: pytest.Config, name: str, default: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(config.getoption(f"--bench-{name}") or default))


def chosen(config: pytest.Config) -> list[tuple[Problem, str]]:
    """Pairs of problem and provider, those of one problem together.

    A shape or a provider belongs to the operations that have it; one that none has is an error.
    """
    device, shapes, names = config.stash[DEVICE], _asked(config, "shape", []), _asked(config, "provider", [])
    try:
        ops = Axes.operations_for(shapes, _asked(config, "op", OPERATIONS))
    except ValueError as error:
        raise pytest.UsageError(f"--bench-shape: {error}") from None
    for name in names:
        reasons = {op: why_not(op, name) for op in ops}
        if all(reasons.values()):
            raise pytest.UsageError("; ".join(f"--bench-provider: {op}: {reason}" for op, reason in reasons.items()))
    return [
        (problem, provider)
        for op in ops
        for tokens in _asked(config, "tokens", [default_tokens(op, device)])
        for problem in problems_of(
            op, shapes, tokens, _asked(config, "dtype", ["bf16"]), _asked(config, "mode", ["both"]), device
        )
        for provider in names or default_providers(op, device)
        if not why_not(op, provider)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each pair."""
    if {"problem", "provider"} <= {*metafunc.fixturenames}:
        pairs = chosen(metafunc.config)
        ids = [f"{problem.name}-{provider}" for problem, provider in pairs]
        metafunc.parametrize(("problem", "provider"), pairs, ids=ids)


@pytest.fixture(scope="session")
def latest(request: pytest.FixtureRequest) -> Latest:
    """The case in memory."""
    return Latest(request.config.stash[DEVICE])


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a result file records about the machine."""
    return environment(request.config.stash[DEVICE])


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """Timed calls."""
    asked: int | None = request.config.getoption("--bench-rounds")
    return asked or (50 if request.config.stash[DEVICE].type == "cuda" else 5)
