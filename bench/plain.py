"""The policy losses as a trainer writes them in plain PyTorch: the baseline, eager and compiled.

Written with care for speed and memory within that style: the cast to float32 happens inside ``log_softmax`` where
there is no softcap, the entropy (a statistic: no preset has a bonus) keeps nothing for backward, and autograd does
the rest; the surrogate of a token is the oracle's, elementwise. Presets only: no KL term and no entropy bonus.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpo_fused.objective import Objective

from .logprob_loss import plain_logprob_loss


class PlainOutput(NamedTuple):
    """Loss attached to the graph; detached log-probabilities and entropy [B, T]."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def plain_token_logprobs(logits: Tensor, tokens: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, attached to the graph, and detached entropies [B, T] of padded logits [B, T, V]."""
    if softcap is None:
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    else:
        log_p = torch.log_softmax(softcap * torch.tanh(logits.float() / softcap), dim=-1)
    logprobs = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logprobs, entropy


def plain_policy_loss(
    objective: Objective,
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None,
    softcap: float | None,
) -> PlainOutput:
    """Loss, log-probabilities and entropy of padded logits [B, T, V]; shapes as in :func:`hpo_fused.policy_loss`."""
    logprobs, entropy = plain_token_logprobs(logits, tokens, softcap)
    loss = plain_logprob_loss(objective, logprobs, advantages, old_logprobs, mask)
    return PlainOutput(loss, logprobs.detach(), entropy)
