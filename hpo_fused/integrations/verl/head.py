"""verl's two fused LM heads, computed by :func:`hpo_fused.linear_token_logprobs`."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from hpo_fused import linear_token_logprobs


def use_fused_head() -> None:
    """Replace what ``model.use_fused_kernels=true`` runs, in this process, with any ``fused_kernels_backend``.

    These are ``linear_cross_entropy`` (backend triton) and ``FusedLinearForPPO.forward`` (torch and liger). Both give
    log-probabilities and entropies, float32, of every position without holding the logits, as before, and take one
    temperature for all. A vocabulary sharded over tensor-parallel ranks, as Megatron has it, stays with verl's kernels.

    In a training run set ``policy_loss.fused_head`` of :class:`HPOPolicyLossConfig`, which calls this in every worker.
    Idempotent.
    """
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as module

    original = module.linear_cross_entropy
    if hasattr(original, "hpo_fused"):
        return

    @functools.wraps(original)
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> Any:
        if dist_process_group is not None or reduction.lower() != "none":
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        return _rows(hidden.reshape(1, -1, hidden.shape[-1]), weight, labels.reshape(1, -1), temperature, (-1,))

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return _rows(hidden_states, vocab_weights, input_ids, temperature, input_ids.shape)

    linear_cross_entropy.hpo_fused = True  # type: ignore[attr-defined]
    module.linear_cross_entropy = linear_cross_entropy
    FusedLinearForPPO.forward = forward


def _rows(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    out = linear_token_logprobs(hidden, weight, tokens, temperature=temperature)
    assert out.entropy is not None
    return out.logprobs.reshape(shape), out.entropy.reshape(shape)
