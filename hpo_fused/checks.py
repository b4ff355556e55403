"""Input checks: one sentence per refusal, naming the argument, the expectation and the value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_FLOATING = tuple(kind for kind in vars(torch).values() if isinstance(kind, torch.dtype) and kind.is_floating_point)
_DTYPES = {
    "integer": frozenset(INTEGER_DTYPES),
    "floating": frozenset(_FLOATING),
    "mask": frozenset((*_FLOATING, *INTEGER_DTYPES, torch.bool)),
    "number": frozenset((*_FLOATING, *INTEGER_DTYPES)),
}
_ARTICLE = {
    "integer": "an integer",
    "floating": "a floating",
    "mask": "a mask",
    "number": "an integer or floating",
}


def described(value: object) -> str:
    """A value in words: dtype, shape and device of a tensor, a module's type, type and (shortened) value of others."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 200 else f"{text[:200]}..."  # a list or an array may be a whole batch's


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, told without importing torch.distributed."""
    return type(value).__name__ == "DTensor" and hasattr(value, "full_tensor")


def same_device(first: torch.device, second: torch.device) -> bool:
    """Whether two devices are one; a device without an index is any of its type."""
    return first == second or (first.type == second.type and None in (first.index, second.index))


def check_tensor(
    name: str,
    value: object,
    shapes: Sequence[tuple[int, ...]],
    kind: str,
    device: torch.device,
) -> Tensor:
    """``value`` itself, if it is a tensor of one of ``shapes``, of dtype ``kind`` and on ``device``.

    Args:
        kind: "integer", "floating", "mask" (bool, integer or floating) or "number" (integer or floating).

    Raises:
        TypeError: not a tensor, or a dtype outside ``kind``.
        ValueError: another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {_ARTICLE[kind]} tensor of shape {_listed(shapes)}, got {described(value)}")
    if value.dtype not in _DTYPES[kind]:
        raise TypeError(f"{name}: expected {_ARTICLE[kind]} tensor of shape {_listed(shapes)}, got {described(value)}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {_listed(shapes)}, got {described(value)}")
    if not same_device(value.device, device):
        raise ValueError(f"{name}: expected a tensor on {device}, got {described(value)}")
    return value


def check_floating(name: str, value: object) -> Tensor:
    """``value`` itself, if it is a floating tensor; TypeError otherwise."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {described(value)}")
    return value


def check_logits(name: str, value: object, *, sharded: bool = False) -> Tensor:
    """``value`` itself, if it is [B, T, V] or [N, V] logits whose last dimension is contiguous and not empty.

    ``sharded``: they are a rank's columns, of which there may be none.

    Raises:
        TypeError: not a tensor, or not float16, bfloat16 or float32.
        ValueError: another number of dimensions, V = 0, or a strided last dimension.
    """
    if not isinstance(value, Tensor) or value.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: expected a float16, bfloat16 or float32 tensor, got {described(value)}")
    if value.dim() not in (2, 3) or (value.shape[-1] == 0 and not sharded):
        raise ValueError(f"{name}: expected shape [B, T, V] or [N, V] with V > 0, got {described(value)}")
    if value.stride(-1) != 1 and value.shape[-1] > 1 and value.numel() > 0:
        raise ValueError(
            f"{name}: expected a contiguous last dimension (stride 1; the others may be strided), got strides "
            f"{value.stride()} of {described(value)}"
        )
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a real number, NumPy's scalars included; bools, strings and tensors are none."""
    # int and float by name: while torch.compile traces, a symbolic float is one of them but no registered Real.
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def check_integer(name: str, value: object, expected: str = "an int") -> int:
    """``value`` as an int, if it is one or NumPy's; TypeError otherwise, also for a bool, a tensor or 2.0."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name}: expected {expected}, got {described(value)}")
    return value if isinstance(value, int) else int(value)


def plain_numbers(whole: Any) -> None:
    """Turns NumPy's numbers in a frozen dataclass into Python's, which print, serialise and compute as expected."""
    for field in dataclasses.fields(whole):
        value = getattr(whole, field.name)
        kind = int if isinstance(value, (int, Integral)) else float
        if is_number(value) and type(value) is not kind:
            object.__setattr__(whole, field.name, kind(value))


def check_number(
    name: str,
    value: object,
    expected: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = True,
) -> None:
    """Raise unless ``value`` is a real number in the interval; ``expected`` words the interval for the message."""
    if not is_number(value):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_positive(name: str, value: object, otherwise: str = "") -> float:
    """``value`` as a float, if it is a finite number above zero; TypeError or ValueError otherwise.

    ``otherwise``: what else the caller would have taken, for the message.
    """
    if not is_number(value):
        raise TypeError(f"{name}: expected a finite number > 0{otherwise}, got {described(value)}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
    return number


def check_factor(name: str, value: object, device: torch.device) -> tuple[float, Tensor | None]:
    """A finite number and None, or 1 and the floating 0-d tensor that ``value`` is instead.

    Raises:
        TypeError: neither a number nor a floating tensor.
        ValueError: not finite (of a tensor on the CPU), another shape or another device.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value, [()], "floating", device)
        if values_readable(value) and not math.isfinite(float(value)):
            raise ValueError(f"{name}: expected a finite number, got {value.item()}")
        return 1.0, value
    if not is_number(value):
        raise TypeError(f"{name}: expected a finite number or a 0-d tensor, got {described(value)}")
    number = float(value)
    if not -math.inf < number < math.inf:  # torch.compile cannot trace math.isfinite of a symbolic float
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number, None


def values_readable(value: Tensor) -> bool:
    """Whether looking at the values is free: on the CPU, and not while torch.compile traces."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_token_ids(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Which ids lie in [0, V), bool; refuses others at unmasked positions, computed or not.

    Raises:
        ValueError: on the CPU. Elsewhere a device-side assert, as PyTorch's own indexing does, without waiting for it;
            nothing is checked while torch.compile traces CPU tensors.
    """
    tokens = tokens.to(torch.int64)  # V may lie outside a narrower type
    inside = tokens == tokens.clamp(0, vocabulary - 1)
    valid = inside if mask is None else inside | (mask == 0)
    message = f"tokens: expected ids in [0, {vocabulary}) at unmasked positions"
    if values_readable(tokens):
        if not bool(valid.all()):
            raise ValueError(f"{message}, got {int(tokens[~valid][0])}")
    elif tokens.device.type != "cpu":
        torch._assert_async(valid.all(), message)
    return inside
