"""Plain values that pass between the public functions and a backend.

A *row* is one token position with its V logits. Per-token tensors are [B, T]; packed responses are [1, N]. Both
backends (``hpo_fused.kernels`` and ``hpo_fused.torch_backend``) offer the same eight operations on these types, so
nothing above them knows which one is in use, and neither sees an :class:`~hpo_fused.objective.Objective`:

    token_terms(batch, spec, vocabulary, skip_inactive) -> TokenTerms     a call's arguments, as numbers per token
    policy_loss(logits, targets, values, spec, transform, results, out)   both sweeps: loss and gradient
    token_statistics(logits, targets, transform, statistics)              first sweep
    token_gradient(logits, targets, statistics, c, h, transform, out)     second sweep
    logprob_loss(logprobs, entropy, terms, spec) -> LogprobLoss           between the sweeps
    scale_gradient(gradient, factor)                                      the upstream gradient

and, where the vocabulary is in shards, between the sweeps and after the second:

    combine_statistics(gathered, targets, ranges, rank)                   the ranks' statistics, as the row's
    column_gradient(first, targets, start, statistics, c, h, transform, out)    where a token is another rank's
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Codes in ``targets`` where no token's id stands.
MASKED = -1
SKIPPED = -2

# Order of the per-token terms along the first dimension of ``TokenTerms.values``.
ADVANTAGE, POLICY_WEIGHT, KL_WEIGHT, ENTROPY_WEIGHT, OLD_LOGPROB, REF_LOGPROB = range(6)
TERMS = 6

# Order along the first dimension of a loss call's per-token results; the entropy may be absent.
LOSS, LOGPROB, ENTROPY = range(3)

Count: TypeAlias = float | Tensor


class LogitTransform(NamedTuple):
    """Transformed logits z' = softcap * tanh(z / softcap) / temperature; no cap where ``softcap`` is None.

    ``temperatures``: float32 [B, T], contiguous, one for each row in place of ``temperature``, which is then 1.
    """

    temperature: float = 1.0
    softcap: float | None = None
    temperatures: Tensor | None = None


def surrogate_spreads(kind: str, ratio_level: str) -> bool:
    """Whether a surrogate has a derivative by a response's ratio, which all of the response's rows are handed.

    Not so where the ratio is a weight that is not differentiated, nor where each row keeps its own derivative.
    """
    return ratio_level in ("sequence", "sequence_sum") and kind not in ("truncated_ratio", "gamma_gate")


class LossSpec(NamedTuple):
    """The part of a loss that is the same for every token.

    ``parameters`` by ``kind``, with the neutral value of each optional one (all finite or +inf, never None):
      clip             1 - low, 1 + high, delta (inf: none), dual (inf: none)
      log_fidelity     c, k_pos, 1/lambda_pos, k_neg, 1/lambda_neg (both reciprocals 0: no hazard)
      soft_gate        tau_pos, tau_neg
      truncated_ratio  low (0: none), high, both for A < 0, and what a bound that was passed counts: 1, or 0
      gamma_gate       k_pos, lambda_pos, k_neg, lambda_neg
      geometric_mean   lower and upper bound of the log-ratio
      dro              beta
    """

    kind: str
    parameters: tuple[float, ...]
    max_log_ratio: float
    off_policy: bool  # old log-probabilities are given, or the responses' log-ratios
    kl: str  # "none", or as Objective.kl: reference log-probabilities are given
    entropy_bonus: bool
    ratio_level: str  # "token"; one ratio for each response: "sequence", "sequence_token", "sequence_sum"

    @property
    def shared_ratio(self) -> bool:
        """Whether a response's tokens share one ratio."""
        return self.ratio_level != "token"

    @property
    def spreads(self) -> bool:
        """Whether the losses have a derivative by a response's ratio: their surrogate, or a KL estimate's weight."""
        return surrogate_spreads(self.kind, self.ratio_level) or (
            self.kl == "k3_ratio" and self.ratio_level == "sequence"
        )

    @property
    def every_advantage(self) -> bool:
        """Whether tokens of advantage 0 have a gradient as well."""
        return self.kind == "dro"


class ContextParts(NamedTuple):
    """Where the other rows of a call's responses are: on the other ranks of a context-parallel group."""

    group: ProcessGroup
    lengths: Tensor  # integer [B], of the whole responses
    alike: bool  # whether a response's rows are active or not all together, so that each rank can tell


class Batch(NamedTuple):
    """A call's checked arguments about its tokens.

    Tensors have any dtype of the right kind and are on one device. Per-token ones are as the caller passed them, [B, T]
    or packed [N], of unit stride on their last dimension. Those marked "any" are [B, T] (packed [1, N]), one entry for
    each response [B], or 0-d, of any strides.
    """

    rows: tuple[int, int]  # [B, T], packed [1, N]
    responses: int
    tokens: Tensor | None  # None: the caller has log-probabilities
    mask: Tensor | None  # 0: masked; None: nothing is masked
    advantages: Tensor  # any
    token_weights: Tensor | None  # any
    entropy_weights: Tensor | None  # any; in place of the normalised entropy_coef
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    cu_seqlens: Tensor | None  # [B + 1]; None: padded
    response_log_ratios: Tensor | None  # float32 [B]: x of each response; None: this call's tokens tell
    normalization: str  # "response", "mean_length", "constant", or "given": 1 / normalizers
    normalizers: Tensor | None  # float32 [B]: 1 / n_i of each response
    max_length: int  # of "constant", else 1
    weighting: str  # "none", "fixed" (alpha), "adaptive" (alpha is alpha_min)
    alpha: float
    kl_coef: float
    entropy_coef: float
    # Of the optimiser batch: responses S, tokens, and responses of positive and negative advantage; None: this call's.
    totals: tuple[Count, Count, Count, Count] | None
    scale: float  # of loss and gradient: gradient_average times loss_scale, where that is a number
    loss_scale: Tensor | None  # 0-d, where it is none
    context: ContextParts | None  # None: responses are whole, or each call has all that it needs


class TokenTerms(NamedTuple):
    """A call's arguments as numbers per token: everything a row's loss needs besides its logits.

    With s the surrogate, x the log-ratio and d the log-ratio to the reference, a token's loss is
    ``-POLICY_WEIGHT * s(x, ADVANTAGE) + KL_WEIGHT * kl(d) - ENTROPY_WEIGHT * H``. Masks, the caller's token weights,
    hysteretic weights, length normalisation, coefficients and gradient averaging are all in the three weights; a weight
    of exactly 0 switches its part off whatever the other terms hold (NaN included). Terms that the :class:`LossSpec`
    does not ask for are uninitialised.
    """

    values: Tensor  # float32 [TERMS, B, T]
    targets: Tensor  # int32 [B, T]: the sampled token's id (0 without tokens) where a sweep computes; MASKED; SKIPPED
    active: Tensor  # bool [B, T]: rows whose gradient can differ from 0, or whose log-ratio one of them needs
    response_statistics: Tensor  # int32 [2, responses]: lengths and signs
    cu_seqlens: Tensor | None  # as in Batch
    response_log_ratios: Tensor | None  # as in Batch, or from all ranks of a context-parallel group
    context: ContextParts | None = None  # where a derivative has to be spread over responses on several ranks

    @property
    def lengths(self) -> Tensor:
        """Unmasked tokens of each response, int32 [responses]."""
        return self.response_statistics[0]

    @property
    def signs(self) -> Tensor:
        """Sign of each response's summed advantage, int32 [responses]; 0 for a fully masked response."""
        return self.response_statistics[1]


class SoftmaxStatistics(NamedTuple):
    """Statistics of each row's transformed logits z', float32 [B, T]; NaN in rows not computed.

    The softmax denominator is kept as ``maximum`` and ``others`` = sum over j != y of exp(z'_j - maximum), without the
    sampled token y: log p_y = -log1p(others / e_y) and 1 - p_y = others / (others + e_y) then keep their relative
    precision on peaked rows, where log p_y computed as z'_y - lse cancels to nothing. ``maximum`` is stored in a unit
    of the backend's own, natural or base-2: only its second sweep reads it.
    """

    logprobs: Tensor
    maximum: Tensor
    others: Tensor
    entropy: Tensor | None


class LogprobLoss(NamedTuple):
    """A loss of log-probabilities, token by token, and its derivatives: the two numbers of every token."""

    results: Tensor  # float32 [2 or 3, B, T]: LOSS, LOGPROB and ENTROPY, each 0 where masked
    logprob_coefficients: Tensor  # c = dloss/dlogp, float32 [B, T]
    entropy_coefficients: Tensor | None  # h = dloss/dH; None without an entropy bonus
