"""The linear path's inputs: hidden states and LM head checked, gathered, and brought to one dtype."""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor

from .checks import LOGIT_DTYPES, check_tensor, found, values_readable
from .linear_head import Rows


class HeadInputs(NamedTuple):
    """hidden [B, T, H] (packed: [1, N, H]), weight [V, H], bias [V] or None, and the dtypes to work in."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    logits: torch.dtype

    @property
    def narrow(self) -> bool:
        """Whether some gradient will be float16: a loss scaler's factor must enter before it is rounded."""
        tensors = (self.hidden, self.weight, self.bias)
        return torch.float16 in (self.compute, *(value.dtype for value in tensors if value is not None))

    @property
    def shape(self) -> torch.Size:
        """[B, T]."""
        return self.hidden.shape[:2]


def _is_dtensor(value: object) -> bool:
    return type(value).__name__ == "DTensor" and hasattr(value, "full_tensor")


def gathered(name: str, value: Tensor) -> Tensor:
    """``value`` as a plain tensor: a DTensor is gathered, and its gradient averaged over the ranks it is sharded on.

    That average is what FSDP2 does with gradients; ranks that hold copies of the same batch average equal gradients.
    A DTensor replicated over all its mesh is taken as it is, its gradient left to whoever replicated it.

    Raises:
        ValueError: sharded over another dimension than the first, or holding partial sums.
    """
    if not _is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    value = cast(DTensor, value)
    # By exact type: FSDP2 over tensor parallelism has a subclass of Shard, equal to Shard(0) in PyTorch 2.8, whose
    # gradient full_tensor does not scatter rightly there.
    kinds = [type(placement) for placement in value.placements]
    if any(kind not in (Replicate, Shard) for kind in kinds) or any(
        isinstance(placement, Shard) and placement.dim != 0 for placement in value.placements
    ):
        raise ValueError(
            f"{name}: expected a tensor, or a DTensor with placements Replicate() and Shard(0) (FSDP2) only, got "
            f"{tuple(value.placements)}; pass the gathered tensor"
        )
    if Shard not in kinds:
        return value.to_local()
    ranks = value.device_mesh.size()
    full: Tensor = value.full_tensor(grad_placements=[Partial()] * value.device_mesh.ndim)
    if full.requires_grad:
        # In place, for it is as large as the weight, and nobody else has seen it yet.
        full.register_hook(lambda gradient: None if gradient is None else gradient.div_(ranks))
    return full


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would run in: autocast's dtype, else that of both."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight: expected hidden's dtype {str(hidden.dtype).removeprefix('torch.')} (or torch.autocast), got "
            f"{found(weight)}"
        )
    return hidden.dtype


def check_head(hidden: object, weight: object, bias: object, logits_dtype: object) -> HeadInputs:
    """Check hidden states and head and settle dtypes; gathers a sharded weight.

    Raises:
        TypeError: not a tensor, not float16, bfloat16 or float32, dtypes that differ outside autocast, or a
            logits_dtype that is neither float32 nor the GEMMs' own.
        ValueError: a wrong shape or device, or a DTensor that cannot be gathered.
    """
    if _is_dtensor(hidden):
        raise TypeError("hidden: expected a plain tensor of this rank's rows, got a DTensor; pass hidden.to_local()")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        if not isinstance(value, Tensor) or value.dtype not in LOGIT_DTYPES:
            hint = "; pass its .weight" if isinstance(value, torch.nn.Module) else ""
            raise TypeError(f"{name}: expected a float16, bfloat16 or float32 tensor, got {found(value)}{hint}")
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape [B, T, H] or [N, H] with H > 0, got {found(hidden)}")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape [V, {width}] with V > 0 (as nn.Linear keeps it), got {found(weight)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight: expected a tensor on {hidden.device}, got {found(weight)}")
    compute = _compute_dtype(hidden, weight)
    if bias is not None:
        assert isinstance(bias, Tensor)
        check_tensor("bias", bias, [(weight.shape[0],)], "floating", hidden.device)
        if bias.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"bias: expected weight's dtype, got {found(bias)} beside {found(weight)}")
        bias = gathered("bias", bias)
    if logits_dtype is None:
        logits_dtype = compute
    elif logits_dtype not in (torch.float32, compute):
        own = "" if compute == torch.float32 else f" or {compute}"
        raise TypeError(f"logits_dtype: expected None, torch.float32{own}, got {logits_dtype!r}")
    assert isinstance(logits_dtype, torch.dtype)
    flat = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
    return HeadInputs(flat, gathered("weight", weight), bias, compute, logits_dtype)


def check_weight_grad(weight_grad: object, weight: Tensor) -> Tensor | None:
    """``weight_grad`` itself, if it can take dweight.

    Raises:
        TypeError: not a float32 tensor.
        ValueError: another shape or device than weight's, or a weight that needs no gradient.
    """
    if weight_grad is None:
        return None
    if not isinstance(weight_grad, Tensor) or weight_grad.dtype != torch.float32 or _is_dtensor(weight_grad):
        raise TypeError(f"weight_grad: expected a float32 tensor {list(weight.shape)}, got {found(weight_grad)}")
    check_tensor("weight_grad", weight_grad, [tuple(weight.shape)], "floating", weight.device)
    if _is_dtensor(weight):
        raise ValueError(
            "weight_grad: expected None for a DTensor weight, whose gradient has to be reduced, got a buffer"
        )
    if weight_grad.requires_grad:
        raise ValueError("weight_grad: expected a buffer that does not require grad itself")
    if not weight.requires_grad:
        raise ValueError("weight_grad: expected None for a weight that does not require grad, got a buffer")
    return weight_grad


def choose_rows(chosen: Tensor, active_count: object, *rest: Tensor) -> list[Rows]:
    """The rows where ``chosen`` (bool [B, T]) holds, then those of each of ``rest``; one synchronisation for all.

    Where ``active_count`` bounds the number of ``chosen``, finding those costs none.

    Raises:
        TypeError, ValueError: active_count not an int in [0, rows], or (a device-side assert where reading values
            would synchronise) below the number of rows chosen.
    """
    if active_count is None:
        selections = (chosen, *rest)
        counts = torch.stack([selection.sum() for selection in selections]).tolist()
        return [Rows.of(selection, n, exact=True) for selection, n in zip(selections, counts, strict=True)]
    if isinstance(active_count, (bool, Tensor)) or not isinstance(active_count, SupportsIndex):
        raise TypeError(f"active_count: expected an int or None, got {found(active_count)}")
    active_count = operator.index(active_count)
    if not 0 <= active_count <= chosen.numel():
        raise ValueError(f"active_count: expected between 0 and {chosen.numel()} rows, got {active_count}")
    number = chosen.sum()
    if values_readable(chosen):
        if int(number) > active_count:
            raise ValueError(f"active_count: expected at least the {int(number)} active rows, got {active_count}")
    else:
        torch._assert_async(number <= active_count, "active_count: expected at least the number of active rows")
    chosen_rows = [Rows.of(chosen, active_count, exact=False)]
    return chosen_rows + (choose_rows(rest[0], None, *rest[1:]) if rest else [])
