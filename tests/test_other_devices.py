"""The torch backend's path for devices that are not the CPU, on the CPU: gathers by index, no look at values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpo_fused import eager
from hpo_fused.row_chunks import RowSelection

from .equivalence import Case, check
from .test_equivalence import difficult_rows, presets, terms, vocabularies

CASES = [case for case in presets() + terms() + difficult_rows() + vocabularies()[:8] if case.dtype != torch.float16]


class Elsewhere(RowSelection):
    def __init__(self, tensor: Tensor, positions: Tensor) -> None:
        super().__init__(tensor, positions)
        self.on_cpu = False


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "RowSelection", Elsewhere)
    monkeypatch.setenv("HPO_FUSED_CPU_COMPILE", "0")
    check(case, "torch", torch.device("cpu"))
