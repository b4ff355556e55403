"""Autograd functions from hidden states and LM head to the loss, or to log-probabilities.

Two ways, as with logits. *Token-level* objectives: a chunk's logits come out of a GEMM, the fused kernel replaces them
by their gradient, and two more GEMMs turn that into the inputs' gradients; backward only scales them (three GEMMs).
*Everything that needs something between the sweeps* (sequence-level ratios, float16 under a loss scaler, a caller's
own gradient buffer, differentiable log-probabilities): forward keeps each row's statistics, and backward makes the
chunk's logits again (four GEMMs).

torch.compile does not trace any of this: the number of rows is not known before the batch is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import consume, first_order
from .backend import implementation
from .linear_head import Head, HeadGradients, Inputs, Rows
from .linear_plan import ChunkPlan
from .rows import LogitTransform, RowStatistics, SurrogateSpec, TokenTerms

UNTRACEABLE = "the number of active rows is known only at run time; call it between compiled graphs"


class LinearCall(NamedTuple):
    """What a call needs besides its differentiable inputs."""

    tokens: Tensor  # int64 [B, T]
    transform: LogitTransform
    compute: torch.dtype  # of the GEMMs
    logits: torch.dtype
    chunk_bytes: int | None
    backend: str

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.compute, self.logits)

    def plan(self, rows: Rows, weight: Tensor) -> ChunkPlan:
        vocabulary, width = weight.shape
        return ChunkPlan.of(
            len(rows), vocabulary, self.compute, self.logits, weight.device.type, self.chunk_bytes, width
        )


@contextmanager
def _plain(tensor: Tensor) -> Iterator[None]:
    """Neither autograd nor autocast: dtypes were settled from it before."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _chunks(
    call: LinearCall, rows: Rows, plan: ChunkPlan, head: Head, hidden: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(places among the rows, x [r, H], logits [r, V]) of each chunk; the logits share one buffer."""
    buffer = head.new_logits(plan.rows)
    for part in plan.slices(len(rows)):
        x = rows.hidden(part, hidden).to(call.compute)
        logits = buffer[: x.shape[0]]
        head.logits(x, logits)
        yield part, x, logits
        del x, logits  # before the next are made


def _needing(inputs: Inputs, needed: tuple[bool, bool, bool]) -> Inputs:
    hidden, weight, bias = (value if need else None for value, need in zip(inputs, needed, strict=True))
    return hidden, weight, bias


def _computed(rows: Rows, part: slice) -> Tensor:
    """Which rows of a chunk are real: bool [1, r]."""
    positions = rows.positions[part]
    chosen = torch.ones_like(positions, dtype=torch.bool) if rows.selected is None else rows.selected[part]
    return chosen.unsqueeze(0)


def _blank(tokens: Tensor) -> Tensor:
    return torch.full(tokens.shape, torch.nan, dtype=torch.float32, device=tokens.device)


def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, rows: Rows, *, entropy: bool
) -> RowStatistics:
    """Statistics of ``rows``, one GEMM; no autograd."""
    logprobs, maximum, rest = (_blank(call.tokens) for _ in range(3))
    result = RowStatistics(logprobs, maximum, rest, _blank(call.tokens) if entropy else None)
    with _plain(hidden):
        head = call.head(weight, bias)
        for part, _, logits in _chunks(call, rows, call.plan(rows, weight), head, hidden):
            statistics = implementation(call.backend).token_statistics(
                logits.unsqueeze(0), rows.take(part, call.tokens), _computed(rows, part), call.transform,
                entropy=entropy,
            )  # fmt: skip
            for whole, entries in zip(result, statistics, strict=True):
                if whole is not None:
                    rows.put(part, whole, entries)
    return result


# ---------------------------------------------------------------------------------------------------------------
# fused: three GEMMs, all in forward


class LossRows(NamedTuple):
    """Per-token results of a fused call, float32 [B, T], and the gradients of the losses' sum where wanted."""

    losses: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    gradients: Inputs


def _fused_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, rows: Rows, terms: TokenTerms,
    spec: SurrogateSpec, entropy: bool, needed: tuple[bool, bool, bool],
) -> LossRows:  # fmt: skip
    losses, logprobs = torch.zeros_like(terms.advantages), _blank(call.tokens)
    entropies = _blank(call.tokens) if entropy or spec.entropy_coef != 0 else None
    with _plain(hidden):
        head, plan = call.head(weight, bias), call.plan(rows, weight)
        gradients = HeadGradients(_needing((hidden, weight, bias), needed), head, rows, plan.chunks)
        for part, x, logits in _chunks(call, rows, plan, head, hidden):
            chunk = logits.unsqueeze(0)
            found = implementation(call.backend).fused_policy_loss(
                chunk, rows.take(part, call.tokens), _computed(rows, part),
                TokenTerms._make(None if entry is None else rows.take(part, entry) for entry in terms),
                call.transform, spec, entropy=entropy, out=chunk if any(needed) else None,
            )  # fmt: skip
            for whole, entries in zip((losses, logprobs, entropies), found, strict=True):
                if whole is not None:
                    rows.put(part, whole, entries)
            if any(needed):
                gradients.add(part, x, logits)
            del x, logits, chunk
        return LossRows(losses, logprobs, entropies, gradients.finish())


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, rows: Rows,
        terms: TokenTerms, spec: SurrogateSpec, entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        needed = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        result = _fused_rows(hidden, weight, bias, call, rows, terms, spec, entropy, needed)
        ctx.save_for_backward(*result.gradients)
        ctx.backend = call.backend
        entropies = result.logprobs.new_empty(0) if result.entropy is None else result.entropy
        ctx.mark_non_differentiable(result.logprobs, entropies)
        ctx.set_materialize_grads(False)
        return result.losses.sum(), result.logprobs, entropies

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        consume(ctx, "linear_policy_loss")
        gradients = [None if saved is None else saved.detach() for saved in ctx.saved_tensors]
        for gradient in gradients:
            if gradient is not None:
                shape = (1,) * (3 - gradient.dim()) + gradient.shape
                implementation(ctx.backend).scale_gradient(gradient.view(shape), upstream)
        return *gradients, *(None,) * 5


def fused_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, rows: Rows, terms: TokenTerms,
    spec: SurrogateSpec, *, entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Loss (differentiable once), log-probabilities and entropy (detached) of a token-level objective."""
    needed = any(value is not None and value.requires_grad for value in (hidden, weight, bias))
    if needed and torch.is_grad_enabled():
        loss, logprobs, entropies = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, call, rows, terms, spec, entropy
        )
        return loss, logprobs, entropies if entropies.dim() > 1 else None
    result = _fused_rows(hidden, weight, bias, call, rows, terms, spec, entropy, (False,) * 3)
    return result.losses.sum(), result.logprobs, result.entropy


# ---------------------------------------------------------------------------------------------------------------
# statistics: one GEMM in forward, three in backward


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, rows: Rows, entropy: bool,
        into: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        result = linear_statistics(hidden, weight, bias, call, rows, entropy=entropy)
        ctx.save_for_backward(hidden, weight, bias, call.tokens, *result)  # all watched for changes until backward
        ctx.call, ctx.rows, ctx.into = call, rows, into
        ctx.set_materialize_grads(False)
        return result.logprobs, result.logprobs.new_empty(0) if result.entropy is None else result.entropy

    @staticmethod
    @first_order
    def backward(
        ctx: Any, upstream_logprobs: Tensor | None, upstream_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if upstream_logprobs is None and upstream_entropy is None:
            return (None,) * 7
        hidden, weight, bias, tokens, *saved = ctx.saved_tensors
        statistics, call, rows = RowStatistics(*saved), ctx.call._replace(tokens=tokens), ctx.rows
        if upstream_logprobs is None:
            upstream_logprobs = torch.zeros_like(statistics.logprobs)
        if upstream_entropy is None:
            statistics = statistics._replace(entropy=None)
        with _plain(hidden):
            head, plan = call.head(weight, bias), call.plan(rows, weight)
            inputs = _needing((hidden, weight, bias), ctx.needs_input_grad[:3])
            gradients = HeadGradients(inputs, head, rows, plan.chunks, ctx.into)
            for part, x, logits in _chunks(call, rows, plan, head, hidden):
                chosen, chunk = _computed(rows, part), logits.unsqueeze(0)
                c, h = (
                    None if up is None else torch.where(chosen, rows.take(part, up), 0.0).to(torch.float32)
                    for up in (upstream_logprobs, upstream_entropy)
                )
                implementation(call.backend).token_gradient(
                    chunk, rows.take(part, call.tokens),
                    RowStatistics._make(None if entry is None else rows.take(part, entry) for entry in statistics),
                    c, h, call.transform, chunk,
                )  # fmt: skip
                gradients.add(part, x, logits)
                del x, logits, chunk
            return *gradients.finish(), *(None,) * 4


def token_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LinearCall, rows: Rows, *, entropy: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Differentiable log-probabilities and entropy, NaN in rows not computed.

    ``into``: float32 [V, H] that backward adds dweight to, instead of returning it.
    """
    needed = any(value is not None and value.requires_grad for value in (hidden, weight, bias))
    if not (needed and torch.is_grad_enabled()):
        result = linear_statistics(hidden, weight, bias, call, rows, entropy=entropy)
        return result.logprobs, result.entropy
    logprobs, entropies = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, call, rows, entropy, into
    )
    return logprobs, entropies if entropy else None
