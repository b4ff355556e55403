"""Plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import torch

from hpo_fused.bench import plain
from hpo_fused.bench.cases import Case
from hpo_fused.bench.inputs import Inputs

from .base import Output, Provider, Unavailable

Function = Callable[..., Any]
_serial = count()


class Eager(Provider):
    """The functions of ``bench/plain.py``, differentiated by autograd."""

    name = "eager"
    summary = "plain PyTorch: (F.linear,) float32 log_softmax, entropy, loss, autograd"

    def call(self, function: Function, *arguments: Any) -> Any:
        """Call ``function`` as this provider runs it."""
        return function(*arguments)

    def policy_loss(self, inputs: Inputs) -> Output:
        arguments = (inputs.objective, *inputs.leaves, inputs.tokens, *inputs.batch, inputs.softcap)
        return Output(*self.call(plain.policy_loss, *arguments))

    def linear_policy_loss(self, inputs: Inputs) -> Output:
        arguments = (inputs.objective, *inputs.leaves, inputs.tokens, *inputs.batch, inputs.softcap)
        return Output(*self.call(plain.linear_policy_loss, *arguments))

    def logprob_policy_loss(self, inputs: Inputs) -> Output:
        loss = self.call(plain.logprob_policy_loss, inputs.objective, *inputs.leaves, *inputs.batch)
        return Output(loss, None, None)

    def token_logprobs(self, inputs: Inputs) -> Output:
        return Output(None, *self.call(plain.token_logprobs, *inputs.leaves, inputs.tokens, inputs.softcap))

    def linear_token_logprobs(self, inputs: Inputs) -> Output:
        return Output(None, *self.call(plain.linear_token_logprobs, *inputs.leaves, inputs.tokens, inputs.softcap))


def fresh_copy(function: Function) -> Function:
    """The same function with a code object of its own.

    Every case is compiled anew, and dynamo counts compilations by code object: past a small limit it would fall back
    to eager. torch.compiler.reset() would also throw away compilations of other providers.
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


class Compiled(Eager):
    """The functions of ``bench/plain.py`` under torch.compile, for exactly the case's shapes, as tuned trainers do."""

    name = "compile"
    summary = "torch.compile(dynamic=False) of the eager function"
    slow_start = "torch.compile can take a minute"
    copies = 2.5

    def __init__(self) -> None:
        self.compiled: Function | None = None

    def prepare(self, case: Case, device: torch.device) -> None:
        super().prepare(case, device)
        self.compiled = None

    def call(self, function: Function, *arguments: Any) -> Any:
        """Compiled once for each case, which needs one function only."""
        with compiler_missing():
            if self.compiled is None:
                self.compiled = torch.compile(fresh_copy(function), dynamic=False)
            return self.compiled(*arguments)
