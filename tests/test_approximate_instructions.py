"""The kernels with the errors of a GPU's approximate instructions, which Triton's interpreter does not make.

For NVIDIA, Triton takes ex2.approx.ftz for exp2, a rounded product by log2(e) and ex2.approx for exp, div.full for `/`
and rsqrt.approx.ftz for rsqrt; log and log2 are libdevice's polynomials, and div_rn is IEEE's. Here each of them is off
by as many units as NVIDIA's manuals allow: all up, all down, or each argument its own way. Products are not fused
with the sums that follow them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hpo_fused.backend import kernels

from .equivalence import Case, check
from .test_equivalence import CASES as EVERY

if kernels is None:
    pytest.skip("needs Triton", allow_module_level=True)

from triton.runtime import interpreter

from hpo_fused.kernels.numerics import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED.value, reason="a GPU has instructions of its own")

UNITS = {"exp2": 2, "exp": 2, "rsqrt": 2, "divide": 2, "log": 1, "log2": 1}
# Where these errors are multiplied: rows that cancel, exponents of exponentials, tanh under a low temperature. Not
# GammaGate of a response's sum: two units of exp(x), times lambda exp(x), pass the limit (1.1e-5).
NAMES = (
    "V1-float32", "V2-float32", "V17-float32", "V997-float32", "peaked-float32", "flat-float32", "negative-float32",
    "minus_inf-transform", "softcap", "kl-entropy-transform", "temperatures-sequence",
    "shape-gamma", "shape-fidelity-sharp",
)  # fmt: skip
CASES = [case for case in EVERY if case.name in NAMES]


def flushed(values: np.ndarray) -> np.ndarray:
    """Float32 without subnormal numbers."""
    return np.where(np.abs(values) < 2.0**-126, np.copysign(0.0, values), values).astype(np.float32)


def drawn(*arguments: np.ndarray) -> np.ndarray:
    """Numbers in [-1, 1] that the arguments' bits decide."""
    bits = sum(a.view(np.uint32).astype(np.uint64) << np.uint64(31 * i) for i, a in enumerate(arguments))
    mixed = np.asarray(bits) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray((mixed >> np.uint64(11)) / 2.0**52 - 1.0)


def approximate(name: str, way: float) -> Callable[..., np.ndarray]:
    """NumPy's function of that name, off by its units: ``way`` is 1 (up), -1 (down) or 0 (drawn)."""

    def function(*arguments: np.ndarray) -> np.ndarray:
        arrays = [np.ascontiguousarray(a) for a in np.broadcast_arrays(*arguments)]
        if any(a.dtype != np.float32 for a in arrays):
            return np.asarray(getattr(np, name)(*arrays))
        kind = name
        if name == "exp":
            arrays, kind = [arrays[0] * np.float32(1.4426950408889634)], "exp2"
        if kind in ("exp2", "rsqrt"):
            arrays = [flushed(a) for a in arrays]
        wide = [a.astype(np.float64) for a in arrays]
        exact = 1 / np.sqrt(wide[0]) if kind == "rsqrt" else getattr(np, kind)(*wide)
        unit = np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)
        error = (UNITS[kind] - 0.5) * unit * (way or drawn(*arrays))
        # 0 and infinity, 2^n and x / 1 have no error.
        sure = (wide[0] == np.floor(wide[0])) & (kind == "exp2") | (wide[-1] == 1) & (kind == "divide")
        result = np.where(sure | (exact == 0) | ~np.isfinite(unit), exact, exact + error).astype(np.float32)
        return flushed(result) if kind in ("exp2", "rsqrt") else result

    return function


@pytest.fixture(params=[1, -1, 0], ids=["up", "down", "drawn"])
def approximations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the interpreter's elementary functions."""
    builder = interpreter.InterpreterBuilder
    functions = {name: approximate(name, request.param) for name in UNITS}
    for name in UNITS.keys() - {"divide"}:
        monkeypatch.setattr(
            builder, f"create_{name}", lambda self, value, name=name: self.unary_op(value, functions[name])
        )
    monkeypatch.setattr(builder, "create_fdiv", lambda self, *values: self.binary_op(*values, functions["divide"]))


@pytest.mark.usefixtures("approximations")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_approximate_instructions(case: Case, device: torch.device) -> None:
    check(case, "triton", device)
