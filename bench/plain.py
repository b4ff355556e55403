"""The operations as a trainer writes them in plain PyTorch: the baseline, eager and compiled.

Written with care for speed and memory within that style: the cast to float32 happens inside ``log_softmax`` where there
is no softcap, the entropy (a statistic: no preset has a bonus) keeps nothing for backward, and autograd does the rest.
Presets only: no KL term and no entropy bonus. Shapes: logits [B, T, V], hidden [B, T, H], weight [V, H], tokens,
log-probabilities and mask [B, T], advantages [B].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo_fused import Objective, hysteretic_advantages
from hpo_fused.reference import bounded_log_ratios, surrogate


def normalised(objective: Objective, losses: Tensor, mask: Tensor | None) -> Tensor:
    """Token losses [B, T] summed as the objective normalises them; the presets' normalisers only."""
    keep = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    sums, lengths = (losses * keep).sum(-1), keep.sum(-1)
    if objective.normalization == "mean_length":
        return sums.sum() / lengths.sum().clamp(min=1)
    divisors: dict[str, Tensor | int] = {
        "response": lengths.clamp(min=1), "constant": objective.max_length or 1, "response_sum": 1,
    }  # fmt: skip
    return (sums / divisors[objective.normalization]).mean()


def logprob_policy_loss(
    objective: Objective, logprobs: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor | None
) -> Tensor:
    """The loss of log-probabilities."""
    own = x = bounded_log_ratios(objective, logprobs - old_logprobs, advantages.unsqueeze(-1))
    if objective.ratio_level != "token":
        keep = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        x = (x * keep).sum(-1, keepdim=True).expand_as(x)
        if objective.ratio_level != "sequence_sum":
            x = x / keep.sum(-1, keepdim=True).clamp(min=1)
        if objective.ratio_level == "sequence_token":
            x = x.detach() + own - own.detach()
    x = x.clamp(-objective.max_log_ratio, objective.max_log_ratio)
    signal = hysteretic_advantages(advantages, mask, objective.weighting).unsqueeze(-1)
    return normalised(objective, -surrogate(objective, x, signal, logprobs), mask)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under the model's softcap; in float32, or the log-probabilities would not be exact."""
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def token_logprobs(logits: Tensor, tokens: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities, attached to the graph, and detached entropies."""
    log_p = torch.log_softmax(capped(logits, softcap), dim=-1, dtype=torch.float32)
    logprobs = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return logprobs, entropy


def policy_loss(
    objective: Objective, logits: Tensor, tokens: Tensor, advantages: Tensor, old_logprobs: Tensor,
    mask: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, attached to the graph, and detached log-probabilities and entropies."""
    logprobs, entropy = token_logprobs(logits, tokens, softcap)
    loss = logprob_policy_loss(objective, logprobs, advantages, old_logprobs, mask)
    return loss, logprobs.detach(), entropy


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` of all the logits."""
    return token_logprobs(F.linear(hidden, weight), tokens, softcap)


def linear_policy_loss(
    objective: Objective, hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, old_logprobs: Tensor,
    mask: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`policy_loss` of all the logits."""
    return policy_loss(objective, F.linear(hidden, weight), tokens, advantages, old_logprobs, mask, softcap)
