"""Random inputs of a case: those of a trained policy, since power draw, clipping and cancellation depend on values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpo_fused import Objective

from .cases import GROUP, Case

# Spread of the logits, and of the log-ratio between the policy and the one that sampled. One token in twenty has
# moved far, so that every branch of every objective (clipped, saturated) is on the measured path.
LOGIT_STD = 2.5
LOG_RATIO_STD, FAR_LOG_RATIO_STD, FAR_SHARE = 0.1, 0.5, 0.05
RESPONSE_LOG_RATIO_STD = 2e-4  # of a response's mean: GSPO, whose range is [-3e-4, 4e-4], then clips a few
CANDIDATES = 8  # tokens of a row that share most of its probability
WEIGHT_STD = 0.02  # of an LM head's entries
HIGHEST = 0.95  # share of a softcap up to which a peak may lie
CHUNK_ELEMENTS = 1 << 23  # float64 temporaries stay near 64 MiB each


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of a case.

    Attributes:
        leaves: inputs that require grad: logits [B, T, V]; hidden [B, T, H] and weight [V, H]; or log-probabilities
            [B, T].
        tokens: int64 [B, T].
        advantages: float32 [B].
        old_logprobs: float32 [B, T].
        mask: bool [B, T], or None where every token counts.
        upstream: float32 [B, T], gradient that a loss behind log-probabilities sends back; 0 where masked.
    """

    case: Case
    objective: Objective
    leaves: tuple[Tensor, ...]
    tokens: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    mask: Tensor | None
    upstream: Tensor

    @property
    def softcap(self) -> float | None:
        return self.case.shape.softcap

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Everything that a loss depends on besides log-probabilities: advantages, old log-probabilities and mask."""
        return self.advantages, self.old_logprobs, self.mask

    def needed(self) -> Tensor:
        """Rows that have to be computed, bool [B, T]: unmasked and, for a loss, with an advantage."""
        rows = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        return rows & (self.advantages != 0).unsqueeze(-1) if self.case.gives_loss else rows


def draw_advantages(responses: int, inactive: float, generator: torch.Generator) -> Tensor:
    """Group-normalised advantages of binary rewards, float32 [B] on the CPU; ``inactive`` of them exactly zero.

    A group whose responses all earn the same has zero advantage; the others hold at least one of each kind.
    """
    active = responses - round(inactive * responses)
    values = torch.zeros(responses)
    for start in range(0, active, GROUP):
        size = min(GROUP, active - start)
        rewards = torch.zeros(size)
        successes = int(torch.randint(1, max(size, 2), (), generator=generator))
        rewards[torch.randperm(size, generator=generator)[:successes]] = 1.0
        # A group of one (an odd count of responses) has no spread; its reward is its advantage.
        normalised = (rewards - rewards.mean()) / rewards.std(correction=0) if size > 1 else rewards
        values[start : start + size] = normalised
    return values[torch.randperm(responses, generator=generator)]


def draw_old_logprobs(
    logprobs: Tensor, generator: torch.Generator, objective: Objective, mask: Tensor | None
) -> Tensor:
    """Float32 log-probabilities under the policy that sampled, near these and for some tokens further away.

    Where a response has one ratio its tokens' log-ratios nearly cancel, as between two updates.
    """
    far = torch.rand(logprobs.shape, generator=generator, device=logprobs.device) < FAR_SHARE
    spread = torch.where(far, FAR_LOG_RATIO_STD, LOG_RATIO_STD)
    log_ratios = spread * torch.randn(logprobs.shape, generator=generator, device=logprobs.device)
    if objective.ratio_level != "token":
        weights = torch.ones_like(log_ratios) if mask is None else mask.to(log_ratios.dtype)
        means = (log_ratios * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        drawn = torch.randn(means.shape, generator=generator, device=means.device)
        log_ratios = log_ratios - means + RESPONSE_LOG_RATIO_STD * drawn
    return (logprobs - log_ratios).float()


def _peaks(count: int, vocabulary: int, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Candidate tokens of ``count`` rows, and their logits; both [count, CANDIDATES].

    A trained policy is sure of itself: a few candidates hold nearly all the probability, and the token is one of
    them. Noise alone would give log-probabilities near -ln V.
    """
    candidates = torch.randint(vocabulary, (count, CANDIDATES), generator=generator, device=device)
    noise = torch.randn(count, CANDIDATES, generator=generator, device=device)
    return candidates, _log_noise(vocabulary) + 1 + LOGIT_STD * noise


def _log_noise(vocabulary: int) -> float:
    """Log of the softmax denominator of the noise alone."""
    return math.log(vocabulary) + LOGIT_STD**2 / 2


def _choose(candidates: Tensor, peaks: Tensor, generator: torch.Generator) -> Tensor:
    """A candidate of each row, sampled by the softmax of their logits."""
    choice = torch.multinomial(peaks.softmax(-1), 1, generator=generator)
    return candidates.gather(-1, choice).squeeze(-1)


def draw_logits(case: Case, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits [N, V] in the case's dtype, and the token sampled from each row, int64 [N]."""
    count, vocabulary = case.tokens, case.shape.vocabulary
    logits = torch.empty(count, vocabulary, dtype=case.torch_dtype, device=device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    for rows in torch.arange(count).split(max(1, CHUNK_ELEMENTS // vocabulary)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        z = torch.empty(len(rows), vocabulary, device=device).normal_(0.0, LOGIT_STD, generator=generator)
        candidates, peaks = _peaks(len(rows), vocabulary, device, generator)
        logits[part] = z.scatter_(1, candidates, peaks).to(case.torch_dtype)
        tokens[part] = _choose(candidates, peaks, generator)
    return logits, tokens


def draw_hidden(case: Case, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H] and head [V, H] in the case's dtype whose logits have those peaks, and the tokens [N].

    Noise, plus that part of the candidates' own rows of the head which makes their logits the peaks.
    """
    shape, count = case.shape, case.tokens
    vocabulary, size = shape.vocabulary, shape.hidden
    weight = torch.empty(vocabulary, size, dtype=case.torch_dtype, device=device)
    weight.normal_(0.0, WEIGHT_STD, generator=generator)
    # The candidates' rows are not orthogonal to the others: they make a part of the noise themselves.
    echo = CANDIDATES * ((_log_noise(vocabulary) + 1) ** 2 + LOGIT_STD**2) / size
    noise = math.sqrt(max(LOGIT_STD**2 - echo, 1.0) / size) / WEIGHT_STD
    hidden = torch.empty(count, size, dtype=case.torch_dtype, device=device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    for rows in torch.arange(count).split(max(1, CHUNK_ELEMENTS // (CANDIDATES * size))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        x = noise * torch.randn(len(rows), size, generator=generator, device=device)
        candidates, peaks = _peaks(len(rows), vocabulary, device, generator)
        wanted = peaks
        if shape.softcap is not None:
            peaks = peaks.clamp(-HIGHEST * shape.softcap, HIGHEST * shape.softcap)
            wanted = shape.softcap * torch.atanh(peaks / shape.softcap)
        own = weight[candidates].float()
        gram = own @ own.mT
        gram.diagonal(dim1=1, dim2=2).mul_(1.001)  # a candidate may have been drawn twice
        gap = wanted.unsqueeze(-1) - own @ x.unsqueeze(-1)
        hidden[part] = (x + (own * torch.linalg.solve(gram, gap)).sum(1)).to(case.torch_dtype)
        tokens[part] = _choose(candidates, peaks, generator)
    return hidden, weight, tokens


def draw_mask(case: Case, device: torch.device, generator: torch.Generator) -> Tensor | None:
    """Bool [B, T] of responses of random lengths, a quarter of T at least; None unless the case is ragged."""
    if not case.ragged:
        return None
    shortest = max(1, case.length // 4)
    lengths = torch.randint(shortest, case.length + 1, (case.responses, 1), generator=generator, device=device)
    return torch.arange(case.length, device=device) < lengths
