"""The same tests run natively on a GPU and, where there is none, under Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import torch

GPU = torch.cuda.is_available()
if not GPU:  # must happen before the first import of triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from hpo_fused.backend import kernels  # noqa: E402

BACKENDS = ["torch"] if kernels is None else ["torch", "triton"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests' tensors live."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that this machine can run."""
    return str(request.param)
