"""A loss call's arguments, checked once and kept as they came, in the two forms that backends take.

Kernels read the caller's tensors as they are: a call costs no operation to prepare them. Whatever else needs weights
per token (the torch backend, traced graphs, metrics) gets them from ``batch.prepare``, when it asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import (
    BatchStatistics,
    Layout,
    PreparedBatch,
    check_boundaries,
    check_groups,
    check_mask,
    check_max_length,
    prepare,
)
from .checks import check_tensor, found
from .objective import AdaptiveHysteretic, Hysteretic, Objective
from .rows import BatchWeights, TokenInputs


class LossBatch:
    """Arguments of a loss call.

    Args:
        objective: what to optimise.
        name: the argument that ``shape`` was taken from.
        shape: [B, T], or packed [N], of per-token tensors.
        device: where every tensor has to be.
        tokens: the ids, already checked; None: the caller has log-probabilities.
        advantages and all others: as in :func:`policy_loss`.

    Raises:
        TypeError, ValueError: as :func:`policy_loss` documents.
    """

    def __init__(
        self,
        objective: Objective,
        name: str,
        shape: torch.Size,
        device: torch.device,
        tokens: Tensor | None,
        advantages: Tensor,
        *,
        old_logprobs: Tensor | None,
        ref_logprobs: Tensor | None,
        mask: Tensor | None,
        token_weights: Tensor | None,
        cu_seqlens: Tensor | None,
        groups: Tensor | None,
        statistics: BatchStatistics | None,
    ) -> None:
        responses = check_boundaries(name, shape, device, cu_seqlens)
        if mask is not None:
            check_mask(mask, shape, device)
        per_token = tuple(shape)
        per_response = [(responses,), per_token] if len(shape) == 1 else [(responses,), per_token, (responses, 1)]
        check_tensor("advantages", advantages, per_response, "number", device)
        if statistics is not None:
            if not isinstance(statistics, BatchStatistics):
                raise TypeError(f"statistics: expected a BatchStatistics or None, got {found(statistics)}")
            statistics.check_device(device)
        if groups is not None and (statistics is None or objective.normalization == "group_mean_length"):
            check_tensor("groups", groups, [(responses,)], "integer", device)
        if objective.kl_coef != 0 and ref_logprobs is None:
            raise ValueError(
                f"ref_logprobs: expected reference log-probabilities for kl_coef={objective.kl_coef}, got None"
            )
        if old_logprobs is not None:
            check_tensor("old_logprobs", old_logprobs, [per_token], "floating", device)
        if ref_logprobs is not None:
            check_tensor("ref_logprobs", ref_logprobs, [per_token], "floating", device)
        if objective.normalization == "constant":
            check_max_length(objective)
        if objective.normalization == "group_mean_length":
            check_groups(groups, statistics)
        if token_weights is not None:
            check_tensor("token_weights", token_weights, per_response, "number", device)
        self.objective, self.name, self.shape, self.device, self.responses = objective, name, shape, device, responses
        self.tokens, self.mask, self.advantages, self.token_weights = tokens, mask, advantages, token_weights
        self.old_logprobs, self.ref_logprobs = old_logprobs, ref_logprobs
        self.cu_seqlens, self.groups, self.statistics = cu_seqlens, groups, statistics
        self._prepared: PreparedBatch | None = None
        self._inputs: TokenInputs | None = None
        self._weights: BatchWeights | None = None

    @property
    def prepared(self) -> PreparedBatch:
        """Weights per token and whatever else takes some forty operations on small tensors; made once."""
        if self._prepared is None:  # not functools.cached_property: torch.compile cannot trace its lock
            self._prepared = self._prepare()
        return self._prepared

    def _prepare(self) -> PreparedBatch:
        return prepare(
            self.objective,
            Layout.of(self.name, self.shape, self.device, self.mask, self.cu_seqlens),
            self.advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            token_weights=self.token_weights,
            groups=self.groups,
            statistics=self.statistics,
        )

    def _per_response_or_token(self, value: Tensor) -> tuple[Tensor, bool]:
        """The tensor as kernels address it, and whether it has one entry per token."""
        if len(self.shape) == 1:
            per_token = value.shape[0] != self.responses
        else:  # expanded along T is one per response, too
            per_token = value.dim() == 2 and value.shape[1] == self.shape[1] and value.stride(1) != 0
        if per_token:
            return unit_stride(value), True
        if value.stride(0) == 1 or value.shape[0] <= 1:
            return value, False
        return (value if value.dim() == 1 else value[:, 0]).contiguous(), False

    def inputs(self) -> TokenInputs:
        """The tensors, of any dtype; copied only where the last dimension is strided, and then once."""
        if self._inputs is None:
            self._inputs = self._as_inputs()
        return self._inputs

    def _as_inputs(self) -> TokenInputs:
        advantages, advantage_per_token = self._per_response_or_token(self.advantages)
        weights, weight_per_token = self.token_weights, False
        if weights is not None:
            weights, weight_per_token = self._per_response_or_token(weights)
        tokens, mask, old, ref = (
            None if value is None else unit_stride(value)
            for value in (self.tokens, self.mask, self.old_logprobs, self.ref_logprobs)
        )
        boundaries = None if self.cu_seqlens is None else unit_stride(self.cu_seqlens)
        return TokenInputs(
            tokens, mask, advantages, weights, old, ref, boundaries, advantage_per_token, weight_per_token
        )

    def weights(self) -> BatchWeights:
        """Normalisation and weighting; "group_mean_length" alone computes, one entry per response, once."""
        if self._weights is None:
            self._weights = self._as_weights()
        return self._weights

    def _as_weights(self) -> BatchWeights:
        objective, statistics, normalizers = self.objective, self.statistics, None
        normalization: str = objective.normalization
        if normalization == "group_mean_length":
            if statistics is None:
                layout = Layout.of(self.name, self.shape, self.device, self.mask, self.cu_seqlens)
                signal = layout.per_response_or_token("advantages", self.advantages)
                statistics = BatchStatistics._of_layout(layout, signal, self.groups)
            assert self.groups is not None
            normalization, normalizers = "response_given", statistics.group_normalizer(self.groups.to(torch.int64))
        weighting, alpha = "none", 1.0
        if isinstance(objective.weighting, Hysteretic):
            weighting, alpha = "fixed", objective.weighting.alpha
        elif isinstance(objective.weighting, AdaptiveHysteretic):
            weighting, alpha = "adaptive", objective.weighting.alpha_min
        length = float(objective.max_length or 1) if normalization == "constant" else 1.0
        if statistics is None:
            numbers = (float(self.responses), 0.0, 0.0, 0.0, 1.0, float(alpha), length)
            return BatchWeights(normalization, weighting, self.responses, True, _NO_COUNTS, numbers, normalizers)
        totals = statistics.responses, statistics.tokens, statistics.positive, statistics.negative
        s, tokens, positive, negative = (float(total) if isinstance(total, int) else 0.0 for total in totals)
        numbers = (s, tokens, positive, negative, float(statistics.gradient_average), float(alpha), length)
        a, b, c, d = (None if isinstance(total, int) else total for total in totals)
        return BatchWeights(normalization, weighting, self.responses, False, (a, b, c, d), numbers, normalizers)


_NO_COUNTS = (None, None, None, None)


def unit_stride(value: Tensor) -> Tensor:
    """The tensor as kernels can address it: last dimension contiguous, offsets within 32 bits."""
    near = value.stride(0) * value.shape[0] < 2**31
    return value if near and (value.stride(-1) == 1 or value.shape[-1] <= 1) else value.contiguous()
