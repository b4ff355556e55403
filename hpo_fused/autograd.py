"""Custom operators and their backward rules.

Two operators read logits: ``fused_policy_loss`` (loss and gradient in its forward, backward only scales) and
``token_statistics`` (log-probability and entropy, whose backward runs the second sweep). ``logprob_policy_loss``
turns log-probabilities into the loss; behind ``token_statistics`` it makes the two-kernel path, which sequence-level
ratios need (a response's mean stands between the sweeps), and float16 logits too: there the upstream gradient,
a loss scaler's factor, must enter before the gradient is rounded, or small entries underflow.

Eager code runs the fused loss through a plain autograd Function around the same row functions: its gradient is
private, so that backward may scale it where it lies, or even take the logits' storage. A functional operator can say
neither; what a compiler traces is the operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import implementation
from .batch import Layout, PreparedBatch
from .checks import check_token_ids
from .loss_batch import LossBatch
from .rows import ComputedRows, LogitTransform, LogprobRows, LossRows, RowStatistics, SurrogateSpec, TokenTerms
from .surrogate import token_loss

_AGAIN = (
    "{} was differentiated a second time, but its stored gradient was consumed by the first backward. Call the loss "
    "again, or combine the terms and call backward once"
)


def consume(ctx: Any, name: str) -> None:
    """Let the first backward pass and refuse a second one (retain_graph=True lets it come this far)."""
    if getattr(ctx, "consumed", False):
        raise RuntimeError(_AGAIN.format(name))
    ctx.consumed = True


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse create_graph=True. PyTorch's once_differentiable refuses only where the incoming gradient has a graph of
    its own, and would here drop the second derivative without a word."""

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "hpo_fused: double backward (create_graph=True) is not supported; a gradient of the gradient would "
                "need the loss's second derivatives"
            )
        return backward(ctx, *upstream)

    return checked


def _empty(condition: bool, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An output of ``shape``, or an empty one where the caller did not ask for it."""
    return like.new_empty(tuple(shape) if condition else (0,), dtype=dtype)


def _gradient_like(logits: Tensor) -> Tensor:
    """Room for the gradient of logits [B, T, V], every row as far from a 16-byte boundary as the logits' own.

    The kernels load a row in 16-byte groups and can store the gradient so only where both rows are aligned alike. With
    odd V that takes the same strides: in a new contiguous tensor the rows of ``logits[:, :-1]`` would lie elsewhere.
    """
    itemsize = logits.element_size()
    shift = logits.data_ptr() % 16 // itemsize
    steps = (logits.shape[-1], *logits.stride()[:2])
    if shift == 0 and (logits.is_contiguous() or all(step * itemsize % 16 == 0 for step in steps)):
        return logits.new_empty(logits.shape)
    span = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if not logits.numel() <= span <= 1.25 * logits.numel():  # rows that share memory, or lie far apart
        return logits.new_empty(logits.shape)
    return logits.new_empty(span + shift).as_strided(logits.shape, logits.stride(), shift)


# ---------------------------------------------------------------------------------------------------------------
# fused: logits -> loss and gradient


@torch.library.custom_op("hpo_fused::fused_policy_loss", mutates_args=())
def _fused_op(
    logits: Tensor, tokens: Tensor, compute: Tensor, advantages: Tensor, policy_weights: Tensor,
    penalty_weights: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, temperature: float,
    softcap: float | None, kind: str, parameters: Sequence[float], max_log_ratio: float, kl_coef: float,
    entropy_coef: float, entropy: bool, gradient: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = _empty(gradient, logits, logits.shape, logits.dtype)
    losses, logprobs, entropies = implementation(backend).fused_policy_loss(
        logits,
        tokens,
        compute,
        TokenTerms(advantages, policy_weights, penalty_weights, old_logprobs, ref_logprobs),
        LogitTransform(temperature, softcap),
        SurrogateSpec(kind, tuple(parameters), max_log_ratio, kl_coef, entropy_coef),
        entropy=entropy,
        out=out if gradient else None,
    )
    return losses.sum(), logprobs, logprobs.new_empty(0) if entropies is None else entropies, out


@_fused_op.register_fake
def _(
    logits: Tensor, tokens: Tensor, compute: Tensor, advantages: Tensor, policy_weights: Tensor,
    penalty_weights: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, temperature: float,
    softcap: float | None, kind: str, parameters: Sequence[float], max_log_ratio: float, kl_coef: float,
    entropy_coef: float, entropy: bool, gradient: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        logits.new_empty((), dtype=torch.float32),
        torch.empty_like(advantages),
        _empty(entropy or entropy_coef != 0, logits, tokens.shape, torch.float32),
        _empty(gradient, logits, logits.shape, logits.dtype),
    )


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logprobs, entropy, gradient = output
    ctx.mark_non_differentiable(logprobs, entropy, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    ctx.inputs = len(inputs)


@first_order
def _fused_backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * ctx.inputs
    if upstream is None:
        return nothing
    (gradient,) = ctx.saved_tensors
    return (gradient * upstream).to(gradient.dtype), *nothing[1:]


_fused_op.register_autograd(_fused_backward, setup_context=_fused_setup)


class _Fused(torch.autograd.Function):
    """The sum of the rows' losses, beside a gradient that is nobody else's: backward scales it where it lies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, losses: Tensor, gradient: Tensor, inplace: bool, backend: str) -> Tensor:
        if inplace:  # here and not before: a view whose version has moved would lose the hooks on its grad_fn
            torch.autograd.graph.increment_version(logits)
        # Saved after the bump: whoever writes to the logits between here and backward is told so.
        ctx.save_for_backward(gradient)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        consume(ctx, "policy_loss")
        gradient = ctx.saved_tensors[0].detach()
        implementation(ctx.backend).scale_gradient(gradient, upstream)
        return gradient, *(None,) * 4


def traced(logits: Tensor) -> bool:
    """Whether a compiler is looking: it needs the functional operators, which it can reason about."""
    return torch.compiler.is_compiling() or type(logits) not in (Tensor, torch.nn.Parameter)


def fused_policy_loss(
    logits: Tensor, batch: LossBatch, transform: LogitTransform, spec: SurrogateSpec, *, skip_inactive: bool,
    entropy: bool, inplace: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Of a token-level objective: loss (differentiable once), log-probabilities, entropy and active rows, [B, T]."""
    gradient = torch.is_grad_enabled() and logits.requires_grad
    if traced(logits):
        return _traced_policy_loss(logits, batch, transform, spec, gradient, skip_inactive, entropy, backend)
    out = None if not gradient else logits if inplace else _gradient_like(logits)
    rows: LossRows = implementation(backend).policy_loss(
        logits, batch, transform, spec, skip_inactive=skip_inactive, entropy=entropy, out=out
    )
    losses, logprobs, entropies, active = rows
    if out is None:
        return losses.sum(), logprobs, entropies, active
    loss: Tensor = _Fused.apply(logits, losses, out, inplace, backend)  # type: ignore[no-untyped-call]
    return loss, logprobs, entropies, active


def _traced_policy_loss(
    logits: Tensor, batch: LossBatch, transform: LogitTransform, spec: SurrogateSpec, gradient: bool,
    skip_inactive: bool, entropy: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    prepared = batch.prepared
    mask = prepared.layout.mask
    assert batch.tokens is not None
    tokens = batch.tokens.to(torch.int64).reshape(mask.shape).contiguous()
    check_token_ids(tokens, mask, logits.shape[-1])
    loss, logprobs, entropies, _ = _fused_op(
        logits, tokens, prepared.active if skip_inactive else mask, *prepared.terms, *transform, *spec, entropy,
        gradient, backend,
    )  # fmt: skip
    logprobs = torch.where(mask, logprobs, 0.0)
    return loss, logprobs, torch.where(mask, entropies, 0.0) if entropies.dim() > 1 else None, prepared.active


# ---------------------------------------------------------------------------------------------------------------
# two kernels: logits -> statistics, and back


def computed_rows(
    logits: Tensor, batch: LossBatch, spec: SurrogateSpec, *, skip_inactive: bool, backend: str
) -> ComputedRows:
    """Which rows of ``logits`` [B, T, V] the first sweep computes."""
    rows: ComputedRows = implementation("torch" if traced(logits) else backend).computed_rows(
        batch, logits.shape[-1], spec, skip_inactive=skip_inactive,
        sequence_level=batch.objective.ratio_level == "sequence",
    )  # fmt: skip
    return rows


@torch.library.custom_op("hpo_fused::token_statistics", mutates_args=())
def _statistics_op(
    logits: Tensor, tokens: Tensor, compute: Tensor, temperature: float, softcap: float | None, entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = implementation(backend).token_statistics(
        logits, tokens, compute, LogitTransform(temperature, softcap), entropy=entropy
    )
    entropies = statistics.logprobs.new_empty(0) if statistics.entropy is None else statistics.entropy
    return statistics.logprobs, entropies, statistics.maximum, statistics.rest


@_statistics_op.register_fake
def _(
    logits: Tensor, tokens: Tensor, compute: Tensor, temperature: float, softcap: float | None, entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    row = logits.new_empty(tokens.shape, dtype=torch.float32)
    return (
        row,
        _empty(entropy, logits, tokens.shape, torch.float32),
        torch.empty_like(row),
        torch.empty_like(row),
    )


@torch.library.custom_op("hpo_fused::token_gradient", mutates_args=())
def _gradient_op(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, entropy: Tensor | None, maximum: Tensor, rest: Tensor,
    logprob_coefficients: Tensor, entropy_coefficients: Tensor | None, temperature: float, softcap: float | None,
    backend: str,
) -> Tensor:  # fmt: skip
    out = logits.new_empty(logits.shape)
    implementation(backend).token_gradient(
        logits, tokens, RowStatistics(logprobs, maximum, rest, entropy), logprob_coefficients, entropy_coefficients,
        LogitTransform(temperature, softcap), out,
    )  # fmt: skip
    return out


@_gradient_op.register_fake
def _(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, entropy: Tensor | None, maximum: Tensor, rest: Tensor,
    logprob_coefficients: Tensor, entropy_coefficients: Tensor | None, temperature: float, softcap: float | None,
    backend: str,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


def _coefficients(upstream: Tensor | None, compute: Tensor, like: Tensor) -> Tensor | None:
    """Upstream gradient of a per-token output as the kernels take it: contiguous float32, 0 where not computed."""
    if upstream is None:
        return None
    return torch.where(compute, upstream, 0.0).to(like.dtype).contiguous()


def _statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, compute, temperature, softcap, _, backend = inputs
    _, _, maximum, rest = output
    ctx.mark_non_differentiable(maximum, rest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, tokens, compute, *output)
    ctx.transform, ctx.backend = LogitTransform(temperature, softcap), backend


@first_order
def _statistics_backward(
    ctx: Any, upstream_logprobs: Tensor | None, upstream_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    logits, tokens, compute, logprobs, entropy, maximum, rest = ctx.saved_tensors
    c = _coefficients(upstream_logprobs, compute, logprobs)
    h = _coefficients(upstream_entropy, compute, logprobs) if entropy.dim() > 1 else None
    if c is None and h is None:
        return (None,) * 7
    c = torch.zeros_like(logprobs) if c is None else c
    gradient = _gradient_op(
        logits,
        tokens,
        logprobs,
        entropy if h is not None else None,
        maximum,
        rest,
        c,
        h,
        *ctx.transform,
        ctx.backend,
    )
    return gradient, *(None,) * 6


_statistics_op.register_autograd(_statistics_backward, setup_context=_statistics_setup)


class _StatisticsInPlace(torch.autograd.Function):
    """The same with the gradient written over the logits, in backward: they must live until then unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        compute: Tensor,
        transform: LogitTransform,
        entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        statistics = implementation(backend).token_statistics(logits, tokens, compute, transform, entropy=entropy)
        ctx.save_for_backward(logits, tokens, compute, *statistics)
        ctx.transform, ctx.backend = transform, backend
        ctx.set_materialize_grads(False)
        return statistics.logprobs, statistics.logprobs.new_empty(
            0
        ) if statistics.entropy is None else statistics.entropy

    @staticmethod
    @first_order
    def backward(
        ctx: Any, upstream_logprobs: Tensor | None, upstream_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        consume(ctx, "policy_loss(inplace=True)")
        logits, tokens, compute, logprobs, maximum, rest, entropy = ctx.saved_tensors
        c = _coefficients(upstream_logprobs, compute, logprobs)
        h = _coefficients(upstream_entropy, compute, logprobs) if entropy is not None else None
        if c is None and h is None:
            return (None,) * 6
        c = torch.zeros_like(logprobs) if c is None else c
        out = logits.detach()
        statistics = RowStatistics(logprobs, maximum, rest, entropy if h is not None else None)
        implementation(ctx.backend).token_gradient(logits, tokens, statistics, c, h, ctx.transform, out)
        torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 5


def token_statistics(
    logits: Tensor,
    tokens: Tensor,
    compute: Tensor,
    transform: LogitTransform,
    *,
    entropy: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Differentiable log-probabilities and entropy, NaN in rows not computed; their gradient runs the second sweep."""
    if inplace and torch.is_grad_enabled() and logits.requires_grad and not traced(logits):
        logprobs, entropies = _StatisticsInPlace.apply(  # type: ignore[no-untyped-call]
            logits, tokens, compute, transform, entropy, backend
        )
    else:
        logprobs, entropies, _, _ = _statistics_op(logits, tokens, compute, *transform, entropy, backend)
    return logprobs, entropies if entropy else None


# ---------------------------------------------------------------------------------------------------------------
# log-probabilities -> loss


@torch.library.custom_op("hpo_fused::logprob_policy_loss", mutates_args=())
def _logprob_op(
    logprobs: Tensor, entropy: Tensor | None, advantages: Tensor, policy_weights: Tensor, penalty_weights: Tensor,
    old_logprobs: Tensor | None, ref_logprobs: Tensor | None, mask: Tensor, response_of_row: Tensor | None,
    responses: int, sequence_level: bool, kind: str, parameters: Sequence[float], max_log_ratio: float,
    kl_coef: float, entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = Layout(mask, response_of_row, responses)
    losses, c, h = token_loss(
        SurrogateSpec(kind, tuple(parameters), max_log_ratio, kl_coef, entropy_coef),
        TokenTerms(advantages, policy_weights, penalty_weights, old_logprobs, ref_logprobs),
        logprobs,
        entropy,
        layout.response_mean if sequence_level else None,
    )
    return losses.sum(), c, logprobs.new_empty(0) if h is None else h


@_logprob_op.register_fake
def _(
    logprobs: Tensor, entropy: Tensor | None, advantages: Tensor, policy_weights: Tensor, penalty_weights: Tensor,
    old_logprobs: Tensor | None, ref_logprobs: Tensor | None, mask: Tensor, response_of_row: Tensor | None,
    responses: int, sequence_level: bool, kind: str, parameters: Sequence[float], max_log_ratio: float,
    kl_coef: float, entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    row = torch.empty_like(advantages)
    return logprobs.new_empty(()), row, _empty(entropy_coef != 0, logprobs, logprobs.shape, logprobs.dtype)


def _logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, c, h = output
    ctx.mark_non_differentiable(c, h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(c, h)
    ctx.inputs = len(inputs)


@first_order
def _logprob_backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * ctx.inputs
    if upstream is None:
        return nothing
    consume(ctx, "the policy loss")
    c, h = ctx.saved_tensors
    return c * upstream, h * upstream if h.dim() > 1 else None, *nothing[2:]


_logprob_op.register_autograd(_logprob_backward, setup_context=_logprob_setup)


class _LogprobLoss(torch.autograd.Function):
    """The sum of losses whose derivatives are known."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, rows: LogprobRows) -> Tensor:
        ctx.save_for_backward(rows.logprob_coefficients, rows.entropy_coefficients)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        ctx.set_materialize_grads(False)
        return rows.losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 3
        consume(ctx, "the policy loss")
        c, h = (
            None if value is None or dtype is None else (value * upstream).to(dtype)
            for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return c, h, None


def batch_logprob_loss(
    logprobs: Tensor, entropy: Tensor | None, batch: LossBatch, spec: SurrogateSpec, backend: str,
    statistics: Tensor | None = None,
) -> tuple[Tensor, LogprobRows]:  # fmt: skip
    """Loss (differentiable once) from log-probabilities and entropies of the batch's shape, and its rows.

    ``statistics``: of :func:`computed_rows`, where the batch went through it.
    """
    rows = implementation(backend).logprob_policy_loss(
        logprobs, entropy, batch, spec, sequence_level=batch.objective.ratio_level == "sequence", statistics=statistics
    )
    loss: Tensor = _LogprobLoss.apply(logprobs, entropy, rows)  # type: ignore[no-untyped-call]
    return loss, rows


def logprob_policy_loss(
    logprobs: Tensor, entropy: Tensor | None, batch: PreparedBatch, spec: SurrogateSpec, sequence_level: bool
) -> Tensor:
    """Loss from float32 log-probabilities (and entropy, if it has a coefficient) of the rows' shape."""
    loss: Tensor
    loss, _, _ = _logprob_op(
        logprobs,
        entropy if spec.entropy_coef != 0 else None,
        *batch.terms,
        *batch.layout,
        sequence_level,
        *spec,
    )
    return loss
