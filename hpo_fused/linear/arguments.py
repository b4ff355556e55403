"""The linear path's arguments: hidden states and LM head checked, gathered, and their dtypes settled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hpo_fused.checks import LOGIT_DTYPES, check_tensor, described, is_dtensor, same_device
from hpo_fused.vocab_parallel import Shards, VocabGroup, hidden_before_shards, resolve_shards

from .head import GemmDtypes, Inputs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class _Gathered(torch.autograd.Function):
    """A sharded DTensor to the whole tensor in ``dtype``, and its gradient to the mean over the mesh, sharded again."""

    @staticmethod
    def forward(ctx: Any, sharded: DTensor, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = sharded.device_mesh, sharded.placements, sharded.dtype
        whole: Tensor = cast("DTensor", sharded.detach().to(dtype)).full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        from torch.distributed.tensor import DTensor, Partial

        sums = DTensor.from_local(gradient.to(ctx.dtype), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return sums.redistribute(placements=ctx.placements).div_(ctx.mesh.size()), None


def gathered(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``value`` as a plain tensor: a sharded DTensor is gathered, and its gradient averaged over the ranks.

    That average is what FSDP2 does with gradients; ranks that hold copies of the same batch average equal gradients.
    A DTensor replicated over all its mesh is taken as it is, its gradient left to whoever replicated it.

    Args:
        name: the argument's, for errors.
        value: a parameter.
        dtype: that of the GEMMs' other operand, None under autocast. A DTensor may have a wider one, as its shards do
            under FSDP2's mixed precision: it is rounded before it is gathered, its gradient averaged in its own.

    Raises:
        TypeError: another dtype.
        ValueError: sharded over another dimension than the first, or holding partial sums.
    """
    sharded = is_dtensor(value)
    dtype = value.dtype if dtype is None else dtype
    if value.dtype != (torch.promote_types(value.dtype, dtype) if sharded else dtype):
        own = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected hidden's dtype {own} (or torch.autocast), got {described(value)}")
    if not sharded:
        return value
    from torch.distributed.tensor import Replicate, Shard

    value = cast("DTensor", value)
    # By exact type: FSDP2 over tensor parallelism has a subclass of Shard, equal to Shard(0) in PyTorch 2.8, whose
    # gradient DTensor does not scatter rightly there.
    kinds = [type(placement) for placement in value.placements]
    if any(kind not in (Replicate, Shard) for kind in kinds) or any(
        isinstance(placement, Shard) and placement.dim != 0 for placement in value.placements
    ):
        raise ValueError(
            f"{name}: expected a tensor, or a DTensor with placements Replicate() and Shard(0) (FSDP2) only, got "
            f"{tuple(value.placements)}; pass the gathered tensor"
        )
    if Shard not in kinds:
        return value.to_local().to(dtype)
    return cast(Tensor, _Gathered.apply(value, dtype))  # type: ignore[no-untyped-call]


def _hint(value: object) -> str:
    """What to pass instead of a module, if ``value`` is one."""
    if not isinstance(value, torch.nn.Module):
        return ""
    if hasattr(value, "base_layer") and hasattr(value, "lora_A"):
        return (
            "; a LoRA layer's .weight is the frozen base alone (log-probabilities without the adapter, and no gradient "
            "for it): pass base + scale * B @ A, in peft layer.base_layer.weight + layer.get_delta_weight(adapter)"
        )
    return "; pass its .weight"


def _gathering(name: str) -> str:
    """What to do where the parameter ``name`` was found empty."""
    return (
        "DeepSpeed's ZeRO-3, for one, holds a parameter only while a module that has it runs forward: pass "
        f"weight_context=lambda: deepspeed.zero.GatheredParameters([{name}]), or call the loss inside the forward of a "
        f"module that {name} is registered with (deepspeed.zero.register_external_parameter)"
    )


def check_head(
    hidden: object, weight: object, bias: object, logits_dtype: object, vocab_group: VocabGroup = None
) -> tuple[Inputs, GemmDtypes, Shards | None]:
    """Hidden states (packed ones as [1, N, H]) and head as plain tensors, GEMMs' dtypes, and which part the head is.

    A DTensor weight is gathered, without ``vocab_group``; with it, the head is this rank's part of it.

    Raises:
        TypeError: not a tensor, not float16, bfloat16 or float32, dtypes that differ outside autocast, or a
            logits_dtype that is neither float32 nor the GEMMs' own.
        ValueError: a wrong shape or device, or a DTensor that cannot be gathered.
    """
    if is_dtensor(hidden):
        raise TypeError("hidden: expected a plain tensor of this rank's rows, got a DTensor; pass hidden.to_local()")
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{name}: expected a float16, bfloat16 or float32 tensor, got {described(value)}{_hint(value)}"
            )
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape [B, T, H] or [N, H] with H > 0, got {described(hidden)}")
    width = hidden.shape[-1]
    shards = None
    if vocab_group is not None:
        weight, shards = resolve_shards("weight", weight, 0, vocab_group)
        if isinstance(bias, Tensor) and is_dtensor(bias):
            bias, _ = resolve_shards("bias", bias, 0, vocab_group)
    if weight.dim() != 2 or weight.shape[1] != width or (weight.shape[0] == 0 and shards is None):
        raise ValueError(
            f"weight: expected shape [V, {width}] with V > 0 (as nn.Linear keeps it), got {described(weight)}"
            + ("" if weight.numel() else f"; {_gathering('weight')}")
        )
    if not same_device(weight.device, hidden.device):
        raise ValueError(f"weight: expected a tensor on {hidden.device}, got {described(weight)}")
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind)
    operands = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
    if bias is not None:
        assert isinstance(bias, Tensor)
        check_tensor("bias", bias, [(weight.shape[0],)], "floating", hidden.device)
    if logits_dtype is None:
        logits_dtype = operands
    elif logits_dtype not in (torch.float32, operands):
        kinds = "None or torch.float32" if operands == torch.float32 else f"None, torch.float32 or {operands}"
        raise TypeError(f"logits_dtype: expected {kinds}, got {logits_dtype!r}")
    assert isinstance(logits_dtype, torch.dtype)
    dtypes = GemmDtypes.of(operands, logits_dtype, hidden.device)
    rows = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
    weight = gathered("weight", weight, None if autocast else hidden.dtype)
    bias = None if bias is None else gathered("bias", bias, None if autocast else hidden.dtype)
    return (rows, weight, bias), dtypes, shards


def whole_shape(hidden: Tensor, shards: Shards | None, sequence_parallel: object) -> torch.Size:
    """[B, T] or [N] of all tokens, of which hidden may have this rank's part.

    Raises:
        TypeError: sequence_parallel is no bool.
        ValueError: sequence_parallel without a vocab_group.
    """
    if not isinstance(sequence_parallel, bool):
        raise TypeError(f"sequence_parallel: expected a bool, got {described(sequence_parallel)}")
    if not sequence_parallel:
        return hidden.shape[:-1]
    if shards is None:
        raise ValueError("sequence_parallel: expected a vocab_group beside it, got vocab_group=None")
    return torch.Size([*hidden.shape[:-2], hidden.shape[-2] * len(shards.ranges)])


def before_shards(inputs: Inputs, shards: Shards | None, sequence_parallel: bool) -> Inputs:
    """The inputs with hidden states as a sharded head takes them; after all checks."""
    if shards is None:
        return inputs
    hidden, weight, bias = inputs
    return hidden_before_shards(hidden, shards, sequence_parallel), weight, bias


def check_still_held(name: str, value: Tensor | None, shape: torch.Size | None) -> None:
    """RuntimeError unless ``value``, saved by forward with ``shape``, still has it in backward."""
    if value is not None and value.shape != shape:
        raise RuntimeError(
            f"{name}: expected shape {list(shape or ())} in backward as in forward, got {described(value)}; "
            f"{_gathering(name)}, or, where it is frozen, take a token-level objective, whose backward does not read "
            "it (but in float16)"
        )


def check_weight_grad(weight_grad: object, weight: Tensor) -> Tensor | None:
    """``weight_grad`` itself, if it can take dweight.

    Raises:
        TypeError: not a float32 tensor.
        ValueError: another shape or device than weight's, or a weight that needs no gradient.
    """
    if weight_grad is None:
        return None
    if not isinstance(weight_grad, Tensor) or weight_grad.dtype != torch.float32 or is_dtensor(weight_grad):
        raise TypeError(f"weight_grad: expected a float32 tensor {list(weight.shape)}, got {described(weight_grad)}")
    check_tensor("weight_grad", weight_grad, [tuple(weight.shape)], "floating", weight.device)
    if weight_grad.requires_grad:
        raise ValueError("weight_grad: expected a buffer that does not require grad itself")
    kind = "DTensor weight, whose gradient has to be reduced" if is_dtensor(weight) else ""
    kind = kind or ("" if weight.requires_grad else "weight that does not require grad")
    if kind:
        raise ValueError(f"weight_grad: expected None for a {kind}, got a buffer")
    return weight_grad
