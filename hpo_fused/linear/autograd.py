"""Autograd functions from hidden states and LM head to the loss, or to log-probabilities.

Two ways, as with logits. *Token-level* objectives: a chunk's logits come out of a GEMM, the fused kernel replaces them
by their gradient, and two more GEMMs turn that into the inputs' gradients; backward only scales them (three GEMMs).
*Everything that needs something between the sweeps* (sequence-level ratios, float16 under a loss scaler, a caller's
own gradient buffer, differentiable log-probabilities): forward keeps each row's statistics, and backward makes the
chunk's logits again (four GEMMs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from hpo_fused import ops, vocab_parallel
from hpo_fused.autograd import consume, first_order
from hpo_fused.backend import implementation
from hpo_fused.interface import LOGPROB, LOSS, SKIPPED, LogitTransform, LossSpec, SoftmaxStatistics, TokenTerms
from hpo_fused.vocab_parallel import Shards

from .arguments import check_still_held
from .head import GemmDtypes, Gradients, Head, HeadGradients, Inputs
from .keep import Keep
from .memory import ChunkPlan, accumulator_bytes
from .rows import Rows
from .weight_context import WeightContext, until_accumulated

# The rows of a call: those with a gradient, then those whose statistics alone are wanted. Asked for as late as can be,
# since the answer waits for the device.
Choice: TypeAlias = Callable[[], Sequence[Rows]]


class Settings(NamedTuple):
    """The part of a call that is the same for every chunk."""

    dtypes: GemmDtypes
    transform: LogitTransform
    chunk_bytes: int | None
    backend: str
    keep: Keep | None
    shards: Shards | None  # of which the head is; None: of the whole vocabulary
    weight_context: WeightContext | None = None

    def transform_of(self, chunk: Rows) -> LogitTransform:
        """The chunk's transform: with its rows' temperatures, [1, r]."""
        given = self.transform.temperatures
        if given is None:
            return self.transform
        return self.transform._replace(temperatures=chunk.gather(given.unsqueeze(0))[0])


class _Chunks:
    """The chunks of a call's rows, and the logits of each from a GEMM; ``summed``: dweight is summed over them."""

    def __init__(self, inputs: Inputs, head: Head, rows: Rows, settings: Settings, *, summed: bool = False) -> None:
        self.inputs = self.hidden, weight, _ = inputs
        self.rows, self.head, self.keep = rows, head, settings.keep
        self.first = 0 if settings.shards is None else settings.shards.own[0]
        vocabulary, width = weight.shape
        accumulator = accumulator_bytes(weight.numel(), weight.dtype, settings.dtypes) if summed else 0
        self.plan = ChunkPlan.of(
            len(rows), vocabulary, width, settings.dtypes, weight.device, settings.chunk_bytes, accumulator
        )

    def __iter__(self) -> Iterator[tuple[slice, Rows, Tensor, Tensor]]:
        """(part of the rows, that as rows, x [r, H], logits [1, r, V]) of each chunk; the logits share one buffer."""
        buffer = self.head.new_logits(self.plan.rows)
        for part in self.plan.slices(len(self.rows)):
            rows = self.rows.part(part)
            x = self.head.operand(rows.hidden(self.hidden))
            logits = buffer[: len(rows)]
            self.head.logits(x, logits)
            if self.keep is not None:
                self.keep.restrict(logits, rows, self.first)
            yield part, rows, x, logits.unsqueeze(0)
            del x, logits  # before the next are made

    def gradients(self, needed: Sequence[bool], into: Tensor | None = None) -> HeadGradients:
        """Sums over the chunks, for the inputs that are ``needed``."""
        hidden, weight, bias = (value if need else None for value, need in zip(self.inputs, needed, strict=True))
        return HeadGradients((hidden, weight, bias), self.head, self.rows, self.plan.chunks, into)


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, from which the dtypes were settled before; asking costs less than entering it."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _requiring(inputs: Inputs) -> tuple[bool, ...]:
    """Which of the inputs get a gradient."""
    return tuple(torch.is_grad_enabled() and value is not None and value.requires_grad for value in inputs)


def _named(statistics: Tensor) -> SoftmaxStatistics:
    """Statistics stacked as log-probabilities, entropies (if there are any), maxima and sums of the others."""
    logprobs, *entropies, maximum, others = statistics.unbind()
    return SoftmaxStatistics(logprobs, maximum, others, entropies[0] if entropies else None)


def _sweep(inputs: Inputs, head: Head, rows: Rows, settings: Settings, statistics: Tensor) -> None:
    """One GEMM and the first sweep: writes the rows' stacked statistics [3 or 4, 1, n], of a shard its own."""
    for part, chunk, _, logits in _Chunks(inputs, head, rows, settings):
        named, targets = _named(statistics[..., part]), chunk.targets.unsqueeze(0)
        transform = settings.transform_of(chunk)
        if settings.shards is None:
            ops.token_statistics(logits, targets, transform, named, settings.backend)
        else:
            vocab_parallel.local_statistics(settings.shards, logits, targets, transform, named, settings.backend)


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
    inputs: Inputs, choose: Choice, terms: TokenTerms, spec: LossSpec, settings: Settings, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Loss (differentiable once) of a token-level objective and its per-token results [2 or 3, B, T]."""
    needed = _requiring(inputs)
    with torch.no_grad(), _no_autocast(inputs[0]):
        head = Head(*inputs[1:], settings.dtypes)
        results = terms.values.new_zeros((3 if entropy else 2, *terms.targets.shape))
        results[LOGPROB:].masked_fill_(terms.targets == SKIPPED, torch.nan)
        rows, *idle = choose()
        chunks = _Chunks(inputs, head, rows, settings, summed=needed[1])
        gradients: HeadGradients | None = None
        for _, chunk, x, logits in chunks:
            gradients = gradients or chunks.gradients(needed)  # behind the first GEMM
            entries = results.new_empty((results.shape[0], 1, len(chunk)))
            ops.policy_loss(
                logits, chunk.targets.unsqueeze(0), chunk.gather(terms.values), spec, settings.transform_of(chunk),
                entries, logits if any(needed) else None, settings.backend,
            )  # fmt: skip
            chunk.scatter(entries, results)
            if any(needed):
                gradients.add(chunk, x, logits[0])
            del x, logits
        sums = (gradients or chunks.gradients(needed)).finish()
        for selection in idle:
            statistics = results.new_empty((3 + entropy, 1, len(selection)))
            _sweep(inputs, head, selection, settings, statistics)
            selection.scatter(statistics[: 1 + entropy], results[LOGPROB:])
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
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, choose: Choice, settings: Settings,
        entropy: bool, into: Tensor | None, other: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs, ctx.rows, statistics = _all_statistics((hidden, weight, bias), choose, settings, entropy, other)
        # All watched for changes until backward.
        ctx.save_for_backward(hidden, weight, bias, statistics, *(settings.keep or ()))
        ctx.settings, ctx.into = settings, into
        ctx.shapes = weight.shape, None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in upstream):
            return (None,) * 8
        saved = ctx.saved_tensors  # once: a checkpoint makes them anew each time
        with until_accumulated(ctx.settings.weight_context, saved[1], needed=any(ctx.needs_input_grad[1:3])):
            return *_TokenStatistics.gradients(ctx, saved, upstream), *(None,) * 5

    @staticmethod
    def gradients(ctx: Any, saved: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> Gradients:
        """dhidden, dweight, dbias from the gradients of log-probabilities and entropies."""
        hidden, weight, bias, statistics, *_ = saved
        for name, value, shape in zip(("weight", "bias"), (weight, bias), ctx.shapes, strict=True):
            check_still_held(name, value, shape)
        rows, settings = ctx.rows, ctx.settings
        with _no_autocast(statistics):
            c, h = (
                None if value is None else rows.gather(value.to(torch.float32).unsqueeze(0))[0]
                for value in (*upstream, None)[:2]
            )
            c = torch.zeros_like(statistics[0]) if c is None else c
            summed = ctx.needs_input_grad[1] and ctx.into is None
            chunks = _Chunks((hidden, weight, bias), Head(weight, bias, settings.dtypes), rows, settings, summed=summed)
            gradients = chunks.gradients(ctx.needs_input_grad[:3], ctx.into)
            for part, chunk, x, logits in chunks:
                vocab_parallel.token_gradient(
                    settings.shards, logits, chunk.targets.unsqueeze(0), _named(statistics[..., part]), c[:, part],
                    None if h is None else h[:, part], settings.transform_of(chunk), logits, settings.backend,
                )  # fmt: skip
                gradients.add(chunk, x, logits[0])
                del x, logits
            return gradients.finish()


def _all_statistics(
    inputs: Inputs, choose: Choice, settings: Settings, entropy: bool, other: float
) -> tuple[tuple[Tensor, ...], Rows, Tensor]:
    """Log-probabilities (and entropies) [B, T], ``other`` where no row is chosen; the rows with a gradient, and theirs.

    The latter, stacked [3 or 4, 1, n], are what the second sweep wants, a shard's as ``Shards.combined`` returns them.
    """
    with torch.no_grad(), _no_autocast(inputs[0]):
        head = Head(*inputs[1:], settings.dtypes)
        selections = choose()
        lengths = [len(rows) for rows in selections]
        statistics = inputs[0].new_empty((3 + entropy, 1, sum(lengths)), dtype=torch.float32)
        for rows, entries in zip(selections, statistics.split(lengths, 2), strict=True):
            _sweep(inputs, head, rows, settings, entries)
        found = statistics
        if settings.shards is not None:
            targets = torch.cat([rows.targets for rows in selections]).unsqueeze(0)
            logprobs, met = settings.shards.combined(_named(statistics), targets, settings.backend)
            found = torch.stack([entry for entry in (logprobs, met.entropy) if entry is not None])
            statistics = torch.stack([entry for entry in (met.logprobs, met.entropy, *met[1:3]) if entry is not None])
        B, T, _ = inputs[0].shape
        whole = statistics.new_full(((1 + entropy) * B, T), other)
        for rows, entries in zip(selections, found[: 1 + entropy].split(lengths, 2), strict=True):
            rows.scatter(entries, whole.view(1 + entropy, B, T))
        # Not views of each other, though they share their memory: the caller may write to them.
        return whole.unsafe_chunk(1 + entropy), selections[0], statistics[..., : lengths[0]]


def token_statistics(
    inputs: Inputs, choose: Choice, settings: Settings, *, entropy: bool, into: Tensor | None, other: float = torch.nan
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies [B, T], ``other`` where no row is chosen; the first selection's differentiable.

    ``into``: float32 [V, H] that backward adds dweight to, instead of returning it.
    """
    if any(_requiring(inputs)):
        outputs = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
            *inputs, choose, settings, entropy, into, other
        )
    else:
        outputs, *_ = _all_statistics(inputs, choose, settings, entropy, other)
    return outputs[0], outputs[1] if entropy else None
