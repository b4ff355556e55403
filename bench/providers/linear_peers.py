"""Other projects' losses from hidden states and LM head, as functions of tensors with one signature.

Arguments: hidden [B, T, H], weight [V, H], tokens int64 [B, T], advantages float32 [B], old_logprobs float32 [B, T],
mask bool [B, T] or None, the objective, the model's softcap or None. Returned: the loss, attached to hidden and weight,
and detached log-probabilities and entropy [B, T], 0 where masked, or None where the peer gives none away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpo_fused.bench.logprob_loss import plain_logprob_loss, weighted_advantages
from hpo_fused.objective import Objective

from .base import Output, Unavailable
from .liger import VERSION as LIGER_VERSION
from .peers import liger_shaping
from .trl import VERSION

TRL_COLUMNS = 32768  # of the vocabulary in one tile, as TRL's trainers choose
IGNORED = -100


class LinearPeer(NamedTuple):
    """What a table says of a peer, and what it takes to run it."""

    name: str
    summary: str
    leaves_out: str
    distribution: str
    version: str
    needs_gpu: bool = False


TRL_CHUNKED = LinearPeer(
    "trl:chunked",
    "TRL >= 1.16's ChunkedLogProbFunction (4 GEMMs in tiles of 4096 x 32768; on a CPU two of them in float32), with "
    "entropy, eager loss; skips masked rows on a GPU, rows of zero advantage never",
    "",
    "trl",
    VERSION,
)
LIGER_CHUNKED = LinearPeer(
    "liger:chunked",
    "Liger-Kernel >= 0.8's LigerFusedLinearGRPOLoss (4 GEMMs, two of them in float32; a response at a time, gradients "
    "in forward whether or not asked for, weight's summed in its own dtype)",
    "log-probabilities, entropy, softcap; objectives other than clipping ones",
    "liger-kernel",
    LIGER_VERSION,
)
CCE = LinearPeer(
    "cce",
    "cut-cross-entropy's per-token cross entropy without gradient filtering, eager loss; skips masked rows, rows of "
    "zero advantage never",
    "entropy",
    "cut-cross-entropy",
    "25.1",
    needs_gpu=True,
)


def trl_chunked(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None,
    objective: Objective,
    softcap: float | None,
) -> Output:
    """``trl.kernels.ChunkedLogProbFunction`` as GRPOTrainer's fused LM head calls it; any objective in eager torch."""
    from trl.kernels import ChunkedLogProbFunction

    # Like TRL's fused LM head: Triton devices score the unmasked positions only.
    compact = mask is not None and hidden.device.type != "cpu"
    rows = mask if compact else torch.ones_like(tokens, dtype=torch.bool)
    values = ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden.flatten(0, 1),
        weight,
        None,
        tokens[mask] if compact else tokens.flatten(),
        1.0,
        TRL_COLUMNS,
        softcap,
        1.0,
        ("entropy",),
    )
    logprobs, entropy = (value.new_zeros(tokens.shape).masked_scatter(rows, value) for value in values[:2])
    loss = plain_logprob_loss(objective, logprobs, advantages, old_logprobs, mask)
    if mask is not None:
        logprobs, entropy = logprobs * mask, entropy * mask
    return Output(loss, logprobs.detach(), entropy.detach())


def liger_chunked(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None,
    objective: Objective,
    softcap: float | None,
    *,
    compiled: bool = True,
) -> Output:
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``; ``compiled``: its loss (not its GEMMs), as by default."""
    if softcap is not None:
        raise Unavailable("Liger-Kernel's chunked GRPO loss has no softcap")
    options = liger_shaping(objective)
    kinds = {"sapo": {"response": "sapo"}, "cispo": {"mean_length": "cispo"}}
    clipped = {"response": "grpo", "mean_length": "dapo", "constant": "dr_grpo"}
    kind = kinds.get(str(options["loss_type"]), clipped).get(objective.normalization)
    if kind is None:
        raise Unavailable(
            "Liger-Kernel's chunked loss normalises a clipped ratio by response, mean_length or constant, SAPO by "
            f"response and CISPO by mean_length; not {options['loss_type']} by {objective.normalization}"
        )
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options.update(loss_type=kind, max_completion_length=objective.max_length)
    peer = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=compiled, **options)
    keep = torch.ones_like(tokens) if mask is None else mask.long()
    loss, _ = peer(
        hidden,
        weight,
        tokens,
        keep,
        weighted_advantages(objective, advantages, mask, tokens.shape[1]),
        old_per_token_logps=old_logprobs,
    )
    return Output(loss, None, None)


def cce(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None,
    objective: Objective,
    softcap: float | None,
) -> Output:
    """``cut_cross_entropy.linear_cross_entropy(reduction="none")``, any objective in eager PyTorch.

    Its gradient filter, "high" by its own default, is off: it drops blocks of the gradient that are small, so that the
    result is not the objective's gradient.
    """
    from cut_cross_entropy import linear_cross_entropy

    targets = tokens if mask is None else tokens.masked_fill(~mask, IGNORED)
    losses: Tensor = linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, softcap=softcap, reduction="none", filter_eps=None
    )
    logprobs = -losses
    loss = plain_logprob_loss(objective, logprobs, advantages, old_logprobs, mask)
    return Output(loss, logprobs.detach(), None)
