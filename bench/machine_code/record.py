"""Recording kernel launches of a call without a GPU. Needs Triton, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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


class Launch:
    """A kernel and its arguments, options among the keywords, specialised by the rules of Triton's own launcher.

    Attributes:
        kernel: the JIT function.
        signature: type of each argument, as ``ASTSource`` takes it.
        constants, attributes: values of constant arguments, and divisibility of the others, by their path.
        options: of the compilation, such as num_warps.
        leaves: arguments with tuples flattened, constants included.
        vector: elements of the longest tensor in 16 bytes.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kernel, self.leaves = kernel, 0
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        self.signature: dict[str, Any] = {}
        self.options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        given = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        bound = inspect.signature(kernel.fn).bind(*args, **given)
        bound.apply_defaults()
        for index, parameter in enumerate(kernel.params):
            value = bound.arguments[parameter.name]
            if parameter.is_constexpr:
                kind = self._constant(value, (index,))
            else:
                kind = self._type(value, (index,), not parameter.do_not_specialize)
            self.signature[parameter.name] = kind
        longest = max(_tensors(tuple(bound.arguments.values())), key=lambda tensor: tensor.numel())
        self.vector = ALIGNMENT // longest.element_size()

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
        return repr((self.name, self.signature, self.constants, self.attributes, sorted(self.options.items())))

    def _constant(self, value: Any, path: tuple[int, ...]) -> str:
        self.leaves += 1
        self.constants[path] = value
        return "constexpr"

    def _type(self, value: Any, path: tuple[int, ...], specialise: bool) -> Any:
        """The type of ``value``; ``specialise``: by its divisibility and whether it is 1, which tuples always are."""
        if isinstance(value, tuple):
            items = [self._type(item, (*path, index), True) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if value is None or (specialise and type(value) is int and value == 1):
            return self._constant(value, path)
        self.leaves += 1
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if specialise and type(number) is int and number % ALIGNMENT == 0:
            self.attributes[path] = [["tt.divisibility", ALIGNMENT]]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, int) and not isinstance(value, bool):
            return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        return {bool: "u1", float: "fp32"}[type(value)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Every launch in this context is appended to the list, and none happens: outputs stay as they were allocated."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original
