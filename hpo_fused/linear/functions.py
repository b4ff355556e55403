"""The policy loss and log-probabilities from hidden states and LM head, a chunk of rows at a time.

torch.compile does not trace these: the number of rows is not known before the batch is looked at.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hpo_fused import ops
from hpo_fused.autograd import logprob_loss
from hpo_fused.backend import Backend, backend_for
from hpo_fused.batch import BatchStatistics
from hpo_fused.checks import check_tensor
from hpo_fused.context_parallel import with_other_ranks
from hpo_fused.layout import AdvantageLevel, as_mask, check_mask, check_transform
from hpo_fused.logprobs import TokenLogprobs
from hpo_fused.losses import PolicyLossOutput, policy_output
from hpo_fused.objective import ObjectiveLike, resolve_objective
from hpo_fused.process_groups import GroupLike
from hpo_fused.token_terms import check_batch, token_targets
from hpo_fused.vocab_parallel import VocabGroup

from . import autograd
from .arguments import before_shards, check_head, check_weight_grad, whole_shape
from .autograd import Settings
from .keep import check_keep
from .rows import Rows, choose_rows
from .weight_context import WeightContext, within_weight_context

_UNTRACEABLE = "the number of active rows is known only at run time; call it between compiled graphs"


@torch.compiler.disable(reason=_UNTRACEABLE)  # type: ignore[untyped-decorator]
@within_weight_context
def linear_policy_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, *, bias: Tensor | None = None,
    old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, mask: Tensor | None = None,
    token_weights: Tensor | None = None, entropy_weights: Tensor | None = None, cu_seqlens: Tensor | None = None,
    groups: Tensor | None = None, objective: ObjectiveLike = "mhpo_ahpo", statistics: BatchStatistics | None = None,
    lengths: Tensor | None = None, response_mean_log_ratios: Tensor | None = None,
    context_group: GroupLike | None = None,
    advantage_level: AdvantageLevel | None = None, loss_scale: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0, softcap: float | None = None, keep: Tensor | tuple[Tensor, Tensor] | None = None,
    skip_inactive: bool = True, entropy: bool = True, chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None, active_count: int | None = None, weight_grad: Tensor | None = None,
    vocab_group: VocabGroup = None, sequence_parallel: bool = False, weight_context: WeightContext | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:  # fmt: skip
    """:func:`policy_loss` of ``hidden @ weight.T + bias``, whose logits never exist but for one chunk of rows.

    Only active rows (unmasked, with a learning signal) enter a GEMM: they are gathered a chunk at a time, their logits
    are replaced by their gradient in place, and that by the gradients of hidden, weight and bias.

    For n active rows that is three GEMMs of 2 n H V flops; one less for each of hidden and weight that needs no
    gradient, one more for sequence-level objectives, float16 and ``weight_grad``, whose backward repeats the first.
    Logits and their gradient are rounded once to the GEMMs' dtype, dweight is summed in float32. docs/linear.md has
    the details, :func:`linear_memory` the memory.

    Args:
        hidden: float16, bfloat16 or float32 [B, T, H], or packed [N, H] with ``cu_seqlens``; any strides, so that
            ``hidden[:, :-1]`` is not copied. ``hidden[b, t]`` predicts ``tokens[b, t]``.
        weight: [V, H] of hidden's dtype (any under torch.autocast, whose dtype the GEMMs then run in); any strides.
            May be a DTensor sharded over V as FSDP2 does: it is gathered, and its gradient averaged over the mesh, see
            ``gradient_average`` of :class:`BatchStatistics`. One in a wider dtype than hidden's, as under FSDP2's mixed
            precision, is rounded to that before, and its gradient is summed over the ranks in its own.
        tokens, advantages: as in :func:`policy_loss`.
        bias: [V] of weight's dtype, or None.
        old_logprobs, ref_logprobs, mask, token_weights, entropy_weights, cu_seqlens, groups, objective, statistics,
            lengths, response_mean_log_ratios, context_group, advantage_level, loss_scale, temperature, softcap,
            entropy, backend: as in :func:`policy_loss`.
        keep: the ids over which the sampler normalised (top-p, top-k), row by row; all results are those of logits with
            -inf elsewhere. Either a tuple (ids, offsets): row b * T + t keeps ``ids[offsets[row]:offsets[row + 1]]``,
            integer [M] and [B * T + 1] (packed [N + 1]), ids in [0, V), in any order. Or a bit mask, int32
            [B, T, ceil(V / 32)] (packed [N, ceil(V / 32)]), any strides: bit j % 32 of word j // 32 is set where id j
            is kept; bits beyond V are ignored. What masked rows keep is of no meaning.
        skip_inactive: leave unmasked rows without a learning signal uncomputed (their logprobs and entropy are NaN).
            False adds one GEMM for them.
        chunk_bytes: memory for a chunk's logits, at least one row. None: 4096 rows (1024 on a CPU), at most 896 MiB;
            on a GPU all rows, where their logits take no more than dweight's sum over chunks would.
        logits_dtype: dtype that the logits are rounded to: None for the GEMMs' own, or float32, for parity with a
            sampler that does so, which takes more of the chunk and, on a CPU, time.
        active_count: number of active rows, or an upper bound, if the caller knows it: the call then does not
            synchronise host and device (Triton backend, ``skip_inactive=True``), and can be captured in a CUDA graph.
            Rows up to the bound cost as much as active ones. With ``vocab_group`` the same on every rank.
        weight_grad: float32 [V, H] that backward adds weight's gradient to (Megatron's ``main_grad``), in the GEMM
            itself; weight then gets no gradient from autograd, and no accumulator is needed. Every backward adds to
            it, also one that was asked for hidden's gradient only.
        vocab_group: weight (and bias) are this rank's rows of a head that is sharded over these ranks, or DTensors
            with Shard(0) over them as ``ColwiseParallel`` leaves them; otherwise as in :func:`policy_loss`. Every rank
            has all rows of hidden and the same arguments, so that the same rows are active; hidden's gradient is
            summed over the ranks in backward, in its own dtype: one all-reduce. Four GEMMs, as for sequence-level
            objectives.
        sequence_parallel: with ``vocab_group``: hidden is this rank's part of the sequence, [B, T / W, H] (packed
            [N / W, H]), in the ranks' order: gathered in forward, its gradient reduced and scattered in backward, and
            held in between as a whole. Everything else has all T tokens.
        weight_context: a callable without arguments that makes a context manager within which weight and bias are
            whole, for those that are elsewhere empty: ``lambda: deepspeed.zero.GatheredParameters([head.weight])``
            under ZeRO-3. Entered in forward, and again in backward until their gradients are accumulated.

    Returns:
        :class:`PolicyLossOutput`. ``loss`` can be differentiated once. It is attached to every input even where no
        row is active: gradients are then zeros, not None.

    Raises:
        TypeError, ValueError: as :func:`policy_loss`; hidden, weight or bias of another dtype, shape or device; a
            weight_context that is no callable, or makes no context manager;
            chunk_bytes below one row; active_count below the number of active rows (a device-side assert on GPU); an
            unmasked row whose sampled token is not in its own kept set, for the sampler cannot have drawn it, an id
            outside [0, V) or offsets that do not rise from 0 to M (likewise).

    Examples:
        >>> hidden = torch.zeros(2, 3, 4, requires_grad=True)
        >>> head = torch.nn.Linear(4, 5, bias=False)
        >>> tokens = torch.zeros(2, 3, dtype=torch.long)
        >>> out = linear_policy_loss(hidden, head.weight, tokens, torch.tensor([1.0, 0.0]), objective="grpo")
        >>> out.active
        tensor([[ True,  True,  True],
                [False, False, False]])
        >>> out.loss.backward()
        >>> hidden.grad[1].any()
        tensor(False)
    """
    resolved = resolve_objective(objective)
    inputs, dtypes, shards = check_head(hidden, weight, bias, logits_dtype, vocab_group)
    shape, device = whole_shape(hidden, shards, sequence_parallel), hidden.device
    vocabulary = inputs[1].shape[0] if shards is None else shards.vocabulary
    tokens = check_tensor("tokens", tokens, [tuple(shape)], "integer", device)
    batch = check_batch(
        resolved, "tokens", shape, device, tokens, advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        mask=mask, token_weights=token_weights, entropy_weights=entropy_weights, cu_seqlens=cu_seqlens, groups=groups,
        statistics=statistics, lengths=lengths, response_mean_log_ratios=response_mean_log_ratios,
        advantage_level=advantage_level, loss_scale=loss_scale, context_group=context_group,
    )  # fmt: skip
    into = check_weight_grad(weight_grad, weight if shards is None else inputs[1])
    transform = check_transform(temperature, softcap, shape, device, batch.mask, batch.responses, batch.cu_seqlens)
    spec, served_by = resolved.lower(batch), backend_for(hidden, backend)
    terms = ops.token_terms(batch, spec, vocabulary, skip_inactive, served_by)
    kept = check_keep(keep, tokens, mask, vocabulary)
    settings = Settings(dtypes, transform, chunk_bytes, served_by, kept, shards, weight_context)
    choose = partial(choose_rows, terms.targets, terms.active, active_count, idle=not skip_inactive)
    entropy = entropy or spec.entropy_bonus
    # A loss scaler's factor must enter before a gradient is rounded to float16.
    narrow = torch.float16 in (dtypes.operands, *(value.dtype for value in inputs if value is not None))
    if spec.shared_ratio or narrow or into is not None or shards is not None:
        inputs = before_shards(inputs, shards, sequence_parallel)
        logprobs, entropies = autograd.token_statistics(inputs, choose, settings, entropy=entropy, into=into)
        terms = with_other_ranks(terms, spec, logprobs, batch.context)
        loss, results = logprob_loss(logprobs, entropies, terms, spec, settings.backend)
    else:
        loss, results = autograd.policy_loss(inputs, choose, terms, spec, settings, entropy=entropy)
    return policy_output(loss, results, resolved, batch, terms, shape)


@torch.compiler.disable(reason=_UNTRACEABLE)  # type: ignore[untyped-decorator]
@within_weight_context
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, bias: Tensor | None = None, mask: Tensor | None = None,
    keep: Tensor | tuple[Tensor, Tensor] | None = None, entropy: bool = True, temperature: float | Tensor = 1.0,
    softcap: float | None = None, chunk_bytes: int | None = None, logits_dtype: torch.dtype | None = None,
    active_count: int | None = None, weight_grad: Tensor | None = None, vocab_group: VocabGroup = None,
    sequence_parallel: bool = False, weight_context: WeightContext | None = None, backend: Backend = "auto",
) -> TokenLogprobs:  # fmt: skip
    """:func:`token_logprobs` of ``hidden @ weight.T + bias``, a chunk of unmasked rows at a time.

    For old and reference log-probabilities under ``torch.no_grad()`` this is one GEMM, 2 n H V flops for n unmasked
    rows. Differentiated, backward makes each chunk's logits again: four GEMMs in all. Either way memory beyond the
    gradients is one chunk of logits and, with several chunks, dweight's float32 accumulator (:func:`linear_memory`).

    Args:
        hidden, weight, bias, keep, chunk_bytes, logits_dtype, weight_grad, vocab_group, sequence_parallel,
            weight_context, backend: as in :func:`linear_policy_loss`.
        tokens: integer [B, T] or [N], ids in [0, V) where unmasked, anything elsewhere.
        mask: bool or 0/1, shaped like tokens: rows to compute; None: all.
        entropy: whether to compute the entropy too.
        temperature, softcap: as in :func:`token_logprobs`.
        active_count: number of unmasked rows, or an upper bound; with it, or without a mask, nothing synchronises (see
            :func:`linear_policy_loss`).

    Returns:
        :class:`TokenLogprobs`, float32, 0 where masked; both differentiable (not twice). Backward may run again with
        retain_graph=True: it recomputes.

    Raises:
        TypeError, ValueError: as :func:`linear_policy_loss`.

    Examples:
        >>> hidden, weight = torch.zeros(1, 2, 3), torch.ones(4, 3)
        >>> linear_token_logprobs(hidden, weight, torch.tensor([[0, 3]])).logprobs
        tensor([[-1.3863, -1.3863]])
    """
    inputs, dtypes, shards = check_head(hidden, weight, bias, logits_dtype, vocab_group)
    shape, device = whole_shape(hidden, shards, sequence_parallel), hidden.device
    vocabulary = inputs[1].shape[0] if shards is None else shards.vocabulary
    tokens = check_tensor("tokens", tokens, [tuple(shape)], "integer", device)
    if mask is not None:
        mask = check_mask(mask, shape, device)
    into = check_weight_grad(weight_grad, weight if shards is None else inputs[1])
    transform = check_transform(temperature, softcap, shape, device, mask)
    row_mask = as_mask(mask, shape if len(shape) == 2 else (1, *shape), device)
    targets = token_targets(tokens, row_mask, vocabulary)
    kept = check_keep(keep, tokens, mask, vocabulary)
    settings = Settings(dtypes, transform, chunk_bytes, backend_for(hidden, backend), kept, shards, weight_context)
    inputs = before_shards(inputs, shards, sequence_parallel)

    def choose() -> list[Rows]:
        if mask is None and active_count is None:
            return [Rows.all(targets)]
        return choose_rows(targets, row_mask, active_count, idle=False)

    logprobs, entropies = autograd.token_statistics(inputs, choose, settings, entropy=entropy, into=into, other=0.0)

    def shaped(value: Tensor) -> Tensor:
        if active_count is not None:  # rows that only fill up to a bound hold NaN
            value = torch.where(row_mask, value, 0.0)
        elif entropies is not None:  # who keeps one of them is not to keep both
            value = value.clone()
        return value.reshape(shape)

    return TokenLogprobs(shaped(logprobs), None if entropies is None else shaped(entropies))
