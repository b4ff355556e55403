"""Autograd functions from hidden states and LM head to the loss, or to log-probabilities.

Two ways, as with logits. *Token-level* objectives: a chunk's logits come out of a GEMM, the fused kernel replaces them
by their gradient, and two more GEMMs turn that into the inputs' gradients; backward only scales them (three GEMMs).
*Everything that needs something between the sweeps* (sequence-level ratios, float16 under a loss scaler, a caller's
own gradient buffer, differentiable log-probabilities): forward keeps each row's statistics, and backward makes the
chunk's logits again (four GEMMs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from hpo_fused import ops, vocab_parallel
from hpo_fused.autograd import consume, first_order
from hpo_fused.backend import implementation
from hpo_fused.interface import LOGPROB, LOSS, SKIPPED, LogitTransform, LossSpec, SoftmaxStatistics, TokenTerms
from hpo_fused.vocab_parallel import VocabShard

from .arguments import check_still_held
from .head import GemmDtypes, Gradients, Head, HeadGradients, Inputs
from .keep import Keep
from .memory import ChunkPlan, accumulator_bytes
from .rows import Rows
from .weight_context import WeightContext, until_accumulated


class Settings(NamedTuple):
    """The part of a call that is the same for every chunk."""

    dtypes: GemmDtypes
    transform: LogitTransform
    chunk_bytes: int | None
    backend: str
    keep: Keep | None
    shard: VocabShard | None  # of which the head is; None: of the whole vocabulary
    weight_context: WeightContext | None = None

    def transform_of(self, chunk: Rows) -> LogitTransform:
        """The chunk's transform: with its rows' temperatures, [1, r]."""
        given = self.transform.temperatures
        return self.transform._replace(temperatures=None if given is None else chunk.gather(given.unsqueeze(0))[0])


class _Chunks:
    """The chunks of a call's rows, and the logits of each from a GEMM; ``summed``: dweight is summed over them."""

    def __init__(self, inputs: Inputs, rows: Rows, settings: Settings, *, summed: bool = False) -> None:
        self.inputs = self.hidden, weight, bias = inputs
        self.rows, self.head, self.keep = rows, Head(weight, bias, settings.dtypes), settings.keep
        self.first = 0 if settings.shard is None else settings.shard.start
        vocabulary, width = weight.shape
        accumulator = accumulator_bytes(weight.numel(), weight.dtype, settings.dtypes) if summed else 0
        self.plan = ChunkPlan.of(
            len(rows), vocabulary, width, settings.dtypes, weight.device, settings.chunk_bytes, accumulator
        )

    def __iter__(self) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """(rows, x [r, H], logits [1, r, V]) of each chunk; the logits share one buffer."""
        buffer = self.head.new_logits(self.plan.rows)
        for part in self.plan.slices(len(self.rows)):
            rows = self.rows.part(part)
            x = self.head.operand(rows.hidden(self.hidden))
            logits = buffer[: len(rows)]
            self.head.logits(x, logits)
            if self.keep is not None:
                self.keep.restrict(logits, rows, self.first)
            yield rows, x, logits.unsqueeze(0)
            del x, logits  # before the next are made

    def gradients(self, needed: Sequence[bool], into: Tensor | None = None) -> HeadGradients:
        """Sums over the chunks, for the inputs that are ``needed``."""
        hidden, weight, bias = (value if need else None for value, need in zip(self.inputs, needed, strict=True))
        return HeadGradients((hidden, weight, bias), self.head, self.rows, self.plan.chunks, into)


@contextmanager
def _plain(tensor: Tensor) -> Iterator[None]:
    """Neither autograd nor autocast: dtypes were settled from it before."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _requiring(inputs: Inputs) -> tuple[bool, ...]:
    """Which of the inputs get a gradient."""
    return tuple(torch.is_grad_enabled() and value is not None and value.requires_grad for value in inputs)


def _named(statistics: Tensor) -> SoftmaxStatistics:
    """Statistics stacked as log-probabilities, entropies (if there are any), maxima and sums of the others."""
    logprobs, *entropies, maximum, others = statistics.unbind()
    return SoftmaxStatistics(logprobs, maximum, others, entropies[0] if entropies else None)


def _sweep(
    inputs: Inputs, rows: Rows, settings: Settings, whole: Tensor, *, entropy: bool, elsewhere: Tensor | None = None
) -> None:
    """One GEMM and the first sweep: writes the rows' stacked statistics to ``whole`` [k, B, T], the first k of them.

    Of a shard they are its own; ``elsewhere``, bool [1, B, T], is then set where a token is another rank's.
    """
    for chunk, _, logits in _Chunks(inputs, rows, settings):
        statistics = whole.new_empty((3 + entropy, 1, len(chunk)))
        named, targets, transform = _named(statistics), chunk.targets.unsqueeze(0), settings.transform_of(chunk)
        if settings.shard is None or elsewhere is None:
            ops.token_statistics(logits, targets, transform, named, settings.backend)
        else:
            other = vocab_parallel.local_statistics(settings.shard, logits, targets, transform, named, settings.backend)
            chunk.scatter(other.unsqueeze(0), elsewhere)
        chunk.scatter(statistics[: len(whole)], whole)


# ---------------------------------------------------------------------------------------------------------------
# three GEMMs, all in forward


class _PolicyLoss(torch.autograd.Function):
    """Inputs to the sum of the losses, beside gradients that are nobody else's: backward scales them in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, gradients: Gradients, losses: Tensor,
        backend: str, weight_context: WeightContext | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(*gradients)
        ctx.backend, ctx.weight_context = backend, weight_context
        # Not kept alive: backward does not read them.
        ctx.head = [(name, ref(value), value.shape) for name, value in (("weight", weight), ("bias", bias))
                    if value is not None and value.requires_grad]  # fmt: skip
        ctx.set_materialize_grads(False)
        return losses.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        head = [(name, held(), shape) for name, held, shape in ctx.head]
        with until_accumulated(ctx.weight_context if head else None, head[0][1] if head else None, needed=True):
            for name, value, shape in head:  # autograd could not add the gradient to what is empty now
                check_still_held(name, value, shape)
            consume(ctx, "linear_policy_loss")
        gradients = [None if saved is None else saved.detach() for saved in ctx.saved_tensors]
        for gradient in gradients:
            if gradient is not None:
                shape = (1,) * (3 - gradient.dim()) + gradient.shape
                implementation(ctx.backend).scale_gradient(gradient.view(shape), upstream)
        return *gradients, None, None, None, None


def policy_loss(
    inputs: Inputs, rows: Rows, idle: Sequence[Rows], terms: TokenTerms, spec: LossSpec, settings: Settings, *,
    entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss (differentiable once) of a token-level objective and its per-token results [2 or 3, B, T].

    ``rows`` are those with a gradient, ``idle`` those whose statistics alone are wanted.
    """
    needed = _requiring(inputs)
    results = terms.values.new_zeros((3 if entropy else 2, *terms.targets.shape))
    results[LOGPROB:].masked_fill_(terms.targets == SKIPPED, torch.nan)
    with _plain(inputs[0]):
        chunks = _Chunks(inputs, rows, settings, summed=needed[1])
        gradients = chunks.gradients(needed)
        for chunk, x, logits in chunks:
            entries = results.new_empty((len(results), 1, len(chunk)))
            ops.policy_loss(
                logits, chunk.targets.unsqueeze(0), chunk.gather(terms.values), spec, settings.transform_of(chunk),
                entries, logits if any(needed) else None, settings.backend,
            )  # fmt: skip
            chunk.scatter(entries, results)
            if any(needed):
                gradients.add(chunk, x, logits[0])
            del x, logits
        sums = gradients.finish()
        for selection in idle:
            if len(selection):
                _sweep(inputs, selection, settings, results[LOGPROB:], entropy=entropy)
    if not any(needed):
        return results[LOSS].sum(), results
    loss = _PolicyLoss.apply(  # type: ignore[no-untyped-call]
        *inputs, sums, results[LOSS], settings.backend, settings.weight_context
    )
    return loss, results


# ---------------------------------------------------------------------------------------------------------------
# one GEMM in forward, three in backward


class _TokenStatistics(torch.autograd.Function):
    """Inputs to log-probabilities and entropies; backward makes the logits again and runs the second sweep."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, selections: Sequence[Rows], settings: Settings,
        entropy: bool, into: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logprobs, statistics = _all_statistics((hidden, weight, bias), selections, settings, entropy)
        # All watched for changes until backward.
        ctx.save_for_backward(hidden, weight, bias, statistics, *(settings.keep or ()))
        ctx.rows, ctx.settings, ctx.into = selections[0], settings, into
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        return tuple(entries.clone() for entries in (logprobs, *statistics[1 : 1 + entropy]))

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in upstream):
            return (None,) * 7
        saved = ctx.saved_tensors  # once: a checkpoint makes them anew each time
        with until_accumulated(ctx.settings.weight_context, saved[1], needed=any(ctx.needs_input_grad[1:3])):
            return *_TokenStatistics.gradients(ctx, saved, upstream), *(None,) * 4

    @staticmethod
    def gradients(ctx: Any, saved: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> Gradients:
        """dhidden, dweight, dbias from the gradients of log-probabilities and entropies."""
        hidden, weight, bias, statistics, *_ = saved
        for name, value, shape in zip(("weight", "bias"), (weight, bias), ctx.shapes, strict=True):
            check_still_held(name, value, shape)
        c, *h = upstream
        with _plain(statistics):
            c = torch.zeros_like(statistics[0]) if c is None else c
            coefficients = torch.stack([value.to(torch.float32) for value in (c, *h) if value is not None])
            summed = ctx.needs_input_grad[1] and ctx.into is None
            chunks = _Chunks((hidden, weight, bias), ctx.rows, ctx.settings, summed=summed)
            gradients = chunks.gradients(ctx.needs_input_grad[:3], ctx.into)
            for chunk, x, logits in chunks:
                c, *h = chunk.gather(coefficients)
                vocab_parallel.token_gradient(
                    ctx.settings.shard, logits, chunk.targets.unsqueeze(0), _named(chunk.gather(statistics)), c,
                    h[0] if h else None, ctx.settings.transform_of(chunk), logits, ctx.settings.backend,
                )  # fmt: skip
                gradients.add(chunk, x, logits[0])
                del x, logits
            return gradients.finish()


def _all_statistics(
    inputs: Inputs, selections: Sequence[Rows], settings: Settings, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] of the rows in ``selections``, NaN elsewhere, and stacked statistics; no autograd.

    The statistics [3 or 4, B, T] are what the second sweep wants, a shard's as ``VocabShard.combined`` returns them.
    """
    shape, device = (3 + entropy, *inputs[0].shape[:2]), inputs[0].device
    whole = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
    elsewhere = None if settings.shard is None else torch.zeros((1, *shape[1:]), dtype=torch.bool, device=device)
    with _plain(inputs[0]):
        for rows in selections:
            _sweep(inputs, rows, settings, whole, entropy=entropy, elsewhere=elsewhere)
        if settings.shard is None or elsewhere is None:
            return whole[0], whole
        logprobs, met = settings.shard.combined(_named(whole), elsewhere[0], settings.backend)
    return logprobs, torch.stack([entry for entry in (met.logprobs, met.entropy, *met[1:3]) if entry is not None])


def token_statistics(
    inputs: Inputs, selections: Sequence[Rows], settings: Settings, *, entropy: bool, into: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies [B, T] of the rows in ``selections``, NaN elsewhere; the first's differentiable.

    ``into``: float32 [V, H] that backward adds dweight to, instead of returning it.
    """
    if any(_requiring(inputs)):
        outputs = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
            *inputs, selections, settings, entropy, into
        )
        return outputs[0], outputs[1] if entropy else None
    logprobs, statistics = _all_statistics(inputs, selections, settings, entropy)
    return logprobs, statistics[1] if entropy else None
