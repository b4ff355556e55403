"""The autograd functions of logits and of log-probabilities, each once for eager and traced code.

``_PolicyLoss`` makes loss and gradient in its forward; backward only scales. ``_TokenStatistics`` makes
log-probabilities and entropies, and its backward runs the second sweep. ``_LogprobLoss`` turns log-probabilities into
the loss; behind ``_TokenStatistics`` it makes the two-kernel path, which sequence-level ratios need (a response's mean
stands between the sweeps), and float16 logits too: there the upstream gradient, a loss scaler's factor, must enter
before the gradient is rounded, or small entries underflow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, vocab_parallel
from .backend import implementation
from .interface import LOSS, LogitTransform, LossSpec, SoftmaxStatistics, TokenTerms
from .ops import traced
from .vocab_parallel import Shards

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
    """Refuse create_graph=True.

    PyTorch's once_differentiable refuses only where the incoming gradient has a graph of its own, and would here drop
    the second derivative without a word. Compiled code refuses by itself.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError(
                "hpo_fused: double backward (create_graph=True) is not supported; a gradient of the gradient would "
                "need the loss's second derivatives"
            )
        return backward(ctx, *upstream)

    return checked


def _gradient_like(logits: Tensor) -> Tensor:
    """Room for the gradient of logits [B, T, V], every row as far from a 16-byte boundary as the logits' own.

    The kernels load a row in 16-byte groups and can store the gradient so only where both rows are aligned alike. With
    odd V that takes the same strides: in a new contiguous tensor the rows of ``logits[:, :-1]`` would lie elsewhere.
    """
    if traced(logits):  # no address is known
        return logits.new_empty(logits.shape)
    itemsize = logits.element_size()
    shift = logits.data_ptr() % 16 // itemsize
    if shift == 0 and logits.is_contiguous():
        return torch.empty_like(logits)  # in less than half of new_empty's time
    if shift == 0 and all(step * itemsize % 16 == 0 for step in (logits.shape[-1], *logits.stride()[:2])):
        return logits.new_empty(logits.shape)
    span = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if not logits.numel() <= span <= 1.25 * logits.numel():  # rows that share memory, or lie far apart
        return logits.new_empty(logits.shape)
    return logits.new_empty(span + shift).as_strided(logits.shape, logits.stride(), shift)


def _new_results(logits: Tensor, targets: Tensor, entropy: bool) -> Tensor:
    return logits.new_empty((3 if entropy else 2, *targets.shape), dtype=torch.float32)


class _PolicyLoss(torch.autograd.Function):
    """Logits to the sum of the rows' losses, beside a gradient that is nobody else's: backward scales it in place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, values: Tensor, spec: LossSpec, transform: LogitTransform,
        entropy: bool, inplace: bool, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        results = _new_results(logits, targets, entropy)
        gradient = logits if inplace else _gradient_like(logits)
        ops.policy_loss(logits, targets, values, spec, transform, results, gradient, backend)
        if inplace:  # not before apply: a view whose version has moved would lose the hooks on its grad_fn
            torch.autograd.graph.increment_version(logits)
        # Saved after the bump: whoever writes to the logits between here and backward is told so.
        ctx.save_for_backward(gradient)
        ctx.backend = backend
        ctx.mark_non_differentiable(results)
        ctx.set_materialize_grads(False)
        return results[LOSS].sum(), results

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing: tuple[None, ...] = (None,) * 7
        if upstream is None:
            return None, *nothing
        if traced(upstream):  # compiled code may run its backward again, on the same gradient
            (gradient,) = ctx.saved_tensors
            return (gradient * upstream).to(gradient.dtype), *nothing
        consume(ctx, "policy_loss")
        gradient = ctx.saved_tensors[0].detach()
        implementation(ctx.backend).scale_gradient(gradient, upstream)
        return gradient, *nothing


def policy_loss(
    logits: Tensor, terms: TokenTerms, spec: LossSpec, transform: LogitTransform, *, entropy: bool, inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss (differentiable once) of a token-level objective of logits [B, T, V], and its per-token results."""
    if torch.is_grad_enabled() and logits.requires_grad:
        inplace = inplace and not traced(logits)
        return _PolicyLoss.apply(  # type: ignore[no-untyped-call, no-any-return]
            logits, terms.targets, terms.values, spec, transform, entropy, inplace, backend
        )
    results = _new_results(logits, terms.targets, entropy)
    ops.policy_loss(logits, terms.targets, terms.values, spec, transform, results, None, backend)
    return results[LOSS].sum(), results


def _statistics(
    logits: Tensor, targets: Tensor, transform: LogitTransform, entropy: bool, backend: str, shards: Shards | None
) -> tuple[Tensor, SoftmaxStatistics]:
    logprobs, maximum, others, entropies = (
        logits.new_empty(targets.shape, dtype=torch.float32) if wanted else None
        for wanted in (True, True, True, entropy)
    )
    assert logprobs is not None and maximum is not None and others is not None
    statistics = SoftmaxStatistics(logprobs, maximum, others, entropies)
    if shards is not None:
        vocab_parallel.local_statistics(shards, logits, targets, transform, statistics, backend)
        return shards.combined(statistics, targets, backend)
    ops.token_statistics(logits, targets, transform, statistics, backend)
    return logprobs, statistics


class _TokenStatistics(torch.autograd.Function):
    """Logits to log-probabilities and entropies; backward runs the second sweep, from both gradients at once.

    In place it writes over the logits in backward: they must live until then unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, transform: LogitTransform, entropy: bool, inplace: bool,
        backend: str, shards: Shards | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logprobs, statistics = _statistics(logits, targets, transform, entropy, backend, shards)
        ctx.save_for_backward(logits, targets, transform.temperatures, *statistics)
        ctx.transform, ctx.inplace, ctx.backend = transform._replace(temperatures=None), inplace, backend
        ctx.shards = shards
        ctx.set_materialize_grads(False)
        if statistics.entropy is None:
            return (logprobs,)
        return logprobs, statistics.entropy

    @staticmethod
    @first_order
    def backward(
        ctx: Any, upstream_logprobs: Tensor | None, upstream_entropy: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        nothing: tuple[None, ...] = (None,) * 6
        if ctx.inplace:
            consume(ctx, "policy_loss(inplace=True)")
        if upstream_logprobs is None and upstream_entropy is None:
            return None, *nothing
        logits, targets, temperatures, *saved = ctx.saved_tensors
        transform, statistics = ctx.transform._replace(temperatures=temperatures), SoftmaxStatistics(*saved)
        c, h = (
            None if upstream is None else upstream.to(torch.float32).contiguous()
            for upstream in (upstream_logprobs, upstream_entropy)
        )
        if c is None:
            c = torch.zeros_like(statistics.logprobs)
        out = logits.detach() if ctx.inplace else _gradient_like(logits)
        vocab_parallel.token_gradient(ctx.shards, logits, targets, statistics, c, h, transform, out, ctx.backend)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return out, *nothing


def token_statistics(
    logits: Tensor, targets: Tensor, transform: LogitTransform, *, entropy: bool, inplace: bool, backend: str,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Differentiable log-probabilities and entropies of logits [B, T, V], NaN in rows not computed.

    ``shards``: the logits are a rank's columns of the vocabulary, while the targets are ids of the whole. No compiler
    traces that.
    """
    if shards is not None and torch.compiler.is_compiling():
        untraced: tuple[Tensor, Tensor | None] = _untraced(
            logits, targets, transform, entropy, inplace, backend, shards
        )
        return untraced
    if torch.is_grad_enabled() and logits.requires_grad:
        inplace = inplace and not traced(logits)
        outputs = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
            logits, targets, transform, entropy, inplace, backend, shards
        )
        return outputs[0], outputs[1] if entropy else None
    logprobs, statistics = _statistics(logits, targets, transform, entropy, backend, shards)
    return logprobs, statistics.entropy


@torch.compiler.disable(reason="collectives stand between the sweeps; call it between compiled graphs")  # type: ignore[untyped-decorator]
def _untraced(
    logits: Tensor, targets: Tensor, transform: LogitTransform, entropy: bool, inplace: bool, backend: str,
    shards: Shards,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return token_statistics(
        logits, targets, transform, entropy=entropy, inplace=inplace, backend=backend, shards=shards
    )


class _LogprobLoss(torch.autograd.Function):
    """Log-probabilities and entropies, of any floating dtype and layout, to the sum of their losses."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, entropy: Tensor | None, terms: TokenTerms, spec: LossSpec, backend: str
    ) -> tuple[Tensor, Tensor]:
        rows, entropies = (
            None if given is None else given.detach().reshape(terms.targets.shape).to(torch.float32).contiguous()
            for given in (logprobs, entropy)
        )
        assert rows is not None
        results, c, h = ops.logprob_loss(rows, entropies, terms, spec, backend)
        ctx.save_for_backward(c, h)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        ctx.shape = logprobs.shape
        ctx.mark_non_differentiable(results)
        ctx.set_materialize_grads(False)
        return results[LOSS].sum(), results

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 5
        if not traced(upstream):
            consume(ctx, "the policy loss")
        c, h = (
            None if value is None or dtype is None else (value * upstream).to(dtype).reshape(ctx.shape)
            for value, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return c, h, None, None, None


def logprob_loss(
    logprobs: Tensor, entropy: Tensor | None, terms: TokenTerms, spec: LossSpec, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss (differentiable once) of log-probabilities and entropies, and its per-token results [2 or 3, B, T]."""
    return _LogprobLoss.apply(logprobs, entropy, terms, spec, backend)  # type: ignore[no-untyped-call, no-any-return]
