"""Differentiable log-probabilities and entropies of sampled tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd
from .backend import Backend, backend_for
from .checks import check_logits, check_tensor
from .layout import as_mask, check_mask, check_transform
from .token_terms import token_targets
from .vocab_parallel import VocabGroup, resolve_shard


class TokenLogprobs(NamedTuple):
    """Float32 tensors shaped like tokens, 0 where masked; ``entropy`` is None when it was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: bool = True,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_group: VocabGroup = None,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """log p(token) and the entropy of p = softmax(z'), z' = softcap * tanh(z / softcap) / temperature.

    One read of the logits; backward reads them once more and writes their gradient once, from the gradients of both
    outputs together. No [N, V] temporary.

    Args:
        logits: float16, bfloat16 or float32 [B, T, V] or [N, V]; any strides except on the last dimension.
        tokens: integer [B, T] or [N], ids in [0, V) where unmasked, anything elsewhere.
        mask: bool or 0/1, shaped like tokens: rows to compute; None: all.
        entropy: whether to compute the entropy too.
        temperature, softcap, vocab_group, backend: as in :func:`policy_loss`; a packed tensor of temperatures is one
            per token.

    Returns:
        :class:`TokenLogprobs`, both differentiable (not twice). Backward may run again with retain_graph=True: it
        recomputes from the logits.

    Raises:
        TypeError, ValueError: as :func:`policy_loss`.

    Examples:
        >>> import torch
        >>> result = token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))
        >>> result.logprobs
        tensor([[-1.3863, -1.3863]])
        >>> result.entropy
        tensor([[1.3863, 1.3863]])
    """
    logits, shard = resolve_shard("logits", logits, -1, vocab_group)
    check_logits("logits", logits, sharded=shard is not None)
    shape = logits.shape[:-1]
    tokens = check_tensor("tokens", tokens, [tuple(shape)], "integer", logits.device)
    if mask is not None:
        mask = check_mask(mask, shape, logits.device)
    rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    transform = check_transform(temperature, softcap, shape, logits.device, mask)
    row_mask = as_mask(mask, rows.shape[:2], logits.device)
    vocabulary = logits.shape[-1] if shard is None else shard.vocabulary
    logprobs, entropies = autograd.token_statistics(
        rows, token_targets(tokens, row_mask, vocabulary), transform, entropy=entropy, inplace=False,
        backend=backend_for(logits, backend), shard=shard,
    )  # fmt: skip

    def shaped(value: Tensor) -> Tensor:
        return torch.where(row_mask, value, 0.0).reshape(shape)

    return TokenLogprobs(shaped(logprobs), None if entropies is None else shaped(entropies))
