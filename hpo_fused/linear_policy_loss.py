"""The policy loss from hidden states and LM head: no logits, and no GEMM for rows without a learning signal."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, linear_autograd
from .backend import Backend, backend_for
from .batch import BatchStatistics, Layout, prepare
from .checks import check_tensor, check_token_ids
from .linear_autograd import UNTRACEABLE, LinearCall
from .linear_inputs import check_head, check_weight_grad, choose_rows
from .objective import Objective, resolve_objective
from .policy_loss import PolicyLossOutput, check_transform, policy_output


@torch.compiler.disable(reason=UNTRACEABLE)  # type: ignore[untyped-decorator]
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
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
    entropy: bool = True,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    active_count: int | None = None,
    weight_grad: Tensor | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """:func:`policy_loss` of ``hidden @ weight.T + bias``, whose logits never exist but for one chunk of rows.

    Only active rows (unmasked, with a learning signal) enter a GEMM: they are gathered a chunk at a time, their logits
    are replaced by their gradient in place, and that by the gradients of hidden, weight and bias.

    Cost, for n active rows, with s bytes an entry:

    * flops: 6 n H V (three GEMMs, the least there is); 2 n H V less for each of hidden and weight that needs no
      gradient, 2 n H V more for sequence-level objectives, float16 and ``weight_grad``, whose backward makes the
      logits again. ``skip_inactive=False`` adds 2 H V for each unmasked inactive row.
    * bytes: the chunk's logits 4 times (twice by GEMMs), weight twice and dweight once per chunk. Over several chunks
      dweight's float32 accumulator is read and written once per chunk: fewer, larger chunks are faster.
    * memory: :func:`linear_memory` tells; R V s for the chunk, 4 V H for the accumulator where there are several.

    Precision: logits are rounded once to ``logits_dtype``, as a GEMM's output is; arithmetic on them is float32. The
    gradient of the logits is rounded once to the GEMMs' dtype. dweight is summed in float32 and rounded once; on
    devices whose GEMMs cannot add into float32 (the CPU) each chunk's contribution is rounded before it is added.

    Args:
        hidden: float16, bfloat16 or float32 [B, T, H], or packed [N, H] with ``cu_seqlens``; any strides, so that
            ``hidden[:, :-1]`` is not copied. ``hidden[b, t]`` predicts ``tokens[b, t]``.
        weight: [V, H] of hidden's dtype (any under torch.autocast, whose dtype the GEMMs then run in); any strides.
            May be a DTensor sharded over V as FSDP2 does: it is gathered, and its gradient averaged over the mesh, see
            ``gradient_average`` of :class:`BatchStatistics`. One that is replicated on all of its mesh is taken as it
            is, its gradient left to whoever replicated it.
        tokens, advantages: as in :func:`policy_loss`.
        bias: [V] of weight's dtype, or None.
        old_logprobs, ref_logprobs, mask, token_weights, cu_seqlens, groups, objective, statistics, temperature,
            softcap, entropy, backend: as in :func:`policy_loss`.
        skip_inactive: leave unmasked rows without a learning signal uncomputed (their logprobs and entropy are NaN).
            False computes their statistics too: one GEMM for them, no gradient.
        chunk_bytes: memory for a chunk's logits, at least one row. None: 4096 rows (1024 on a CPU), at most 896 MiB.
        logits_dtype: dtype that the logits are rounded to: None for the GEMMs' own, or float32, for parity with a
            sampler that does so. Each row then takes V (4 + s) bytes of the chunk, and the CPU multiplies in float32.
        active_count: number of active rows, or an upper bound, if the caller knows it: the call then does not
            synchronise host and device (Triton backend, ``skip_inactive=True``), and can be captured in a CUDA graph.
            Rows up to the bound cost as much as active ones.
        weight_grad: float32 [V, H] that backward adds weight's gradient to (Megatron's ``main_grad``), in the GEMM
            itself; weight then gets no gradient from autograd, and no accumulator is needed. Every backward adds to
            it, also one that was asked for hidden's gradient only.

    Returns:
        :class:`PolicyLossOutput`. ``loss`` can be differentiated once. It is attached to every input even where no
        row is active: gradients are then zeros, not None.

    Raises:
        TypeError, ValueError: as :func:`policy_loss`; hidden, weight or bias of another dtype, shape or device;
            chunk_bytes below one row; active_count below the number of active rows (a device-side assert on GPU).

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
    transform = check_transform(temperature, softcap)
    inputs = check_head(hidden, weight, bias, logits_dtype)
    shape = hidden.shape[:-1]
    tokens = check_tensor("tokens", tokens, [tuple(shape)], "integer", hidden.device)
    layout = Layout.of("tokens", tokens.shape, hidden.device, mask, cu_seqlens)
    batch = prepare(
        resolved,
        layout,
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        token_weights=token_weights,
        groups=groups,
        statistics=statistics,
    )
    into = check_weight_grad(weight_grad, weight)
    ids = tokens.to(torch.int64).reshape(inputs.shape).contiguous()
    check_token_ids(ids, layout.mask, inputs.weight.shape[0])
    call = LinearCall(ids, transform, inputs.compute, inputs.logits, chunk_bytes, backend_for(inputs.hidden, backend))
    idle = [] if skip_inactive else [layout.mask & ~batch.active]
    rows, *others = choose_rows(batch.active, active_count, *idle)
    spec = resolved.lower()
    entropy = entropy or spec.entropy_coef != 0
    operands = inputs.hidden, inputs.weight, inputs.bias
    if resolved.ratio_level == "token" and not inputs.narrow and into is None:
        loss, logprobs, entropies = linear_autograd.fused_policy_loss(
            *operands, call, rows, batch.terms, spec, entropy=entropy
        )
    else:
        logprobs, entropies = linear_autograd.token_statistics(*operands, call, rows, entropy=entropy, into=into)
        loss = autograd.logprob_policy_loss(logprobs, entropies, batch, spec, resolved.ratio_level == "sequence")
    if others and len(others[0]):
        idle_rows = linear_autograd.linear_statistics(*operands, call, others[0], entropy=entropy)
        logprobs = torch.where(idle[0], idle_rows.logprobs, logprobs)
        if entropies is not None and idle_rows.entropy is not None:
            entropies = torch.where(idle[0], idle_rows.entropy, entropies)
    return policy_output(loss, logprobs, entropies, resolved, batch, tokens.shape)
