"""The policy losses from logits and from log-probabilities: arguments in, per-token terms, one autograd function."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import autograd, ops
from .backend import Backend, backend_for
from .batch import BatchStatistics
from .checks import check_floating, check_logits, check_tensor, described
from .context_parallel import with_other_ranks
from .interface import Batch, TokenTerms
from .layout import AdvantageLevel, check_transform
from .metrics import MetricSums, metric_sums
from .objective import Objective, ObjectiveLike, resolve_objective
from .process_groups import GroupLike
from .token_terms import check_batch
from .vocab_parallel import VocabGroup, resolve_shards


@dataclass(frozen=True, eq=False)
class PolicyLossOutput:
    """The result of a loss call; every tensor but ``loss`` is detached.

    Attributes:
        loss: float32 scalar, differentiable once.
        logprobs: float32, shaped like tokens: log-probability of each token; 0 where masked, NaN where the row was
            unmasked but not computed (``skip_inactive=True`` and no learning signal).
        entropy: float32, likewise; None when it was not asked for.
        active: bool, shaped like tokens: rows whose gradient can differ from zero.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    active: Tensor
    _objective: Objective = field(repr=False)
    _batch: Batch = field(repr=False)
    _terms: TokenTerms = field(repr=False)

    def metric_sums(self) -> MetricSums:
        """The sums and counts behind :meth:`metrics`, for means over micro-batches and ranks; no synchronisation.

        Examples:
            >>> logprobs, old = torch.zeros(2, 3), torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]])
            >>> halves = [
            ...     logprob_policy_loss(logprobs[i], torch.ones(1), old_logprobs=old[i], objective="grpo").metric_sums()
            ...     for i in (slice(0, 1), slice(1, 2))
            ... ]
            >>> (halves[0] + halves[1]).metrics()["clip_fraction"]
            tensor(0.1667)
        """
        shape = self._terms.targets.shape
        entropy = None if self.entropy is None else self.entropy.reshape(shape)
        return metric_sums(self._objective, self._batch, self._terms, self.logprobs.reshape(shape), entropy)

    def metrics(self) -> dict[str, Tensor]:
        """Diagnostics as 0-d float32 tensors on the loss's device, computed now; waits for the device once.

        Not while torch.compile traces: return :meth:`metric_sums` from there.

        Means run over the rows that the call computes: the active ones, with ``skip_inactive=False`` all unmasked ones
        (the same in :func:`logprob_policy_loss`, which knows the others' log-probabilities too); what depends on a
        response's ratio over those of responses of which every row is computed. They are this call's:
        for micro-batches and ranks add up :meth:`metric_sums`. What does not apply, or has nothing to average, is
        absent.

        * rows: how many they are; active_fraction: active rows among unmasked ones
        * ratio_mean: mean r, at the objective's level; approx_kl: mean of r - 1 - log r of the tokens' own ratios, the
          k3 estimate of KL(old || policy), with old_logprobs
        * clip_fraction (Clip, TruncatedRatio, GeometricMean): share of rows whose gradient a bound removed or whose
          weight it cut; of these clip_low_fraction at the lower bound, clip_high_fraction at the upper one,
          clip_dual_fraction by Clip's delta or dual where A < 0; clip_low_min, clip_high_max: least and largest share
          in a response
        * psi_mean, hazard_mean, survival_mean (LogFidelity): means of psi, zeta, exp(-zeta); gate_mean (GammaGate)
        * kl_ref: mean estimate of KL(policy || reference), k3 or the objective's k1 or k2; with ref_logprobs
        * entropy; hysteretic_weight: alpha; positive_fraction: responses with A > 0 among those with A != 0
        """
        return self.metric_sums().metrics()


def check_in_place(logits: Tensor) -> None:
    """Refuse logits whose storage cannot take the gradient.

    Raises:
        ValueError: a leaf that requires grad (or a view of one), or rows that share memory.
    """
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"inplace: expected logits that an operation produced, got a leaf that requires grad "
            f"({described(logits)}); its values would be lost to the optimiser"
        )
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < span:
            raise ValueError(
                f"inplace: expected logits whose rows have memory of their own, got strides {logits.stride()} of "
                f"{described(logits)} (expanded or overlapping); pass logits.contiguous()"
            )
        span = stride * (size - 1) + span


def policy_output(
    loss: Tensor, results: Tensor, objective: Objective, batch: Batch, terms: TokenTerms, shape: torch.Size
) -> PolicyLossOutput:
    """The result of a call from its per-token results [2 or 3, B, T], in the tokens' ``shape``."""
    active = terms.active
    if len(shape) == 1:  # packed
        results, active = results[:, 0], active[0]
    _, logprobs, *entropy = results.unbind(0)
    return PolicyLossOutput(loss, logprobs, entropy[0] if entropy else None, active, objective, batch, terms)


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None,
    objective: ObjectiveLike = "mhpo_ahpo",
    statistics: BatchStatistics | None = None,
    lengths: Tensor | None = None,
    response_mean_log_ratios: Tensor | None = None,
    context_group: GroupLike | None = None,
    advantage_level: AdvantageLevel | None = None,
    loss_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    skip_inactive: bool = True,
    inplace: bool = False,
    entropy: bool = True,
    vocab_group: VocabGroup = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """Policy loss and its gradient with respect to logits, in one pass over the vocabulary.

    The loss is sum_t -m n u a s(x, A) + m n (kl_coef kl(d) - entropy_coef H), see :class:`Objective` for the surrogate
    s, and the README for every preset's formula and paper. Token-level objectives compute the
    gradient during forward (one read and one write of the logits); sequence-level ones and float16 logits run the
    second sweep in backward.

    Args:
        logits: float16, bfloat16 or float32 [B, T, V], or packed [N, V] with ``cu_seqlens``. ``logits[b, t]``
            predicts ``tokens[b, t]``. Any strides except on the last dimension, e.g. ``logits[:, :-1]``.
        tokens: integer [B, T] or [N], ids in [0, V) where unmasked, anything elsewhere.
        advantages: [B], or one per token: [B, T] or [N].
        old_logprobs: floating, shaped like tokens: log-probabilities under the policy that sampled. None: on-policy.
        ref_logprobs: floating, shaped like tokens: under the reference policy; required when kl_coef is not 0.
        mask: bool or 0/1, shaped like tokens; masked rows contribute nothing whatever they hold. None: all ones.
        token_weights: floating, [B], [B, 1] or shaped like tokens: a factor of the surrogate, e.g. the truncated
            importance weight between sampler and trainer. Not applied to KL and entropy terms.
        entropy_weights: integer or floating, 0-d, [B], [B, 1] or shaped like tokens: weight of each token's entropy
            bonus in place of n entropy_coef, for a mean or a coefficient of its own; a tensor on the device may change
            from step to step without a synchronisation.
        cu_seqlens: integer [B + 1], boundaries of packed responses, from 0 to N.
        groups: integer [B], the prompt of each response; for normalization "group_mean_length".
        objective: an :class:`Objective`, a preset's name, or a mapping that :meth:`Objective.from_mapping` reads.
        statistics: totals of the optimiser batch, :class:`BatchStatistics`; None: this call is the whole batch.
        lengths: integer [B], unmasked tokens of each whole response, where this call has a part of it (context
            parallelism); needs ``statistics``. Without it, normalisation by response and ratios of responses are
            undefined for parts.
        response_mean_log_ratios: floating [B], mean over each whole response of log p - log p_old, for responses in
            parts whose tokens share a ratio; from a first sweep over all parts, see docs/objectives.md.
        context_group: process group or one-dimensional DeviceMesh of the ranks that have the other rows of this call's
            responses (context parallelism), for responses in parts without a first sweep: the same responses in the
            same order on each of them. Needs ``lengths``. A loss is its own rows' part, and gradients add up over the
            ranks. Nothing is sent where tokens have ratios of their own; a ratio of responses takes an all-reduce of
            [2, B], and one of [B] where its derivative is spread over the response. Every rank takes part, also with
            no row.
        advantage_level: "response" or "token", to tell packed advantages [B] from [N] where B = N; None: their shape
            tells. (Other packed tensors are then [B, 1] or [1, N].)
        loss_scale: finite number, or floating 0-d tensor on the device: a factor of the returned loss and its gradient,
            such as one over the accumulation steps. A factor on ``out.loss`` is as right, but costs another read and
            write of the logits' gradient.
        temperature: logits are divided by it, > 0: a number, or a tensor (0-d, [B], [B, 1] or shaped like tokens), used
            in float32 and not differentiated.
        softcap: z is replaced by softcap * tanh(z / softcap) before the temperature; None: no cap. A logit of -inf
            stays -inf: it marks a token that could not be sampled.
        skip_inactive: leave rows without a learning signal uncomputed (their logprobs and entropy are NaN). False
            computes their statistics and skips only their gradient.
        inplace: write the gradient over the logits' storage. An operation that saved the logits before this call
            raises in its backward; what reads the logits after it reads gradients. Ignored (the gradient gets its
            own buffer) while torch.compile traces.
        entropy: compute the entropy of each row; implied by an entropy bonus.
        vocab_group: the logits are this rank's columns, [B, T, columns], of a vocabulary that is sharded over these
            ranks: a process group or 1-D mesh, whose ranks hold shards of any sizes in their order, or a
            :class:`VocabShard`. A DTensor with Shard(-1) says so by itself. All other arguments are the same on every
            rank, tokens are ids of the whole vocabulary; so is the loss, and a rank's gradient is that of its own
            columns. One all-gather of 4 floats a row (3 without entropy) from each rank, and the second sweep in
            backward.
        backend: "triton", "torch" or "auto", see :func:`backend_for`.

    Returns:
        :class:`PolicyLossOutput`. ``loss`` can be differentiated once: a second backward through the same call and
        double backward raise RuntimeError.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; a token id outside [0, V) at an unmasked position (a device-side
            assert on GPU); missing ref_logprobs, groups or max_length.

    Examples:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 5, requires_grad=True)
        >>> out = policy_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.tensor([1.0, -1.0]), objective="grpo")
        >>> out.loss.item()
        0.0
        >>> out.loss.backward()
        >>> logits.grad[0, 0]
        tensor([-0.1333,  0.0333,  0.0333,  0.0333,  0.0333])
    """
    resolved = resolve_objective(objective)
    logits, shards = resolve_shards("logits", logits, -1, vocab_group)
    check_logits("logits", logits, sharded=shards is not None)
    shape, device = logits.shape[:-1], logits.device
    check_tensor("tokens", tokens, [tuple(shape)], "integer", device)
    batch = check_batch(
        resolved, "tokens", shape, device, tokens, advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        mask=mask, token_weights=token_weights, entropy_weights=entropy_weights, cu_seqlens=cu_seqlens, groups=groups,
        statistics=statistics, lengths=lengths, response_mean_log_ratios=response_mean_log_ratios,
        advantage_level=advantage_level, loss_scale=loss_scale, context_group=context_group,
    )  # fmt: skip
    transform = check_transform(temperature, softcap, shape, device, batch.mask, batch.responses, batch.cu_seqlens)
    name = backend_for(logits, backend)
    if inplace and logits.requires_grad:
        check_in_place(logits)
    spec = resolved.lower(batch)
    vocabulary = logits.shape[-1] if shards is None else shards.vocabulary
    terms = ops.token_terms(batch, spec, vocabulary, skip_inactive, name)
    entropy = entropy or spec.entropy_bonus
    rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    if spec.shared_ratio or logits.dtype == torch.float16 or shards is not None:
        logprobs, entropies = autograd.token_statistics(
            rows, terms.targets, transform, entropy=entropy, inplace=inplace, backend=name, shards=shards
        )
        terms = with_other_ranks(terms, spec, logprobs, batch.context)
        loss, results = autograd.logprob_loss(logprobs, entropies, terms, spec, name)
    else:
        loss, results = autograd.policy_loss(
            rows, terms, spec, transform, entropy=entropy, inplace=inplace, backend=name
        )
    if inplace and not torch.compiler.is_compiling():
        # A view whose version has moved rebuilds its grad_fn when that is next read; register_hook does not read it
        # first and crashes (PyTorch 2.13, segmentation fault).
        _ = logits.grad_fn
    return policy_output(loss, results, resolved, batch, terms, shape)


def logprob_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None,
    objective: ObjectiveLike = "mhpo_ahpo",
    statistics: BatchStatistics | None = None,
    lengths: Tensor | None = None,
    response_mean_log_ratios: Tensor | None = None,
    context_group: GroupLike | None = None,
    advantage_level: AdvantageLevel | None = None,
    loss_scale: float | Tensor = 1.0,
    skip_inactive: bool = True,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """Policy loss from log-probabilities, for trainers that compute those themselves.

    Args:
        logprobs: floating [B, T], or packed [N] with ``cu_seqlens``: log-probability of each sampled token.
        advantages: [B], [B, T] or [N].
        entropy: floating, shaped like logprobs; required for an entropy bonus, differentiated through.
        old_logprobs, ref_logprobs, mask, token_weights, entropy_weights, cu_seqlens, groups, objective, statistics,
            lengths, response_mean_log_ratios, context_group, advantage_level, loss_scale: as in :func:`policy_loss`,
            with "shaped like tokens" read as "shaped like logprobs".
        skip_inactive: accepted so that calls can be exchanged with :func:`policy_loss`. Every row's log-probability is
            already known, and returned.
        backend: as in :func:`policy_loss`.

    Returns:
        :class:`PolicyLossOutput`; computed in float32, gradients in the inputs' dtypes. Differentiable once.

    Raises:
        TypeError, ValueError: as :func:`policy_loss`; also missing entropy with entropy_coef != 0.

    Examples:
        >>> import torch
        >>> logprobs = torch.full((2, 2), -1.0, requires_grad=True)
        >>> logprob_policy_loss(logprobs, torch.tensor([1.0, -1.0]), objective="grpo").loss.backward()
        >>> logprobs.grad
        tensor([[-0.2500, -0.2500],
                [ 0.2500,  0.2500]])
    """
    resolved = resolve_objective(objective)
    check_floating("logprobs", logprobs)
    shape, device = logprobs.shape, logprobs.device
    batch = check_batch(
        resolved, "logprobs", shape, device, None, advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        mask=mask, token_weights=token_weights, entropy_weights=entropy_weights, cu_seqlens=cu_seqlens, groups=groups,
        statistics=statistics, lengths=lengths, response_mean_log_ratios=response_mean_log_ratios,
        advantage_level=advantage_level, loss_scale=loss_scale, context_group=context_group,
    )  # fmt: skip
    name = backend_for(logprobs, backend)
    if entropy is not None:
        check_tensor("entropy", entropy, [tuple(shape)], "floating", device)
    elif resolved.entropy_coef != 0 or entropy_weights is not None:
        source = f"entropy_coef={resolved.entropy_coef}" if entropy_weights is None else "entropy_weights"
        raise ValueError(f"entropy: expected each token's entropy for {source}, got None")
    spec = resolved.lower(batch)
    terms = ops.token_terms(batch, spec, None, skip_inactive, name)
    terms = with_other_ranks(terms, spec, logprobs, batch.context)
    loss, results = autograd.logprob_loss(logprobs, entropy, terms, spec, name)
    return policy_output(loss, results, resolved, batch, terms, shape)
