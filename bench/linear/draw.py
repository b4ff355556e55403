"""Random hidden states and an LM head whose logits are those of a trained policy; see ``bench/cases.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused.bench.cases import (
    CANDIDATES,
    CHUNK_ELEMENTS,
    LOGIT_STD,
    draw_advantages,
    draw_old_logprobs,
)
from hpo_fused.objective import Objective

from .cases import HeadShape, LinearCase

WEIGHT_STD = 0.02  # of an LM head's entries
HIGHEST = 0.95  # of a softcap: where a peak may lie


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """Tensors of a case.

    Attributes:
        hidden: [B, T, H] leaf that requires grad.
        weight: [V, H] leaf that requires grad.
        tokens: int64 [B, T].
        advantages: float32 [B].
        old_logprobs: float32 [B, T].
        mask: None: every token counts.
    """

    case: LinearCase
    objective: Objective
    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    mask: None = None

    def active_hidden(self) -> Tensor:
        """Hidden states [n, H] of the rows with a learning signal, detached."""
        return self.hidden.detach()[self.advantages != 0].flatten(0, 1)


def draw_weight(shape: HeadShape, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """An LM head [V, H]."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(shape.vocabulary, shape.hidden, dtype=dtype, device=device)
    return weight.normal_(0.0, WEIGHT_STD, generator=generator)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Hidden states [n, H], tokens and their log-probabilities as designed [n]."""

    hidden: Tensor
    tokens: Tensor
    logprobs: Tensor


def _draw_rows(count: int, weight: Tensor, softcap: float | None, generator: torch.Generator) -> _Rows:
    """Noise, plus what of the candidates' own rows of the head makes their logits the peaks that were drawn."""
    (vocabulary, size), device = weight.shape, weight.device
    rest = math.log(vocabulary) + LOGIT_STD**2 / 2  # log of the noise's own softmax denominator
    # Those rows are not orthogonal to the others: they make a part of the noise themselves.
    echo = CANDIDATES * ((rest + 1) ** 2 + LOGIT_STD**2) / size
    noise = math.sqrt(max(LOGIT_STD**2 - echo, 1.0) / size) / WEIGHT_STD
    hidden = noise * torch.randn(count, size, generator=generator, device=device)
    candidates = torch.randint(vocabulary, (count, CANDIDATES), generator=generator, device=device)
    peaks = rest + 1 + LOGIT_STD * torch.randn(count, CANDIDATES, generator=generator, device=device)
    before_cap = peaks
    if softcap is not None:
        peaks = peaks.clamp(-HIGHEST * softcap, HIGHEST * softcap)
        before_cap = softcap * torch.atanh(peaks / softcap)
    rows = weight.detach()[candidates].float()
    gram = rows @ rows.mT
    gram.diagonal(dim1=1, dim2=2).mul_(1.001)  # a candidate may have been drawn twice
    gap = before_cap.unsqueeze(-1) - rows @ hidden.unsqueeze(-1)
    hidden += (rows * torch.linalg.solve(gram, gap)).sum(1)
    choice = torch.multinomial(peaks.softmax(-1), 1, generator=generator)
    total = torch.cat([peaks, torch.full((count, 1), rest, device=device)], -1).logsumexp(-1)
    logprobs = peaks.gather(-1, choice).squeeze(-1) - total
    return _Rows(hidden.to(weight.dtype), candidates.gather(-1, choice).squeeze(-1), logprobs.double())


@dataclass(frozen=True, eq=False)
class Problem:
    """Hidden states, head and tokens that cases with other advantages share.

    Attributes:
        case: with any share of inactive rows.
        advantages: float32 [B] for each share.
        logprobs: of the tokens, float64 [B, T], as far as the design of the logits tells; see ``exact.py``.
        noise: float32 [B, T], old log-probabilities less log-probabilities.
    """

    case: LinearCase
    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    logprobs: Tensor
    noise: Tensor
    advantages: dict[float, Tensor]

    def inputs(self, inactive: float, logprobs: Tensor | None = None) -> LinearInputs:
        """The inputs with that share of inactive rows; ``logprobs`` [B, T] where they are known better."""
        case = self.case.at(inactive)
        old = ((self.logprobs if logprobs is None else logprobs) + self.noise).float()
        return LinearInputs(
            case, case.resolved_objective(), self.hidden, self.weight, self.tokens, self.advantages[inactive], old
        )


def draw(case: LinearCase, fractions: Sequence[float], device: torch.device, seed: int, weight: Tensor) -> Problem:
    """Random inputs of ``case`` for each share of inactive rows in ``fractions``."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    count, size = case.tokens, case.shape.hidden
    hidden = torch.empty(count, size, dtype=weight.dtype, device=device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs = torch.empty(count, dtype=torch.float64, device=device)
    step = max(1, CHUNK_ELEMENTS // (CANDIDATES * size))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows = _draw_rows(part.stop - start, weight, case.shape.softcap, generator)
        hidden[part], tokens[part], logprobs[part] = rows.hidden, rows.tokens, rows.logprobs
    noise = draw_old_logprobs(torch.zeros_like(logprobs), generator)
    advantages = {
        inactive: draw_advantages(case.responses, inactive, torch.Generator().manual_seed(seed)).to(device)
        for inactive in fractions
    }
    shape = (case.responses, case.length)
    return Problem(
        case,
        hidden.reshape(*shape, size).requires_grad_(),
        weight.requires_grad_(),
        tokens.reshape(shape),
        logprobs.reshape(shape),
        noise.reshape(shape),
        advantages,
    )
