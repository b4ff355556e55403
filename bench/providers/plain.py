"""Plain PyTorch: the same function eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from hpo_fused.bench.cases import Case, Inputs
from hpo_fused.bench.plain import plain_policy_loss, plain_token_logprobs

from .base import Output, Provider, Unavailable

Function = Callable[..., tuple[Any, ...]]
_serial = count()


def fresh_copy(function: Function) -> Function:
    """The same function with a code object of its own.

    Every case is compiled anew, and dynamo counts compilations by code object: past a small limit it would fall back
    to eager. A copy starts from nought; torch.compiler.reset() would also throw away what other providers have
    compiled.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_serial)}")
    return FunctionType(code, function.__globals__)


@contextmanager
def compiler_missing() -> Iterator[None]:
    """Turns torch.compile's complaint about a missing or broken compiler into :class:`Unavailable`."""
    try:
        yield
    except Exception as error:
        # Inductor's own class for it is private, and wrapped on the way up.
        if any(name in repr(error) for name in ("InvalidCxxCompiler", "TritonMissing")):
            raise Unavailable("torch.compile found no working compiler on this machine") from error
        raise


class Eager(Provider):
    """The loss in plain PyTorch, differentiated by autograd."""

    name = "eager"
    summary = "plain PyTorch: float32 log_softmax, entropy, loss, autograd"

    def ready(self, function: Function) -> Function:
        """The function as this provider runs it."""
        return function

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        softcap = inputs.case.shape.softcap
        function = self.ready(plain_policy_loss)
        args = (logits, inputs.tokens, inputs.advantages, inputs.old_logprobs, inputs.mask, softcap)
        return Output(*function(inputs.objective, *args))

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        return Output(None, *self.ready(plain_token_logprobs)(logits, inputs.tokens, inputs.case.shape.softcap))


class Compiled(Eager):
    """The same under torch.compile, for exactly the case's shapes, as a tuned trainer would have it."""

    name = "compile"
    summary = "torch.compile(dynamic=False) of the eager function"
    slow_start = "torch.compile can take a minute"
    memory_factor = 2.5
    largest = 1 << 29  # each number of tokens is compiled anew

    def __init__(self) -> None:
        self.compiled: Function | None = None

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        self.compiled = None

    def ready(self, function: Function) -> Function:
        """Compiled once for each case, which needs one function only."""
        if self.compiled is None:
            self.compiled = torch.compile(fresh_copy(function), dynamic=False)
        return self.compiled

    def forward(self, inputs: Inputs, logits: Tensor) -> Output:
        with compiler_missing():
            return super().forward(inputs, logits)

    def token_logprobs(self, inputs: Inputs, logits: Tensor) -> Output:
        with compiler_missing():
            return super().token_logprobs(inputs, logits)
