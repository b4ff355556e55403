"""Log-probabilities and entropies of sampled tokens from hidden states and LM head."""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear_autograd
from .backend import Backend, backend_for
from .batch import as_mask
from .checks import check_tensor, check_token_ids
from .linear_autograd import UNTRACEABLE, LinearCall
from .linear_head import Rows
from .linear_inputs import check_head, check_weight_grad, choose_rows
from .policy_loss import check_transform
from .token_logprobs import TokenLogprobs


@torch.compiler.disable(reason=UNTRACEABLE)  # type: ignore[untyped-decorator]
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    entropy: bool = True,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    active_count: int | None = None,
    weight_grad: Tensor | None = None,
    backend: Backend = "auto",
) -> TokenLogprobs:
    """:func:`token_logprobs` of ``hidden @ weight.T + bias``, a chunk of unmasked rows at a time.

    For old and reference log-probabilities under ``torch.no_grad()`` this is one GEMM, 2 n H V flops for n unmasked
    rows. Differentiated, backward makes each chunk's logits again: four GEMMs in all. Either way memory beyond the
    gradients is one chunk of logits and, with several chunks, dweight's float32 accumulator (:func:`linear_memory`).

    Args:
        hidden, weight, bias, chunk_bytes, logits_dtype, weight_grad, backend: as in :func:`linear_policy_loss`.
        tokens: integer [B, T] or [N], ids in [0, V) where unmasked, anything elsewhere.
        mask: bool or 0/1, shaped like tokens: rows to compute; None: all.
        entropy: whether to compute the entropy too.
        temperature, softcap: as in :func:`policy_loss`.
        active_count: number of unmasked rows, or an upper bound; with it, or without a mask, nothing synchronises (see
            :func:`linear_policy_loss`).

    Returns:
        :class:`TokenLogprobs`, float32, 0 where masked; both differentiable (not twice). Backward may run again with
        retain_graph=True: it recomputes.

    Raises:
        TypeError, ValueError: as :func:`linear_policy_loss`.

    Examples:
        >>> hidden, weight = torch.zeros(1, 2, 3), torch.ones(4, 3)
        >>> linear_token_logprobs(hidden, weight, torch.tensor([[0, 3]])).logprobs
        tensor([[-1.3863, -1.3863]])
    """
    transform = check_transform(temperature, softcap)
    inputs = check_head(hidden, weight, bias, logits_dtype)
    shape = hidden.shape[:-1]
    tokens = check_tensor("tokens", tokens, [tuple(shape)], "integer", hidden.device)
    compute = as_mask(mask, shape, hidden.device).reshape(inputs.shape).contiguous()
    into = check_weight_grad(weight_grad, weight)
    ids = tokens.to(torch.int64).reshape(inputs.shape).contiguous()
    check_token_ids(ids, compute, inputs.weight.shape[0])
    call = LinearCall(ids, transform, inputs.compute, inputs.logits, chunk_bytes, backend_for(inputs.hidden, backend))
    if mask is None and active_count is None:
        rows = Rows.of(compute, compute.numel(), exact=True)
    else:
        (rows,) = choose_rows(compute, active_count)
    logprobs, entropies = linear_autograd.token_statistics(
        inputs.hidden, inputs.weight, inputs.bias, call, rows, entropy=entropy, into=into
    )

    def shaped(value: Tensor) -> Tensor:
        return torch.where(compute, value, 0.0).reshape(shape)

    return TokenLogprobs(shaped(logprobs), None if entropies is None else shaped(entropies))
