"""What the linear path's calls are watched by: GEMMs counted, allocations noted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf

BATCH, STEPS, WIDTH, VOCABULARY = 6, 5, 16, 101
ACTIVE, UNMASKED = 12, 19

# What calls launch with the Triton backend in one chunk, by objective, and ``linear_token_logprobs`` under no_grad.
_TERMS, _ROWS = ["response_statistics_kernel", "token_terms_kernel"], ["index_select", "mm"]
_GRADIENTS = ["mm", "mm", "index_copy_"]  # dhidden, dweight, and the former's rows
LAUNCHES = {
    "grpo": [
        *_TERMS, "new_zeros", "eq", "masked_fill_", "nonzero", *_ROWS, "zeros", "index_select", "index_select",
        "policy_loss_kernel", "index_copy_", *_GRADIENTS, "sum", "ones_like", *["scale_gradient_kernel"] * 2,
    ],
    "gspo": [
        *_TERMS, "nonzero", *_ROWS, "index_select", "token_statistics_kernel", "new_full", "index_copy_",
        "logprob_loss_kernel", "sum", "ones_like", "mul", "index_select", "zeros", *_ROWS, "token_gradient_kernel",
        *_GRADIENTS,
    ],
    "logprobs": [
        "clamp", "eq", "eq", "bitwise_or", *["scalar_tensor", "where"] * 2, "_to_copy", "nonzero", *_ROWS,
        "index_select", "token_statistics_kernel", "new_full", "index_copy_", "clone", "clone",
    ],
}  # fmt: skip

aten = torch.ops.aten


class Gemms(TorchDispatchMode):
    """Adds up the multiplications of every matrix product, and notes operands that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0
        self.finite = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.mm, aten.addmm):
            left, right = [value for value in args if isinstance(value, Tensor)][-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
            self.finite &= bool(left.isfinite().all()) and bool(right.isfinite().all())
        elif func.overloadpacket in (aten.bmm, aten.baddbmm, aten.linear, aten.matmul, aten._scaled_mm):
            raise AssertionError(f"a product that is not counted: {func}")
        return result

    @property
    def rows(self) -> float:
        """In rows of one product with the head."""
        return self.multiplications / (WIDTH * VOCABULARY)


class Allocations(TorchDispatchMode):
    """Shapes (and dtypes) of tensors that operations made, as opposed to views of what there was."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.names: list[str] = []
        self.largest = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        known = {
            value.untyped_storage().data_ptr()
            for value in (*args, *(kwargs or {}).values())
            if isinstance(value, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self.shapes.append(tuple(value.shape))
                self.dtypes.append(value.dtype)
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result

    def rows(self, width: int, dtype: torch.dtype) -> int:
        """Of the largest new tensor of ``dtype`` whose last dimension is ``width``."""
        return max(
            (
                math.prod(shape[:-1])
                for shape, kind in zip(self.shapes, self.dtypes, strict=True)
                if len(shape) > 1 and shape[-1] == width and kind == dtype
            ),
            default=0,
        )


def arguments(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two responses of six inactive, a mask; hidden is a strided view."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(BATCH, STEPS + 1, WIDTH, generator=generator)
    tokens = torch.randint(VOCABULARY, (BATCH, STEPS), generator=generator)
    mask = torch.arange(STEPS) < torch.tensor([5, 2, 4, 3, 5, 0])[:, None]
    values = {
        "base": hidden.to(dtype),
        "weight": (torch.randn(VOCABULARY, WIDTH, generator=generator) / 2).to(dtype),
        "bias": torch.randn(VOCABULARY, generator=generator).to(dtype),
        "tokens": torch.where(mask, tokens, -100),
        "advantages": torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 2.0]),
        "old_logprobs": torch.full((BATCH, STEPS), -4.0),
        "mask": mask,
    }
    assert int(mask.sum()) == UNMASKED
    return {name: value.to(device) for name, value in values.items()}


def call(values: dict[str, Tensor], bias: bool = True, **options: Any) -> hf.PolicyLossOutput:
    return hf.linear_policy_loss(
        values["base"][:, :-1],
        values["weight"],
        values["tokens"],
        values["advantages"],
        bias=values["bias"] if bias else None,
        old_logprobs=values["old_logprobs"],
        mask=values["mask"],
        **options,
    )


def requiring(values: dict[str, Tensor], *frozen: str) -> dict[str, Tensor]:
    for name in ("base", "weight", "bias"):
        values[name].requires_grad_(name not in frozen)
    return values


def warm(values: dict[str, Tensor], **options: Any) -> None:
    """What a device can do is found out by trying, once; those products are not counted."""
    call(values, **options).loss.backward()
    for value in values.values():
        value.grad = None
