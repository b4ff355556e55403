"""Row-level data that passes between the public functions and a backend.

A *row* is one token position: V logits. Both backends (``hpo_fused.kernels`` and ``hpo_fused.eager``) take and
return exactly these types, so nothing above them knows which one is in use. Plain values only: a backend never
sees an :class:`~hpo_fused.objective.Objective`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """z' = softcap * tanh(z / softcap) / temperature; ``softcap=None`` leaves z' = z / temperature."""

    temperature: float = 1.0
    softcap: float | None = None


class SurrogateSpec(NamedTuple):
    """An objective lowered to the values that a row needs.

    ``parameters`` by ``kind``, with the neutral value of each optional one (all finite or +inf, never None):
      clip             1 - low, 1 + high, delta (inf: none), dual (inf: none)
      log_fidelity     c, k_pos, 1/lambda_pos, k_neg, 1/lambda_neg (both reciprocals 0: no hazard)
      soft_gate        tau_pos, tau_neg
      truncated_ratio  low (0: none), high
    """

    kind: str
    parameters: tuple[float, ...]
    max_log_ratio: float
    kl_coef: float
    entropy_coef: float


class TokenTerms(NamedTuple):
    """Everything a row's loss needs besides its logits, each float32 [B, T] contiguous.

    With s the surrogate, the row's loss is
    ``-policy_weights * s(x, advantages) + penalty_weights * (kl_coef * k3 - entropy_coef * H)``.
    Masks, caller's token weights, hysteretic weights, length normalisation and gradient averaging are already in
    the two weights; a weight of exactly 0 switches its part off whatever the other entries hold (NaN included).
    """

    advantages: Tensor
    policy_weights: Tensor
    penalty_weights: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None


class TokenInputs(NamedTuple):
    """What a caller passed about the tokens, checked but as it came: any dtype of the right kind, on one device.

    Per-token tensors are [B, T] or, packed, [1, N], with unit stride on the last dimension. Whoever takes these makes
    the weights of :class:`TokenTerms` itself.
    """

    tokens: Tensor | None  # None: log-probabilities are at hand
    mask: Tensor | None  # 0: masked
    advantages: Tensor  # per token, or per response: [B], contiguous
    token_weights: Tensor | None  # likewise
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    cu_seqlens: Tensor | None  # contiguous [B + 1]; None: padded
    advantage_per_token: bool
    weight_per_token: bool


class BatchWeights(NamedTuple):
    """Length normalisation and hysteretic weighting, lowered, and the totals of the optimiser batch.

    ``normalization``: "response" n_i = 1 / (S max(L_i, 1)); "mean_length" 1 / sum L; "constant" 1 / (S max_length);
    "response_given" 1 / ``normalizers``[i]. ``weighting``: "none", "fixed" (alpha), "adaptive" (alpha is alpha_min).
    """

    normalization: str
    weighting: str
    responses: int  # of this call
    own_counts: bool  # tokens, N+ and N- are to be counted in this call
    counts: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # 0-d S, tokens, N+, N- on the device
    numbers: tuple[float, float, float, float, float, float, float]  # S, tokens, N+, N-; average; alpha; max_length
    normalizers: Tensor | None  # float32 [B]


class ComputedRows(NamedTuple):
    """Which rows a sweep computes, and what a backend found out about the responses on the way."""

    compute: Tensor  # bool [B, T], contiguous
    statistics: Tensor | None  # for the same backend's ``logprob_policy_loss``


class LossRows(NamedTuple):
    """Results of a loss call row by row, [B, T]: float32 but for ``active``, which is bool.

    Where masked, all are 0; log-probability and entropy are NaN in unmasked rows that were not computed.
    """

    losses: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    active: Tensor


class LogprobRows(NamedTuple):
    """Results of a loss of log-probabilities: ``losses`` float32, of any shape, whose sum is the loss; the rest shaped
    like the log-probabilities and, but for ``active``, float32 and 0 where masked."""

    losses: Tensor
    logprob_coefficients: Tensor  # dloss/dlogp
    entropy_coefficients: Tensor | None  # dloss/dH; None without an entropy term
    logprobs: Tensor
    entropy: Tensor | None
    active: Tensor  # bool


class RowStatistics(NamedTuple):
    """Statistics of each row of transformed logits z', float32 [B, T]; undefined (NaN) in rows not computed.

    The softmax denominator is kept as ``maximum`` and ``rest`` = sum over j != y of exp(z'_j - maximum), without
    the sampled token y: log p_y = -log1p(rest / e_y) and 1 - p_y = rest / (rest + e_y) then keep their relative
    precision on peaked rows, where log p_y computed as z'_y - lse cancels to nothing.
    """

    logprobs: Tensor
    maximum: Tensor
    rest: Tensor
    entropy: Tensor | None
