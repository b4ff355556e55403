"""Recording kernel launches of a call without a GPU. Needs Triton, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNMENT = 16
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.bool: "*i1",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
# Constants of kernels that sweep over a row: threads of a program, and loads that each has outstanding.
SWEEP_CONSTANTS = ({"LANES", "THREADS"}, {"UNROLL", "LOADS"})


@dataclass
class Launch:
    """A kernel and its arguments as a launch specialises them.

    Attributes:
        kernel: the JIT function.
        signature: type of each argument, as ``ASTSource`` takes it.
        constants: values of constant arguments by their path.
        attributes: divisibility of the others by their path.
        options: of the compilation, such as num_warps.
        leaves: arguments with tuples flattened, constants included.
        vector: elements of the longest tensor in 16 bytes.
    """

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    leaves: int
    vector: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def sweeps(self) -> bool:
        """Whether the kernel has main loops over a row."""
        return all(names & {*self.kernel.arg_names} for names in SWEEP_CONSTANTS)

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        parts = (self.name, self.signature, self.constants, self.attributes, sorted(self.options.items()))
        return repr(parts)


class _Specialisation:
    """Types, constants and attributes of arguments, by the rules of Triton's own launcher."""

    def __init__(self) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        self.leaves = 0

    def type_of(self, value: Any, path: tuple[int, ...], specialise: bool) -> Any:
        """The type of ``value``; ``specialise``: by its divisibility and whether it is 1, which tuples always are."""
        if isinstance(value, tuple):
            items = [self.type_of(item, (*path, index), True) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        self.leaves += 1
        if value is None or (specialise and type(value) is int and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            self._divisible(path, specialise and value.data_ptr() % ALIGNMENT == 0)
            return POINTERS[value.dtype]
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, int):
            self._divisible(path, specialise and value % ALIGNMENT == 0)
            return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if isinstance(value, float):
            return "fp32"
        raise TypeError(f"argument {path} of a kernel: expected a tensor, number, None or tuple, got {value!r}")

    def _divisible(self, path: tuple[int, ...], holds: bool) -> None:
        if holds:
            self.attributes[path] = [["tt.divisibility", ALIGNMENT]]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def specialised(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The launch of ``kernel`` with these arguments, options among the keywords."""
    names = kernel.arg_names
    options = {name: value for name, value in kwargs.items() if name not in names}
    bound = inspect.signature(kernel.fn).bind(*args, **{name: kwargs[name] for name in kwargs if name in names})
    bound.apply_defaults()
    rules, signature = _Specialisation(), {}
    for index, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], rules.constants[(index,)] = "constexpr", value
            rules.leaves += 1
        else:
            signature[parameter.name] = rules.type_of(value, (index,), not parameter.do_not_specialize)
    longest = max(_tensors(tuple(bound.arguments.values())), key=lambda tensor: tensor.numel())
    vector = ALIGNMENT // longest.element_size()
    return Launch(kernel, signature, rules.constants, rules.attributes, options, rules.leaves, vector)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Every launch in this context is appended to the list, and none happens: outputs stay as they were allocated."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(specialised(self, args, kwargs))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original
