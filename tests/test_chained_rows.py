"""The experiment of bench/chained_rows.py: two rows' sweeps in one loop give the shipped kernel's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import Objective

from .samples import Sample

launch = pytest.importorskip("hpo_fused.kernels.launch", reason="needs Triton")
pytest.importorskip("typer", reason="needs the extra bench")
from hpo_fused.bench.chained_rows import chained  # noqa: E402

BONUS = Objective.preset("mhpo_ahpo", entropy_coef=0.1)


@pytest.mark.parametrize(
    ("V", "dtype", "variant", "options"),
    [
        (1100, torch.bfloat16, ("all",), {"objective": BONUS}),
        (1027, torch.bfloat16, ("all",), {"softcap": 20.0}),  # rows of one step and of two, by their alignment
        (1539, torch.bfloat16, ("all", True), {}),
        (515, torch.float32, ("all", True), {"inplace": True, "temperature": 0.7}),
        (1100, torch.bfloat16, ("step",), {"softcap": 20.0}),
        (515, torch.float32, ("step",), {"objective": BONUS, "inplace": True}),
        (400, torch.bfloat16, ("step",), {}),  # no whole step
    ],
    ids=["even", "odd", "odd-deep", "inplace", "step", "step-inplace", "no-step"],
)
def test_same_bits(
    V: int, dtype: torch.dtype, variant: tuple[Any, ...], options: dict[str, Any], device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A program's rows have a gradient, none, or are masked, in turn."""
    small = launch.LaunchConfiguration(64, 1, 3, {"num_warps": 1})  # several steps a row, and rows a program
    monkeypatch.setattr(launch, "_interpreted", lambda itemsize, V: small)
    sample = Sample("triton", device, V, dtype)
    mask = torch.arange(20, device=device).view(5, 4) % 7 != 3

    def results() -> list[Tensor]:
        (leaf,) = sample.leaves()
        logits = leaf * 1  # not a leaf, which could not be overwritten
        with launch.override(parameters=launch.LaunchParameters(64, 1, 3)):
            out = sample.loss([logits], mask=mask, **options)
            out.loss.backward()
        assert leaf.grad is not None
        assert out.entropy is not None
        return [out.loss.detach(), out.logprobs, out.entropy, leaf.grad]

    shipped = results()
    with chained(*variant) as kernel:
        ours = results()
    assert kernel.launches == 1
    assert int(shipped[3].any(-1).sum()) == (17 if "objective" in options else 14)
    for one, other in zip(shipped, ours, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
