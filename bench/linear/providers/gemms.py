"""The floor: the three GEMMs that nobody can do without."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo_fused.bench.linear.cases import LinearCase
from hpo_fused.bench.linear.check import LinearOracle
from hpo_fused.bench.linear.draw import LinearInputs
from hpo_fused.bench.linear.results import GEMMS
from hpo_fused.bench.providers import Output
from hpo_fused.bench.trial import Step
from hpo_fused.linear_plan import ChunkPlan

from .base import LinearProvider


class Gemms(LinearProvider):
    """Logits, dhidden and dweight of the active rows, on the chunks of ``linear_policy_loss`` and nothing else.

    Of the three, the forward alone is the first and the gradient alone the others.

    Everything goes to memory in use before. The gradient of the logits is the logits: GEMMs do not look. dweight's
    parts of several chunks are not added up: each overwrites the last.
    """

    name = GEMMS
    summary = "three bare GEMMs over the active rows in the same chunks, to memory in use before: the floor"
    leaves_out = "everything but the GEMMs"
    skips_inactive = True
    measures_memory = False

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.active: dict[float, Tensor] = {}

    def prepare(self, case: LinearCase, device: torch.device) -> None:
        self.active.pop(case.inactive, None)

    def memory_bytes(self, case: LinearCase, device: torch.device) -> float:
        return case.memory(device.type).chunk + case.weight_bytes + 2 * case.input_bytes

    def judge(self, oracle: LinearOracle, step: Step) -> None:
        """It computes no loss, and gradients of nothing."""

    def release(self) -> None:
        self.buffers.clear()
        self.active.clear()

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """Room that the cases share."""
        kept = self.buffers.get(name)
        fits = kept is not None and kept.dtype == like.dtype and kept.numel() >= rows * columns
        if not fits or kept is None:
            kept = self.buffers[name] = torch.zeros(rows * columns, dtype=like.dtype, device=like.device)
        return kept[: rows * columns].view(rows, columns)

    def step(self, inputs: LinearInputs, begun: Output | None = None) -> Step:
        case, weight = inputs.case, inputs.weight.detach()
        vocabulary, size = weight.shape
        x = self.active.get(case.inactive)
        if x is None:
            x = self.active[case.inactive] = inputs.active_hidden()
        plan = ChunkPlan.of(len(x), vocabulary, x.dtype, x.dtype, x.device.type, case.chunk_bytes, size)
        logits = self._buffer("logits", plan.rows, vocabulary, x)
        of_hidden = self._buffer("hidden", len(x), size, x)
        of_weight = self._buffer("weight", vocabulary, size, x)
        for part in plan.slices(len(x)):
            rows = x[part]
            chunk = logits[: len(rows)]
            if case.mode != "gradient":
                torch.mm(rows, weight.t(), out=chunk)
            if case.mode != "forward":
                torch.mm(chunk, weight, out=of_hidden[part])
                torch.mm(chunk.t(), rows, out=of_weight)
        return Step(Output(None, None, None), () if case.mode == "forward" else (of_hidden, of_weight))
