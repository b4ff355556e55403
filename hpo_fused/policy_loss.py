"""The policy losses: validation, then dispatch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import autograd
from .backend import Backend, backend_for
from .batch import BatchStatistics, PreparedBatch
from .checks import (
    check_floating,
    check_logits,
    check_positive,
    check_tensor,
    check_token_ids,
    found,
    values_readable,
)
from .loss_batch import LossBatch, unit_stride
from .metrics import policy_metrics
from .objective import Objective, resolve_objective
from .rows import LogitTransform, SurrogateSpec


@dataclass(frozen=True, eq=False)
class PolicyLossOutput:
    """What a loss call returns; every tensor but ``loss`` is detached.

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
    _batch: LossBatch | PreparedBatch = field(repr=False)

    def metrics(self) -> dict[str, Tensor]:
        """Diagnostics as 0-d float32 tensors on the loss's device, computed now; no synchronisation.

        Computed from the tensors that the call was given, which must not have been written to since.

        Averages run over unmasked rows whose log-probability is known (with ``skip_inactive=True``: the active
        ones), ``positive_fraction`` over responses with a sign, ``active_fraction`` over unmasked rows. Where
        there is nothing to average they are 0. Keys that do not apply are absent.

        * ratio_mean: mean r; clip_fraction (Clip, TruncatedRatio): share of rows whose gradient a bound removed or
          whose weight it cut; psi_mean, hazard_mean, survival_mean (LogFidelity): means of psi, zeta, exp(-zeta)
        * approx_kl: mean of r - 1 - log r, the k3 estimate of KL(old || policy); needs old_logprobs
        * kl_ref: mean k3 estimate of KL(policy || reference); needs ref_logprobs
        * entropy; hysteretic_weight (alpha); positive_fraction: N+ / (N+ + N-); active_fraction
        """
        batch = self._batch.prepared if isinstance(self._batch, LossBatch) else self._batch
        shape = batch.active.shape
        entropy = None if self.entropy is None else self.entropy.reshape(shape)
        return policy_metrics(self._objective, batch, self.logprobs.reshape(shape), entropy)


def check_transform(temperature: object, softcap: object) -> LogitTransform:
    """The logits' transform; TypeError or ValueError naming the argument unless both are finite and above zero."""
    return LogitTransform(
        check_positive("temperature", temperature),
        None if softcap is None else check_positive("softcap", softcap),
    )


def check_in_place(logits: Tensor) -> None:
    """Refuse logits whose storage cannot take the gradient.

    Raises:
        ValueError: a leaf that requires grad (or a view of one), or rows that share memory.
    """
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"inplace: expected logits that an operation produced, got a leaf that requires grad ({found(logits)}); "
            "its values would be lost to the optimiser"
        )
    span = 1
    for stride, size in sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < span:
            raise ValueError(
                f"inplace: expected logits whose rows have memory of their own, got strides {logits.stride()} of "
                f"{found(logits)} (expanded or overlapping); pass logits.contiguous()"
            )
        span = stride * (size - 1) + span


def policy_output(
    loss: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    objective: Objective,
    batch: PreparedBatch,
    shape: torch.Size,
) -> PolicyLossOutput:
    """What a loss call returns, from rows' results: masked positions 0, tensors in the tokens' ``shape``."""
    mask = batch.layout.mask
    logprobs = torch.where(mask, logprobs.detach(), 0.0).reshape(shape)
    entropy = None if entropy is None else torch.where(mask, entropy.detach(), 0.0).reshape(shape)
    return PolicyLossOutput(loss, logprobs, entropy, batch.active.reshape(shape), objective, batch)


def policy_loss(
    logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None,
    objective: str | Objective = "mhpo_ahpo",
    statistics: BatchStatistics | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    skip_inactive: bool = True,
    inplace: bool = False,
    entropy: bool = True,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """Policy loss and its gradient with respect to logits, in one pass over the vocabulary.

    The loss is sum_t -m n u a s(x, A) + m n (kl_coef k3 - entropy_coef H), see :class:`Objective` for the surrogate
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
        cu_seqlens: integer [B + 1], boundaries of packed responses, from 0 to N.
        groups: integer [B], the prompt of each response; for normalization "group_mean_length".
        objective: a preset's name or an :class:`Objective`.
        statistics: totals of the optimiser batch, :class:`BatchStatistics`; None: this call is the whole batch.
        temperature: logits are divided by it, > 0.
        softcap: z is replaced by softcap * tanh(z / softcap) before the temperature; None: no cap.
        skip_inactive: leave rows without a learning signal uncomputed (their logprobs and entropy are NaN). False
            computes their statistics and skips only their gradient.
        inplace: write the gradient over the logits' storage. An operation that saved the logits before this call
            raises in its backward; what reads the logits after it reads gradients. Ignored (the gradient gets its
            own buffer) while torch.compile traces.
        entropy: compute the entropy of each row; implied by entropy_coef != 0.
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
    transform = check_transform(temperature, softcap)
    check_logits("logits", logits)
    shape, device = logits.shape[:-1], logits.device
    check_tensor("tokens", tokens, [tuple(shape)], "integer", device)
    batch = LossBatch(
        resolved,
        "tokens",
        shape,
        device,
        tokens,
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        groups=groups,
        statistics=statistics,
    )
    name = backend_for(logits, backend)
    if inplace and logits.requires_grad:
        check_in_place(logits)
    rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    if values_readable(tokens):
        check_token_ids(tokens, mask, logits.shape[-1])
    tracing = torch.compiler.is_compiling()
    spec = resolved.lower() if tracing else resolved.lowered
    entropy = entropy or spec.entropy_coef != 0
    if resolved.ratio_level == "token" and logits.dtype != torch.float16:
        loss, logprobs, entropies, active = autograd.fused_policy_loss(
            rows, batch, transform, spec, skip_inactive=skip_inactive, entropy=entropy, inplace=inplace, backend=name
        )
        if len(shape) == 1:
            logprobs, active = logprobs.view(shape), active.view(shape)
            entropies = None if entropies is None else entropies.view(shape)
        output = PolicyLossOutput(loss, logprobs, entropies, active, resolved, batch)
    else:
        output = _two_kernels(rows, batch, transform, spec, skip_inactive, entropy, inplace, name)
    if inplace and not tracing:
        # A view whose version has moved rebuilds its grad_fn when that is next read; register_hook does not read it
        # first and crashes (PyTorch 2.13, segmentation fault).
        _ = logits.grad_fn
    return output


def _two_kernels(
    logits: Tensor, batch: LossBatch, transform: LogitTransform, spec: SurrogateSpec, skip_inactive: bool,
    entropy: bool, inplace: bool, backend: str,
) -> PolicyLossOutput:  # fmt: skip
    """Objectives and dtypes that need something between the sweeps."""
    assert batch.tokens is not None
    compute, statistics = autograd.computed_rows(logits, batch, spec, skip_inactive=skip_inactive, backend=backend)
    tokens = batch.tokens.to(torch.int64).reshape(compute.shape).contiguous()
    logprobs, entropies = autograd.token_statistics(
        logits, tokens, compute, transform, entropy=entropy, inplace=inplace, backend=backend
    )
    return _logprob_output(logprobs, entropies, batch, spec, backend, statistics)


def _logprob_output(
    logprobs: Tensor, entropy: Tensor | None, batch: LossBatch, spec: SurrogateSpec, backend: str,
    statistics: Tensor | None = None,
) -> PolicyLossOutput:  # fmt: skip
    """What a call returns, from differentiable log-probabilities and entropies of any shape with as many entries."""
    objective = batch.objective
    if autograd.traced(logprobs):
        prepared = batch.prepared
        rows = logprobs.to(torch.float32).reshape(prepared.active.shape)
        entropies = None if entropy is None else entropy.to(torch.float32).reshape(rows.shape)
        loss = autograd.logprob_policy_loss(rows, entropies, prepared, spec, objective.ratio_level == "sequence")
        return policy_output(loss, rows, entropies, objective, prepared, batch.shape)
    logprobs = unit_stride(logprobs.reshape(batch.shape))
    entropy = None if entropy is None else unit_stride(entropy.reshape(batch.shape))
    loss, found_rows = autograd.batch_logprob_loss(logprobs, entropy, batch, spec, backend, statistics)
    return PolicyLossOutput(loss, found_rows.logprobs, found_rows.entropy, found_rows.active, objective, batch)


def logprob_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None,
    objective: str | Objective = "mhpo_ahpo",
    statistics: BatchStatistics | None = None,
    skip_inactive: bool = True,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """The same loss from log-probabilities, for trainers that compute those themselves.

    Args:
        logprobs: floating [B, T], or packed [N] with ``cu_seqlens``: log-probability of each sampled token.
        advantages: [B], [B, T] or [N].
        entropy: floating, shaped like logprobs; required when entropy_coef is not 0, differentiated through.
        old_logprobs, ref_logprobs, mask, token_weights, cu_seqlens, groups, objective, statistics: as in
            :func:`policy_loss`, with "shaped like tokens" read as "shaped like logprobs".
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
    batch = LossBatch(
        resolved,
        "logprobs",
        shape,
        device,
        None,
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        mask=mask,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        groups=groups,
        statistics=statistics,
    )
    name = backend_for(logprobs, backend)
    if entropy is not None:
        check_tensor("entropy", entropy, [tuple(shape)], "floating", device)
    elif resolved.entropy_coef != 0:
        raise ValueError(f"entropy: expected each token's entropy for entropy_coef={resolved.entropy_coef}, got None")
    spec = resolved.lower() if torch.compiler.is_compiling() else resolved.lowered
    return _logprob_output(logprobs, entropy, batch, spec, name)
