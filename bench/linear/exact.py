"""The float64 truth about a problem's logits, in one pass over them and independent of the loss.

"Exact" starts from the logits as one GEMM of the dtype rounds them: that rounding is everybody's. A GEMM of another
shape may sum in another order and round a logit the other way; ``slack`` says by how much that can move a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused.bench.cases import CHUNK_ELEMENTS
from hpo_fused.bench.check import spread_rows

from .draw import Problem

ROWS = 16  # of hidden's gradient that are checked in full for each share of inactive rows, and a quarter of idle ones
COLUMNS = 16  # further rows of weight's gradient that are, beside those of the checked rows' tokens
PROBES = 2  # random directions along which every row of hidden's gradient is checked
BLOCKS = 64  # of the vocabulary, in each of which all rows of weight's gradient are checked, summed with random signs


def _signs(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    signs: Tensor = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)
    return signs.double().to(device)


def block_sums(values: Tensor) -> Tensor:
    """[n, V] -> [n, BLOCKS]: sums over equal parts of the vocabulary, the last one shorter."""
    width = -(-values.shape[-1] // BLOCKS)
    padded = torch.nn.functional.pad(values, (0, width * BLOCKS - values.shape[-1]))
    return padded.view(-1, BLOCKS, width).sum(-1)


@dataclass(frozen=True, eq=False)
class Exact:
    """Everything is float64; s is a row's dlogp/dlogits [V], what c times gives its gradient of the logits.

    Attributes:
        logprobs: of the tokens [B, T].
        entropies: of the rows [B, T].
        slack: bound on what differently rounded logits change of a log-probability [B, T].
        rows, directions: indices [R] of rows, and their s W [R, H].
        columns, column_slopes: ids [C], and s of every row in these columns [N, C].
        probes, hidden_probes: directions [H, PROBES], and (s W) along them for every row [N, PROBES].
        signs, weight_probes: [V], and s times them summed over each block of the vocabulary [N, BLOCKS].
        masses: |s| summed over each block [N, BLOCKS].
    """

    logprobs: Tensor
    entropies: Tensor
    slack: Tensor
    rows: Tensor
    directions: Tensor
    columns: Tensor
    column_slopes: Tensor
    probes: Tensor
    hidden_probes: Tensor
    signs: Tensor
    weight_probes: Tensor
    masses: Tensor

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Exact:
        """One GEMM and a pass in float64 over its result, a few rows at a time."""
        weight, tokens = problem.weight.detach(), problem.tokens.flatten()
        hidden = problem.hidden.detach().flatten(0, 1)
        (count, size), vocabulary, device = hidden.shape, weight.shape[0], hidden.device
        generator = torch.Generator().manual_seed(seed + 2)
        rows = _checked_rows(problem)
        others = torch.randint(vocabulary, (COLUMNS,), generator=generator).to(device)
        columns = torch.cat([tokens[rows], others]).unique()
        probes = _signs((size, PROBES), device, generator)
        signs = _signs((vocabulary,), device, generator)
        along = torch.cat([part.double() @ probes for part in weight.split(max(1, CHUNK_ELEMENTS // size))])

        logprobs, entropies, slack = (torch.empty(count, dtype=torch.float64, device=device) for _ in range(3))
        checked = torch.empty(len(rows), vocabulary, dtype=torch.float64, device=device)
        column_slopes = torch.empty(count, len(columns), dtype=torch.float64, device=device)
        hidden_probes = torch.empty(count, PROBES, dtype=torch.float64, device=device)
        weight_probes, masses = torch.empty(2, count, BLOCKS, dtype=torch.float64, device=device).unbind()
        step = max(1, CHUNK_ELEMENTS // vocabulary) * (8 if device.type == "cuda" else 1)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            logits = torch.mm(hidden[part], weight.t())
            found = _row_slopes(logits, tokens[part], problem.case.shape.softcap, size)
            logprobs[part], entropies[part], slack[part], slopes = found
            column_slopes[part] = slopes[:, columns]
            hidden_probes[part] = slopes @ along
            here = ((rows >= part.start) & (rows < part.stop)).nonzero().squeeze(1)
            checked[here] = slopes[rows[here] - part.start]
            weight_probes[part] = block_sums(slopes.mul_(signs))
            masses[part] = block_sums(slopes.abs_())
        directions = _times_weight(checked, weight)
        shape = problem.tokens.shape
        return cls(
            logprobs.view(shape), entropies.view(shape), slack.view(shape), rows, directions, columns, column_slopes,
            probes, hidden_probes, signs, weight_probes, masses,
        )  # fmt: skip


def _checked_rows(problem: Problem) -> Tensor:
    """Active and inactive ones of every share."""
    found = []
    for advantages in problem.advantages.values():
        active = (advantages != 0).unsqueeze(-1).expand_as(problem.tokens).flatten()
        found += [spread_rows(active, ROWS), spread_rows(~active, ROWS // 4)]
    rows: Tensor = torch.cat(found).unique()
    return rows


def _row_slopes(logits: Tensor, tokens: Tensor, softcap: float | None, size: int) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, slack, and slopes [n, V]."""
    epsilon = torch.finfo(logits.dtype).eps  # a unit in the last place is at most this part of a value
    if logits.dtype == torch.float32:
        epsilon *= size**0.5  # nothing is rounded after the sum: its own error is what there is
    column = tokens.unsqueeze(-1)
    z = logits.double()
    slack = epsilon * (z.gather(-1, column).squeeze(-1).abs() + z.abs().amax(-1))
    slope = None
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = softcap * tanh, 1 - tanh.square()
    z -= z.logsumexp(-1, keepdim=True)
    logprobs = z.gather(-1, column).squeeze(-1)
    slopes = z.exp().neg_()
    entropies = (slopes * z).sum(-1)
    slopes.scatter_add_(-1, column, torch.ones_like(column, dtype=torch.float64))
    return logprobs, entropies, slack, slopes if slope is None else slopes.mul_(slope)


def _times_weight(values: Tensor, weight: Tensor) -> Tensor:
    """values [n, V] weight [V, H] in float64, without a float64 copy of the weight."""
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    total = values.new_zeros(values.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        total.addmm_(values[:, part], weight[part].double())
    return total
